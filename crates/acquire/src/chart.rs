//! A guest's memory, to be looked at: QEMU's graph of MemoryRegions, the flat view drawn from it, what the
//! host keeps behind each region, and the ways to the map held against each other. Changes nothing,
//! reads no guest memory.

use crate::find::{self, Row};
use crate::look::Probe;
use crate::map::{self, Located};
use crate::monitor::{Monitor, VmFacts};
use crate::plan::TAINT;
use crate::{Failure, Request, log, look, told};
use evidence::range::hex;
use evidence::{GuestRange, Kind, Region};
use host::Process;
use host::numa::{self, NumaMap};
use qemu::facts::{MemoryDevice, MemorySize};
use qemu::graph::{Graph, Hidden, MEMORY};
use qemu::{FlatViews, RamBlock};
use serde::Serialize;
use std::collections::BTreeMap;

/// All that `stillframe map` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Chart {
    /// The VM.
    pub vm: Row,
    /// What QEMU says of it.
    pub qemu: VmFacts,
    /// Sizes of the guest's memory.
    pub size: MemorySize,
    /// Bytes of RAM that the balloon leaves the guest; null without a balloon.
    pub balloon_bytes: Option<u64>,
    /// The flat view: what answers where, as far as it is memory. Ascending.
    pub regions: Vec<Charted>,
    /// RAM and ROM that lie under something else.
    pub hidden: Vec<Hidden>,
    /// QEMU's RAMBlocks.
    pub blocks: Vec<Block>,
    /// The memory devices.
    pub devices: Vec<MemoryDevice>,
    /// Pages of the process that KSM has merged; null when the kernel does not say.
    pub ksm_pages: Option<u64>,
    /// QEMU's graph; null when its text is not understood: see `warnings`.
    pub graph: Option<Graph>,
    /// The ways to the map, held against the flat view.
    pub routes: Vec<Route>,
    /// What the head of QEMU's dump told, if it was to be asked.
    pub probe: Option<Probe>,
    /// What could not be found out, and why.
    pub warnings: Vec<String>,
}

/// A region of the flat view.
#[derive(Clone, Debug, Serialize)]
pub struct Charted {
    /// QEMU's word and the host's.
    #[serde(flatten)]
    pub region: Region,
    /// Its address in QEMU's process; null of what is not read.
    #[serde(serialize_with = "hex::optional")]
    pub hva: Option<u64>,
    /// The guest's NUMA node; null when the machine has none.
    pub node: Option<u32>,
    /// Whether it is in the image, and why or why not.
    pub image: Decision,
    /// What the host has behind it; null of what is not read or may not be looked at.
    pub pages: Option<Pages>,
}

/// What is done with a region.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Decision {
    /// It is in the image.
    pub taken: bool,
    /// Why, or why not.
    pub why: &'static str,
}

/// A region's bytes by where they are. An estimate: the guest runs on.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pages {
    /// In memory, or in the file that lies behind.
    pub resident_bytes: u64,
    /// In swap.
    pub swapped_bytes: u64,
    /// Nowhere: never touched, or given back.
    pub hole_bytes: u64,
}

/// A RAMBlock, and where the host has its pages.
#[derive(Clone, Debug, Serialize)]
pub struct Block {
    /// QEMU's word.
    #[serde(flatten)]
    pub block: RamBlock,
    /// The host's memory policy for the mapping; null when the kernel does not say.
    pub policy: Option<String>,
    /// Bytes on each of the host's NUMA nodes.
    pub nodes: BTreeMap<u32, u64>,
}

/// A way to the map.
#[derive(Clone, Debug, Serialize)]
pub struct Route {
    /// Its name.
    pub route: &'static str,
    /// How it differs from the flat view; null when it does not, or could not be gone.
    pub difference: Option<String>,
    /// Why it could not be gone.
    pub not_had: Option<String>,
}

