//! The text of HMP `info mtree -f` and `info mtree -f -o`: QEMU's flat views.
//!
//! A flat view is the acyclic graph of MemoryRegions drawn flat: what answers at each address. The
//! text is printed by `mtree_print_flatview` in `system/memory.c` (`softmmu/memory.c` in 7.2):
//!
//! ```text
//! FlatView #2
//!  AS "memory", root: system
//!  AS "e1000", root: bus master container, alias system
//!  Root memory region: system
//!   0000000000000000-000000000009ffff (prio 0, ram): pc.ram owner:{obj path=/objects/pc.ram} KVM
//!   00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000 owner:{..} KVM
//!   (or)  No rendered FlatView
//! ```
//!
//! HMP text is no interface: whatever is not understood here is an error that names the line.
//! Three things about it are easily taken wrongly: ends are inclusive; `NAME` is the MemoryRegion's
//! name and not the RAMBlock's; and a range that is shown read-only is called `rom` whatever
//! answers there, be it RAM (PAM shadow) or a read-only flash *device* (OVMF's code).

use crate::text::{Excerpt, hex};
use evidence::GuestRange;
use serde::{Serialize, Serializer};
use std::fmt;

/// Ranges that all views together may hold; a machine with 256 DIMMs and 100 devices has some
/// thousands in each of its about 100 views.
const MAX_ENTRIES: usize = 4_000_000;

/// What QEMU calls a flat range (`memory_region_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RangeType {
    /// `ram`: plain memory that the guest can write.
    Ram,
    /// `rom`: shown read-only; see the module's text.
    Rom,
    /// `romd`: a ROM device in its reading mode.
    Romd,
    /// `ramd`: memory of a passed-through device.
    RamDevice,
    /// `i/o`: reads and writes go to a device model.
    Io,
    /// `container`: printed for the root of some address spaces; no memory.
    Container,
}

impl RangeType {
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "ram" => Self::Ram,
            "rom" => Self::Rom,
            "romd" => Self::Romd,
            "ramd" => Self::RamDevice,
            "i/o" => Self::Io,
            "container" => Self::Container,
            _ => return None,
        })
    }

    /// QEMU's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ram => "ram",
            Self::Rom => "rom",
            Self::Romd => "romd",
            Self::RamDevice => "ramd",
            Self::Io => "i/o",
            Self::Container => "container",
        }
    }

    /// Whether memory, of whatever kind, stands behind the range.
    pub fn is_memory(self) -> bool {
        !matches!(self, Self::Io | Self::Container)
    }
}

/// How QEMU names an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ObjectName {
    /// `id=ID`: a device that the user gave an id.
    Id(String),
    /// `path=PATH`: the object's canonical path.
    Path(String),
    /// `type=TYPE`: an object outside the object tree.
    Type(String),
}

/// The owner or the parent of a MemoryRegion, printed with `-o`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    /// `dev` (a device) rather than `obj`.
    pub is_device: bool,
    /// Which one.
    pub name: ObjectName,
}

impl Serialize for Object {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl Serialize for RangeType {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.word())
    }
}

impl fmt::Display for Object {
    /// The path, or the id, or the type: as the record names owners.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            ObjectName::Id(text) | ObjectName::Path(text) => f.write_str(text),
            ObjectName::Type(text) => write!(f, "type {text}"),
        }
    }
}

/// One range of a flat view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First address.
    pub first: u64,
    /// Last address, included. An I/O range may cover all 2^64 addresses.
    pub last: u64,
    /// Priority of the MemoryRegion.
    pub priority: i32,
    /// What QEMU calls it.
    pub range_type: RangeType,
    /// `nv-`: persistent memory.
    pub nonvolatile: bool,
    /// The MemoryRegion's name; need not be unique, may hold spaces.
    pub name: String,
    /// Offset of the first byte in the MemoryRegion.
    pub offset: u64,
    /// Who owns the MemoryRegion (`-o`).
    pub owner: Option<Object>,
    /// Its parent in the object tree, when another than the owner (`-o`).
    pub parent: Option<Object>,
    /// Neither owner nor parent (`-o`).
    pub orphan: bool,
    /// KVM has a memory slot for the range, in at least one of the view's address spaces.
    pub in_kvm: bool,
}

