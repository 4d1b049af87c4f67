//! Where captured bytes first rest, by position.

use crate::HostError;
use evidence::{GuestRange, Segments};
use std::io;

/// A place that captured bytes rest in, by any number of workers at a time.
///
/// Positions come from the [`Segments`] that the store was made with.
pub trait Store: Sync {
    /// Puts `bytes`, which are `at.len()` many, at `at`.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when `at` is in no segment or `bytes` do not fit it; full
    /// stores and broken disks.
    fn put(&self, at: GuestRange, bytes: &[u8]) -> io::Result<()>;

    /// Gets what was put at `at` into `buf`, which is `at.len()` bytes. What was never put is
    /// zeros.
    ///
    /// # Errors
    /// As [`Store::put`].
    fn get(&self, at: GuestRange, buf: &mut [u8]) -> io::Result<()>;

    /// Lends what the store holds at `at` to `work`, to be read and changed in place: what was
    /// never put is zeros. Says whether it was lent; what was not is for [`Store::put`] and
    /// [`Store::get`]. Nobody else can put or get it meanwhile: `work` must not use the store.
    ///
    /// # Errors
    /// As [`Store::put`]; `work` was not called then.
    fn lend(&self, at: GuestRange, work: &mut dyn FnMut(&mut [u8])) -> io::Result<bool>;
}