/// Looks at the VM's memory; `probe`: also at the head of QEMU's dump, for which QEMU stops the guest for
/// milliseconds.
///
/// # Errors
/// [`Failure`] when the VM cannot be looked at.
pub fn chart(vm: &str, probe: bool) -> Result<Chart, Failure> {
    let request = Request { vm: vm.to_owned(), probe, ..Request::default() };
    let probe = match probe {
        true => look::survey(&request)?.probe,
        false => None,
    };
    let target = find::one(vm)?;
    let whom = target.whom();
    let mut monitor = Monitor::open(&whom, &log::Notes::default())?;
    let asked = monitor.look(&whom)?;
    let mut warnings: Vec<String> =
        asked.skipped.iter().map(|text| format!("monitor skipped: {text}")).collect();
    if target.through.is_some() {
        warnings.push(TAINT.to_owned());
    }
    let Some(view) = asked.view else {
        let why = asked.confidential.unwrap_or_default();
        return Err(Failure::Refused(crate::plan::Refusal {
            reason: format!("the guest's memory is hidden from the host: {why}"),
            rejected: Vec::new(),
            remedies: Vec::new(),
        }));
    };
    let more = monitor.chart(&view.devices)?;
    // Others may need it: what the host has behind the guest's memory takes its time.
    drop(monitor);
    let (located, memory) = map::locate(view, &target.process)?;
    let usage = memory.usage()?;
    if let Some(why) = &located.unseen {
        warnings.push(format!("what the host has behind it may not be looked at: {why}"));
    }
    let mut usage = usage.iter().filter(|_| located.unseen.is_none());
    let nodes = Nodes::of(&target.cmdline.numa, &located);
    let regions = located.map.regions().iter().zip(&located.view.regions);
    let regions: Vec<Charted> = regions
        .map(|(region, place)| {
            let used = if region.kind.in_image() { usage.next() } else { None };
            Charted {
                region: region.clone(),
                hva: place.hva,
                node: nodes.node(region),
                image: decision(region.kind),
                pages: used.map(|used| Pages {
                    resident_bytes: used.resident - used.swapped.min(used.resident),
                    swapped_bytes: used.swapped,
                    hole_bytes: region.len.saturating_sub(used.resident),
                }),
            }
        })
        .collect();
    let views = FlatViews::parse(&located.view.mtree).ok();
    let memory_view = views.as_ref().and_then(|views| views.memory().ok());
    let (graph, drawn, hidden) = match (more.graph, memory_view) {
        (Err(why), _) => {
            warnings.push(format!("QEMU's graph: {why}"));
            let why = "QEMU's graph is not understood".to_owned();
            (None, Err(why.clone()), Err(why))
        }
        (Ok(graph), None) => {
            let why = "no flat view".to_owned();
            (Some(graph), Err(why.clone()), Err(why))
        }
        (Ok(graph), Some(view)) => {
            let (drawn, hidden) = (graph.unexplained(&view.entries), graph.hidden(&view.entries));
            (Some(graph), drawn, hidden)
        }
    };
    let routes = routes(&located, &drawn, &hidden, more.arithmetic, probe.as_ref());
    let hidden = hidden.unwrap_or_else(|why| {
        warnings.push(format!("what is hidden is not known: {why}"));
        Vec::new()
    });
    Ok(Chart {
        blocks: blocks(&located, &target.process, &mut warnings),
        ksm_pages: memory.merged_pages(),
        vm: target.row,
        qemu: asked.vm,
        size: located.view.size,
        balloon_bytes: more.balloon,
        devices: located.view.devices.clone(),
        regions,
        hidden,
        graph,
        routes,
        probe,
        warnings,
    })
}

/// What is asked of QEMU beyond the map.
pub(crate) struct More {
    /// The graph, or why its text is not understood.
    pub(crate) graph: Result<Graph, String>,
    /// RAM by the objects' addresses; `None` for a machine that shows it in another way.
    pub(crate) arithmetic: Option<Vec<GuestRange>>,
    /// Bytes that the balloon leaves the guest.
    pub(crate) balloon: Option<u64>,
}

fn decision(kind: Kind) -> Decision {
    let (taken, why) = match kind {
        Kind::Ram => (true, "the guest's RAM"),
        Kind::Rom => (true, "ROM that is plain memory to the host"),
        Kind::DeviceRam => (true, "memory of an emulated device"),
        Kind::Romd => (false, "a device model answers reads"),
        Kind::Nvdimm => (false, "persistent memory: a file of the host's"),
        Kind::RamDevice => (false, "a passed-through device's: to read it is to touch hardware"),
    };
    Decision { taken, why }
}

/// The guest's NUMA nodes, by QEMU's command line.
struct Nodes {
    /// Node and size in bytes of each, in the order of the nodes, when the machine's RAM is one block.
    sizes: Vec<(u32, u64)>,
    /// Node of each backend.
    backends: BTreeMap<String, u32>,
}

/// QEMU's answer, as the map names a RAMBlock's memory device.
fn node_of(device: &MemoryDevice) -> Option<u32> {
    u32::try_from(device.raw.pointer("/data/node")?.as_u64()?).ok()
}

impl Nodes {
    fn of(numa: &[qemu::cmdline::NumaNode], located: &Located) -> Self {
        let mut backends: BTreeMap<String, u32> = BTreeMap::new();
        for device in &located.view.devices {
            let id = device.memdev.as_deref().and_then(|path| path.strip_prefix("/objects/"));
            if !numa.is_empty()
                && let (Some(id), Some(node)) = (id, node_of(device))
            {
                backends.insert(id.to_owned(), node);
            }
        }
        backends.extend(numa.iter().filter_map(|one| Some((one.memdev.clone()?, one.node))));
        let sizes = numa.iter().filter_map(|one| Some((one.node, one.memory_bytes?))).collect();
        Self { sizes, backends }
    }

