//! Texts of the human monitor. Each is read, printed by code of our own here, and read again.

use crate::take;
use qemu::gpa2hva::{self as answer, Gpa2Hva};
use qemu::graph::{Alias, Graph, Leaf};
use qemu::mtree::{Entry, FlatViews, Object, ObjectName};
use qemu::ramblock as blocks;
use std::fmt::Write as _;

/// `info mtree -f [-o]`
pub fn mtree(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(views) = FlatViews::parse(&text) else { return };
    for view in &views.views {
        for pair in view.entries.windows(2) {
            assert!(pair[0].last < pair[1].first, "ranges are ascending and apart");
        }
        for entry in &view.entries {
            assert!(entry.first <= entry.last);
            let memory = entry.range_type.is_memory();
            assert!(!memory || entry.offset.checked_add(entry.last - entry.first).is_some());
        }
    }
    if let Ok(memory) = views.memory() {
        assert!(memory.address_spaces.iter().any(|space| space.name == "memory"));
    }
    assert_eq!(FlatViews::parse(&print_views(&views)), Ok(views));
}

fn print_views(views: &FlatViews) -> String {
    let mut out = String::new();
    for view in &views.views {
        let _ = write!(out, "FlatView #{}\r\n", view.number);
        for space in &view.address_spaces {
            let _ = write!(out, " AS \"{}\", root: {}\r\n", space.name, space.root);
        }
        out.push_str(" Root memory region: x\r\n");
        view.entries.iter().for_each(|entry| print_entry(&mut out, entry));
        out.push_str("\r\n");
    }
    out
}

fn print_entry(out: &mut String, entry: &Entry) {
    let Entry { first, last, priority, name, offset, .. } = entry;
    let nonvolatile = if entry.nonvolatile { "nv-" } else { "" };
    let word = entry.range_type.word();
    let _ = write!(out, "  {first:016x}-{last:016x} (prio {priority}, {nonvolatile}{word}): ");
    let _ = write!(out, "{name} @{offset:016x}");
    print_owners(out, &entry.owner, &entry.parent);
    out.push_str(if entry.orphan { " orphan" } else { "" });
    out.push_str(if entry.in_kvm { " KVM\r\n" } else { "\r\n" });
}

fn print_owners(out: &mut String, owner: &Option<Object>, parent: &Option<Object>) {
    let object = |Object { is_device, name }: &Object| {
        let (key, value) = match name {
            ObjectName::Id(value) => ("id", value),
            ObjectName::Path(value) => ("path", value),
            ObjectName::Type(value) => ("type", value),
        };
        format!("{{{} {key}={value}}}", if *is_device { "dev" } else { "obj" })
    };
    for (label, who) in [("owner", owner), ("parent", parent)] {
        let _ = who.iter().try_for_each(|who| write!(out, " {label}:{}", object(who)));
    }
}

/// Two views with every form of line.
pub fn mtree_seeds() -> Vec<Vec<u8>> {
    let text = "\
FlatView #0
 AS \"memory\", root: system
 AS \"e1000\", root: bus master container, alias system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram owner:{obj path=/objects/pc.ram} KVM KVM
  00000000000a0000-00000000000affff (prio 1, i/o): vga-lowmem owner:{dev id=vga} parent:{obj type=x}
  00000000000c0000-00000000000cafff (prio -1, rom): pc.ram @00000000000c0000 KVM
  00000000ffc00000-00000000ffc83fff (prio 0, romd): system.flash1
  0000000100000000-000000017fffffff (prio 0, nv-ram): /objects/nv dimm0 orphan

FlatView #1
 AS \"I/O\", root: io
 Root memory region: (none)
  No rendered FlatView

";
    let second = text.find("FlatView #1").map_or("", |at| &text[at..]);
    vec![text.into(), second.replace('\n', "\r\n").into()]
}

/// `info mtree -o -D`
pub fn graph(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(graph) = Graph::parse(&text) else { return };
    let children = graph
        .nodes
        .iter()
        .enumerate()
        .flat_map(|(at, node)| node.children.iter().map(move |child| (at, *child)));
    for (parent, child) in children {
        assert!(parent < child && child < graph.nodes.len(), "parents stand before children");
    }
    // What the walk finds is shown nowhere, by an empty flat view.
    if let (Ok(leaves), Ok(compared)) = (graph.leaves(), graph.compare(&[])) {
        for one in &compared.hidden {
            let whole = |leaf: &Leaf| leaf.range.start() == one.gpa && leaf.range.len() == one.len;
            assert!(one.by.is_none() && one.shown_at.is_none() && leaves.memory.iter().any(whole));
        }
        assert_eq!(compared.difference.is_some(), !compared.hidden.is_empty());
    }
    let parts = graph.parts();
    assert!(parts.iter().all(|at| *at < graph.nodes.len()) && parts.len() <= graph.trees.len());
    assert_eq!(Graph::parse(&print_graph(&graph)), Ok(graph));
}

