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

use crate::mtree::{
    Entry, FlatViews, Line, Lines, MtreeError, Object, RangeType, hex16, take_owners,
};
use crate::qmp::{Hmp, Qmp, QmpError};
use evidence::GuestRange;
use evidence::range::hex;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// Regions that one text may have; a machine with 256 DIMMs and 100 devices has some thousands.
const MAX_NODES: usize = 100_000;

/// Trees that one text may have: every PCI device that may read memory has an address space.
const MAX_TREES: usize = 10_000;

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
    /// It has neither.
    pub orphan: bool,
    /// What it contains, in QEMU's order: by address, then by priority, the highest first.
    pub children: Vec<usize>,
}

/// What an alias shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hidden {
    /// First guest-physical address.
    #[serde(with = "hex")]
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// The MemoryRegion.
    pub name: String,
    /// Who owns it, in QEMU's words, as [`evidence::Region::owner`] has it.
    pub owner: Option<String>,
    /// Offset in it of the first byte.
    #[serde(with = "hex")]
    pub offset: u64,
    /// What answers instead; absent when nothing does.
    pub by: Option<String>,
    /// A guest-physical address at which the guest does see the same bytes, if there is one for all of them.
    #[serde(serialize_with = "hex::optional", deserialize_with = "hex::deserialize_optional")]
    pub shown_at: Option<u64>,
}

/// What the graph and the flat view say of each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// How their memory differs; `None`: it does not. It would, if the guest changed its machine between the
    /// two texts.
    pub difference: Option<String>,
    /// The memory that the flat view does not show where it would lie. Ascending.
    pub hidden: Vec<Hidden>,
    /// As [`Leaves::unknown`].
    pub unknown: Vec<(GuestRange, String)>,
}

/// The address space that is the guest's physical memory.
pub const MEMORY: &str = "memory";

/// How many regions a walk from the root may come through, and how many pieces of memory may be hidden: each
/// alias is followed.
const MAX_STEPS: usize = 200_000;

/// What an address space has in it, as the graph says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaves {
    /// All memory, whatever lies over it; in no order.
    pub memory: Vec<Leaf>,
    /// Where an alias shows something of which the text does not say for certain what it is, and the alias's
    /// name.
    pub unknown: Vec<(GuestRange, String)>,
}

/// Which tree shows what an alias leads to.
#[derive(Debug)]
pub struct Index<'g> {
    graph: &'g Graph,
    by_region: HashMap<&'g str, Vec<usize>>,
}

impl<'g> Index<'g> {
    /// Of a graph.
    pub fn of(graph: &'g Graph) -> Self {
        let mut by_region: HashMap<&str, Vec<usize>> = HashMap::new();
        for tree in &graph.trees {
            if let (false, Some(root)) = (tree.region.is_empty(), tree.root) {
                by_region.entry(&tree.region).or_default().push(root);
            }
        }
        Self { graph, by_region }
    }

