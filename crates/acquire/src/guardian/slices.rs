//! A file that QEMU copies its guest's memory into, a slice at a time (`pmemsave`). The guardian passes
//! it on and keeps no copy: what comes into it, only capture reads.
//!
//! QEMU opens the file anew for each slice, by its own `/proc/self/fd`: so it needs no path that both
//! see, and it does not matter in which mount namespace or under which user QEMU runs.

use crate::monitor::{AskError, Monitor, QUERY};
use crate::undo::{Line, Undo};
use host::clock::monotonic_ns;
use qemu::qmp::Change;
use std::os::fd::{AsFd, OwnedFd};

/// The file, as QEMU has it.
#[derive(Debug)]
pub(super) struct Slices {
    set: u64,
    /// QEMU's name for it.
    path: String,
}

/// Sets are numbered by whoever makes them; libvirt counts from 0. So ours lie far off, in the middle of
/// what QEMU's number can be.
const SETS: u64 = 1 << 40;

impl Slices {
    /// Gives `file` to QEMU.
    ///
    /// # Errors
    /// [`AskError`]: QEMU does not have it, or it is announced in `undo`.
    pub(super) fn begin(
        monitor: &mut Monitor,
        undo: &mut Undo,
        file: &OwnedFd,
    ) -> Result<Self, AskError> {
        let set = SETS + (host::random::seed() & (SETS - 1));
        super::announce(undo, &Line::Slices { set })?;
        let fd = monitor.pass_as_set(set, file.as_fd())?;
        Ok(Self { set, path: format!("/proc/self/fd/{fd}") })
    }

    /// Has QEMU copy; how long it took, in nanoseconds.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn copy(&self, monitor: &mut Monitor, gpa: u64, len: u64) -> Result<u64, AskError> {
        let began_ns = monotonic_ns();
        let change = Change::Pmemsave { gpa, len, file: self.path.clone() };
        monitor.change_untold(&change, QUERY)?;
        Ok(monotonic_ns().saturating_sub(began_ns))
    }

    /// Takes it back.
    ///
    /// # Errors
    /// [`AskError`]: it stays announced.
    pub(super) fn end(self, monitor: &mut Monitor, undo: &mut Undo) -> Result<(), AskError> {
        monitor.change(&Change::RemoveFdSet(self.set), QUERY)?;
        super::announce(undo, &Line::Free)
    }
}

/// Takes the file of a run that died back; what was done, for people.
///
/// # Errors
/// [`AskError`]: to be tried again.
pub(super) fn take_back(monitor: &mut Monitor, set: u64) -> Result<String, AskError> {
    let text = "QEMU had a file of ours open to copy memory into; it was taken back";
    match monitor.change_unless_refused(&Change::RemoveFdSet(set), QUERY)? {
        // It was announced, and not given; or QEMU has closed it itself.
        Some(why) => Ok(format!("QEMU has no file of ours open any more ({why})")),
        None => Ok(text.to_owned()),
    }
}
