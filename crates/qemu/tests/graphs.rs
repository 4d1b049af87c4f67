//! Real graphs of real machines: QEMU 7.2 and 10.0, each with the flat view that it had at that moment.
//!
//! `tests/graphs/VERSION/MACHINE/` holds both texts, `tests/graphs/record.py` recorded them.
#![forbid(unsafe_code)]
// Helpers of tests are tests: a panic is their verdict.
#![allow(clippy::unwrap_used)]

mod recorded;

use qemu::FlatViews;
use qemu::graph::{Graph, MEMORY};
use qemu::mtree::Entry;
use std::fmt::Write as _;
use std::path::Path;

fn text(dir: &Path, file: &str) -> String {
    std::fs::read_to_string(dir.join(file)).unwrap()
}

#[test]
fn the_flat_view_is_drawn_from_the_graph() {
    let machines = recorded::machines("graphs");
    assert_eq!(machines.len(), 16, "two versions of eight machines");
    for (name, dir) in machines {
        let graph = Graph::parse(&text(&dir, "graph.txt")).unwrap();
        let views = FlatViews::parse(&text(&dir, "flat.txt")).unwrap();
        let entries = &views.memory().unwrap().entries;
        let compared = graph.compare(entries).unwrap();
        assert_eq!((compared.difference, compared.unknown), (None, Vec::new()), "{name}");
        let mut out = String::new();
        let root = &graph.nodes[graph.space(MEMORY).unwrap().root.unwrap()];
        writeln!(out, "{} regions, {} trees", graph.nodes.len(), graph.trees.len()).unwrap();
        writeln!(out, "{}: {} regions in it", root.name, root.children.len()).unwrap();
        let mut leaves = graph.leaves().unwrap().memory;
        leaves.sort_by_key(|leaf| (leaf.range.start(), leaf.range.len()));
        for leaf in leaves {
            let name = &graph.nodes[leaf.node].name;
            writeln!(out, "leaf {} {name:?} +{:#x}", leaf.range, leaf.offset).unwrap();
        }
        for one in compared.hidden {
            let (end, by) = (one.gpa + one.len - 1, one.by.as_deref().unwrap_or("nothing"));
            let shown = one.shown_at.map_or_else(|| "nowhere".to_owned(), |at| format!("{at:#x}"));
            let (gpa, name, offset) = (one.gpa, &one.name, one.offset);
            writeln!(
                out,
                "hidden {gpa:#x}-{end:#x} {name:?} +{offset:#x} by {by:?}, shown at {shown}"
            )
            .unwrap();
        }
        insta::assert_snapshot!(format!("graph-{name}"), out);
    }
}

/// Without the alias that shows the machine's RAM, the flat view has what the graph has not.
#[test]
fn a_graph_of_another_moment_does_not_explain_the_flat_view() {
    for (name, dir) in recorded::machines("graphs") {
        let views = FlatViews::parse(&text(&dir, "flat.txt")).unwrap();
        let entries = &views.memory().unwrap().entries;
        let text = text(&dir, "graph.txt");
        let graph = Graph::parse(&text).unwrap();
        let without = text.lines().filter(|line| !line.contains("alias ram-below-4g"));
        let without: String = without.map(|line| format!("{line}\n")).collect();
        let differs = |graph: &Graph, entries: &[Entry]| {
            graph.compare(entries).unwrap().difference.unwrap_or_default()
        };
        let told = differs(&Graph::parse(&without).unwrap(), entries);
        assert!(told.contains(" at 0x0-"), "{name}: {told}");
        // And the other way round: of RAM that the flat view has not, nothing else is there.
        let mut less = entries.clone();
        let last = less.iter().rposition(|entry| entry.range_type.is_memory()).unwrap();
        less.remove(last);
        let told = differs(&graph, &less);
        assert!(told.contains("the flat view nothing"), "{name}: {told}");
    }
}
