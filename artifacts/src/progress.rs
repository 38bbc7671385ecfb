//! What long work tells about itself; how it is shown is the caller's business.

/// One thing that is transferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The file's path, or the layer's digest where it has none.
    pub name: String,
    /// Bytes to transfer.
    pub bytes: u64,
}

/// Told by several workers at once; must not block.
pub trait Progress: Send + Sync {
    /// What will be transferred, once, before anything else. Items are known by their index from here on.
    fn begin(&self, items: &[Item]);
    /// So many more bytes of an item have passed.
    fn advance(&self, item: usize, bytes: u64);
    /// The item starts over: what was counted for it does not count.
    fn restart(&self, item: usize);
    /// The item is verified and in place.
    fn done(&self, item: usize);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _items: &[Item]) {}
    fn advance(&self, _item: usize, _bytes: u64) {}
    fn restart(&self, _item: usize) {}
    fn done(&self, _item: usize) {}
}
