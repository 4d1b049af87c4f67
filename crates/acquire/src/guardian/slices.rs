//! A file that QEMU copies its guest's memory into, a slice at a time (`pmemsave`). The guardian passes
//! it on and keeps no copy: what comes into it, only capture reads.
//!
//! QEMU opens the file anew for each slice, by its own `/proc/self/fd`: so it needs no path that both
//! see, and it does not matter in which mount namespace or under which user QEMU runs. Which number it
//! has there, capture sees. It is passed by `getfd`: what `add-fd` passed, QEMU closes only while its
//! guest runs (monitor/fds.c, `monitor_fdset_cleanup`).

use crate::monitor::{AskError, Monitor, QUERY};
use crate::undo::{Line, Undo};
use host::clock::monotonic_ns;
use qemu::qmp::Change;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What QEMU knows it by.
const FD: &str = "stillframe-slice";

/// The file, as QEMU has it.
#[derive(Debug)]
pub(super) struct Slices {
    /// The directory that holds it, where QEMU opens it by its path.
    dir: Option<PathBuf>,
}

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
        super::announce(undo, &Line::Slices { dir: None })?;
        monitor.pass(FD, file.as_fd())?;
        Ok(Self { dir: None })
    }

    /// QEMU will open a file in `dir` by its path: who asks may not see QEMU's descriptors.
    ///
    /// # Errors
    /// [`AskError`]
    pub(super) fn begin_in(undo: &mut Undo, dir: PathBuf) -> Result<Self, AskError> {
        super::announce(undo, &Line::Slices { dir: Some(dir.clone()) })?;
        Ok(Self { dir: Some(dir) })
    }

    /// Has QEMU copy into `file`, as QEMU calls it; how long it took, in nanoseconds.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn copy(
        &self,
        monitor: &mut Monitor,
        gpa: u64,
        len: u64,
        file: &Path,
    ) -> Result<u64, AskError> {
        let began_ns = monotonic_ns();
        let change = Change::Pmemsave { gpa, len, file: file.display().to_string() };
        monitor.change_untold(&change, QUERY)?;
        Ok(monotonic_ns().saturating_sub(began_ns))
    }

    /// Takes it back.
    ///
    /// # Errors
    /// [`AskError`]: it stays announced.
    pub(super) fn end(self, monitor: &mut Monitor, undo: &mut Undo) -> Result<(), AskError> {
        match &self.dir {
            Some(dir) => drop(remove(dir)),
            None => monitor.change(&Change::CloseFd(FD.to_owned()), QUERY)?,
        }
        super::announce(undo, &Line::Free)
    }
}

/// Takes the file of a run that died back; what was done, for people.
///
/// # Errors
/// [`AskError`]: to be tried again.
pub(super) fn take_back(monitor: &mut Monitor, dir: Option<&Path>) -> Result<String, AskError> {
    if let Some(dir) = dir {
        return Ok(remove(dir));
    }
    match monitor.change_unless_refused(&Change::CloseFd(FD.to_owned()), QUERY)? {
        None => {
            Ok("QEMU had a file of ours open to copy memory into; it was taken back".to_owned())
        }
        // It was announced, and not given; or QEMU's monitor was closed, and the file with it.
        Some(why) => Ok(format!("QEMU has no file of ours open any more ({why})")),
    }
}

/// Removes a directory of ours with the file that QEMU copied into; what was done, for people.
fn remove(dir: &Path) -> String {
    // It is ours, and nobody else can put anything there.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = fs::remove_file(entry.path());
    }
    let _ = fs::remove_dir(dir);
    match dir.exists() {
        false => format!("QEMU copied memory into a file in {}; it was removed", dir.display()),
        true => format!("{} could not be removed", dir.display()),
    }
}