    /// The region that an alias shows, by its place in [`Graph::nodes`]. Names need not be unique (every
    /// PCI bridge calls its window's content `pci_bridge_pci`): of several the one is meant that has the
    /// alias's own owner. `None` when that is not one, or the text has none.
    pub fn target(&self, alias: &Node) -> Option<usize> {
        let roots = self.by_region.get(alias.alias.as_ref()?.target.as_str())?;
        if let [root] = roots[..] {
            return Some(root);
        }
        let owner = alias.owner.as_ref()?;
        let is_its = |root: &&usize| {
            self.graph.nodes.get(**root).is_some_and(|node| node.owner.as_ref() == Some(owner))
        };
        let mut its = roots.iter().filter(is_its);
        let first = its.next()?;
        if its.next().is_some() { None } else { Some(*first) }
    }
}

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
            let begin = line;
            pending = graph.tree(&mut tree, &mut lines)?;
            let root = tree.root.and_then(|root| graph.nodes.get(root));
            let is_it = |node: &Node| tree.region.is_empty() || node.name == tree.region;
            if !root.is_none_or(is_it) || graph.trees.len() >= MAX_TREES {
                return Err(begin.error());
            }
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

    /// All memory under the root of [`MEMORY`], whatever lies over it.
    ///
    /// # Errors
    /// There is no such root, or the walk does not end.
    pub fn leaves(&self) -> Result<Leaves, String> {
        let root = self.space(MEMORY).and_then(|tree| tree.root);
        let root = root.ok_or_else(|| format!("no address space {MEMORY:?} with a root"))?;
        let index = Index::of(self);
        let mut leaves = Leaves::default();
        // A node; the part of it that shows, in the root's addresses; what is added to the node's own
        // addresses to have the root's. An alias's target may begin far below 0, or end beyond 2^64.
        let mut ways = vec![(root, (0i128, i128::from(u64::MAX)), 0i128)];
        let mut steps = 0usize;
        while let Some((at, (low, high), shift)) = ways.pop() {
            let Some(node) = self.nodes.get(at).filter(|node| node.enabled) else { continue };
            let first = i128::from(node.first) + shift;
            let (low, high) = (low.max(first), high.min(i128::from(node.last) + shift));
            // Both lie in the root's addresses now.
            let (Ok(from), Ok(to)) = (u64::try_from(low), u64::try_from(high)) else { continue };
            if low > high {
                continue;
            }
            steps = steps.saturating_add(1).saturating_add(node.children.len());
            if steps > MAX_STEPS {
                return Err(format!("more than {MAX_STEPS} steps from the root"));
            }
            match &node.alias {
                Some(alias) => {
                    match index.target(node).and_then(|at| Some((at, self.nodes.get(at)?))) {
                        // Offset `alias.first` of the target lies at the alias's first address.
                        Some((target, its)) => {
                            let shift = first - i128::from(alias.first) - i128::from(its.first);
                            ways.push((target, (low, high), shift));
                        }
                        None => {
                            let range = GuestRange::from_inclusive(from, to);
                            leaves.unknown.extend(range.map(|range| (range, node.name.clone())));
                        }
                    }
                }
                None if node.range_type.is_memory() => {
                    let offset = u64::try_from(low - first);
                    if let (Some(range), Ok(offset)) =
                        (GuestRange::from_inclusive(from, to), offset)
                    {
                        leaves.memory.push(Leaf { range, node: at, offset });
                    }
                }
                None => ways.extend(node.children.iter().map(|child| (*child, (low, high), shift))),
            }
        }
        Ok(leaves)
    }

    /// Holds the graph against the flat view `entries`, ascending, which QEMU draws from it.
    ///
    /// # Errors
    /// As [`Graph::leaves`]; or there are too many pieces.
    pub fn compare(&self, entries: &[Entry]) -> Result<Comparison, String> {
        let Leaves { memory, unknown } = self.leaves()?;
        let hidden = self.hidden(&memory, entries)?;
        // What lies under nothing would be seen.
        let seen = hidden.iter().find(|one| one.by.is_none()).map(|one| {
            let (name, last) = (&one.name, one.gpa.saturating_add(one.len - 1));
            format!("the graph shows {name:?} at {:#x}-{last:#x}, the flat view nothing", one.gpa)
        });
        let difference = self.unexplained(&memory, &unknown, entries).or(seen);
        Ok(Comparison { difference, hidden, unknown })
    }

    /// The same with the guest's memory in the text of `info mtree -f -o`.
    ///
    /// # Errors
    /// As [`Graph::compare`], or why the text is not understood.
    pub fn against(&self, mtree: &str) -> Result<Comparison, String> {
        let views = FlatViews::parse(mtree).map_err(|error| error.to_string())?;
        self.compare(&views.memory().map_err(|error| error.to_string())?.entries)
    }

    /// The first memory in the flat view that no region of the graph has there.
    fn unexplained(
        &self,
        memory: &[Leaf],
        unknown: &[(GuestRange, String)],
        entries: &[Entry],
    ) -> Option<String> {
        // By region, and by what has to be added to an offset to have the address.
        let mut there: HashMap<(Identity<'_>, u64), Vec<GuestRange>> = HashMap::new();
        for leaf in memory {
            let Some(node) = self.nodes.get(leaf.node) else { continue };
            let shift = leaf.range.start().wrapping_sub(leaf.offset);
            there.entry((identity(node), shift)).or_default().push(leaf.range);
        }
        let unknown: Vec<GuestRange> = unknown.iter().map(|(range, _)| *range).collect();
        entries.iter().filter(|entry| entry.range_type.is_memory()).find_map(|entry| {
            let range = GuestRange::from_inclusive(entry.first, entry.last)?;
            let shift = entry.first.wrapping_sub(entry.offset);
            let its = there.get(&(entry_identity(entry), shift)).map_or(&[][..], Vec::as_slice);
            let more = range.first_outside(&[its, &unknown].concat())?;
            let name = &entry.name;
            Some(format!(
                "the flat view has {name:?} at {more}, which no region of the graph shows there"
            ))
        })
    }

    fn hidden(&self, memory: &[Leaf], entries: &[Entry]) -> Result<Vec<Hidden>, String> {
        let mut by_region: HashMap<Identity<'_>, Vec<&Entry>> = HashMap::new();
        for entry in entries.iter().filter(|entry| entry.range_type.is_memory()) {
            by_region.entry(entry_identity(entry)).or_default().push(entry);
        }
        let mut hidden = Vec::new();
        let mut steps = 0usize;
        for leaf in memory {
            let Some(node) = self.nodes.get(leaf.node) else { continue };
            let its = by_region.get(&identity(node)).map_or(&[][..], Vec::as_slice);
            for (first, last, by) in parts(leaf.range, entries) {
                let offset = leaf.offset + (first - leaf.range.start());
                let len = last - first + 1;
                let shown = by.is_some_and(|by| {
                    entry_identity(by) == identity(node)
                        && by.offset.wrapping_add(first - by.first) == offset
                });
                steps = steps.saturating_add(1);
                if !shown {
                    steps = steps.saturating_add(its.len());
                    hidden.push(Hidden {
                        gpa: first,
                        len,
                        name: node.name.clone(),
                        owner: node.owner.as_ref().or(node.parent.as_ref()).map(Object::to_string),
                        offset,
                        by: by.map(|by| by.name.clone()),
                        shown_at: shown_at(its, offset, len),
                    });
                }
                if steps > MAX_STEPS {
                    return Err(format!("more than {MAX_STEPS} pieces of memory"));
                }
            }
        }
        hidden.sort_by(|a, b| {
            (a.gpa, a.len, &a.name, a.offset).cmp(&(b.gpa, b.len, &b.name, b.offset))
        });
        hidden.dedup();
        Ok(hidden)
    }

    /// The regions to show, by their places in [`Graph::nodes`], so that each that is switched on is shown once:
    /// the root of [`MEMORY`], and what aliases lead to and does not stand under one before.
    pub fn parts(&self) -> Vec<usize> {
        let index = Index::of(self);
        let mut wanted: Vec<usize> =
            self.space(MEMORY).and_then(|tree| tree.root).into_iter().collect();
        let mut seen = HashSet::new();
        let mut parts = Vec::new();
        let mut next = 0;
        while let Some(root) = wanted.get(next).copied() {
            next += 1;
            // The text has a region that others lead to once more, in a tree of its own.
            let Some(node) = self.nodes.get(root) else { continue };
            if seen.contains(&(identity(node), &node.alias)) {
                continue;
            }
            seen.insert((identity(node), &node.alias));
            parts.push(root);
            let mut ways = vec![root];
            while let Some(at) = ways.pop() {
                let Some(node) = self.nodes.get(at).filter(|node| node.enabled) else { continue };
                seen.insert((identity(node), &node.alias));
                wanted.extend(index.target(node));
                ways.extend(node.children.iter().rev());
            }
        }
        parts
    }
}

