//! What an opposing expert must read: the words and formats of a stillframe exhibit.
//!
//! This crate knows no operating system, no clock, no QEMU and no unsafe code. It is given bytes
//! and gives back bytes. Everything that makes an exhibit checkable is here: guest-physical
//! ranges, the memory map, blocks and page states, the digests, the manifest, the journal, the
//! encoders and decoders of the image formats, and `verify`.
//!
//! ```text
//! range ─> map ─> block ─> state ─> digest ─> manifest, journal, sums ─> verify
//!                   └─> layout ─> format::{elf, raw, lime}
//! ```
#![forbid(unsafe_code)]

pub mod block;
pub mod digest;
pub mod exhibit;
pub mod format;
pub mod journal;
pub mod layout;
mod lines;
pub mod manifest;
pub mod map;
pub mod range;
pub mod record;
pub mod state;
pub mod sums;
pub mod verify;

pub use block::{BLOCK_LEN, Block};
pub use digest::Digest;
pub use exhibit::ExhibitDir;
pub use layout::{Segment, Segments};
pub use manifest::Manifest;
pub use map::{Kind, MemoryMap, Region};
pub use range::GuestRange;
pub use record::BlockRecord;
pub use state::{PAGE, PageState};
