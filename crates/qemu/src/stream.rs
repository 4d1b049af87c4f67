//! QEMU's migration stream, as `background-snapshot` writes it: guest RAM page by page, then the
//! state of the devices.
//!
//! The stream is hostile input: a guest that took over its QEMU writes what it likes. So nothing is
//! allocated on the word of a length, every length is checked against what holds it, and whatever
//! is not understood is an error that says at which byte and what should have stood there. The
//! format is that of `migration/savevm.c` and `migration/ram.c` (7.2 and 10.0); all numbers are
//! big-endian, `str` is one byte of length and as many bytes of text:
//!
//! ```text
//! "QEVM" be32 3
//! 07 be32-counted machine name, subsections      configuration
//! 01 be32 id, str "ram", be32 0, be32 4          START: the blocks, no pages
//!    be64 total|04, {str name, be64 length}, be64 10, FOOTER
//! 04 virtio-mem's bitmap                         FULL, early: 8.0 and later
//! 02 be32 id, {page record}, be64 10, FOOTER     PART: pages
//! 03 as PART                                     END: a plain migration only
//! 04 ...                                         FULL: devices, without any length
//! 00                                             EOF
//! 06 be32 length, JSON                           description of the devices
//! ```
//!
//! FOOTER is `7e be32 id`; a page record is `be64 offset|flags`, `str block` unless the block is
//! that of the record before, and one page, or a byte 0 for a page of zeros.
//!
//! **Where RAM ends.** `background-snapshot` writes no END: the devices' state was taken when the
//! guest stood still, and is sent when RAM is through. So the first FULL after a PART ends RAM, and
//! a FULL before the first PART is an early one. Early sections have no length either: the only
//! one known (to 10.2) is virtio-mem's, and another is refused by name.
//!
//! **Where the stream ends.** The devices' part has no length and no end mark but the description.
//! So the stream is read to its end, and the description has to end there too: a stream that was
//! cut off anywhere has none, and is an error.
//!
//! The stream does not say where its blocks lie in the guest's memory: see [`crate::view`].

mod description;
mod input;
#[cfg(test)]
mod tests;

pub use description::{Device, Unaccounted};

use crate::text::Excerpt;
use input::Input;
use std::collections::BTreeMap;
use std::io::{self, Read};

/// Bytes of a page: the target page of x86-64, also for guests on huge pages.
pub const PAGE: usize = 4096;

/// Blocks that a stream may list; a machine with 256 DIMMs and 100 devices has about 500.
pub const MAX_BLOCKS: usize = 65_536;

/// Blocks that one virtio-mem device may have: 16 TiB in blocks of 1 MiB.
const MAX_PLUGGABLE: u64 = 1 << 24;

/// virtio-mem devices that a machine may have; QEMU has slots for 256 memory devices.
const MAX_EARLY: usize = 1024;

/// Bytes of a machine's name.
const MAX_MACHINE: u32 = 255;

const MAGIC: [u8; 4] = *b"QEVM";
const VERSION: u32 = 3;
const RAM_VERSION: u32 = 4;

/// Bytes that begin a section, or stand in one (`migration/savevm.h`).
mod section {
    pub(super) const EOF: u8 = 0x00;
    pub(super) const START: u8 = 0x01;
    pub(super) const PART: u8 = 0x02;
    pub(super) const END: u8 = 0x03;
    pub(super) const FULL: u8 = 0x04;
    pub(super) const SUBSECTION: u8 = 0x05;
    pub(super) const VMDESCRIPTION: u8 = 0x06;
    pub(super) const CONFIGURATION: u8 = 0x07;
    pub(super) const COMMAND: u8 = 0x08;
    pub(super) const FOOTER: u8 = 0x7e;
}

/// Flags in the low bits of a record of RAM (`migration/ram.h`).
mod flag {
    pub(super) const MASK: u64 = 0xfff;
    pub(super) const ZERO: u64 = 0x02;
    pub(super) const MEM_SIZE: u64 = 0x04;
    pub(super) const PAGE: u64 = 0x08;
    pub(super) const EOS: u64 = 0x10;
    pub(super) const CONTINUE: u64 = 0x20;