/// Length of the buffer that holds `at`.
pub(crate) fn length_of(at: GuestRange) -> io::Result<usize> {
    usize::try_from(at.len()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Offset of `at` in a store of `segments`, for a buffer of `len` bytes.
pub(crate) fn offset_of(segments: &Segments, at: GuestRange, len: usize) -> io::Result<u64> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    if at.len() != len as u64 {
        return Err(bad(format!("a buffer of {len} bytes for {at}")));
    }
    segments.offset_of(at).ok_or_else(|| bad(format!("{at} lies in no segment of the store")))
}

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The limit is smaller than what must be kept.
    #[error(
        "the image needs {needed} bytes of memory, but the store may take only {limit} ({bound})"
    )]
    OverLimit {
        /// Bytes needed.
        needed: u64,
        /// Bytes allowed.
        limit: u64,
        /// What sets the limit.
        bound: String,
    },
    /// Memory became scarce while the store was faulted in; all of it was given back.
    #[error("gave the RAM store up after {done} of {needed} bytes: {why}")]
    Pressure {
        /// Bytes faulted in.
        done: u64,
        /// Bytes needed.
        needed: u64,
        /// What showed it.
        why: String,
    },
    /// The caller cancelled; all memory was given back.
    #[error("cancelled after {done} of {needed} bytes")]
    Cancelled {
        /// Bytes faulted in.
        done: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The disk has not the space.
    #[error("the store needs {needed} bytes, but its file system has only {free} free")]
    NoSpace {
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The map does not fit a store.
    #[error("the map does not fit a store: {0}")]
    Layout(String),
    /// The kernel refused something.
    #[error("{what} failed")]
    Os {
        /// The call or step.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The host could not be looked at.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl StoreError {
    /// A function that makes the error of step `what` from its cause.
    pub(crate) fn os<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| StoreError::Os { what, source: source.into() }
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
pub(crate) mod tests {
    use super::*;
    use evidence::Segment;

    /// Segments with odd ends, a gap in the guest, and offsets that do not ascend.
    pub(crate) fn segments() -> Segments {
        let at =
            |start, len, offset| Segment { range: GuestRange::new(start, len).unwrap(), offset };
        Segments::new(vec![
            at(0, 0xa_0000, 0x20_0000),
            at(0xc_0000, 0x24_0123, 0x30_1000),
            at(0x1_0000_0000, 0x10_0000, 0),
        ])
        .unwrap()
    }

    fn pattern(at: GuestRange, salt: u64) -> Vec<u8> {
        (at.start()..at.end()).map(|a| (a.wrapping_mul(31) ^ a >> 9 ^ salt) as u8).collect()
    }

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(start, len).unwrap()
    }

    fn get(store: &impl Store, at: GuestRange) -> Vec<u8> {
        let mut buf = vec![0xee; at.len() as usize];
        store.get(at, &mut buf).unwrap();
        buf
    }

    /// What every store must do; `store` is new and made with [`segments`].
    pub(crate) fn suite(store: &impl Store) {
        never_put_is_zero(store);
        lending_is_putting(store);
        ranges_of_all_kinds(store);
        workers_beside_each_other(store);
        misuse_is_refused(store);
    }

    fn never_put_is_zero(store: &impl Store) {
        assert!(get(store, range(0x10_0001, 0x5432)).iter().all(|b| *b == 0));
    }

    /// Changes what is at `at` to `bytes`, by whatever way the store has; gives what was there.
    fn replace(store: &impl Store, at: GuestRange, bytes: &[u8]) -> Vec<u8> {
        let mut old = vec![0xee; bytes.len()];
        let mut work = |lent: &mut [u8]| {
            old.copy_from_slice(lent);
            lent.copy_from_slice(bytes);
        };
        if !store.lend(at, &mut work).unwrap() {
            assert!(old.iter().all(|b| *b == 0xee), "used, and said not to be lent");
            store.get(at, &mut old).unwrap();
            store.put(at, bytes).unwrap();
        }
        old
    }

    fn lending_is_putting(store: &impl Store) {
        // In a cell of the RAM store, over two, with odd ends, over a whole segment.
        let pieces = [
            range(0x20_1234, 0x1000),
            range(0xf_fff0, 0x20),
            range(0, 0xa_0000),
            range(0x30_0122, 1),
        ];
        for at in pieces {
            let old = replace(store, at, &pattern(at, 1));
            assert!(old.iter().all(|b| *b == 0), "{at}");
            assert_eq!(replace(store, at, &pattern(at, 2)), pattern(at, 1), "{at}");
            assert_eq!(get(store, at), pattern(at, 2), "{at}");
        }
        for beside in [range(0x20_0000, 0x1234), range(0x20_2234, 0x100), range(0xf_ff00, 0xf0)] {
            assert!(get(store, beside).iter().all(|b| *b == 0), "{beside}");
        }
        // Back to nothing, for what comes next.
        pieces.iter().for_each(|at| store.put(*at, &vec![0; at.len() as usize]).unwrap());
    }

    fn ranges_of_all_kinds(store: &impl Store) {
        let all = [
            range(0, 0xa_0000),
            range(0xc_0000, 0x4_0000),
            range(0x10_0000, 0x10_0000),
            range(0x20_0000, 0x10_0000),
            range(0x30_0000, 0x123),
            range(0x1_0000_0000, 0x10_0000),
        ];
        for at in all {
            store.put(at, &pattern(at, 0)).unwrap();
        }
        for at in all {
            assert_eq!(get(store, at), pattern(at, 0), "{at}");
        }
        // Over what is there, aligned to nothing, across cells of the store.
        let odd = range(0x1f_f00d, 0x1_2345);
        store.put(odd, &pattern(odd, 9)).unwrap();
        assert_eq!(get(store, odd), pattern(odd, 9));
        for beside in [range(0x1f_f000, 0xd), range(0x21_1352, 0x1000), range(0x30_0000, 0x123)] {
            assert_eq!(get(store, beside), pattern(beside, 0), "{beside}");
        }
        // Without the alignment that direct I/O wants of the buffer.
        let at = range(0x10_0000, 0x1000);
        let mut odd_buffer = vec![0; 0x1001];
        odd_buffer[1..].copy_from_slice(&pattern(at, 3));
        store.put(at, &odd_buffer[1..]).unwrap();
        store.get(at, &mut odd_buffer[..0x1000]).unwrap();
        assert_eq!(odd_buffer[..0x1000], pattern(at, 3));
    }

    fn workers_beside_each_other(store: &impl Store) {
        // Page-sized pieces of four workers interleave.
        std::thread::scope(|scope| {
            for worker in 0..4 {
                scope.spawn(move || {
                    for page in (worker..256).step_by(4) {
                        let at = range(0x10_0000 + page * 0x1000, 0x1000);
                        store.put(at, &pattern(at, 4)).unwrap();
                        assert_eq!(replace(store, at, &pattern(at, 5)), pattern(at, 4));
                        assert_eq!(get(store, at), pattern(at, 5));
                    }
                });
            }
        });
        let at = range(0x10_0000, 0x10_0000);
        assert_eq!(get(store, at), pattern(at, 5));
    }

    fn misuse_is_refused(store: &impl Store) {
        let refused = |result: io::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        };
        refused(store.put(range(0, 0x10), &[0; 0x11]));
        refused(store.get(range(0, 0x10), &mut [0; 0xf]));
        refused(store.put(range(0xa_0000, 1), &[0]));
        refused(store.put(range(0x9_ffff, 2), &[0; 2]));
        refused(store.get(range(0x30_0123, 1), &mut [0]));
        for at in [range(0xa_0000, 1), range(0x9_ffff, 2), range(0x30_0123, 1)] {
            refused(store.lend(at, &mut |_| panic!("lent {at}")).map(|_| ()));
        }
    }
}
