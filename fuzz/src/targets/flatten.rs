//! Layers of images by strangers: no panic, the same twice, and what is left is a tar that can be judged.

use std::convert::Infallible;
use std::io::{self, Read};

use km_artifacts::Limits;
use km_artifacts::unpack::{Format, Layers, NewFile, Output, flatten, normalise, unpack};

struct Halves<'a>([&'a [u8]; 2]);

impl Layers for Halves<'_> {
    fn count(&self) -> usize {
        2
    }

    fn open(&self, layer: usize) -> io::Result<(Box<dyn Read + Send + '_>, Format)> {
        Ok((Box::new(self.0[layer]), Format::Tar))
    }
}

struct Nowhere;

impl Output for Nowhere {
    type Open = ();
    type File = ();
    type Error = Infallible;

    fn begin(&mut self, _: &NewFile) -> Result<(), Infallible> {
        Ok(())
    }

    fn write(&mut self, (): &mut (), _bytes: &[u8]) -> Result<(), Infallible> {
        Ok(())
    }

    fn hole(&mut self, (): &mut (), _bytes: u64) -> Result<(), Infallible> {
        Ok(())
    }

    fn end(&mut self, (): ()) -> Result<(), Infallible> {
        Ok(())
    }
}

pub(crate) fn run(bytes: &[u8]) {
    // Whole blocks: a tar that begins in the middle of one is none.
    let middle = bytes.len() / 1024 * 512;
    let layers = Halves([&bytes[..middle], &bytes[middle..]]);
    let limits = Limits {
        entries: 1000,
        unpacked_bytes: 16 << 20,
        ..Limits::default()
    };
    let Ok(flat) = flatten(&layers, "k", &limits) else {
        return;
    };
    let mut tar = Vec::new();
    flat.write(&layers, &limits, &mut tar)
        .expect("it was read before");
    let mut again = Vec::new();
    flat.write(&layers, &limits, &mut again)
        .expect("it was read before");
    assert!(tar == again);
    let Ok(unpacked) = unpack(&tar[..], Format::Tar, &limits, &mut Nowhere, &mut |_| {}) else {
        return;
    };
    for (path, ()) in &unpacked.files {
        assert_eq!(normalise(path.as_bytes()).as_ref(), Ok(path));
    }
}
