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

use crate::mtree::{Line, Lines, MtreeError, Object, RangeType, hex16, take_owners};
use serde::Serialize;

/// Regions that one text may have; a machine with 256 DIMMs and 100 devices has some thousands.
const MAX_NODES: usize = 1_000_000;

/// How deep the tree may be; QEMU's machines have about ten levels.
const MAX_DEPTH: usize = 256;

/// One MemoryRegion where the text shows it: an alias's target is shown once, wherever aliases lead to
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// First address in the root.
    pub first: u64,
    /// Last address in the root, included.
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
    pub first: u64,
    /// Offset of the last byte in it, included.
    pub last: u64,
}

/// A tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The address spaces that have this root, by their names; empty for a region that an alias led to.
    pub spaces: Vec<String>,
    /// The name behind `memory-region:`; empty for address spaces.
    pub region: String,
    /// The root, by its place in [`Graph::nodes`]; absent for an address space without one.
    pub root: Option<usize>,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graph {
    /// Every region, parents before their children.
    pub nodes: Vec<Node>,
    /// The trees, in the text's order.
    pub trees: Vec<Tree>,
}

impl Graph {
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

    /// The root of the tree that shows the region `name`, to which aliases led.
    pub fn region(&self, name: &str) -> Option<&Node> {
        let tree = self.trees.iter().find(|tree| tree.region == name)?;
        self.nodes.get(tree.root?)
    }
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
            let _ = Graph::parse(&text);
        }
    }
}
