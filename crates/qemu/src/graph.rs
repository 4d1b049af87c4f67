//! The text of HMP `info mtree -o -D`: QEMU's acyclic graph of MemoryRegions, as address spaces look at
//! it.
//!
//! A MemoryRegion is a container of others, memory, a device's registers, or an *alias*, a window onto a
//! part of another one. The text is printed by `mtree_info` and `mtree_print_mr` in `system/memory.c`
//! (`softmmu/memory.c` in 7.2): a tree for each root that address spaces have, then one for each region
//! that an alias led to:
//!
//! ```text
//! address-space: cpu-memory-0
//! address-space: memory
//!   0000000000000000-ffffffffffffffff (prio 0, i/o): system owner:{..}
//!     0000000000000000-000000007fffffff (prio 0, ram): alias ram-below-4g @pc.ram 0000000000000000-000000007fffffff
//!     00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem [disabled]
//!
//! memory-region: pc.ram
//!   0000000000000000-000000007fffffff (prio 0, ram): pc.ram owner:{obj path=/objects/pc.ram}
//! ```
//!
//! Addresses are those in the root, not in the parent. Without `-D` a region that is not enabled is left
//! out, and what is in it is printed all the same, one step deeper than what is printed above it: so it is
//! asked with `-D`. As with the flat views, what is not understood is an error that names the line.

use crate::mtree::{Entry, Line, Lines, MtreeError, Object, RangeType, hex16, take_owners};
use crate::qmp::{Hmp, Qmp, QmpError};
use evidence::GuestRange;
use evidence::range::hex;
use serde::Serialize;
use std::collections::HashMap;
use std::time::Duration;

/// Regions that one text may have; a machine with 256 DIMMs and 100 devices has some thousands.
const MAX_NODES: usize = 1_000_000;

/// How deep the tree may be; QEMU's machines have about ten levels.
const MAX_DEPTH: usize = 256;

/// One MemoryRegion where the text shows it: an alias's target is shown once, wherever aliases lead to
/// it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// First address in the root.
    #[serde(serialize_with = "hex::serialize")]
    pub first: u64,
    /// Last address in the root, included.
    #[serde(serialize_with = "hex::serialize")]
    pub last: u64,
    /// Of regions that lie over each other, the one with the highest priority answers.
    pub priority: i32,
    /// What QEMU calls it; a container is `i/o` too.
    pub range_type: RangeType,
    /// Persistent memory.
    pub nonvolatile: bool,
    /// Its name; need not be unique.
    pub name: String,
    /// It is a window onto this.
    pub alias: Option<Alias>,
    /// The guest, or the chipset, has switched it on.
    pub enabled: bool,
    /// Who owns it.
    pub owner: Option<Object>,
    /// Its parent in the object tree, when another than the owner.
    pub parent: Option<Object>,
    /// What it contains, in QEMU's order: by address, then by priority, the highest first.
    pub children: Vec<usize>,
}

/// What an alias shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alias {
    /// Name of the other region.
    pub target: String,
    /// Offset of the first byte in it.
    #[serde(serialize_with = "hex::serialize")]
    pub first: u64,
    /// Offset of the last byte in it, included.
    #[serde(serialize_with = "hex::serialize")]
    pub last: u64,
}

/// A tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tree {
    /// The address spaces that have this root, by their names; empty for a region that an alias led to.
    pub spaces: Vec<String>,
    /// The name behind `memory-region:`; empty for address spaces.
    pub region: String,
    /// The root, by its place in [`Graph::nodes`]; absent for an address space without one.
    pub root: Option<usize>,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Graph {
    /// Every region, parents before their children.
    pub nodes: Vec<Node>,
    /// The trees, in the text's order.
    pub trees: Vec<Tree>,
}

/// Memory at the place where the guest would see it if nothing lay over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Where.
    pub range: GuestRange,
    /// What, by its place in [`Graph::nodes`]: no alias.
    pub node: usize,
    /// Offset in it of the range's first byte.
    pub offset: u64,
}