/// A range cut where what answers changes: the first and last address of each part, and what answers there.
fn parts(range: GuestRange, entries: &[Entry]) -> Vec<(u64, u64, Option<&Entry>)> {
    let mut parts = Vec::new();
    let (mut at, last) = (range.start(), range.last());
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
    parts
}

/// What tells regions apart in both texts; names need not be unique.
type Identity<'a> = (&'a str, Option<&'a Object>, Option<&'a Object>);

fn identity(node: &Node) -> Identity<'_> {
    (&node.name, node.owner.as_ref(), node.parent.as_ref())
}

fn entry_identity(entry: &Entry) -> Identity<'_> {
    (&entry.name, entry.owner.as_ref(), entry.parent.as_ref())
}

/// Where the flat view shows these bytes of a region, all in one piece; `entries` are those of the region.
fn shown_at(entries: &[&Entry], offset: u64, len: u64) -> Option<u64> {
    entries.iter().find_map(|entry| {
        let within = offset.checked_sub(entry.offset)?;
        let fits = within.checked_add(len - 1)? <= entry.last - entry.first;
        fits.then(|| entry.first + within)
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
        orphan: owners.orphan,
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
    use crate::mtree::ObjectName;
    use crate::mtree::tests::entry;
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
        let target = Index::of(&graph).target(ram).map(|at| graph.nodes[at].last);
        assert_eq!((target, Index::of(&graph).target(bank)), (Some(0xffff_ffff), None));
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

    #[test]
    fn memory_under_something_else_is_hidden() {
        let graph = Graph::parse(OVERLAID).unwrap();
        let mut leaves = graph.leaves().unwrap().memory;
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
            entry("pc.ram", 0, 0x9ffff, 0),
            Entry { range_type: RangeType::Io, ..entry("vga-lowmem", 0xa0000, 0xbffff, 0) },
            entry("pc.ram", 0xc0000, 0xdffff, 0xc0000),
            entry("pc.bios", 0xe0000, 0xfffff, 0x20000),
            entry("pc.ram", 0x10_0000, 0xfff_ffff, 0x10_0000),
            entry("pc.ram", 1 << 32, 0x1_0fff_ffff, 0x1000_0000),
        ];
        assert_eq!(graph.compare(&view).unwrap().difference, None);
        let hidden = graph.compare(&view).unwrap().hidden;
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
        let nothing = graph.compare(&view[..5]).unwrap().hidden;
        assert_eq!(nothing.last().map(|h| (h.gpa, h.by.as_deref())), Some((1 << 32, None)));
    }

    #[test]
    fn what_is_hidden_here_may_be_shown_there() {
        let graph = Graph::parse(OVERLAID).unwrap();
        // The firmware under RAM, and all of it at another place.
        let view = [
            entry("pc.ram", 0, 0xfff_ffff, 0),
            entry("pc.bios", 0xfffc_0000, 0xffff_ffff, 0),
            entry("pc.ram", 1 << 32, 0x1_0fff_ffff, 0x1000_0000),
        ];
        let hidden = graph.compare(&view).unwrap().hidden;
        let told: Vec<_> = hidden.iter().map(|h| (h.gpa, &*h.name, h.shown_at)).collect();
        assert_eq!(told, [(0xe0000, "pc.bios", Some(0xfffe_0000))]);
    }

    #[test]
    fn memory_that_only_one_of_them_has_is_a_difference() {
        let graph = Graph::parse(OVERLAID).unwrap();
        let whole = [
            entry("pc.ram", 0, 0xd_ffff, 0),
            entry("pc.bios", 0xe0000, 0xfffff, 0x20000),
            entry("pc.ram", 0x10_0000, 0xfff_ffff, 0x10_0000),
            entry("pc.ram", 1 << 32, 0x1_0fff_ffff, 0x1000_0000),
        ];
        let differs = |change: &dyn Fn(&mut Vec<Entry>)| {
            let mut view = whole.to_vec();
            change(&mut view);
            graph.compare(&view).unwrap().difference
        };
        assert_eq!(differs(&|_| ()), None);
        let told = differs(&|view| view[2].offset += 0x1000).unwrap();
        assert!(told.contains("\"pc.ram\" at 0x100000-0xfffffff"), "another offset: {told}");
        let told = differs(&|view| view[2].last += 0x1000).unwrap();
        assert!(told.contains("\"pc.ram\" at 0x10000000-0x10000fff"), "{told}");
        assert!(differs(&|view| view[2].name = "spare".into()).is_some(), "another region");
        let told = differs(&|view| drop(view.remove(3))).unwrap();
        assert!(told.contains("0x100000000-0x10fffffff, the flat view nothing"), "{told}");
        let more = Entry { range_type: RangeType::Io, ..entry("x", 1 << 40, 1 << 41, 0) };
        assert_eq!(differs(&|view| view.push(more.clone())), None, "registers");
    }

    /// A VGA bank: the window shows what lies beyond its own address, so the target would begin below 0.
    #[test]
    fn a_window_may_show_what_lies_far_inside() {
        let text = "\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    00000000000a0000-00000000000affff (prio 1, ram): alias chain4 @vga.vram 0000000000f00000-0000000000f0ffff

memory-region: vga.vram
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
";
        let graph = Graph::parse(text).unwrap();
        let leaves = graph.leaves().unwrap().memory;
        assert_eq!((leaves.len(), leaves[0].offset), (1, 0xf0_0000));
        assert_eq!(leaves[0].range.to_string(), "0xa0000-0xaffff");
        let view = [entry("vga.vram", 0xa0000, 0xaffff, 0xf0_0000)];
        assert_eq!(graph.compare(&view).unwrap().difference, None);
    }

    #[test]
    fn of_regions_with_one_name_the_owners_is_meant() {
        let text = "\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000010000000-000000001fffffff (prio 1, i/o): alias window @pci_bridge_pci 0000000010000000-000000001fffffff owner:{dev id=a}
    0000000020000000-000000002fffffff (prio 1, i/o): alias window @pci_bridge_pci 0000000020000000-000000002fffffff owner:{dev id=b}
    0000000030000000-000000003fffffff (prio 1, i/o): alias other @pci_bridge_pci 0000000030000000-000000003fffffff owner:{dev id=c}

memory-region: pci_bridge_pci
  0000000000000000-ffffffffffffffff (prio 0, i/o): pci_bridge_pci owner:{dev id=a}
    0000000010000000-0000000010ffffff (prio 1, ram): bar.a owner:{dev id=x}

memory-region: pci_bridge_pci
  0000000000000000-ffffffffffffffff (prio 0, i/o): pci_bridge_pci owner:{dev id=b}
    0000000020000000-0000000020ffffff (prio 1, ram): bar.b owner:{dev id=y}
";
        let graph = Graph::parse(text).unwrap();
        let Leaves { memory, unknown } = graph.leaves().unwrap();
        let parts: Vec<_> = graph.parts().iter().map(|at| graph.nodes[*at].owner.clone()).collect();
        assert_eq!(parts.len(), 3, "the root and two bridges: {parts:?}");
        let mut told: Vec<_> =
            memory.iter().map(|leaf| (leaf.range.start(), &*graph.nodes[leaf.node].name)).collect();
        told.sort_unstable();
        assert_eq!(told, [(0x1000_0000, "bar.a"), (0x2000_0000, "bar.b")]);
        assert_eq!(unknown, [(GuestRange::new(3 << 28, 1 << 28).unwrap(), "other".to_owned())]);
        let of = |id: &str, entry: Entry| {
            let name = ObjectName::Id(id.to_owned());
            Entry { owner: Some(Object { is_device: true, name }), ..entry }
        };
        let view = [
            of("x", entry("bar.a", 0x1000_0000, 0x10ff_ffff, 0)),
            of("y", entry("bar.b", 0x2000_0000, 0x20ff_ffff, 0)),
            of("z", entry("bar.c", 0x3000_0000, 0x30ff_ffff, 0)),
        ];
        assert_eq!(graph.compare(&view).unwrap().difference, None);
        assert!(graph.compare(&view[1..]).unwrap().difference.is_some());
        let other = [of("y", view[0].clone()), view[1].clone()];
        assert!(
            graph.compare(&other).unwrap().difference.is_some(),
            "another device's of that name"
        );
    }

    /// Some hundred kilobytes of text that lead to more ways than there is memory for.
    #[test]
    fn a_graph_that_leads_into_itself_is_given_up() {
        let mut text = String::from("address-space: memory\n");
        let all = "0000000000000000-ffffffffffffffff";
        text.push_str(&format!(
            "  {all} (prio 0, i/o): system\n    {all} (prio 0, i/o): alias a @b {all}\n\n"
        ));
        text.push_str(&format!("memory-region: b\n  {all} (prio 0, i/o): b\n"));
        for _ in 0..1000 {
            text.push_str(&format!("    {all} (prio 0, i/o): alias c @b {all}\n"));
        }
        let told = Graph::parse(&text).unwrap().leaves().unwrap_err();
        assert!(told.contains("steps"), "{told}");
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
            "memory-region: x\n  0000000000000000-0000000000000001 (prio 0, ram): y\n",
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
                let _ = (graph.compare(&[]), graph.parts());
            }
        }
    }
}
