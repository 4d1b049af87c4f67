//! What the fuzz targets do with their input, and the inputs that they begin with.
//!
//! Each target takes bytes that a hostile guest, monitor or exhibit could have made, and holds more
//! than "it does not panic" against the parser: what was read can be written and read again, what
//! was found lies inside what was given, two ways to the same answer agree. Run them with
//! `cargo xtask fuzz`.
//!
//! A crash's input, kept under `seeds/TARGET/`, is run first from then on.
#![forbid(unsafe_code)]

pub mod dump;
pub mod image;
pub mod libvirt;
pub mod monitor;
pub mod process;
pub mod qmp;
pub mod record;
pub mod stream;
pub mod verify;

/// A target's name and what it begins with.
pub type Seeds = (&'static str, fn() -> Vec<Vec<u8>>);

/// The seeds of every target.
pub const SEEDS: [Seeds; 19] = [
    ("blocks", record::blocks_seeds),
    ("cmdline", process::cmdline_seeds),
    ("dump", dump::seeds),
    ("elf", image::elf_seeds),
    ("gpa2hva", monitor::gpa2hva_seeds),
    ("graph", monitor::graph_seeds),
    ("journal", record::journal_seeds),
    ("libvirt", libvirt::seeds),
    ("lime", image::lime_seeds),
    ("manifest", record::manifest_seeds),
    ("map", image::map_seeds),
    ("maps", process::maps_seeds),
    ("mtree", monitor::mtree_seeds),
    ("notes", image::notes_seeds),
    ("qmp", qmp::seeds),
    ("ramblock", monitor::ramblock_seeds),
    ("stream", stream::seeds),
    ("sums", record::sums_seeds),
    ("verify", verify::seeds),
];

/// Takes `N` bytes off the front; missing ones are 0.
pub(crate) fn take<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let mut out = [0; N];
    let (head, rest) = data.split_at(N.min(data.len()));
    out.iter_mut().zip(head).for_each(|(to, from)| *to = *from);
    *data = rest;
    out
}