    fn node(&self, region: &Region) -> Option<u32> {
        if region.kind != Kind::Ram {
            return None;
        }
        let block = region.block.as_deref()?;
        if let Some(node) = self.backends.get(block) {
            return Some(*node);
        }
        // One block, cut among the nodes in their order; a region that lies in two has none.
        let mut from = 0u64;
        for (node, size) in &self.sizes {
            let to = from.saturating_add(*size);
            if region.block_offset >= from && region.block_offset.saturating_add(region.len) <= to {
                return Some(*node);
            }
            from = to;
        }
        None
    }
}

/// The RAMBlocks with the host's word on their pages.
fn blocks(located: &Located, process: &Process, warnings: &mut Vec<String>) -> Vec<Block> {
    let maps = match numa::maps(process) {
        Ok(maps) => maps.unwrap_or_default(),
        Err(error) => {
            warnings.push(format!("where the host has pages is not known: {}", told(&error)));
            Vec::new()
        }
    };
    let of = |block: &RamBlock, index: usize| {
        let shown = located.view.regions.iter().find(|place| place.block_index == Some(index));
        let start = block.hva.or_else(|| {
            let place = shown?;
            place.hva?.checked_sub(place.region.block_offset)
        });
        let end = start.and_then(|start| start.checked_add(block.total));
        let inside =
            |map: &&NumaMap| start.is_some_and(|start| map.start >= start) && end > Some(map.start);
        let maps: Vec<&NumaMap> = maps.iter().filter(inside).collect();
        let mut nodes = BTreeMap::new();
        for (node, bytes) in maps.iter().flat_map(|map| &map.nodes) {
            *nodes.entry(*node).or_insert(0u64) += bytes;
        }
        let policy = maps.first().map(|map| map.policy.clone());
        Block { block: block.clone(), policy, nodes }
    };
    located.view.blocks.iter().enumerate().map(|(index, block)| of(block, index)).collect()
}

/// The ways to the map beside the flat view.
fn routes(
    located: &Located,
    drawn: &Result<Option<GuestRange>, String>,
    hidden: &Result<Vec<Hidden>, String>,
    arithmetic: Option<Vec<GuestRange>>,
    probe: Option<&Probe>,
) -> Vec<Route> {
    let shown: Vec<GuestRange> = located.map.regions().iter().filter_map(Region::range).collect();
    let graph = match drawn {
        Ok(None) => Route { route: "graph", difference: None, not_had: None },
        Ok(Some(range)) => {
            let difference =
                format!("no region under {MEMORY:?} shows what the flat view has at {range}");
            Route { route: "graph", difference: Some(difference), not_had: None }
        }
        Err(why) => Route { route: "graph", difference: None, not_had: Some(why.clone()) },
    };
    let objects = match (arithmetic, hidden) {
        (Some(ranges), Ok(hidden)) => {
            let under = hidden.iter().filter_map(|one| GuestRange::new(one.gpa, one.len));
            let known: Vec<GuestRange> = shown.iter().copied().chain(under).collect();
            let ram = located.map.regions().iter().filter(|region| region.kind == Kind::Ram);
            let ram: Vec<GuestRange> = ram.filter_map(Region::range).collect();
            Route { route: "objects", difference: apart(&ranges, &ram, &known), not_had: None }
        }
        (None, _) => Route {
            route: "objects",
            difference: None,
            not_had: Some("this machine shows its RAM in another way".to_owned()),
        },
        (_, Err(why)) => Route { route: "objects", difference: None, not_had: Some(why.clone()) },
    };
    let dump = Route {
        route: "dump",
        difference: probe.and_then(|probe| probe.map_difference.clone()),
        not_had: probe.is_none().then(|| "not asked for: --probe".to_owned()),
    };
    vec![graph, objects, dump]
}

/// How RAM by the objects' addresses differs from the `ram` of the flat view and from what is `known`: that
/// and what is hidden.
fn apart(objects: &[GuestRange], ram: &[GuestRange], known: &[GuestRange]) -> Option<String> {
    if let Some(range) = ram.iter().find_map(|range| range.first_outside(objects)) {
        return Some(format!("the flat view has RAM at {range}, the objects' addresses do not"));
    }
    let range = objects.iter().find_map(|range| range.first_outside(known))?;
    Some(format!("the objects' addresses have RAM at {range}, the flat view does not"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::from_ends(start, end).unwrap()
    }

    #[test]
    fn ram_that_only_one_way_has_is_named() {
        let objects = [range(0, 0x10_0000), range(0x1000_0000, 0x2000_0000)];
        let ram = [range(0, 0xa_0000), range(0xc_0000, 0x10_0000), range(0x1000_0000, 0x2000_0000)];
        let known = [&ram[..], &[range(0xa_0000, 0xc_0000)]].concat();
        assert_eq!(apart(&objects, &ram, &known), None);
        let told = apart(&objects, &ram, &ram).unwrap();
        assert!(told.contains("0xa0000-0xbffff"), "{told}");
        let told = apart(&objects[..1], &ram, &known).unwrap();
        assert!(told.contains("the flat view has RAM at 0x10000000-0x1fffffff"), "{told}");
    }
}
