//! `stillframe map`: a VM's memory as QEMU builds it and as the host keeps it.

use crate::args::Map;
use crate::cmd;
use crate::exit::Exit;
use crate::output::{self, safe, size};
use crate::picture;
use acquire::chart::{Chart, Charted, Pages, Route};
use acquire::plan::TAINT;
use qemu::Balloon;
use qemu::graph::{Graph, Index, MEMORY};
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

/// Looks and shows; changes nothing, but that the VM stands for a probe.
pub(crate) fn run(args: &Map) -> Exit {
    cmd::say_taint(&args.vm);
    let probe = args.probe.then_some(args.stall_budget);
    let chart = match acquire::chart::chart(&args.vm, probe, args.host_nodes) {
        Ok(chart) => chart,
        Err(failure) => return cmd::acquire::failed(&failure),
    };
    for text in chart.warnings.iter().filter(|text| *text != TAINT) {
        output::say(&format!("warning: {text}"));
    }
    let drawn = args.graph.as_deref().map(|file| write_new(file, &picture::map::draw(&chart)));
    if args.json {
        output::json(&chart);
    } else {
        for line in lines(&chart) {
            if !output::line(&line) {
                break;
            }
        }
    }
    match (args.graph.as_deref(), drawn) {
        (Some(file), Some(Err(error))) => {
            output::say(&format!("cannot write the picture {}: {error}", file.display()));
            if error.kind() == io::ErrorKind::AlreadyExists {
                output::hint("nothing is overwritten; name a file that does not exist");
            }
            Exit::Failed
        }
        _ => Exit::Complete,
    }
}

/// Writes a file that was not there before; a half of it is taken away.
fn write_new(file: &Path, text: &str) -> io::Result<()> {
    let mut out = fs::OpenOptions::new().write(true).create_new(true).open(file)?;
    out.write_all(text.as_bytes()).inspect_err(|_| {
        let _ = fs::remove_file(file);
    })
}

/// What the balloon leaves the guest, and whether the guest gives memory back unasked.
fn balloon(balloon: &Balloon) -> String {
    let reports = if balloon.free_page_reporting { ", may report free pages" } else { "" };
    format!("leaves the guest {}{reports}", size(balloon.leaves))
}

fn lines(chart: &Chart) -> Vec<String> {
    let (vm, qemu) = (&chart.vm, &chart.qemu);
    let mut lines = vec![
        safe(&format!(
            "VM      {} (PID {}), {}, {}, QEMU {}, {}",
            vm.name, vm.pid, qemu.machine, qemu.accelerator, qemu.qemu_version, qemu.run_state
        )),
        format!(
            "RAM     {} at start, {} plugged in; balloon: {}",
            size(chart.size.base),
            size(chart.size.plugged.unwrap_or(0)),
            chart.balloon.as_ref().map_or_else(|| "none".to_owned(), balloon)
        ),
        format!(
            "KSM     {}",
            match chart.ksm_pages {
                None => "not known: the kernel does not say, or not to this user".to_owned(),
                Some(pages) => format!("{pages} pages of the process are merged"),
            }
        ),
    ];
    lines.extend(chart.routes.iter().map(route));
    if let Some(graph) = &chart.graph {
        lines.push(String::new());
        lines.extend(tree(graph));
    }
    lines.push(String::new());
    lines.extend(output::columns(&view_table(chart)));
    match &chart.hidden {
        None => lines.extend([String::new(), "what is hidden is not known".to_owned()]),
        Some(hidden) if hidden.is_empty() => {}
        Some(hidden) => {
            lines.push(String::new());
            let mut cells = vec![cells(["HIDDEN", "SIZE", "IS", "UNDER", "SHOWN AT"])];
            cells.extend(hidden.iter().map(|one| {
                vec![
                    span(one.gpa, one.gpa.saturating_add(one.len - 1)),
                    size(one.len),
                    format!("{} +{:#x}", one.name, one.offset),
                    one.by.clone().unwrap_or_else(|| "nothing".to_owned()),
                    one.shown_at.map_or_else(|| "-".to_owned(), |gpa| format!("{gpa:#x}")),
                ]
            }));
            lines.extend(output::columns(&cells));
        }
    }
    lines.push(String::new());
    let mut cells = vec![cells(["RAMBLOCK", "USED", "PAGES", "HOST POLICY", "HOST NODES"])];
    let host_nodes = chart.blocks.iter().any(|one| one.nodes.is_some());
    cells.extend(chart.blocks.iter().map(|one| {
        let name = if one.name.is_empty() { "(no name)" } else { &one.name };
        let nodes = one.nodes.iter().flatten();
        let nodes: Vec<String> =
            nodes.map(|(node, bytes)| format!("{node}: {}", size(*bytes))).collect();
        let policy = one.policy.clone().unwrap_or_else(|| "-".to_owned());
        vec![name.to_owned(), size(one.used_bytes), size(one.page_bytes), policy, nodes.join(", ")]
    }));
    if !host_nodes {
        cells.iter_mut().for_each(|row| row.truncate(3));
    }
    lines.extend(output::columns(&cells));
    lines
}

fn route(route: &Route) -> String {
    let said = match (&route.difference, &route.not_had) {
        (Some(difference), _) => difference.clone(),
        (None, Some(why)) => format!("not compared: {why}"),
        (None, None) => "agrees with the flat view".to_owned(),
    };
    format!("{:7} {}", route.route, safe(&said))
}

fn span(first: u64, last: u64) -> String {
    format!("{first:#x}-{last:#x}")
}