/// Memory that the guest does not see, for something else answers there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hidden {
    /// First guest-physical address.
    #[serde(serialize_with = "hex::serialize")]
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// The MemoryRegion.
    pub name: String,
    /// Offset in it of the first byte.
    #[serde(serialize_with = "hex::serialize")]
    pub offset: u64,
    /// What answers instead; absent when nothing does.
    pub by: Option<String>,
    /// A guest-physical address at which the guest does see the same bytes, if there is one for all of them.
    #[serde(serialize_with = "hex::optional")]
    pub shown_at: Option<u64>,
}

/// The address space that is the guest's physical memory.
pub const MEMORY: &str = "memory";

/// How many regions a walk from the root may come through: each alias is followed.
const MAX_STEPS: usize = 1_000_000;

impl Graph {
    /// Asks QEMU for its graph.
    ///
    /// # Errors
    /// The monitor's; or the text is not understood.
    pub fn take(qmp: &mut Qmp, timeout: Duration) -> Result<Result<Self, MtreeError>, QmpError> {
        Ok(Self::parse(&qmp.hmp(Hmp::InfoMtreeGraph, timeout)?))
    }

    /// Reads the text; line ends may be `\n` or `\r\n`.
    ///
    /// # Errors
    /// [`MtreeError`] for the first line that is not understood.
    pub fn parse(text: &str) -> Result<Self, MtreeError> {
        let mut graph = Self::default();
        let mut lines = Lines::new(text);
        let mut pending = None;
        while let Some(line) = pending.take().or_else(|| lines.next_filled()) {
            let mut tree = Tree { spaces: Vec::new(), region: String::new(), root: None };
            if let Some(name) = line.text.strip_prefix("memory-region: ") {
                tree.region = name.to_owned();
            } else {
                let name = line.text.strip_prefix("address-space: ");
                tree.spaces.push(name.ok_or_else(|| line.error())?.to_owned());
            }
            pending = graph.tree(&mut tree, &mut lines)?;
            graph.trees.push(tree);
        }
        Ok(graph)
    }