    /// QEMU's names, as far as a flag has one.
    pub(super) const NAMES: [(u64, &str); 10] = [
        (0x01, "FULL"),
        (ZERO, "ZERO"),
        (MEM_SIZE, "MEM_SIZE"),
        (PAGE, "PAGE"),
        (EOS, "EOS"),
        (CONTINUE, "CONTINUE"),
        (0x40, "XBZRLE"),
        (0x80, "HOOK"),
        (0x100, "COMPRESS_PAGE"),
        (0x200, "MULTIFD_FLUSH"),
    ];
}

/// `MIG_CMD_*`, from 0.
const COMMANDS: [&str; 12] = [
    "INVALID",
    "OPEN_RETURN_PATH",
    "PING",
    "POSTCOPY_ADVISE",
    "POSTCOPY_LISTEN",
    "POSTCOPY_RUN",
    "POSTCOPY_RAM_DISCARD",
    "PACKAGED",
    "ENABLE_COLO",
    "POSTCOPY_RESUME",
    "RECV_BITMAP",
    "SWITCHOVER_START",
];

/// `MIG_CMD_SWITCHOVER_START`: a plain migration of a 10.0 machine sends it before RAM's END.
const SWITCHOVER_START: u16 = 11;

/// A block of memory that the stream carries: guest RAM, a ROM, video memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// QEMU's `idstr`, as in [`crate::RamBlock::name`].
    pub name: String,
    /// Bytes in use; a multiple of [`PAGE`].
    pub used: u64,
}

/// Who takes the guest's memory out of a stream.
///
/// An error from any of these ends the reading with [`StreamError::Refused`].
pub trait Sink {
    /// The blocks, once, before any page. Pages name them by their index here. The lengths add up
    /// to a sum that fits into 64 bits; whether there is room for that much is for the sink to say.
    ///
    /// # Errors
    /// Why the stream is not wanted.
    fn blocks(&mut self, blocks: &[Block]) -> io::Result<()>;

    /// The bytes of the page at `offset` of a block; the page lies inside the block.
    ///
    /// The sink decides about a page that comes twice, and knows in the end which ones never came:
    /// `background-snapshot` sends each page once, and none of unplugged virtio-mem. A plain
    /// migration sends again what the guest wrote meanwhile.
    ///
    /// # Errors
    /// Why the page cannot be kept.
    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE]) -> io::Result<()>;

    /// As [`Sink::page`], of a page that QEMU found to be all zeros.
    ///
    /// # Errors
    /// Why the page cannot be kept.
    fn zero_page(&mut self, block: usize, offset: u64) -> io::Result<()>;
}

/// virtio-mem's state, sent before the first page.
///
/// While a migration runs QEMU refuses to plug and unplug (`virtio_mem_is_busy`), so it is also the
/// state at the instant of the snapshot, unless the guest was reset between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioMem {
    /// The section's name, such as `0000:00:01.0/virtio-mem-device-early`.
    pub name: String,
    /// Guest-physical address of its region.
    pub gpa: u64,
    /// Bytes of the region, plugged or not.
    pub len: u64,
    /// Bytes of one bit in `plugged`.
    pub unit: u64,
    /// Bytes plugged; agrees with `plugged`.
    pub plugged_len: u64,
    /// A bit for each unit of the region, lowest first; bits past its end are 0.
    pub plugged: Vec<u64>,
}

/// A stream read to its end, without its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Bytes of the whole stream.
    pub len: u64,
    /// QEMU's machine type, such as `pc-q35-10.0`.
    pub machine: String,
    /// Records of pages with bytes; a page that was sent twice counts twice.
    pub pages: u64,
    /// Records of pages of zeros.
    pub zero_pages: u64,
    /// virtio-mem devices of machine types 8.0 and later, in the stream's order.
    pub virtio_mem: Vec<VirtioMem>,
    /// The devices that QEMU says are in the stream, early ones first, in the stream's order.
    pub devices: Vec<Device>,
    /// The first place where `devices` and the stream disagree; `None` when every byte behind RAM
    /// belongs to the device that QEMU says it does. Whether all of RAM came the sink knows.
    pub unaccounted: Option<Unaccounted>,
    /// The stream without the records of its pages: byte for byte what QEMU wrote, all sections in
    /// their order, with nothing between the header of a PART or END and its end mark.
    ///
    /// That makes it a migration stream of its own: [`read`] and QEMU's
    /// `scripts/analyze-migration.py -f FILE` read it and find every device and no page.
    pub device_state: Vec<u8>,
}