fn cells<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

fn view_table(chart: &Chart) -> Vec<Vec<String>> {
    let mut rows = vec![cells([
        "GUEST-PHYSICAL",
        "SIZE",
        "KIND",
        "RAMBLOCK",
        "HOST",
        "NODE",
        "KEPT",
        "SWAPPED",
        "HOLES",
        "IMAGE",
    ])];
    rows.extend(chart.regions.iter().map(view_row));
    rows
}

fn view_row(one: &Charted) -> Vec<String> {
    let region = &one.region;
    let none = || "-".to_owned();
    let block = region.block.clone().unwrap_or_else(|| region.name.clone());
    let pages =
        |of: fn(&Pages) -> Option<u64>| one.pages.as_ref().and_then(of).map_or_else(none, size);
    vec![
        span(region.gpa, region.gpa.saturating_add(region.len - 1)),
        size(region.len),
        region.kind.word().to_owned(),
        format!("{block} +{:#x}", region.block_offset),
        region.mapping.map_or_else(none, |mapping| {
            let pages = region.page_size.filter(|bytes| *bytes != evidence::PAGE);
            let pages = pages.map_or_else(String::new, |bytes| format!(" {}", size(bytes)));
            format!("{}{pages}", mapping.word())
        }),
        one.node.map_or_else(none, |node| node.to_string()),
        pages(|pages| Some(pages.kept_bytes)),
        pages(|pages| pages.swapped_bytes),
        one.pages.map_or_else(none, |pages| {
            let more = if pages.pluggable { " or not plugged in" } else { "" };
            format!("{}{more}", size(pages.hole_bytes))
        }),
        if one.image.taken { "yes".to_owned() } else { format!("no: {}", one.image.why) },
    ]
}

/// The address space of the guest's memory as a tree, and the regions that its aliases show. What is switched
/// off is only counted.
fn tree(graph: &Graph) -> Vec<String> {
    let mut tree = Tree { graph, index: Index::of(graph), lines: Vec::new(), off: 0 };
    for (number, root) in graph.parts().into_iter().enumerate() {
        let name = graph.nodes.get(root).map_or("", |node| &node.name);
        tree.lines.push(match number {
            0 => MEMORY.to_owned(),
            _ => format!("{}, shown by aliases", safe(name)),
        });
        tree.branch(root, "", true);
    }
    if tree.off > 0 {
        tree.lines.push(format!("{} more are switched off: --json has all", tree.off));
    }
    tree.lines
}

/// A tree that is being written.
struct Tree<'g> {
    graph: &'g Graph,
    index: Index<'g>,
    lines: Vec<String>,
    /// How many regions were left out.
    off: usize,
}

impl Tree<'_> {
    // As deep as the text is, which has a limit.
    fn branch(&mut self, at: usize, indent: &str, last: bool) {
        let graph = self.graph;
        let Some(node) = graph.nodes.get(at) else { return };
        let kind = match (&node.alias, node.children.is_empty()) {
            (Some(alias), _) => {
                let unknown = self.index.target(node).is_none();
                let unknown = if unknown { ", which is not known" } else { "" };
                format!("alias of {} +{:#x}{unknown}", alias.target, alias.first)
            }
            (None, false) => "container".to_owned(),
            (None, true) => node.range_type.word().to_owned(),
        };
        let mut line = format!("{}  {}  {kind}", node.name, span(node.first, node.last));
        if node.nonvolatile {
            line.push_str(", persistent");
        }
        if node.priority != 0 {
            line.push_str(&format!(", priority {}", node.priority));
        }
        if let Some(owner) = node.owner.as_ref().or(node.parent.as_ref()) {
            line.push_str(&format!("  ({owner})"));
        }
        self.lines.push(format!("{indent}{} {}", if last { "└─" } else { "├─" }, safe(&line)));
        let below = format!("{indent}{}", if last { "   " } else { "│  " });
        let is_on = |child: &&usize| graph.nodes.get(**child).is_some_and(|node| node.enabled);
        let on: Vec<usize> = node.children.iter().filter(is_on).copied().collect();
        self.off += node.children.len() - on.len();
        for (number, child) in on.iter().enumerate() {
            self.branch(*child, &below, number + 1 == on.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_graph_is_a_tree_with_its_aliases_behind() {
        let text = "\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000000000000-000000000fffffff (prio 0, ram): alias ram-below-4g @pc.ram 0000000000000000-000000000fffffff
    00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem [disabled] owner:{dev path=/machine/vga}
    00000000000f0000-00000000000fffff (prio 0, rom): pc.bios
    00000000000e0000-00000000000effff (prio 0, rom): alias isa-bios @pc.bios 0000000000000000-000000000000ffff

memory-region: pc.bios
  00000000000f0000-00000000000fffff (prio 0, rom): pc.bios

memory-region: pc.ram
  0000000000000000-000000000fffffff (prio 0, ram): pc.ram
";
        assert_eq!(
            tree(&Graph::parse(text).unwrap()),
            [
                "memory",
                "└─ system  0x0-0xffffffffffffffff  container",
                "   ├─ ram-below-4g  0x0-0xfffffff  alias of pc.ram +0x0",
                "   ├─ pc.bios  0xf0000-0xfffff  rom",
                "   └─ isa-bios  0xe0000-0xeffff  alias of pc.bios +0x0",
                "pc.ram, shown by aliases",
                "└─ pc.ram  0x0-0xfffffff  ram",
                "1 more are switched off: --json has all",
            ]
        );
    }
}
