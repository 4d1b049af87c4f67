//! `stillframe map`: a VM's memory as QEMU builds it and as the host keeps it.

use crate::args::Map;
use crate::cmd;
use crate::exit::Exit;
use crate::output::{self, safe, size};
use crate::picture;
use acquire::chart::{Chart, Charted, Route};
use acquire::plan::TAINT;
use qemu::graph::{Graph, MEMORY};

/// Looks and shows; changes nothing, unless it is to probe.
pub(crate) fn run(args: &Map) -> Exit {
    // Before it is done: to look is to ask QEMU.
    if acquire::find::one(&args.vm).is_ok_and(|target| target.through.is_some()) {
        output::say(&format!("warning: {TAINT}"));
    }
    let chart = match acquire::chart::chart(&args.vm, args.probe) {
        Ok(chart) => chart,
        Err(failure) => return cmd::acquire::failed(&failure),
    };
    for text in chart.warnings.iter().filter(|text| *text != TAINT) {
        output::say(&format!("warning: {text}"));
    }
    if let Some(file) = &args.graph
        && let Err(error) = std::fs::write(file, picture::map::draw(&chart))
    {
        output::say(&format!("cannot write the picture {}: {error}", file.display()));
        return Exit::Failed;
    }
    if args.json {
        output::json(&chart);
        return Exit::Complete;
    }
    for line in lines(&chart) {
        if !output::line(&safe(&line)) {
            break;
        }
    }
    Exit::Complete
}

fn lines(chart: &Chart) -> Vec<String> {
    let (vm, qemu) = (&chart.vm, &chart.qemu);
    let mut lines = vec![
        format!(
            "VM      {} (PID {}), {}, {}, QEMU {}, {}",
            vm.name, vm.pid, qemu.machine, qemu.accelerator, qemu.qemu_version, qemu.run_state
        ),
        format!(
            "RAM     {} at start, {} plugged in; balloon: {}",
            size(chart.size.base),
            size(chart.size.plugged.unwrap_or(0)),
            chart.balloon_bytes.map_or_else(
                || "none".to_owned(),
                |bytes| format!("leaves the guest {}", size(bytes))
            )
        ),
        format!(
            "KSM     {}",
            match chart.ksm_pages {
                None => "not known: the kernel does not say".to_owned(),
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
    lines.extend(table(view_table(chart)));
    if !chart.hidden.is_empty() {
        lines.push(String::new());
        let mut cells = vec![cells(["HIDDEN", "SIZE", "IS", "UNDER", "SHOWN AT"])];
        cells.extend(chart.hidden.iter().map(|one| {
            vec![
                span(one.gpa, one.gpa.saturating_add(one.len - 1)),
                size(one.len),
                format!("{} +{:#x}", one.name, one.offset),
                one.by.clone().unwrap_or_else(|| "nothing".to_owned()),
                one.shown_at.map_or_else(|| "nowhere".to_owned(), |gpa| format!("{gpa:#x}")),
            ]
        }));
        lines.extend(table(cells));
    }
    lines.push(String::new());
    let mut cells = vec![cells(["RAMBLOCK", "USED", "PAGES", "HOST POLICY", "HOST NODES"])];
    cells.extend(chart.blocks.iter().map(|one| {
        let nodes = one.nodes.iter().map(|(node, bytes)| format!("{node}: {}", size(*bytes)));
        vec![
            if one.block.name.is_empty() { "(no name)".to_owned() } else { one.block.name.clone() },
            size(one.block.used),
            size(one.block.page_size),
            one.policy.clone().unwrap_or_else(|| "-".to_owned()),
            Some(nodes.collect::<Vec<_>>().join(", "))
                .filter(|text| !text.is_empty())
                .unwrap_or_else(|| "-".to_owned()),
        ]
    }));
    lines.extend(table(cells));
    lines
}

fn route(route: &Route) -> String {
    let said = match (&route.difference, &route.not_had) {
        (Some(difference), _) => difference.clone(),
        (None, Some(why)) => format!("not compared: {why}"),
        (None, None) => "agrees with the flat view".to_owned(),
    };
    format!("{:7} {said}", route.route)
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
        "RESIDENT",
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
    let pages = |of: fn(&acquire::chart::Pages) -> u64| {
        one.pages.map_or_else(none, |pages| size(of(&pages)))
    };
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
        pages(|pages| pages.resident_bytes),
        pages(|pages| pages.swapped_bytes),
        pages(|pages| pages.hole_bytes),
        if one.image.taken { "yes".to_owned() } else { format!("no: {}", one.image.why) },
    ]
}

/// Rows as aligned lines; the last column is as long as it is.
fn table(rows: Vec<Vec<String>>) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| safe(cell).chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.saturating_sub(1)).map(width).collect();
    let aligned = |row: &Vec<String>| {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            line.push_str(cell);
            if let Some(width) = widths.get(column) {
                let pad = width.saturating_sub(safe(cell).chars().count()) + 2;
                line.extend(std::iter::repeat_n(' ', pad));
            }
        }
        line
    };
    rows.iter().map(aligned).collect()
}