    /// Reads what stands under a tree's first line, up to an empty line; gives back a line that begins
    /// another tree.
    fn tree<'a>(
        &mut self,
        tree: &mut Tree,
        lines: &mut Lines<'a>,
    ) -> Result<Option<Line<'a>>, MtreeError> {
        // The way from the root to the last region, each with its depth.
        let mut way: Vec<(usize, usize)> = Vec::new();
        while let Some(line) = lines.next() {
            if line.text.is_empty() {
                return Ok(None);
            }
            let more = line.text.strip_prefix("address-space: ");
            if let Some(name) = more.filter(|_| tree.root.is_none() && !tree.spaces.is_empty()) {
                tree.spaces.push(name.to_owned());
                continue;
            }
            if line.text.starts_with("memory-region: ") || more.is_some() {
                return Ok(Some(line));
            }
            let (depth, node) = parse_node(line.text).ok_or_else(|| line.error())?;
            if self.nodes.len() >= MAX_NODES {
                return Err(MtreeError::TooMany);
            }
            let at = self.nodes.len();
            self.nodes.push(node);
            while way.last().is_some_and(|(above, _)| *above >= depth) {
                way.pop();
            }
            match way.last() {
                Some((_, parent)) => {
                    if let Some(parent) = self.nodes.get_mut(*parent) {
                        parent.children.push(at);
                    }
                }
                None if tree.root.is_none() => tree.root = Some(at),
                // A second root.
                None => return Err(line.error()),
            }
            way.push((depth, at));
        }
        Ok(None)
    }

    /// The tree of the address space `name`.
    pub fn space(&self, name: &str) -> Option<&Tree> {
        self.trees.iter().find(|tree| tree.spaces.iter().any(|space| space == name))
    }

    /// The root of the one tree that shows the region `name`, to which aliases led.
    pub fn region(&self, name: &str) -> Option<&Node> {
        self.nodes.get(self.root_of(name)?)
    }

    /// The same by its place in [`Graph::nodes`].
    pub fn root_of(&self, name: &str) -> Option<usize> {
        let mut trees = self.trees.iter().filter(|tree| tree.region == name);
        let tree = trees.next()?;
        // Names need not be unique, and then it is not known which one an alias means.
        if trees.next().is_some() { None } else { tree.root }
    }

    /// All memory under the root of [`MEMORY`], whatever lies over it; in no order.
    ///
    /// # Errors
    /// What an alias leads to is not in the text or not the only one of its name, or the walk does not
    /// end.
    pub fn leaves(&self) -> Result<Vec<Leaf>, String> {
        let root = self.space(MEMORY).and_then(|tree| tree.root);
        let root = root.ok_or_else(|| format!("no address space {MEMORY:?} with a root"))?;
        let mut leaves = Vec::new();
        // A node; the part of it that shows, in the root's addresses; what is added to the node's own
        // addresses to have the root's.
        let mut ways = vec![(root, (0, u64::MAX), 0u64)];
        let mut steps = 0;
        while let Some((at, (low, high), shift)) = ways.pop() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(format!("more than {MAX_STEPS} steps from the root"));
            }
            let Some(node) = self.nodes.get(at).filter(|node| node.enabled) else { continue };
            let first = node.first.wrapping_add(shift);
            let Some(last) = first.checked_add(node.last.saturating_sub(node.first)) else {
                continue;
            };
            let (low, high) = (low.max(first), high.min(last));
            if low > high {
                continue;
            }
            match &node.alias {
                Some(alias) => {
                    let target = self.root_of(&alias.target).ok_or_else(|| {
                        format!(
                            "{:?} shows {:?}, of which there is not one",
                            node.name, alias.target
                        )
                    })?;
                    let own = self.nodes.get(target).map_or(0, |node| node.first);
                    // Offset `alias.first` of the target lies at the alias's first address.
                    ways.push((
                        target,
                        (low, high),
                        first.wrapping_sub(alias.first).wrapping_sub(own),
                    ));
                }
                None if node.range_type.is_memory() => {
                    if let Some(range) = GuestRange::from_inclusive(low, high) {
                        leaves.push(Leaf { range, node: at, offset: low - first });
                    }
                }
                None => ways.extend(node.children.iter().map(|child| (*child, (low, high), shift))),
            }
        }
        Ok(leaves)
    }

    /// The first memory in the flat view `entries` that no region under the root has there. There is none,
    /// unless the guest changed its machine between the two texts, or one of them is not understood.
    ///
    /// # Errors
    /// As [`Graph::leaves`].
    pub fn unexplained(&self, entries: &[Entry]) -> Result<Option<GuestRange>, String> {
        // By name, and by what has to be added to an offset to have the address.
        let mut there: HashMap<(&str, u64), Vec<GuestRange>> = HashMap::new();
        for leaf in self.leaves()? {
            let Some(node) = self.nodes.get(leaf.node) else { continue };
            let shift = leaf.range.start().wrapping_sub(leaf.offset);
            there.entry((&node.name, shift)).or_default().push(leaf.range);
        }
        let outside = |entry: &Entry| {
            let range = GuestRange::from_inclusive(entry.first, entry.last)?;
            let shift = entry.first.wrapping_sub(entry.offset);
            match there.get(&(entry.name.as_str(), shift)) {
                Some(ranges) => range.first_outside(ranges),
                None => Some(range),
            }
        };
        Ok(entries.iter().filter(|entry| entry.range_type.is_memory()).find_map(outside))
    }

    /// The memory that the flat view `entries`, ascending, does not show where it would lie. Ascending.
    ///
    /// # Errors
    /// As [`Graph::leaves`]; or there are more than a million pieces.
    pub fn hidden(&self, entries: &[Entry]) -> Result<Vec<Hidden>, String> {
        let mut hidden = Vec::new();
        for leaf in self.leaves()? {
            let Some(node) = self.nodes.get(leaf.node) else { continue };
            // The first and last address, and what answers there.
            let mut parts: Vec<(u64, u64, Option<&Entry>)> = Vec::new();
            let (mut at, last) = (leaf.range.start(), leaf.range.last());
            let from = entries.partition_point(|entry| entry.last < at);
            for entry in entries.iter().skip(from).take_while(|entry| entry.first <= last) {
                if entry.first > at {
                    parts.push((at, entry.first - 1, None));
                }
                parts.push((at.max(entry.first), last.min(entry.last), Some(entry)));
                at = entry.last.saturating_add(1);
            }
            if at <= last {
                parts.push((at, last, None));
            }
            for (first, last, by) in parts {
                let offset = leaf.offset + (first - leaf.range.start());
                let len = last - first + 1;
                let shown = by.is_some_and(|by| {
                    by.name == node.name && by.offset.wrapping_add(first - by.first) == offset
                });
                if !shown {
                    hidden.push(Hidden {
                        gpa: first,
                        len,
                        name: node.name.clone(),
                        offset,
                        by: by.map(|by| by.name.clone()),
                        shown_at: shown_at(entries, &node.name, offset, len),
                    });
                }
            }
            if hidden.len() > MAX_NODES {
                return Err(format!("more than {MAX_NODES} pieces are hidden"));
            }
        }
        hidden.sort_by_key(|one| (one.gpa, one.len));
        hidden.dedup();
        Ok(hidden)
    }
}

