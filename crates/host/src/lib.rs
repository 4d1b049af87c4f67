//! The Linux kernel and the only unsafe code of stillframe; safe to use from outside.
//!
//! ```text
//! process ─> maps, pagemap ─> guest_memory (a Source) ─> store::{RamStore, DiskStore}
//! peer, facts, memory, clock, oom, fs: what the host is and what it allows
//! hold: all threads of a process stopped, and let go; sandbox: the rights that we give up
//! exhibit_dir: where the exhibit is made and read
//! ```
//! Nothing here knows QEMU, monitors or formats. Guest memory is copied out, never lent, and
//! there is no function that writes it.

pub mod channel;
pub mod clock;
pub mod disk_store;
mod error;
pub mod exhibit_dir;
pub mod facts;
pub mod fs;
pub mod guest_memory;
pub mod hold;
mod kernel_text;
pub mod maps;
pub mod memory;
pub mod numa;
pub mod oom;
pub mod own_memory;
pub mod pagemap;
pub mod peer;
pub mod privilege;
pub mod process;
pub mod ram_store;
pub mod random;
pub mod sandbox;
pub mod scripted;
pub mod shared_store;
pub mod signals;
pub mod soft_dirty;
pub mod source;
pub mod store;
pub mod userfault;

pub use disk_store::DiskStore;
pub use error::HostError;
pub use guest_memory::{GuestMemory, Place};
pub use process::Process;
pub use ram_store::RamStore;
pub use shared_store::SharedStore;
pub use source::{Gone, Source};
pub use store::{Store, StoreError};