impl Entry {
    /// The addresses; `None` when they end at 2^64.
    pub fn range(&self) -> Option<GuestRange> {
        GuestRange::from_inclusive(self.first, self.last)
    }
}

/// An address space that shows a flat view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// Its name; the guest's physical memory is `memory`.
    pub name: String,
    /// Root MemoryRegion, with the alias's target when it is one.
    pub root: String,
}

/// One flat view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatView {
    /// QEMU's running number in this text; says nothing across texts.
    pub number: u64,
    /// Who shows it.
    pub address_spaces: Vec<AddressSpace>,
    /// The ranges, ascending and disjoint.
    pub entries: Vec<Entry>,
}

/// All flat views of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatViews {
    /// In the text's order, which is that of a hash table: not stable.
    pub views: Vec<FlatView>,
}

/// Why a text is not a list of flat views.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MtreeError {
    /// A line that QEMU 7.2 and 10.0 do not print at this place.
    #[error("mtree: line {number} is not understood: {text:?}")]
    Line {
        /// Counted from 1.
        number: usize,
        /// The line.
        text: Excerpt,
    },
    /// A range begins before the one above it ends.
    #[error("mtree: line {number} overlaps the range above it: {text:?}")]
    Overlap {
        /// Counted from 1.
        number: usize,
        /// The line.
        text: Excerpt,
    },
    /// The text ends inside a view.
    #[error("mtree: the text ends inside flat view #{0}")]
    Cut(u64),
    /// More ranges than any machine has.
    #[error("mtree: more than {MAX_ENTRIES} ranges")]
    TooMany,
    /// Not exactly one view lists the address space `memory`.
    #[error("mtree: {0} flat views list the address space \"memory\", not one")]
    Memory(usize),
}

impl FlatViews {
    /// Reads the text; line ends may be `\n` or `\r\n`.
    ///
    /// # Errors
    /// [`MtreeError`] for the first line that is not understood.
    pub fn parse(text: &str) -> Result<Self, MtreeError> {
        let mut views = Vec::new();
        let mut entries = 0;
        let mut lines = Lines::new(text);
        while let Some(line) = lines.next_filled() {
            let number = line
                .text
                .strip_prefix("FlatView #")
                .and_then(|n| n.parse().ok())
                .ok_or_else(|| line.error())?;
            let view = parse_view(number, &mut lines, &mut entries)?;
            views.push(view);
        }
        Ok(Self { views })
    }

    /// The view of the address space `memory`: guest-physical memory as the CPUs see it.
    ///
    /// # Errors
    /// [`MtreeError::Memory`] when there is none, or more than one.
    pub fn memory(&self) -> Result<&FlatView, MtreeError> {
        let shows_memory =
            |view: &&FlatView| view.address_spaces.iter().any(|space| space.name == "memory");
        let mut found = self.views.iter().filter(shows_memory);
        match (found.next(), found.count()) {
            (Some(view), 0) => Ok(view),
            (first, more) => Err(MtreeError::Memory(more + usize::from(first.is_some()))),
        }
    }
}

/// A line and its number, counted from 1.
#[derive(Clone, Copy)]
pub(crate) struct Line<'a> {
    number: usize,
    pub(crate) text: &'a str,
}

impl Line<'_> {
    pub(crate) fn error(self) -> MtreeError {
        MtreeError::Line { number: self.number, text: Excerpt::new(self.text) }
    }
}

/// The lines of a text.
pub(crate) struct Lines<'a> {
    lines: std::iter::Peekable<std::iter::Enumerate<std::str::Lines<'a>>>,
}

impl<'a> Lines<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { lines: text.lines().enumerate().peekable() }
    }

    pub(crate) fn next(&mut self) -> Option<Line<'a>> {
        self.lines.next().map(|(index, text)| Line { number: index + 1, text })
    }

    /// The next one that is not empty.
    pub(crate) fn next_filled(&mut self) -> Option<Line<'a>> {
        while self.lines.next_if(|(_, text)| text.is_empty()).is_some() {}
        self.next()
    }
}