/// Where the flat view shows these bytes of a region, all in one piece.
fn shown_at(entries: &[Entry], name: &str, offset: u64, len: u64) -> Option<u64> {
    entries.iter().find_map(|entry| {
        let within = offset.checked_sub(entry.offset)?;
        let fits = within.checked_add(len - 1)? <= entry.last - entry.first;
        let same = entry.range_type.is_memory() && entry.name == name && fits;
        same.then(|| entry.first + within)
    })
}

/// What QEMU prints in front of a region whose end wraps.
const OVERFLOW: &str = "[DETECTED OVERFLOW!] ";

/// `  START-END (prio N, TYPE): [alias ]NAME[ @TARGET START-END][ [disabled]][ OWNER]`, and how deep it
/// stands.
fn parse_node(line: &str) -> Option<(usize, Node)> {
    let line = line.strip_prefix(OVERFLOW).unwrap_or(line);
    let rest = line.trim_start_matches(' ');
    let spaces = line.len() - rest.len();
    let depth = spaces / 2;
    if !spaces.is_multiple_of(2) || depth == 0 || depth > MAX_DEPTH {
        return None;
    }
    let (ends, rest) = rest.split_once(" (prio ")?;
    let (first, last) = parse_ends(ends)?;
    let (priority, rest) = rest.split_once(", ")?;
    let (word, rest) = rest.split_once("): ")?;
    let (nonvolatile, word) = match word.strip_prefix("nv-") {
        Some(word) => (true, word),
        None => (false, word),
    };
    let (rest, owners) = take_owners(rest)?;
    let (rest, enabled) = match rest.strip_suffix(" [disabled]") {
        Some(rest) => (rest, false),
        None => (rest, true),
    };
    let (name, alias) = match rest.strip_prefix("alias ").map(parse_alias) {
        // A region that is only called so is none.
        None | Some(None) => (rest, None),
        Some(Some((name, alias))) => (name, Some(alias)),
    };
    let node = Node {
        first,
        last,
        priority: priority.parse().ok()?,
        range_type: RangeType::parse(word)?,
        nonvolatile,
        name: name.to_owned(),
        alias,
        enabled,
        owner: owners.owner,
        parent: owners.parent,
        children: Vec::new(),
    };
    Some((depth, node))
}

/// `NAME @TARGET START-END`; either name may hold anything.
fn parse_alias(text: &str) -> Option<(&str, Alias)> {
    let (front, ends) = text.rsplit_once(' ')?;
    let (first, last) = parse_ends(ends)?;
    let (name, target) = front.rsplit_once(" @")?;
    Some((name, Alias { target: target.to_owned(), first, last }))
}