/// Why a stream is not taken. `at` is counted in bytes from the stream's start.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The socket failed, or its deadline passed.
    #[error("stream: reading failed at byte {at:#x}")]
    Read {
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The stream ends too early.
    #[error("stream: cut off at byte {at:#x}, before {wanted}")]
    Cut {
        /// Its length.
        at: u64,
        /// What should have come.
        wanted: &'static str,
    },
    /// Not what QEMU writes at this place.
    #[error("stream: byte {at:#x}: {wanted} was expected, not {found}")]
    Malformed {
        /// Where.
        at: u64,
        /// What should have stood there.
        wanted: &'static str,
        /// What does.
        found: Excerpt,
    },
    /// QEMU writes it, but only in modes that this reader does not know or want.
    #[error("stream: byte {at:#x}: {what} is not supported")]
    Unsupported {
        /// Where.
        at: u64,
        /// Its name in QEMU.
        what: Excerpt,
    },
    /// More than this reader takes.
    #[error("stream: byte {at:#x}: more than {limit} {what}")]
    Limit {
        /// Where.
        at: u64,
        /// The greatest number.
        limit: u64,
        /// Of what.
        what: &'static str,
    },
    /// The stream does not end with a description: it was cut off behind RAM, or the machine has
    /// `suppress-vmdesc=on`, which cannot be told apart.
    #[error("stream: cut off at byte {at:#x}, before the description of the devices")]
    NoDescription {
        /// The stream's length.
        at: u64,
    },
    /// The description of the devices is not JSON, or of another shape.
    #[error("stream: the description of the devices at byte {at:#x} is not understood")]
    Description {
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The sink did not take it.
    #[error("stream: what stands at byte {at:#x} was not taken")]
    Refused {
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Reads a stream to its end and gives its memory to `sink`.
///
/// At most `limit` bytes are kept of all that is not a page ([`Rest::device_state`]); a machine
/// with a few devices has some 100 KiB, one with hundreds of CPUs some MiB. Beside them there are a
/// buffer of 256 KiB and what the lists in [`Rest`] take, which is a few times `limit` at most. No
/// system call is made but those of `from` and of the allocator. Deadlines are those of `from`: a
/// read that would block is an error.
///
/// # Errors
/// [`StreamError`] at the first thing that is not as it should be. What the sink was given until
/// then is right as far as it goes.
pub fn read(from: impl Read, sink: &mut impl Sink, limit: usize) -> Result<Rest, StreamError> {
    let mut input = Input::new(from, limit);
    let machine = head(&mut input)?;
    let (mut ram, virtio_mem) = setup(&mut input, sink)?;
    ram.parts(&mut input, sink)?;
    let (tail_at, tail_kept) = (input.at(), input.kept().len());
    input.keep_rest()?;
    let len = input.at();
    let device_state = input.take_kept();
    let tail = device_state.get(tail_kept..).unwrap_or_default();
    let described = description::find(tail, tail_at)?;
    let unaccounted = described.walk(tail, tail_at, &virtio_mem);
    Ok(Rest {
        len,
        machine,
        pages: ram.pages,
        zero_pages: ram.zero_pages,
        virtio_mem,
        devices: described.into_devices(),
        unaccounted,
        device_state,
    })
}

/// Header and configuration; returns the machine's name.
fn head(input: &mut Input<impl Read>) -> Result<String, StreamError> {
    input.expect(MAGIC, "\"QEVM\"")?;
    input.expect(VERSION.to_be_bytes(), "version 3")?;
    input.expect([section::CONFIGURATION], "the configuration")?;
    let at = input.at();
    let len = input.be32("the length of the machine's name")?;
    if len > MAX_MACHINE {
        let limit = MAX_MACHINE.into();
        return Err(StreamError::Limit { at, limit, what: "bytes of a machine's name" });
    }
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let machine = input.text(len, "the machine's name")?;
    while input.next_byte("a section")? == section::SUBSECTION {
        configuration_subsection(input)?;
    }
    Ok(machine)
}

/// `vmstate_configuration`'s subsections: each changes how the rest has to be read, or nothing.
fn configuration_subsection(input: &mut Input<impl Read>) -> Result<(), StreamError> {
    let at = input.at();
    input.expect([section::SUBSECTION], "a subsection")?;
    let name = input.string("the name of a subsection")?;
    input.be32("the version of a subsection")?;
    let at_value = input.at();
    match name.as_str() {
        "configuration/target-page-bits" => match input.be32("the page size")? {
            12 => Ok(()),
            bits => Err(unsupported(at_value, &format!("a page size of 2^{bits}"))),
        },
        // mapped-ram and x-ignore-shared, which change what RAM looks like.
        "configuration/capabilities" => match input.be32("the number of capabilities")? {
            0 => Ok(()),
            _ => {
                let name = input.string("the name of a capability")?;
                Err(unsupported(at_value, &format!("capability {name:?}")))
            }
        },
        "configuration/uuid" => input.array::<16>("the machine's UUID").map(drop),
        other => Err(unsupported(at, &format!("subsection {other:?}"))),
    }
}

fn unsupported(at: u64, what: &str) -> StreamError {
    StreamError::Unsupported { at, what: Excerpt::new(what) }
}

fn malformed(at: u64, wanted: &'static str, found: &str) -> StreamError {
    StreamError::Malformed { at, wanted, found: Excerpt::new(found) }
}

/// What stands before the first page: RAM's START, and early sections.
fn setup<S: Sink>(
    input: &mut Input<impl Read>,
    sink: &mut S,
) -> Result<(Ram, Vec<VirtioMem>), StreamError> {
    let mut ram = None;
    let mut virtio_mem = Vec::new();
    loop {
        let at = input.at();
        match (input.next_byte("RAM's sections")?, ram) {
            (section::START, None) => ram = Some(Ram::start(input, sink)?),
            (section::FULL, started) => {
                if virtio_mem.len() == MAX_EARLY {
                    let limit = u64::try_from(MAX_EARLY).unwrap_or(u64::MAX);
                    return Err(StreamError::Limit { at, limit, what: "early sections" });
                }
                virtio_mem.push(early(input)?);
                ram = started;
            }
            (section::PART | section::END, Some(ram)) => return Ok((ram, virtio_mem)),
            (section::COMMAND, _) => {
                input.array::<1>("a command")?;
                return Err(command(at, input.be16("a command")?));
            }
            (byte, _) => {
                let wanted = "RAM's first or next section";
                return Err(malformed(at, wanted, &format!("section {byte:#04x}")));
            }
        }
    }
}

fn command(at: u64, number: u16) -> StreamError {
    match COMMANDS.get(usize::from(number)) {
        Some(name) => unsupported(at, &format!("command {name}")),
        None => unsupported(at, &format!("command {number}")),
    }
}

/// Header of a START or FULL section.
struct Header {
    id: u32,
    name: String,
    instance: u32,
    version: u32,
}

fn header(input: &mut Input<impl Read>) -> Result<Header, StreamError> {
    input.array::<1>("a section")?;
    Ok(Header {
        id: input.be32("a section's id")?,
        name: input.string("a section's name")?,
        instance: input.be32("a section's instance")?,
        version: input.be32("a section's version")?,
    })
}

fn footer(input: &mut Input<impl Read>, id: u32) -> Result<(), StreamError> {
    input.expect([section::FOOTER], "a section's footer")?;
    input.expect(id.to_be_bytes(), "the section's id in its footer")
}

/// A FULL section before the first page. It has no length, so it is read field by field: those of
/// `vmstate_virtio_mem_device_early` (`hw/virtio/virtio-mem.c`).
fn early(input: &mut Input<impl Read>) -> Result<VirtioMem, StreamError> {
    let at = input.at();
    let Header { id, name, version, .. } = header(input)?;
    let device = name.rsplit('/').next().unwrap_or_default();
    if device != "virtio-mem-device-early" || version != 1 {
        let what = format!("the section {name:?}, version {version}, before the first page");
        return Err(unsupported(at, &what));
    }
    let at = input.at();
    let gpa = input.be64("virtio-mem's address")?;
    let len = input.be64("virtio-mem's length")?;
    let unit = input.be64("virtio-mem's block size")?;
    input.be32("virtio-mem's node")?;
    let plugged_len = input.be64("virtio-mem's plugged size")?;
    let fits = unit.is_power_of_two()
        && unit >= PAGE as u64
        && len.is_multiple_of(unit)
        && gpa.checked_add(len).is_some();
    if !fits {
        let found = format!("{len:#x} bytes at {gpa:#x} in blocks of {unit:#x}");
        return Err(malformed(at, "a region of whole blocks", &found));
    }
    let units = len / unit;
    if units > MAX_PLUGGABLE {
        return Err(StreamError::Limit {
            at,
            limit: MAX_PLUGGABLE,
            what: "blocks of a virtio-mem device",
        });
    }
    let at = input.at();
    let mut plugged = Vec::new();
    for _ in 0..units.div_ceil(64) {
        // Not reserved on the word of a length: the words have to be there.
        plugged.push(input.be64("virtio-mem's bitmap")?);
    }
    let count: u64 = plugged.iter().map(|word| u64::from(word.count_ones())).sum();
    let beyond = match (units % 64, plugged.last()) {
        (0, _) | (_, None) => 0,
        (used, Some(word)) => word >> used,
    };
    if count.checked_mul(unit) != Some(plugged_len) || beyond != 0 {
        let found = format!("{count} bits for {plugged_len:#x} bytes");
        return Err(malformed(at, "a bitmap that agrees with the plugged size", &found));
    }
    footer(input, id)?;
    Ok(VirtioMem { name, gpa, len, unit, plugged_len, plugged })
}

/// The "ram" section between its START and its last page.
struct Ram {
    id: u32,
    blocks: Vec<Block>,
    /// A tree and no hash table: it asks the kernel for nothing, and no name makes it slow.
    by_name: BTreeMap<String, usize>,
    /// Block of the last record. QEMU carries it on from one PART to the next.
    current: Option<usize>,
    pages: u64,
    zero_pages: u64,
}

impl Ram {
    /// Reads START: the list of blocks. It has no end mark: the lengths add up to the total.
    fn start<S: Sink>(input: &mut Input<impl Read>, sink: &mut S) -> Result<Self, StreamError> {
        let at = input.at();
        let Header { id, name, instance, version } = header(input)?;
        if name != "ram" {
            return Err(unsupported(at, &format!("the section {name:?} with parts")));
        }
        if (instance, version) != (0, RAM_VERSION) {
            return Err(unsupported(at, &format!("instance {instance}, version {version} of RAM")));
        }
        let at = input.at();
        let total = input.be64("the size of RAM")?;
        if total & flag::MASK != flag::MEM_SIZE {
            return Err(malformed(at, "the size of RAM", &flags(total)));
        }
        let mut ram = Self {
            id,
            blocks: Vec::new(),
            by_name: BTreeMap::new(),
            current: None,
            pages: 0,
            zero_pages: 0,
        };
        let mut left = total & !flag::MASK;
        while left > 0 {
            left = ram.add_block(input, left)?;
        }
        input.expect(flag::EOS.to_be_bytes(), "the end of the list of blocks")?;
        footer(input, id)?;
        sink.blocks(&ram.blocks).map_err(|source| StreamError::Refused { at, source })?;
        Ok(ram)
    }

    /// Reads one block of the list; returns the bytes that the others have to have.
    fn add_block(&mut self, input: &mut Input<impl Read>, left: u64) -> Result<u64, StreamError> {
        let at = input.at();
        if self.blocks.len() == MAX_BLOCKS {
            let limit = u64::try_from(MAX_BLOCKS).unwrap_or(u64::MAX);
            return Err(StreamError::Limit { at, limit, what: "blocks" });
        }
        let name = input.string("a block's name")?;
        let at_len = input.at();
        let used = input.be64("a block's length")?;
        if used & flag::MASK != 0 {
            return Err(malformed(at_len, "a length of whole pages", &format!("{used:#x}")));
        }
        let rest = left.checked_sub(used).ok_or_else(|| {
            let wanted = "a length that the size of RAM leaves room for";
            malformed(at_len, wanted, &format!("{used:#x}, with {left:#x} left"))
        })?;
        if self.by_name.insert(name.clone(), self.blocks.len()).is_some() {
            return Err(malformed(at, "a block's name for the first time", &format!("{name:?}")));
        }
        self.blocks.push(Block { name, used });
        Ok(rest)
    }

    /// Reads PARTs, and END if there is one, up to the first section of a device.
    fn parts<S: Sink>(
        &mut self,
        input: &mut Input<impl Read>,
        sink: &mut S,
    ) -> Result<(), StreamError> {
        let mut ended = false;
        loop {
            let at = input.at();
            match input.next_byte("a section")? {
                kind @ (section::PART | section::END) if !ended => {
                    input.array::<1>("a section")?;
                    input.expect(self.id.to_be_bytes(), "the id of RAM's section")?;
                    self.records(input, sink)?;
                    footer(input, self.id)?;
                    ended = kind == section::END;
                }
                section::COMMAND if !ended => {
                    input.array::<1>("a command")?;
                    let number = input.be16("a command")?;
                    if number != SWITCHOVER_START {
                        return Err(command(at, number));
                    }
                    input.expect([0; 2], "a command without data")?;
                }
                section::FULL | section::EOF => return Ok(()),
                byte => {
                    let wanted = if ended { "a device's section" } else { "RAM or a device" };
                    return Err(malformed(at, wanted, &format!("section {byte:#04x}")));
                }
            }
        }
    }

    /// The records of one PART or END. Only the mark at their end is kept.
    fn records<S: Sink>(
        &mut self,
        input: &mut Input<impl Read>,
        sink: &mut S,
    ) -> Result<(), StreamError> {
        const RECORD: &str = "a page, or the end of RAM's section";
        loop {
            let at = input.at();
            let header = u64::from_be_bytes(*input.peek_array(0, RECORD)?);
            if header == flag::EOS {
                return input.keep(8);
            }
            let (offset, kind) = (header & !flag::MASK, header & flag::MASK & !flag::CONTINUE);
            if kind != flag::ZERO && kind != flag::PAGE {
                return Err(unsupported(at, &format!("a record of RAM with {}", flags(header))));
            }
            let mut len = 8;
            if header & flag::CONTINUE == 0 {
                let name = input.peek_string(len, "the name of a page's block")?;
                len += 1 + name.len();
                let found = std::str::from_utf8(name).ok().and_then(|n| self.by_name.get(n));
                self.current = Some(*found.ok_or_else(|| StreamError::Malformed {
                    at,
                    wanted: "a block of the list",
                    found: input::quoted(name),
                })?);
            }
            let (block, used) = self
                .current
                .and_then(|index| Some((index, self.blocks.get(index)?.used)))
                .ok_or_else(|| malformed(at, "the name of a block", &flags(header)))?;
            // Both are whole pages: what begins inside ends inside.
            if offset >= used {
                let found = format!("offset {offset:#x} of {used:#x}");
                return Err(malformed(at, "a page inside its block", &found));
            }
            let taken = if kind == flag::PAGE {
                let bytes = input.peek_array::<PAGE>(len, "the bytes of a page")?;
                len += PAGE;
                self.pages += 1;
                sink.page(block, offset, bytes)
            } else {
                let &[fill] = input.peek_array(len, "the byte of a zero page")?;
                if fill != 0 {
                    return Err(malformed(at, "a page of zeros", &format!("one of {fill:#04x}")));
                }
                len += 1;
                self.zero_pages += 1;
                sink.zero_page(block, offset)
            };
            taken.map_err(|source| StreamError::Refused { at, source })?;
            input.skip(len);
        }
    }
}

/// The names of a record's flags.
fn flags(header: u64) -> String {
    let bits = header & flag::MASK;
    let mut words: Vec<_> =
        flag::NAMES.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    if words.is_empty() || bits & !0x3ff != 0 {
        words.push("no known flag");
    }
    format!("{bits:#05x} ({})", words.join(", "))
}
