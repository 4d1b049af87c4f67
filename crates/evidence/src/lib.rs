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
pub mod layout;
pub mod map;
pub mod range;
pub mod state;

pub use block::{BLOCK_LEN, Block};
pub use layout::{Segment, Segments};
pub use map::{Kind, MemoryMap, Region};
pub use range::GuestRange;
pub use state::{PAGE, PageState};