fn parse_ends(text: &str) -> Option<(u64, u64)> {
    let (first, last) = text.split_once('-')?;
    Some((hex16(first)?, hex16(last)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "\
address-space: cpu-memory-0
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system owner:{obj path=/machine}
    0000000000000000-000000007fffffff (prio 0, ram): alias ram-below-4g @pc.ram 0000000000000000-000000007fffffff
    00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem [disabled] owner:{dev path=/machine/q35}
      00000000000a0000-00000000000affff (prio 0, ram): alias of the @ bank 0 @vga.vram 0000000000000000-000000000000ffff
    0000000100000000-000000017fffffff (prio -1000, nv-ram): nvdimm

address-space: I/O
  0000000000000000-000000000000ffff (prio 0, i/o): io

memory-region: pc.ram
  0000000000000000-00000000ffffffff (prio 0, ram): pc.ram owner:{obj path=/objects/pc.ram}

";

    #[test]
    fn a_graph_is_read_as_it_is_printed() {
        let graph = Graph::parse(TEXT).unwrap();
        let memory = graph.space("memory").unwrap();
        assert_eq!(memory.spaces, ["cpu-memory-0", "memory"]);
        let root = &graph.nodes[memory.root.unwrap()];
        assert_eq!((root.name.as_str(), root.last, root.children.len()), ("system", u64::MAX, 3));
        let [ram, vga, nvdimm] = [0, 1, 2].map(|n| &graph.nodes[root.children[n]]);
        assert_eq!(ram.alias.as_ref().unwrap().target, "pc.ram");
        assert_eq!((vga.enabled, vga.priority, vga.children.len()), (false, 1, 1));
        let bank = &graph.nodes[vga.children[0]];
        assert_eq!(bank.name, "of the @ bank 0");
        assert_eq!(
            bank.alias.as_ref().map(|a| (a.target.as_str(), a.last)),
            Some(("vga.vram", 0xffff))
        );
        assert_eq!((nvdimm.nonvolatile, nvdimm.priority), (true, -1000));
        assert_eq!(graph.region("pc.ram").unwrap().last, 0xffff_ffff);
        assert_eq!(graph.space("I/O").unwrap().root.map(|at| &*graph.nodes[at].name), Some("io"));
        let crlf = TEXT.replace('\n', "\r\n");
        assert_eq!(Graph::parse(&crlf).unwrap(), graph);
    }

    const OVERLAID: &str = "\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000000000000-000000000fffffff (prio 0, ram): alias ram-below-4g @pc.ram 0000000000000000-000000000fffffff
    0000000000000000-ffffffffffffffff (prio -1, i/o): pci
      00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
      00000000000e0000-00000000000fffff (prio 1, rom): alias isa-bios @pc.bios 0000000000020000-000000000003ffff
    00000000000c0000-00000000000c3fff (prio 1, ram): alias off @pc.ram 00000000000c0000-00000000000c3fff [disabled]
    0000000100000000-000000010fffffff (prio 0, ram): alias ram-above-4g @pc.ram 0000000010000000-000000001fffffff

memory-region: pc.ram
  0000000000000000-000000001fffffff (prio 0, ram): pc.ram

memory-region: pc.bios
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

";

    fn entry(first: u64, last: u64, name: &str, offset: u64) -> Entry {
        Entry {
            first,
            last,
            priority: 0,
            range_type: RangeType::Ram,
            nonvolatile: false,
            name: name.to_owned(),
            offset,
            owner: None,
            parent: None,
            orphan: false,
            in_kvm: false,
        }
    }

    #[test]
    fn memory_under_something_else_is_hidden() {
        let graph = Graph::parse(OVERLAID).unwrap();
        let mut leaves: Vec<_> = graph.leaves().unwrap();
        leaves.sort_by_key(|leaf| leaf.range.start());
        let told: Vec<_> = leaves
            .iter()
            .map(|leaf| (leaf.range.to_string(), &*graph.nodes[leaf.node].name, leaf.offset))
            .collect();
        assert_eq!(
            told,
            [
                ("0x0-0xfffffff".to_owned(), "pc.ram", 0),
                ("0xe0000-0xfffff".to_owned(), "pc.bios", 0x20000),
                ("0x100000000-0x10fffffff".to_owned(), "pc.ram", 0x1000_0000),
            ]
        );
        let view = [
            entry(0, 0x9ffff, "pc.ram", 0),
            Entry { range_type: RangeType::Io, ..entry(0xa0000, 0xbffff, "vga-lowmem", 0) },
            entry(0xc0000, 0xdffff, "pc.ram", 0xc0000),
            entry(0xe0000, 0xfffff, "pc.bios", 0x20000),
            entry(0x10_0000, 0xfff_ffff, "pc.ram", 0x10_0000),
            entry(1 << 32, 0x1_0fff_ffff, "pc.ram", 0x1000_0000),
        ];
        assert_eq!(graph.unexplained(&view).unwrap(), None);
        let hidden = graph.hidden(&view).unwrap();
        let told: Vec<_> =
            hidden.iter().map(|h| (h.gpa, h.len, &*h.name, h.offset, h.by.as_deref())).collect();
        assert_eq!(
            told,
            [
                (0xa0000, 0x20000, "pc.ram", 0xa0000, Some("vga-lowmem")),
                (0xe0000, 0x20000, "pc.ram", 0xe0000, Some("pc.bios")),
            ]
        );
        assert!(hidden.iter().all(|one| one.shown_at.is_none()));
        let nothing = graph.hidden(&view[..5]).unwrap();
        assert_eq!(nothing.last().map(|h| (h.gpa, h.by.as_deref())), Some((1 << 32, None)));
    }

    #[test]
    fn what_is_hidden_here_may_be_shown_there() {
        let graph = Graph::parse(OVERLAID).unwrap();
        // The firmware under RAM, and all of it at another place.
        let view = [
            entry(0, 0xfff_ffff, "pc.ram", 0),
            entry(0xfffc_0000, 0xffff_ffff, "pc.bios", 0),
            entry(1 << 32, 0x1_0fff_ffff, "pc.ram", 0x1000_0000),
        ];
        let hidden = graph.hidden(&view).unwrap();
        let told: Vec<_> = hidden.iter().map(|h| (h.gpa, &*h.name, h.shown_at)).collect();
        assert_eq!(told, [(0xe0000, "pc.bios", Some(0xfffe_0000))]);
    }

    #[test]
    fn memory_that_no_region_has_is_not_explained() {
        let graph = Graph::parse(OVERLAID).unwrap();
        let first = |view: &[Entry]| graph.unexplained(view).unwrap().map(|r| r.to_string());
        assert_eq!(first(&[entry(0x1000, 0x1fff, "pc.ram", 0x1000)]), None);
        let other = first(&[entry(0x1000, 0x1fff, "pc.ram", 0x2000)]);
        assert_eq!(other.as_deref(), Some("0x1000-0x1fff"), "another offset");
        let beyond = first(&[entry(0xfff_f000, 0x1000_0fff, "pc.ram", 0xfff_f000)]);
        assert_eq!(beyond.as_deref(), Some("0x10000000-0x10000fff"));
        assert!(first(&[entry(0x1000, 0x1fff, "spare", 0)]).is_some(), "another region");
        let registers = Entry { range_type: RangeType::Io, ..entry(0x1000, 0x1fff, "x", 0) };
        assert_eq!(first(&[registers]), None);
    }

    #[test]
    fn an_alias_to_one_of_two_leads_nowhere() {
        let twice = format!(
            "{OVERLAID}memory-region: pc.bios\n  \
             0000000000000000-0000000000000fff (prio 0, rom): pc.bios\n"
        );
        assert!(Graph::parse(&twice).unwrap().leaves().unwrap_err().contains("pc.bios"));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for bad in [
            "memory: system\n",
            "address-space: memory\n  0-1 (prio 0, ram): x\n",
            "address-space: memory\n 0000000000000000-0000000000000001 (prio 0, ram): x\n",
            "address-space: memory\n  0000000000000000-0000000000000001 (prio 0, rem): x\n",
            "address-space: memory\n  0000000000000000-0000000000000001 (prio z, ram): x\n",
            "address-space: memory\n  0000000000000000-0000000000000001 (prio 0, ram): x\n  \
             0000000000000000-0000000000000001 (prio 0, ram): y\n",
            "address-space: memory\n  0000000000000000-0000000000000001 (prio 0, ram): x owner:{what}\n",
        ] {
            assert!(matches!(Graph::parse(bad), Err(MtreeError::Line { .. })), "{bad}");
        }
        let deep =
            format!("{}0000000000000000-0000000000000001 (prio 0, ram): x", " ".repeat(1024));
        assert!(Graph::parse(&format!("address-space: memory\n{deep}\n")).is_err());
        assert_eq!(Graph::parse("").unwrap(), Graph::default());
    }

    proptest! {
        #[test]
        fn no_text_breaks_it(text in "(address-space: m|memory-region: r|  0{16}-0{16} \\(prio 0, ram\\): a|\n| |.)*") {
            if let Ok(graph) = Graph::parse(&text) {
                let _ = (graph.hidden(&[]), graph.unexplained(&[]));
            }
        }
    }
}
