//! The picture of `stillframe map`: on the left QEMU's graph of MemoryRegions, on the right the flat view
//! drawn from it, each region with what the host has behind it.

use super::Svg;
use crate::output::size;
use acquire::chart::{Chart, Charted};
use evidence::{GuestRange, Kind, Region};
use qemu::graph::{Graph, Node};
use qemu::mtree::RangeType;

/// Colours by what a region is; light and dark.
const STYLE: &str = "
svg{font:12px ui-sans-serif,system-ui,'DejaVu Sans',sans-serif;color-scheme:light dark}
.paper{fill:#fbfbfa}.h{font-size:18px;font-weight:600;fill:#1d2329}.h2{font-size:13px;font-weight:600;fill:#1d2329}
.t{fill:#1d2329}.m{fill:#69727d}.a{fill:#69727d;font-size:11px;font-family:ui-monospace,'DejaVu Sans Mono',monospace}
.way{fill:none;stroke:#c9ced4;stroke-width:1}.link{fill:none;stroke-width:1.5;opacity:.55}
.ram{fill:#3b78c9}.rom{fill:#c98a1b}.romd{fill:#c2571a}.device{fill:#7d5bb5}.nvdimm{fill:#2f9268}.io{fill:#b9c0c8}
.passed{fill:#b23a48}.box{fill:#5d6873}
.link.ram{stroke:#3b78c9;fill:none}.link.rom{stroke:#c98a1b;fill:none}.link.romd{stroke:#c2571a;fill:none}
.link.device{stroke:#7d5bb5;fill:none}.link.nvdimm{stroke:#2f9268;fill:none}.link.passed{stroke:#b23a48;fill:none}
.hidden{fill:none;stroke:#3b78c9;stroke-width:1.2;stroke-dasharray:4 3}
.rest{fill:#e4e7ea}.swap{fill:#d0489a}
@media(prefers-color-scheme:dark){.paper{fill:#15181c}.h,.h2,.t{fill:#e8eaed}.m,.a{fill:#9aa3ad}
.way{stroke:#3a4148}.rest{fill:#2c3238}.io{fill:#59626c}.box{fill:#8a949e}}
";

/// Height of a row of the tree.
const ROW: f64 = 20.0;
/// Steps to the right for each level.
const STEP: f64 = 18.0;
/// Where the flat view stands.
const VIEW: f64 = 760.0;
/// Width of the flat view's boxes.
const BOX: f64 = 190.0;
/// Width of the bar of pages.
const BAR: f64 = 150.0;
const WIDTH: f64 = 1420.0;
const TOP: f64 = 96.0;

/// A row of the tree.
struct Row<'g> {
    depth: usize,
    /// The region; `None` for the registers of devices, which are only counted.
    node: Option<&'g Node>,
    text: String,
    /// Of an alias: the region that it shows.
    shows: Option<&'g str>,
    /// It lies in the guest's memory, and not only in a region that aliases show.
    in_space: bool,
}

/// The picture.
pub(crate) fn draw(chart: &Chart) -> String {
    let mut svg = Svg::default();
    let (vm, qemu) = (&chart.vm, &chart.qemu);
    svg.text("h", [24.0, 36.0], &vm.name);
    let about = format!(
        "PID {}, {}, {}, QEMU {}, {}; {} of RAM at start, {} plugged in",
        vm.pid,
        qemu.machine,
        qemu.accelerator,
        qemu.qemu_version,
        qemu.run_state,
        size(chart.size.base),
        size(chart.size.plugged.unwrap_or(0))
    );
    svg.text("m", [24.0, 56.0], &about);
    svg.text("h2", [24.0, TOP - 12.0], "Graph of MemoryRegions");
    svg.text("h2", [VIEW, TOP - 12.0], "Flat view: what the guest sees");
    let rows = chart.graph.as_ref().map(rows).unwrap_or_default();
    let places = places(chart);
    let bottom = places.last().map_or(TOP, |(_, y, height)| y + height);
    // Links lie under everything else.
    for (one, top, height) in &places {
        for number in drawn_from(&rows, &one.region) {
            let y = TOP + lift(number) + ROW / 2.0;
            let class = format!("link {}", kind_class(one.region.kind));
            svg.curve(&class, [VIEW - 110.0, y], [VIEW - 6.0, top + height / 2.0]);
        }
    }
    for (number, row) in rows.iter().enumerate() {
        draw_row(&mut svg, row, TOP + lift(number));
    }
    for (one, y, height) in &places {
        draw_region(&mut svg, one, *y, *height);
    }
    let mut at = bottom + 34.0;
    let hidden = chart.hidden.as_deref();
    if hidden.is_none() {
        svg.text("m", [VIEW, at], "What is hidden is not known.");
        at += 24.0;
    }
    let hidden = hidden.unwrap_or_default();
    if !hidden.is_empty() {
        svg.text("h2", [VIEW, at], "Hidden: memory under something else");
        at += 10.0;
        for one in hidden {
            svg.rect("hidden", [VIEW, at, BOX, ROW - 4.0], "");
            let last = one.gpa.saturating_add(one.len - 1);
            let by = one.by.as_deref().unwrap_or("nothing");
            let shown = one.shown_at.map_or_else(String::new, |at| format!(", shown at {at:#x}"));
            let (name, offset, len) = (&one.name, one.offset, size(one.len));
            let text = format!("{name} +{offset:#x}, {len}, under {by}{shown}");
            svg.text("a", [VIEW + 8.0, at + 12.0], &format!("{:#x}-{last:#x}", one.gpa));
            svg.text("t", [VIEW + BOX + 14.0, at + 12.0], &text);
            at += ROW;
        }
        at += 24.0;
    }
    legend(&mut svg, at);
    let height = (TOP + lift(rows.len())).max(at + 40.0) + 24.0;
    svg.finish(&format!("Memory of {}", vm.name), STYLE, [WIDTH, height])
}

/// How far down row `number` is.
fn lift(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::MAX, f64::from) * ROW
}

fn kind_class(kind: Kind) -> &'static str {
    match kind {
        Kind::Ram => "ram",
        Kind::Rom => "rom",
        Kind::Romd => "romd",
        Kind::DeviceRam => "device",
        Kind::Nvdimm => "nvdimm",
        Kind::RamDevice => "passed",
    }
}

/// Each region of the flat view with its top and height: taller where it is larger, by its logarithm.
fn places(chart: &Chart) -> Vec<(&Charted, f64, f64)> {
    let mut at = TOP;
    let mut places = Vec::new();
    for one in &chart.regions {
        let doublings = f64::from(one.region.len.max(4096).ilog2() - 12);
        let height = (18.0 + 1.6 * doublings).round();
        places.push((one, at, height));
        at += height + 4.0;
    }
    places
}

/// The rows of which a region of the flat view is drawn. Where several show the same memory at an address,
/// the smaller was put over the larger one.
fn drawn_from(rows: &[Row<'_>], region: &Region) -> Vec<usize> {
    let from = drawn_from_rows(rows, region, true);
    // What lies behind a bridge.
    if from.is_empty() { drawn_from_rows(rows, region, false) } else { from }
}

fn drawn_from_rows(rows: &[Row<'_>], region: &Region, in_space: bool) -> Vec<usize> {
    let Some(shown) = region.range() else { return Vec::new() };
    let mut there: Vec<(GuestRange, usize)> = Vec::new();
    for (number, row) in rows.iter().enumerate() {
        let Some(node) = row.node.filter(|_| row.in_space == in_space) else { continue };
        let name = row.shows.unwrap_or(&node.name);
        let memory = node.children.is_empty() && node.range_type.is_memory();
        let range = GuestRange::from_inclusive(node.first, node.last);
        let range = range.filter(|range| range.intersect(shown).is_some());
        if name == region.name && (memory || row.shows.is_some()) {
            there.extend(range.map(|range| (range, number)));
        }
    }
    there.sort_by_key(|(range, _)| range.len());
    let mut ranges = Vec::new();
    let mut from = Vec::new();
    for (range, number) in there {
        if shown.first_outside(&ranges).is_none() {
            break;
        }
        ranges.push(range);
        from.push(number);
    }
    from
}

/// The tree of the guest's memory, with what its aliases show behind it. What is switched off is left out.
fn rows(graph: &Graph) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for (number, root) in graph.parts().into_iter().enumerate() {
        let from = rows.len();
        below(graph, root, 0, number == 0, &mut rows);
        if let Some(row) = rows.get_mut(from).filter(|_| number > 0) {
            row.text.push_str(", shown by aliases");
        }
    }
    rows
}

fn below<'g>(graph: &'g Graph, at: usize, depth: usize, in_space: bool, rows: &mut Vec<Row<'g>>) {
    let Some(node) = graph.nodes.get(at) else { return };
    let shows = node.alias.as_ref().map(|alias| alias.target.as_str());
    let mut text = node.name.clone();
    if let Some(alias) = &node.alias {
        text.push_str(&format!("  \u{2192} {} +{:#x}", alias.target, alias.first));
    }
    rows.push(Row { depth, node: Some(node), text, shows, in_space });
    let mut registers = 0u32;
    for child in &node.children {
        let Some(inner) = graph.nodes.get(*child).filter(|node| node.enabled) else { continue };
        if inner.alias.is_none() && inner.children.is_empty() && inner.range_type == RangeType::Io {
            registers += 1;
        } else {
            below(graph, *child, depth + 1, in_space, rows);
        }
    }
    if registers > 0 {
        let s = if registers == 1 { "" } else { "s" };
        let text = format!("{registers} region{s} of device registers");
        rows.push(Row { depth: depth + 1, node: None, text, shows: None, in_space });
    }
}

fn draw_row(svg: &mut Svg, row: &Row<'_>, y: f64) {
    let x = 24.0 + u32::try_from(row.depth).map_or(0.0, f64::from) * STEP;
    if row.depth > 0 {
        svg.line("way", [x - 10.0, y], [x - 10.0, y + ROW / 2.0]);
        svg.line("way", [x - 10.0, y + ROW / 2.0], [x - 2.0, y + ROW / 2.0]);
    }
    let Some(node) = row.node else {
        svg.rect("io", [x, y + 5.0, 10.0, 10.0], "");
        svg.text("m", [x + 16.0, y + 14.0], &row.text);
        return;
    };
    let class = match (node.range_type, node.nonvolatile) {
        (_, true) => "nvdimm",
        (RangeType::Ram, _) => "ram",
        (RangeType::Rom, _) => "rom",
        (RangeType::Romd, _) => "romd",
        (RangeType::RamDevice, _) => "passed",
        (RangeType::Io | RangeType::Container, _) => "box",
    };
    let owner = node.owner.as_ref().or(node.parent.as_ref());
    let tip = owner.map_or_else(String::new, |owner| format!("owned by {owner}"));
    svg.rect(class, [x, y + 5.0, 10.0, 10.0], &tip);
    svg.text("t", [x + 16.0, y + 14.0], &clipped(&row.text, 46));
    let ends = format!("{:#x}-{:#x}", node.first, node.last);
    svg.text("a", [VIEW - 370.0, y + 14.0], &ends);
}

fn clipped(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most - 1).chain(['\u{2026}']).collect(),
        false => text.to_owned(),
    }
}

fn draw_region(svg: &mut Svg, one: &Charted, y: f64, height: f64) {
    let region = &one.region;
    let class = kind_class(region.kind);
    let middle = y + height / 2.0 + 4.0;
    let last = region.gpa.saturating_add(region.len - 1);
    let tip = region.owner.as_deref().map_or_else(String::new, |owner| format!("owned by {owner}"));
    svg.rect(class, [VIEW, y, 8.0, height], &tip);
    svg.text("a", [VIEW + 14.0, middle], &format!("{:#x}-{last:#x}", region.gpa));
    let block = region.block.as_deref().unwrap_or(&region.name);
    let what = format!("{} {} {block}", size(region.len), region.kind.word());
    svg.text("t", [VIEW + BOX + 14.0, middle], &clipped(&what, 32));
    let x = VIEW + BOX + 244.0;
    match one.pages {
        Some(pages) => {
            #[expect(clippy::cast_precision_loss, reason = "a bar of 150 pixels")]
            let part = |bytes: u64| bytes as f64 / (region.len.max(1)) as f64 * BAR;
            svg.rect("rest", [x, middle - 9.0, BAR, 10.0], "");
            let (kept, swapped) = (part(pages.kept_bytes), part(pages.swapped_bytes.unwrap_or(0)));
            svg.rect(class, [x, middle - 9.0, kept.min(BAR), 10.0], "the host has it");
            let swapped = swapped.min(kept);
            if swapped > 0.0 {
                svg.rect("swap", [x + kept - swapped, middle - 9.0, swapped, 10.0], "in swap");
            }
        }
        None if !one.image.taken => {
            svg.text("m", [x, middle], &format!("not read: {}", clipped(one.image.why, 28)))
        }
        None => {}
    }
}

fn legend(svg: &mut Svg, y: f64) {
    let mut x = VIEW;
    for (class, word) in [
        ("ram", "RAM"),
        ("rom", "ROM"),
        ("romd", "ROM device"),
        ("device", "device memory"),
        ("nvdimm", "persistent"),
        ("swap", "swapped"),
        ("rest", "hole"),
    ] {
        svg.rect(class, [x, y, 10.0, 10.0], "");
        svg.text("m", [x + 15.0, y + 9.0], word);
        x += 30.0 + 7.0 * u32::try_from(word.len()).map_or(0.0, f64::from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_drawn_from_what_was_put_on_top() {
        let text = "\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000000000000-000000000fffffff (prio 0, ram): alias ram-below-4g @pc.ram 0000000000000000-000000000fffffff
    00000000000c0000-00000000000c3fff (prio 1, rom): alias pam-rom @pc.ram 00000000000c0000-00000000000c3fff
    00000000000c4000-00000000000c7fff (prio 1, rom): alias pam-rom @pc.ram 00000000000c4000-00000000000c7fff

memory-region: pc.ram
  0000000000000000-000000000fffffff (prio 0, ram): pc.ram
";
        let graph = Graph::parse(text).unwrap();
        let rows = rows(&graph);
        let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
        assert_eq!(texts[1], "ram-below-4g  \u{2192} pc.ram +0x0");
        assert_eq!(texts[4], "pc.ram, shown by aliases");
        let from = |gpa: u64, len: u64| {
            let region = Region {
                gpa,
                len,
                kind: Kind::Ram,
                name: "pc.ram".to_owned(),
                owner: None,
                block: None,
                block_offset: gpa,
                mapping: None,
                page_size: None,
                readonly: false,
            };
            drawn_from(&rows, &region)
        };
        assert_eq!(from(0, 0xa0000), [1]);
        assert_eq!(from(0xc0000, 0x8000), [2, 3], "not from what lies below");
        assert_eq!(from(0xc4000, 0x8000), [3, 1], "half of it shows what lies below");
    }
}
