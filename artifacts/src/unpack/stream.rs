//! Decompression with a leash: the stream of an archive's bytes, counted on both sides.
//!
//! It must not know what the bytes mean.

use std::io::{self, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Limits, Refusal};

/// Bytes read from the compressed side at once. The ratio is judged with the whole buffer counted as used, so it is small.
const INPUT_BUFFER: usize = 64 << 10;

/// The largest zstd window that is accepted, as a power of two: 128 MiB, what `zstd` decodes without `--long`
/// (zstd.h, `ZSTD_WINDOWLOG_LIMIT_DEFAULT`). It bounds the decoder's memory.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Not at all.
    Tar,
    /// gzip (RFC 1952), any number of members.
    TarGzip,
    /// Zstandard (RFC 8878), any number of frames.
    TarZstd,
}

/// Reads the decompressed stream and stops at the limits.
pub(super) struct Leashed<'a> {
    inner: Box<dyn Read + Send + 'a>,
    compressed: Arc<AtomicU64>,
    out: u64,
    limits: Limits,
}

impl<'a> Leashed<'a> {
    pub(super) fn new(
        input: impl Read + Send + 'a,
        format: Format,
        limits: &Limits,
    ) -> io::Result<Self> {
        let compressed = Arc::new(AtomicU64::new(0));
        let counted = Counted {
            inner: input,
            count: Arc::clone(&compressed),
        };
        let buffered = BufReader::with_capacity(INPUT_BUFFER, counted);
        let inner: Box<dyn Read + Send + 'a> = match format {
            Format::Tar => Box::new(buffered),
            Format::TarGzip => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
            Format::TarZstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Box::new(decoder)
            }
        };
        Ok(Leashed {
            inner,
            compressed,
            out: 0,
            limits: limits.clone(),
        })
    }

    fn check(&self) -> Result<(), Refusal> {
        let limits = &self.limits;
        if self.out > limits.unpacked_bytes {
            return Err(Refusal::TooLarge {
                limit: limits.unpacked_bytes,
            });
        }
        let allowed = self
            .compressed
            .load(Ordering::Relaxed)
            .saturating_mul(limits.ratio);
        if self.out > limits.ratio_free_bytes && self.out > allowed {
            return Err(Refusal::Ratio {
                limit: limits.ratio,
            });
        }
        Ok(())
    }
}

impl Read for Leashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.out += got as u64;
        self.check().map_err(io::Error::other)?;
        Ok(got)
    }
}

/// The refusal that a [`Leashed`] put into an I/O error, if it is one.
pub(super) fn refusal(error: &io::Error) -> Option<&Refusal> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

struct Counted<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.count.fetch_add(got as u64, Ordering::Relaxed);
        Ok(got)
    }
}
