//! The methods. Those that read QEMU's process are one loop with settings: `process` has what they
//! share, `live` and `freeze`; `track` has rounds of its own. `snapshot` and `dump` are QEMU's
//! streams, which have `stream` and `sample` in common; `pmemsave` is its copying.

pub mod dump;
pub mod hold;
pub mod pmemsave;
pub mod process;
pub mod sample;
pub mod snapshot;
pub mod stream;
pub mod track;