/// How deep a tree is shown.
const DEPTH: usize = 64;

/// The address space of the guest's memory as a tree, and the regions that its aliases show. What is switched
/// off is only counted.
fn tree(graph: &Graph) -> Vec<String> {
    let mut tree = Tree { graph, lines: Vec::new(), shown: vec![false; graph.nodes.len()], off: 0 };
    let Some(root) = graph.space(MEMORY).and_then(|tree| tree.root) else { return tree.lines };
    tree.lines.push(MEMORY.to_owned());
    let mut aliases = Vec::new();
    tree.branch(root, "", true, 0, &mut aliases);
    // In the order in which they were met.
    let mut next = 0;
    while let Some(target) = aliases.get(next).copied() {
        next += 1;
        if !tree.shows(target)
            && let Some(root) = graph.root_of(target)
        {
            tree.lines.push(format!("{target:?}, shown by aliases"));
            tree.branch(root, "", true, 0, &mut aliases);
        }
    }
    if tree.off > 0 {
        tree.lines.push(format!("{} more are switched off: --json has all", tree.off));
    }
    tree.lines
}

/// A tree that is being written.
struct Tree<'g> {
    graph: &'g Graph,
    lines: Vec<String>,
    /// Of each node, whether it stands in a line.
    shown: Vec<bool>,
    off: usize,
}

impl<'g> Tree<'g> {
    /// Whether the region of this name stands in some line, and not only as an alias.
    fn shows(&self, name: &str) -> bool {
        let mut nodes = self.graph.nodes.iter().zip(&self.shown);
        nodes.any(|(node, shown)| *shown && node.alias.is_none() && node.name == name)
    }

    fn branch(
        &mut self,
        at: usize,
        indent: &str,
        last: bool,
        depth: usize,
        aliases: &mut Vec<&'g str>,
    ) {
        let graph = self.graph;
        let Some(node) = graph.nodes.get(at).filter(|_| depth < DEPTH) else { return };
        if let Some(shown) = self.shown.get_mut(at) {
            *shown = true;
        }
        let kind = match (&node.alias, node.children.is_empty()) {
            (Some(alias), _) => {
                aliases.push(&alias.target);
                format!("alias of {} +{:#x}", alias.target, alias.first)
            }
            (None, false) => "container".to_owned(),
            (None, true) => node.range_type.word().to_owned(),
        };
        let mut line = format!("{indent}{} {}", if last { "└─" } else { "├─" }, node.name);
        line.push_str(&format!("  {}  {kind}", span(node.first, node.last)));
        if node.nonvolatile {
            line.push_str(", persistent");
        }
        if node.priority != 0 {
            line.push_str(&format!(", priority {}", node.priority));
        }
        if let Some(owner) = node.owner.as_ref().or(node.parent.as_ref()) {
            line.push_str(&format!("  ({owner})"));
        }
        self.lines.push(line);
        let below = format!("{indent}{}", if last { "   " } else { "│  " });
        let is_on = |child: &&usize| graph.nodes.get(**child).is_some_and(|node| node.enabled);
        let on: Vec<usize> = node.children.iter().filter(is_on).copied().collect();
        self.off += node.children.len() - on.len();
        for (number, child) in on.iter().enumerate() {
            self.branch(*child, &below, number + 1 == on.len(), depth + 1, aliases);
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
                "\"pc.ram\", shown by aliases",
                "└─ pc.ram  0x0-0xfffffff  ram",
                "1 more are switched off: --json has all",
            ]
        );
    }

    #[test]
    fn columns_align() {
        let rows = vec![cells(["A", "B", "C"]), cells(["long", "x", "the last one"])];
        assert_eq!(table(rows), ["A     B  C", "long  x  the last one"]);
    }
}
