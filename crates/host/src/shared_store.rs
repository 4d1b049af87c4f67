//! Another process's RAM store, for reading: its file came as a descriptor.

use crate::store::offset_of;
use evidence::{GuestRange, Segments};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// A store that can be read and nothing else.
#[derive(Debug)]
pub struct SharedStore {
    segments: Segments,
    file: File,
}

impl SharedStore {
    /// The store in `fd`, which [`crate::RamStore::share`] gave, with the segments it was made with.
    pub fn new(fd: OwnedFd, segments: Segments) -> Self {
        Self { segments, file: File::from(fd) }
    }

    /// As [`crate::Store::get`]. Read by `pread`: what was never put stays without memory.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when `at` is in no segment or `buf` does not fit it.
    pub fn get(&self, at: GuestRange, buf: &mut [u8]) -> io::Result<()> {
        let offset = offset_of(&self.segments, at, buf.len())?;
        self.file.read_exact_at(buf, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram_store::{Bound, Limit};
    use crate::store::tests::segments;
    use crate::{RamStore, Store};

    #[test]
    fn what_one_process_puts_another_gets() {
        let limit = Limit { bytes: 64 << 20, bound: Bound::MaxRam };
        let store = RamStore::reserve(segments(), &[], &limit, |_, _| (), || false).unwrap();
        let at = GuestRange::new(0x10_0800, 0x1000).unwrap();
        store.put(at, &[7; 0x1000]).unwrap();
        let shared = SharedStore::new(store.share().unwrap(), segments());
        let mut buf = vec![1; 0x2000];
        shared.get(GuestRange::new(0x10_0000, 0x2000).unwrap(), &mut buf).unwrap();
        assert!(buf[..0x800].iter().chain(&buf[0x1800..]).all(|b| *b == 0));
        assert!(buf[0x800..0x1800].iter().all(|b| *b == 7));
        assert!(shared.get(at, &mut buf).is_err());
    }
}
