//! What can go wrong between stillframe and the host.

use crate::maps::MapsError;
use evidence::GuestRange;
use std::io;

/// An error of the host: of a process looked at, a kernel file, or the layout of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no such process, or it exited while it was looked at.
    #[error("process {pid} does not exist (any more)")]
    Exited {
        /// Its process id.
        pid: u32,
    },
    /// The kernel does not let us look: rights, Yama, an LSM, a namespace.
    #[error("the kernel refuses {path}")]
    Refused {
        /// The file or call that was refused.
        path: String,
        /// EACCES or EPERM.
        #[source]
        source: io::Error,
    },
    /// A file could not be read or written.
    #[error("{path} cannot be used")]
    File {
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is longer than anything sensible.
    #[error("{path} is longer than {limit} bytes")]
    TooLong {
        /// The file.
        path: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A kernel file does not have the form that its documentation gives.
    #[error("{path} is not as expected: {what}")]
    Format {
        /// The file.
        path: String,
        /// What was found and what was expected.
        what: String,
    },
    /// `maps` or `smaps` is not as expected.
    #[error("{path} is not as expected")]
    Maps {
        /// The file.
        path: String,
        /// Line and reason.
        #[source]
        source: MapsError,
    },
    /// A block lies in no place: a mistake of the caller.
    #[error("{range} does not lie in one place of the guest's memory")]
    NoPlace {
        /// The block.
        range: GuestRange,
    },
    /// Two places of guest memory overlap.
    #[error("guest memory {first} and {second} overlap")]
    Overlap {
        /// The lower one.
        first: GuestRange,
        /// The higher one.
        second: GuestRange,
    },
    /// Guest-physical and host virtual address do not agree in their lowest 12 bits.
    #[error(
        "guest memory {range} at host address {hva:#x} is not aligned alike: pages of guest and host differ"
    )]
    Skewed {
        /// The guest-physical addresses.
        range: GuestRange,
        /// Where QEMU has them.
        hva: u64,
    },
    /// No mapping, or more than one, holds the place.
    #[error("QEMU has guest memory {range} at {hva:#x}, but the process has there: {there}")]
    NotOneMapping {
        /// The guest-physical addresses.
        range: GuestRange,
        /// Where QEMU has them.
        hva: u64,
        /// The mappings that touch the place, or "nothing".
        there: String,
    },
    /// The mapping is not ordinary memory: a device's registers or memory.
    #[error("guest memory {range} lies in {vma}, which is not ordinary memory ({why})")]
    NotMemory {
        /// The guest-physical addresses.
        range: GuestRange,
        /// The mapping.
        vma: String,
        /// What shows it.
        why: String,
    },
    /// The file behind a mapping could not be opened for reading.
    #[error(
        "the file behind {vma} cannot be opened through /proc/{pid}/fd or /proc/{pid}/map_files"
    )]
    NoFile {
        /// The process.
        pid: u32,
        /// The mapping.
        vma: String,
        /// Why the second way failed.
        #[source]
        source: io::Error,
    },
    /// The mapping under a place is another one than before.
    #[error("guest memory {range} lay in {before}, and now lies in {after}")]
    Changed {
        /// The guest-physical addresses.
        range: GuestRange,
        /// The mapping seen first.
        before: String,
        /// What is there now.
        after: String,
    },
}

impl HostError {
    /// The error for `path`: refusals and exited processes get their own variants.
    pub(crate) fn file(path: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let (path, source) = (path.into(), source.into());
        match source.kind() {
            io::ErrorKind::PermissionDenied => HostError::Refused { path, source },
            _ => HostError::File { path, source },
        }
    }
}