fn print_graph(graph: &Graph) -> String {
    let mut out = String::new();
    for tree in &graph.trees {
        for space in &tree.spaces {
            let _ = write!(out, "address-space: {space}\r\n");
        }
        if tree.spaces.is_empty() {
            let _ = write!(out, "memory-region: {}\r\n", tree.region);
        }
        let mut ways: Vec<(usize, usize)> = tree.root.iter().map(|root| (*root, 1)).collect();
        while let Some((at, depth)) = ways.pop() {
            let node = &graph.nodes[at];
            let _ = write!(out, "{:1$}", "", 2 * depth);
            let nonvolatile = if node.nonvolatile { "nv-" } else { "" };
            let (first, last, word) = (node.first, node.last, node.range_type.word());
            let _ = write!(
                out,
                "{first:016x}-{last:016x} (prio {}, {nonvolatile}{word}): ",
                node.priority
            );
            match &node.alias {
                Some(Alias { target, first, last }) => {
                    let _ = write!(out, "alias {} @{target} {first:016x}-{last:016x}", node.name);
                }
                None => out.push_str(&node.name),
            }
            out.push_str(if node.enabled { "" } else { " [disabled]" });
            print_owners(&mut out, &node.owner, &node.parent);
            out.push_str(if node.orphan { " orphan\r\n" } else { "\r\n" });
            ways.extend(node.children.iter().rev().map(|child| (*child, depth + 1)));
        }
        out.push_str("\r\n");
    }
    out
}

/// Two trees with every form of line.
pub fn graph_seeds() -> Vec<Vec<u8>> {
    let text = "\
address-space: cpu-memory-0
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system owner:{obj path=/machine}
    0000000000000000-000000007fffffff (prio 0, ram): alias low @pc.ram 0000000000000000-000000007fffffff
    00000000000a0000-00000000000bffff (prio 1, i/o): vga [disabled] owner:{dev id=vga} parent:{obj type=x}
      00000000000a0000-00000000000affff (prio -1, nv-ram): bank

memory-region: pc.ram
  0000000000000000-00000000ffffffff (prio 0, ram): pc.ram

";
    vec![text.into(), text.replace('\n', "\r\n").into()]
}

/// `x-query-ramblock`, `info ramblock`
pub fn ramblock(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(list) = blocks::parse(&text) else { return };
    for block in &list {
        assert!(block.page_size.is_power_of_two() && block.used <= block.total);
        assert!(block.ram_addr.checked_add(block.total).is_some());
        assert!(block.hva.unwrap_or(1).checked_add(block.total).is_some());
    }
    let new = list.iter().any(|block| block.read_only.is_some());
    let mut out = String::from("Block Name PSize Offset Used Total");
    out.push_str(if new { " HVA RO\r\n" } else { "\r\n" });
    for block in &list {
        let blocks::RamBlock { name, page_size, ram_addr, used, total, .. } = block;
        let _ = write!(out, "{name} {page_size} B {ram_addr:#x} {used:#x} {total:#x}");
        if let Some(read_only) = block.read_only {
            let word = if read_only { "ro" } else { "rw" };
            let _ = write!(out, " {:#x} {word}", block.hva.unwrap_or(0));
        }
        out.push_str("\r\n");
    }
    assert_eq!(blocks::parse(&out), Ok(list));
}

/// The form of 7.2 and the form of 10.0.
pub fn ramblock_seeds() -> Vec<Vec<u8>> {
    let old = "\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000
                            2 MiB  0x0000000008000000 0x0000000000040000 0x0000000000080000
";
    let new = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
  0000:01:00.0 BAR 1 mm[0]    1 GiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f0000000000  rw
                pc.bios    4 KiB  0x0000000008000000 0x0000000000040000 0x0000000000040000 0x0000000000000000  ro
";
    vec![old.into(), new.into()]
}

/// `gpa2hva ADDR`: an address, then the answer; and the right answers about that address.
pub fn gpa2hva(data: &[u8]) {
    let mut rest = data;
    let gpa = u64::from_le_bytes(take(&mut rest));
    let text = String::from_utf8_lossy(rest);
    if let Ok(Gpa2Hva::At { hva, .. }) = answer::parse(gpa, &text) {
        assert!(hva != 0);
    }
    // The text as the name of a region: the sentence around it must be read right all the same.
    let hva = u64::from_le_bytes(take(&mut rest)).max(1);
    let name = String::from_utf8_lossy(rest).replace('\n', "");
    let sentence = format!("Host virtual address for {gpa:#x} ({name}) is {hva:#x}\r\n");
    assert_eq!(answer::parse(gpa, &sentence), Ok(Gpa2Hva::At { name, hva }));
    let other = gpa ^ 1;
    assert!(answer::parse(other, &sentence).is_err(), "it speaks of another address");
}

/// The three sentences about address 16.
pub fn gpa2hva_seeds() -> Vec<Vec<u8>> {
    let said = [
        "Host virtual address for 0x10 (pc.ram) is 0x7f0123456010\r\n",
        "Memory at address 0x10 is not RAM\r\n",
        "No memory is mapped at address 0x10\r\n",
        "is 0x10) is (a) is 0x1",
    ];
    said.iter().map(|text| [&16u64.to_le_bytes(), text.as_bytes()].concat()).collect()
}
