//! Everything that a new QEMU may change: its command line, QMP, the texts of its monitor.
//!
//! Nothing here reads guest memory, but for [`stream`] and [`dump`], which are sent it. The commands
//! that can be sent are the members of [`qmp::Command`] and [`qmp::Hmp`], all of them queries, and those
//! of [`qmp::Change`], which stop a guest and let it go on, or have QEMU take a snapshot or a dump.
//!
//! ```text
//! cmdline   argv -> name, UUID, RAM, monitors        (no monitor is opened)
//! qmp       socket -> answers, events                (a deadline on everything)
//! libvirt   socket -> domains, and QMP through them  (the same)
//! facts     qmp -> version, state, sizes, devices    (typed queries)
//! mtree, ramblock, gpa2hva                           (strict parsers of monitor texts)
//! graph     the acyclic graph of MemoryRegions; what the flat view hides
//! arithmetic qom -> where RAM lies               (a second way)
//! balloon   qmp -> what the guest gave back
//! owner     flat range -> what kind of memory it is
//! view      qmp -> the guest's memory as QEMU sees it
//! stream    migration stream -> blocks, pages, devices (hostile input)
//! dump      dump-guest-memory -> ranges, registers, memory (hostile input)
//! ```
#![forbid(unsafe_code)]

mod ahead;
pub mod arithmetic;
pub mod balloon;
pub mod cmdline;
mod deadline;
pub mod dump;
pub mod facts;
mod frame;
pub mod gpa2hva;
pub mod graph;
pub mod libvirt;
pub mod mtree;
pub mod owner;
pub mod qmp;
mod queue;
pub mod ramblock;
pub mod stream;
pub mod text;
mod unix;
pub mod view;

pub use balloon::Balloon;
pub use cmdline::CommandLine;
pub use mtree::FlatViews;
pub use qmp::{Qmp, QmpError};
pub use ramblock::RamBlock;
pub use view::GuestView;
