//! Where guest memory is read from.

use evidence::{GuestRange, PageState};
use rustix::io::Errno;
use std::fmt;

/// A place that guest memory is read from, by any number of workers at a time.
///
/// Two channels of failure: a page that cannot be read is a state, and the source goes on; a
/// source that is gone is [`Gone`], and nothing more can be read from it.
pub trait Source: Sync {
    /// Reads `at` into `buf` and says of each page what it is.
    ///
    /// `buf` is `at.len()` bytes, `states` one for each of the 4 KiB cells that `at` touches
    /// ([`evidence::state::page_count`]). Sets every byte and every state: [`PageState::Data`]
    /// for bytes read (they may all be zero: looked at elsewhere), [`PageState::Hole`] and
    /// [`PageState::Unreadable`] with zeros.
    ///
    /// # Errors
    /// [`Gone`]; `buf` and `states` then hold nothing of use.
    fn read(&self, at: GuestRange, buf: &mut [u8], states: &mut [PageState]) -> Result<(), Gone>;

    /// The same, but the bytes of holes may be left as they are: for a `buf` that holds zeros
    /// there, or whose holes nobody looks at.
    ///
    /// # Errors
    /// As [`Source::read`].
    fn read_but_holes(
        &self,
        at: GuestRange,
        buf: &mut [u8],
        states: &mut [PageState],
    ) -> Result<(), Gone> {
        self.read(at, buf, states)
    }
}

/// Nothing more can be read from the source.
#[derive(Debug, thiserror::Error)]
pub enum Gone {
    /// The process exited.
    #[error("process {pid} exited while {at} was read")]
    Exited {
        /// The process.
        pid: u32,
        /// What was being read.
        at: GuestRange,
    },
    /// The kernel stopped letting us read.
    #[error("process {pid} no longer lets its memory be read: {at}")]
    Refused {
        /// The process.
        pid: u32,
        /// What was being read.
        at: GuestRange,
        /// EPERM or EACCES.
        #[source]
        source: std::io::Error,
    },
    /// The range is not in one place of the source: a mistake of the caller.
    #[error("{at} does not lie in one place of this source")]
    NoPlace {
        /// What was asked for.
        at: GuestRange,
    },
    /// Buffer or states do not fit the range: a mistake of the caller.
    #[error("{at} was asked for with a buffer of {buf} bytes and {states} states")]
    Misfit {
        /// What was asked for.
        at: GuestRange,
        /// Length of the buffer.
        buf: usize,
        /// Number of states.
        states: usize,
    },
}

/// Checks that `buf` and `states` fit `at`.
pub(crate) fn check_fit(at: GuestRange, buf: &[u8], states: &[PageState]) -> Result<(), Gone> {
    let fits =
        buf.len() as u64 == at.len() && states.len() as u64 == evidence::state::page_count(at);
    if fits { Ok(()) } else { Err(Gone::Misfit { at, buf: buf.len(), states: states.len() }) }
}

/// A page that could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Guest-physical address of the first byte asked for in the page.
    pub gpa: u64,
    /// The kernel's error number; 0 when it gave fewer bytes without one (end of file).
    pub errno: i32,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno {
            0 => write!(f, "{:#x}: the file ends before it", self.gpa),
            n => write!(f, "{:#x}: {}", self.gpa, std::io::Error::from_raw_os_error(n)),
        }
    }
}

/// The pages that could not be read: all counted, the first ones listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// How many there were.
    pub count: u64,
    /// The first [`Faults::LISTED`] of them.
    pub list: Vec<Fault>,
}

impl Faults {
    /// Faults that are listed at most.
    pub const LISTED: usize = 4096;

    pub(crate) fn add(&mut self, gpa: u64, errno: Option<Errno>) {
        self.count = self.count.saturating_add(1);
        if self.list.len() < Self::LISTED {
            self.list.push(Fault { gpa, errno: errno.map_or(0, Errno::raw_os_error) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_are_counted_and_the_first_listed() {
        let mut faults = Faults::default();
        let all = Faults::LISTED as u64 + 3;
        for page in 0..all {
            faults.add(page * 4096, Some(Errno::FAULT));
        }
        assert_eq!((faults.count, faults.list.len()), (all, Faults::LISTED));
        assert_eq!(faults.list[0], Fault { gpa: 0, errno: 14 });
    }
}