fn parse_view(
    number: u64,
    lines: &mut Lines<'_>,
    count: &mut usize,
) -> Result<FlatView, MtreeError> {
    let cut = MtreeError::Cut(number);
    let mut view = FlatView { number, address_spaces: Vec::new(), entries: Vec::new() };
    loop {
        let Some(line) = lines.next() else { return Err(cut) };
        if line.text.starts_with(" Root memory region: ") {
            break;
        }
        let space = parse_address_space(line.text).ok_or_else(|| line.error())?;
        view.address_spaces.push(space);
    }
    // A view ends with an empty line, also when it is the last one.
    loop {
        let Some(line) = lines.next() else { return Err(cut) };
        if line.text.is_empty() {
            return Ok(view);
        }
        if line.text == "  No rendered FlatView" && view.entries.is_empty() {
            continue;
        }
        let entry = parse_entry(line.text).ok_or_else(|| line.error())?;
        if view.entries.last().is_some_and(|above| entry.first <= above.last) {
            return Err(MtreeError::Overlap { number: line.number, text: Excerpt::new(line.text) });
        }
        *count += 1;
        if *count > MAX_ENTRIES {
            return Err(MtreeError::TooMany);
        }
        view.entries.push(entry);
    }
}

/// ` AS "NAME", root: REGION[, alias REGION]`
fn parse_address_space(line: &str) -> Option<AddressSpace> {
    let (name, root) = line.strip_prefix(" AS \"")?.split_once("\", root: ")?;
    Some(AddressSpace { name: name.into(), root: root.into() })
}

/// `  START-END (prio N, TYPE): NAME[ @OFFSET][ OWNER][ KVM..]`
fn parse_entry(line: &str) -> Option<Entry> {
    let rest = line.strip_prefix("  ")?;
    let (ends, rest) = rest.split_once(" (prio ")?;
    let (first, last) = ends.split_once('-')?;
    let (first, last) = (hex16(first)?, hex16(last)?);
    let (priority, rest) = rest.split_once(", ")?;
    let (word, rest) = rest.split_once("): ")?;
    let (nonvolatile, word) = match word.strip_prefix("nv-") {
        Some(word) => (true, word),
        None => (false, word),
    };

    // From the right, because only the name can hold spaces.
    let mut rest = rest;
    let mut in_kvm = false;
    // The accelerator's name once for each address space that has a slot.
    while let Some(front) = rest.strip_suffix(" KVM") {
        rest = front;
        in_kvm = true;
    }
    let (rest, owners) = take_owners(rest)?;
    let (name, offset) = match rest.rsplit_once(" @") {
        Some((name, digits)) if hex16(digits).is_some() => (name, hex16(digits)?),
        _ => (rest, 0),
    };
    let range_type = RangeType::parse(word)?;
    let wraps = last.checked_sub(first)?.checked_add(offset).is_none();
    if wraps && range_type.is_memory() {
        return None;
    }
    Some(Entry {
        first,
        last,
        priority: priority.parse().ok()?,
        range_type,
        nonvolatile,
        name: name.into(),
        offset,
        owner: owners.owner,
        parent: owners.parent,
        orphan: owners.orphan,
        in_kvm,
    })
}

/// QEMU prints addresses with exactly 16 digits.
pub(crate) fn hex16(digits: &str) -> Option<u64> {
    hex(digits).filter(|_| digits.len() == 16)
}

#[derive(Default)]
/// Who a MemoryRegion belongs to.
pub(crate) struct Owners {
    pub(crate) owner: Option<Object>,
    pub(crate) parent: Option<Object>,
    pub(crate) orphan: bool,
}

