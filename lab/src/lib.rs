//! stillframe's lab: real guests under real QEMUs, for tests of five lines.
//!
//! ```no_run
//! # fn main() -> lab::Result<()> {
//! let lab = lab::Lab::open()?;
//! let mut guest = lab.guest().machine(lab::Machine::Q35).memory_mib(512).boot()?;
//! assert_eq!(guest.sh("uname -s")?, "Linux\n");
//! guest.finish()
//! # }
//! ```
//!
//! The lab shares no code with the tool, so that it can contradict it: it has its own QMP client,
//! its own reading of QEMU's memory map and its own way to guest memory.
#![forbid(unsafe_code)]

pub mod bare;
mod cpio;
pub mod diskcheck;
#[path = "../guest/diskpage.rs"]
pub mod diskpage;
pub mod diskread;
mod error;
mod guest;
mod initramfs;
mod kit;
pub mod libvirtd;
pub mod metronome;
mod mtree;
pub mod outer;
#[path = "../guest/pattern.rs"]
pub mod pattern;
mod places;
pub mod proc;
mod program;
mod qmp;
mod ring;
pub mod runner;
mod serial;
pub mod session;
pub mod setup;
pub mod slicebench;
pub mod tear;
pub mod tearbench;
pub mod tearcheck;
#[path = "../guest/tearpage.rs"]
pub mod tearpage;
pub mod terminal;

pub use error::{Doing, Failure, Result, failed, skipped};
pub use guest::{Accel, Backing, Builder, Guest, Machine, file_filler};
pub use initramfs::{CANARY, DISK_MODULES, GUEST_MODULES};
pub use kit::{Kit, Version, cache};
pub use mtree::Range;
pub use places::{Place, Places};
pub use qmp::Qmp;
pub use ring::Ring;
pub use runner::Lab;
