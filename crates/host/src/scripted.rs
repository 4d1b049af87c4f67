//! A source that fails as told: for tests of what reads from sources.

use crate::source::{Gone, Source, check_fit};
use evidence::{GuestRange, PAGE, PageState};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a page of a [`ScriptedSource`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// It is a hole.
    Hole,
    /// It cannot be read, as with EIO, EFAULT or a short read: `Unreadable`.
    Fail,
    /// Reading it shows the process gone, now and ever after.
    Vanish,
    /// Every read of it gives its bytes plus the number of reads before: a page that changes.
    Change,
}

/// Memory made of bytes, with a script of what goes wrong. For tests only: real memory is
/// [`crate::GuestMemory`].
#[derive(Debug)]
pub struct ScriptedSource {
    range: GuestRange,
    bytes: Vec<u8>,
    /// By page number.
    acts: BTreeMap<u64, Act>,
    /// Reads so far of each page that changes.
    reads: Mutex<BTreeMap<u64, u8>>,
    /// Calls of `read` left before it vanishes.
    calls: AtomicU64,
}

impl ScriptedSource {
    /// A source of `bytes` at guest-physical address `start`; `None` when `bytes` is empty or
    /// reaches behind the address space.
    pub fn new(start: u64, bytes: Vec<u8>) -> Option<Self> {
        let range = GuestRange::new(start, bytes.len() as u64)?;
        let (acts, reads) = (BTreeMap::new(), Mutex::default());
        Some(Self { range, bytes, acts, reads, calls: AtomicU64::new(u64::MAX) })
    }

    /// Lets the page of `gpa` do `act`.
    #[must_use]
    pub fn act(mut self, gpa: u64, act: Act) -> Self {
        self.acts.insert(gpa / PAGE, act);
        self
    }

    /// Vanishes after `calls` calls of `read`.
    #[must_use]
    pub fn vanish_after(self, calls: u64) -> Self {
        self.calls.store(calls, Ordering::SeqCst);
        self
    }

    fn gone(&self, at: GuestRange) -> Gone {
        self.calls.store(0, Ordering::SeqCst);
        Gone::Exited { pid: 0, at }
    }

    fn fill_changed(&self, page: u64, buf: &mut [u8]) {
        let mut reads = self.reads.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = reads.entry(page).or_default();
        buf.iter_mut().for_each(|b| *b = b.wrapping_add(*before));
        *before = before.wrapping_add(1);
    }
}

impl Source for ScriptedSource {
    fn read(&self, at: GuestRange, buf: &mut [u8], states: &mut [PageState]) -> Result<(), Gone> {
        check_fit(at, buf, states)?;
        let take = |left: u64| left.checked_sub(u64::from(left != u64::MAX));
        self.calls
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
            .map_err(|_| Gone::Exited { pid: 0, at })?;
        let from = at.start().checked_sub(self.range.start()).ok_or(Gone::NoPlace { at })?;
        let bytes = usize::try_from(from).ok().and_then(|f| self.bytes.get(f..)?.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(Gone::NoPlace { at })?);
        let mut rest = buf;
        for (cell, state) in evidence::state::pages(at).zip(states) {
            let len = usize::try_from(cell.len()).unwrap_or(rest.len());
            let (page, behind) = rest.split_at_mut(len);
            rest = behind;
            let number = cell.start() / PAGE;
            *state = match self.acts.get(&number) {
                None => PageState::Data,
                Some(Act::Change) => {
                    self.fill_changed(number, page);
                    PageState::Data
                }
                Some(Act::Hole) => PageState::Hole,
                Some(Act::Fail) => PageState::Unreadable,
                Some(Act::Vanish) => return Err(self.gone(at)),
            };
            if *state != PageState::Data {
                page.fill(0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests {
    use super::*;

    fn read(
        source: &ScriptedSource,
        start: u64,
        len: u64,
    ) -> Result<(Vec<u8>, Vec<PageState>), Gone> {
        let at = GuestRange::new(start, len).unwrap();
        let mut buf = vec![0xee; at.len() as usize];
        let mut states = vec![PageState::Excluded; evidence::state::page_count(at) as usize];
        source.read(at, &mut buf, &mut states)?;
        Ok((buf, states))
    }

    #[test]
    fn it_does_as_told() {
        use PageState::*;
        let source = ScriptedSource::new(0x1000, vec![7; 0x4000])
            .unwrap()
            .act(0x2000, Act::Hole)
            .act(0x3fff, Act::Fail)
            .act(0x4000, Act::Change);
        let (buf, states) = read(&source, 0x1800, 0x3000).unwrap();
        assert_eq!(states, [Data, Hole, Unreadable, Data]);
        assert_eq!((buf[0], buf[0x800], buf[0x1800], buf[0x2800]), (7, 0, 0, 7));
        assert_eq!(read(&source, 0x4000, 1).unwrap().0, [8]);
        assert!(matches!(read(&source, 0x4000, 0x1001), Err(Gone::NoPlace { .. })));
        assert!(matches!(read(&source, 0xfff, 1), Err(Gone::NoPlace { .. })));
    }

    #[test]
    fn what_vanished_stays_away() {
        let source = ScriptedSource::new(0, vec![7; 0x3000]).unwrap().act(0x1000, Act::Vanish);
        assert!(read(&source, 0, 0x1000).is_ok());
        assert!(matches!(read(&source, 0, 0x2000), Err(Gone::Exited { .. })));
        assert!(matches!(read(&source, 0, 0x1000), Err(Gone::Exited { .. })));
        let source = ScriptedSource::new(0, vec![7; 0x1000]).unwrap().vanish_after(2);
        let results: Vec<_> = (0..4).map(|_| read(&source, 0, 0x1000).is_ok()).collect();
        assert_eq!(results, [true, true, false, false]);
    }
}