/// Takes ` owner:{..}`, ` parent:{..}` or ` orphan` off the line's end; without `-o` there is none.
pub(crate) fn take_owners(line: &str) -> Option<(&str, Owners)> {
    let mut owners = Owners::default();
    if let Some(rest) = line.strip_suffix(" orphan") {
        owners.orphan = true;
        return Some((rest, owners));
    }
    let mut rest = line;
    if let Some((front, object)) = take_object(rest, " parent:{") {
        rest = front;
        owners.parent = Some(object?);
    }
    if let Some((front, object)) = take_object(rest, " owner:{") {
        rest = front;
        owners.owner = Some(object?);
    }
    // What still looks like an owner is a form that we do not know: not part of a name.
    let unknown = rest.contains(" owner:{") || rest.contains(" parent:{");
    (!unknown).then_some((rest, owners))
}

/// The object behind `label` at the line's end; the inner `None` is one that is not understood.
fn take_object<'a>(line: &'a str, label: &str) -> Option<(&'a str, Option<Object>)> {
    let (front, inside) = line.strip_suffix('}')?.rsplit_once(label)?;
    Some((front, parse_object(inside)))
}

/// `dev id=ID`, `obj path=PATH`, `obj type=TYPE`
fn parse_object(text: &str) -> Option<Object> {
    if text.contains(['{', '}']) {
        return None;
    }
    let (sort, name) = text.split_once(' ')?;
    let is_device = match sort {
        "dev" => true,
        "obj" => false,
        _ => return None,
    };
    let (key, value) = name.split_once('=')?;
    let name = match key {
        "id" => ObjectName::Id(value.into()),
        "path" => ObjectName::Path(value.into()),
        "type" => ObjectName::Type(value.into()),
        _ => return None,
    };
    Some(Object { is_device, name })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A line of a flat view: RAM.
    pub(crate) fn entry(name: &str, first: u64, last: u64, offset: u64) -> Entry {
        Entry {
            first,
            last,
            priority: 0,
            range_type: RangeType::Ram,
            nonvolatile: false,
            name: name.into(),
            offset,
            owner: None,
            parent: None,
            orphan: false,
            in_kvm: false,
        }
    }

    fn one(line: &str) -> Option<Entry> {
        let text = format!(
            "FlatView #0\n AS \"memory\", root: system\n Root memory region: system\n{line}\n\n"
        );
        FlatViews::parse(&text).ok().map(|views| views.memory().unwrap().entries[0].clone())
    }

    #[test]
    fn all_parts_of_a_line() {
        let entry = one("  00000000000c0000-00000000000cafff (prio -1, nv-rom): my region @00000000000c0000 owner:{dev id=d0} parent:{obj path=/machine/unattached} KVM KVM").unwrap();
        assert_eq!(
            entry,
            Entry {
                first: 0xc_0000,
                last: 0xc_afff,
                priority: -1,
                range_type: RangeType::Rom,
                nonvolatile: true,
                name: "my region".into(),
                offset: 0xc_0000,
                owner: Some(Object { is_device: true, name: ObjectName::Id("d0".into()) }),
                parent: Some(Object {
                    is_device: false,
                    name: ObjectName::Path("/machine/unattached".into())
                }),
                orphan: false,
                in_kvm: true,
            }
        );
        assert!(one("  0000000000000000-0000000000000fff (prio 0, ram): x orphan").unwrap().orphan);
    }

    #[test]
    fn names_keep_what_only_looks_like_more() {
        let name = |line: &str| one(line).unwrap().name;
        let head = "  0000000000000000-0000000000000fff (prio 0, ram): ";
        assert_eq!(name(&format!("{head}vga @home")), "vga @home");
        assert_eq!(
            name(&format!("{head}0000:01:00.0 BAR 1 mmaps[0]")),
            "0000:01:00.0 BAR 1 mmaps[0]"
        );
        assert_eq!(name(&format!("{head}a): b, c (prio 1, ram): d")), "a): b, c (prio 1, ram): d");
    }

    #[test]
    fn io_may_cover_everything_but_ram_may_not_wrap() {
        let all = "  0000000000000000-ffffffffffffffff (prio 0, i/o): intel_iommu";
        assert_eq!(one(all).unwrap().range(), None);
        assert_eq!(
            one("  0000000000001000-ffffffffffffffff (prio 0, ram): r @ffffffffffffff00"),
            None
        );
    }

    #[test]
    fn unknown_lines_are_refused_with_their_number() {
        for line in [
            "  0000000000000000-0000000000000fff (prio 0, rams): x",
            "  000000000000000-0000000000000fff (prio 0, ram): x",
            "  0000000000001000-0000000000000fff (prio 0, ram): x",
            "  0000000000000000-0000000000000fff (prio x, ram): x",
            " 0000000000000000-0000000000000fff (prio 0, ram): x",
            "  0000000000000000-0000000000000fff (prio 0, ram): x owner:{odd path=/x}",
            "  0000000000000000-0000000000000fff (prio 0, ram): x owner:{obj uuid=/x}",
            "  0000000000000000-0000000000000fff (prio 0, ram): x owner:{obj path=/x} HVF",
            "  0000000000000000-0000000000000fff",
            "  Dispatch",
            "mtree: unsupported option -d",
        ] {
            let text = format!(
                "FlatView #0\n AS \"memory\", root: system\n Root memory region: system\n{line}\n\n"
            );
            let error = FlatViews::parse(&text).unwrap_err();
            assert!(matches!(error, MtreeError::Line { number: 4, .. }), "{line}: {error}");
        }
        assert!(matches!(
            FlatViews::parse("\nunknown command: 'info mtree'\n"),
            Err(MtreeError::Line { number: 2, .. })
        ));
    }

    #[test]
    fn overlap_and_a_cut_text_are_refused() {
        let head = "FlatView #7\n AS \"memory\", root: system\n Root memory region: system\n";
        let a = "  0000000000000000-0000000000001fff (prio 0, ram): x\n";
        let b = "  0000000000001fff-0000000000002fff (prio 0, ram): x\n";
        assert!(matches!(
            FlatViews::parse(&format!("{head}{a}{b}\n")),
            Err(MtreeError::Overlap { number: 5, .. })
        ));
        assert_eq!(FlatViews::parse(&format!("{head}{a}")), Err(MtreeError::Cut(7)));
        assert_eq!(FlatViews::parse("FlatView #7\n"), Err(MtreeError::Cut(7)));
    }

    #[test]
    fn exactly_one_view_shows_memory() {
        let view = |space: &str| {
            format!(
                "FlatView #0\n AS \"{space}\", root: r\n Root memory region: r\n  No rendered FlatView\n\n"
            )
        };
        let parse = |text: String| FlatViews::parse(&text).unwrap();
        assert!(parse(view("memory") + &view("I/O")).memory().is_ok());
        assert_eq!(parse(view("I/O")).memory(), Err(MtreeError::Memory(0)));
        assert_eq!(parse(view("memory") + &view("memory")).memory(), Err(MtreeError::Memory(2)));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(FlatView #[0-9]{1,2}\n| AS \"memory\", root: x\n| Root memory region: x\n|  [0-9a-f]{15,17}-[0-9a-f]{15,17} \\(prio [0-9]{1,12}, (ram|nv-rom|i/o)\\): x( @[0-9a-f]{16})?( owner:\\{[ a-z=]{0,9}\\})?( KVM)?\n|\n|.{0,20}\n){0,12}") {
            let _ = FlatViews::parse(&text);
        }

        #[test]
        fn a_printed_line_is_read_back(first in any::<u64>(), len in 1u64..1 << 40, prio in any::<i32>(),
                                       offset in 0u64..1 << 50, kvm in any::<bool>(), owned in any::<bool>()) {
            let last = first.saturating_add(len - 1);
            let at = if offset == 0 { String::new() } else { format!(" @{offset:016x}") };
            let owner = if owned { " owner:{obj path=/objects/m 0}" } else { "" };
            let kvm_text = if kvm { " KVM" } else { "" };
            let line = format!("  {first:016x}-{last:016x} (prio {prio}, ram): m 0{at}{owner}{kvm_text}");
            let entry = one(&line).unwrap();
            prop_assert_eq!((entry.first, entry.last, entry.priority), (first, last, prio));
            prop_assert_eq!((entry.offset, entry.in_kvm, entry.owner.is_some()), (offset, kvm, owned));
            prop_assert_eq!(entry.name, "m 0");
        }
    }
}
