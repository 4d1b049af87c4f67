//! The methods. Those that read QEMU's process are one loop with settings: `process` has what they
//! share, `live` and `freeze`; `track` has rounds of its own. `snapshot` is QEMU's.

pub mod hold;
pub mod pmemsave;
pub mod process;
pub mod snapshot;
pub mod track;
