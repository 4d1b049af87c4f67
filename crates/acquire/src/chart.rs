//! A guest's memory, to be looked at: QEMU's graph of MemoryRegions, the flat view drawn from it, what the
//! host keeps behind each region, and the ways to the map held against each other. Reads no guest memory,
//! and changes nothing, but that the guest stands for milliseconds for a probe.

use crate::find::{self, Row, Target};
use crate::guardian::Guardian;
use crate::log::{Log, Notes};
use crate::look::{self, Probe};
use crate::map::{self, Located};
use crate::monitor::{Asked, Monitor, VmFacts};
use crate::plan::{self, Facts, TAINT};
use crate::{Failure, Request, amount, aside, told};
use evidence::manifest::Plugged;
use evidence::map::Mapping;
use evidence::range::hex;
use evidence::{GuestRange, Kind, Region};
use host::Process;
use host::guest_memory::Usage;
use host::numa::{self, NumaMap};
use qemu::facts::{MemoryDevice, MemorySize};
use qemu::graph::{Comparison, Graph, Hidden};
use qemu::{Balloon, RamBlock};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// All that `stillframe map` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Chart {
    /// The VM.
    pub vm: Row,
    /// What QEMU says of it.
    pub qemu: VmFacts,
    /// Sizes of the guest's memory.
    pub size: MemorySize,
    /// The balloon; null without one.
    pub balloon: Option<Balloon>,
    /// The flat view: what answers where, as far as it is memory. Ascending.
    pub regions: Vec<Charted>,
    /// Memory that lies under something else; null when it is not known: see `warnings`.
    pub hidden: Option<Vec<Hidden>>,
    /// QEMU's RAMBlocks.
    pub blocks: Vec<Block>,
    /// The memory devices.
    pub devices: Vec<Plugged>,
    /// Pages of the process that KSM has merged; null when the kernel does not say, or this user may not look.
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
    /// The guest's NUMA node, as QEMU's command line gives it to the RAMBlock; null when that gives none, or
    /// more than one.
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
    /// The host has them: in memory, in swap, or in the file that lies behind.
    pub kept_bytes: u64,
    /// Of these, in swap; null of shared memory, for which the kernel tells it for a whole mapping alone.
    pub swapped_bytes: Option<u64>,
    /// The host has nothing: never touched, or given back.
    pub hole_bytes: u64,
    /// Of virtio-mem: much of that may not be plugged in.
    pub pluggable: bool,
}

/// A RAMBlock, and where the host has its pages.
#[derive(Clone, Debug, Serialize)]
pub struct Block {
    /// QEMU's name; empty for virtio-pmem.
    pub name: String,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Bytes reserved.
    pub total_bytes: u64,
    /// Size of a page in bytes.
    pub page_bytes: u64,
    /// Its address in QEMU's process, where it is known.
    #[serde(serialize_with = "hex::optional")]
    pub hva: Option<u64>,
    /// The host's memory policy for the mapping; null when it was not asked for, or the kernel does not say.
    pub policy: Option<String>,
    /// Bytes on each of the host's NUMA nodes; null likewise.
    pub nodes: Option<BTreeMap<u32, u64>>,
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

/// Looks at the VM's memory. `probe`: the map is also held against the head of QEMU's dump, for which QEMU
/// stops the guest, at most so long. `host_nodes`: it is also told on which of the host's NUMA nodes the
/// pages lie.
///
/// # Errors
/// [`Failure`] when the VM cannot be looked at.
pub fn chart(vm: &str, probe: Option<Duration>, host_nodes: bool) -> Result<Chart, Failure> {
    let target = find::one(vm)?;
    let whom = target.whom();
    let mut monitor = Monitor::open(&whom, &Notes::default())?;
    let mut asked = monitor.look(&whom)?;
    let taint = target.through.is_some().then(|| TAINT.to_owned());
    let mut warnings: Vec<String> =
        taint.into_iter().chain(asked.warnings()).chain(target.warnings()).collect();
    let Some(view) = asked.view.take() else {
        let facts = Facts { confidential: asked.confidential, ..Facts::default() };
        return Err(Failure::Refused(look::refusal_of(&facts, &Request::default())));
    };
    let (view, more) = monitor.chart(view)?;
    // Others may need it: what the host has behind the guest's memory takes its time.
    drop(monitor);
    let (located, memory) = map::locate(view, &target.process)?;
    let usage = memory.usage()?;
    if let Some(why) = &located.unseen {
        warnings.push(format!("what the host has behind it may not be looked at: {why}"));
    }
    let probe = match probe {
        Some(at_most) => dumped_head(&target, &asked, &located, at_most)?,
        None => Err("not asked for: --probe".to_owned()),
    };
    let compared = compare(&more.graph, &located);
    match &compared {
        Err(why) => warnings.push(format!("what is hidden is not known: {why}")),
        Ok(Comparison { unknown, .. }) => warnings.extend(
            unknown
                .iter()
                .map(|(range, alias)| format!("what {alias:?} shows at {range} is not known")),
        ),
    }
    if let Err(why) = &more.balloon {
        warnings.push(format!("the balloon is not known: {why}"));
    }
    if let Err(why) = &more.backend {
        warnings.push(format!("the guest's NUMA nodes may not all be known: {why}"));
    }
    let machine = more.backend.ok().flatten();
    let nodes = Nodes::of(&target.cmdline.numa, &located, machine.as_deref());
    Ok(Chart {
        blocks: blocks(&located, &target.process, host_nodes, &mut warnings),
        ksm_pages: memory.merged_pages(),
        vm: target.row,
        qemu: asked.vm,
        size: located.view.size,
        balloon: more.balloon.ok().flatten(),
        devices: located.view.devices.iter().map(amount::plugged).collect(),
        regions: regions(&located, &usage, &nodes),
        routes: routes(&located, &compared, more.arithmetic, probe.as_ref()),
        hidden: compared.ok().map(|compared| compared.hidden),
        graph: more.graph.ok(),
        probe: probe.ok(),
        warnings,
    })
}

/// What the head of QEMU's dump tells; the inner error is why it was not asked for, or not had.
fn dumped_head(
    target: &Target,
    asked: &Asked,
    located: &Located,
    at_most: Duration,
) -> Result<Result<Probe, String>, Failure> {
    let facts = Facts {
        run_state: asked.vm.run_state.clone(),
        migration: asked.migration.clone(),
        through_libvirt: target.through.is_some(),
        locked_for: target.row.proxmox.as_ref().and_then(|vm| vm.lock.clone()),
        image_bytes: located.map.imaged_len(),
        dump_unfit: look::dump_unfit(&asked.vm.arch, located),
        ..Facts::default()
    };
    let log = Log::begin();
    let had = plan::can_probe(&facts)
        .map_err(Failure::Refused)
        .and_then(|()| Guardian::start(target, &log))
        .and_then(|guardian| look::dumped_head(guardian, located, at_most, &log));
    match had {
        Ok(probe) => Ok(Ok(probe)),
        Err(Failure::Refused(refusal)) => Ok(Err(refusal.reason)),
        Err(Failure::Probe(error)) => Ok(Err(told(&error))),
        Err(other) => Err(other),
    }
}

/// What is asked of QEMU beyond the map; in place of each, why QEMU did not say.
pub(crate) struct More {
    /// The graph.
    pub(crate) graph: Result<Graph, String>,
    /// RAM by the objects' addresses; `None` for a machine that shows it in another way.
    pub(crate) arithmetic: Result<Option<Vec<GuestRange>>, String>,
    /// Object path of the backend that is the machine's RAM, where there is one.
    pub(crate) backend: Result<Option<String>, String>,
    /// The balloon.
    pub(crate) balloon: amount::Asked,
}

fn compare(graph: &Result<Graph, String>, located: &Located) -> Result<Comparison, String> {
    let graph = graph.as_ref().map_err(|why| format!("QEMU's graph: {why}"))?;
    graph.against(&located.view.mtree)
}

fn regions(located: &Located, usage: &[Usage], nodes: &Nodes) -> Vec<Charted> {
    let pluggable = located.pluggable();
    let mut usage = usage.iter().filter(|_| located.unseen.is_none());
    let mut pages = |region: &Region| {
        let used = if region.kind.in_image() { usage.next() } else { None }?;
        let shared = matches!(region.mapping, Some(Mapping::Shared | Mapping::SharedHugetlb));
        let of_device = |range: GuestRange| pluggable.iter().any(|device| device.covers(range));
        Some(Pages {
            kept_bytes: used.resident,
            swapped_bytes: (!shared).then_some(used.swapped),
            hole_bytes: region.len.saturating_sub(used.resident),
            pluggable: region.range().is_some_and(of_device),
        })
    };
    let all = located.map.regions().iter().zip(&located.view.regions);
    all.map(|(region, place)| Charted {
        region: region.clone(),
        hva: place.hva,
        node: nodes.node(region),
        image: decision(region.kind),
        pages: pages(region),
    })
    .collect()
}

fn decision(kind: Kind) -> Decision {
    Decision { taken: kind.in_image(), why: aside::why(kind) }
}

/// The guest's NUMA nodes, by QEMU's command line.
struct Nodes {
    /// Node of each backend.
    backends: BTreeMap<String, u32>,
    /// Id of the backend that is cut among the nodes, and node and size in bytes of each piece in their order.
    cut: Option<(String, Vec<(u32, u64)>)>,
}

/// QEMU's answer on a memory device.
fn node_of(device: &MemoryDevice) -> Option<u32> {
    u32::try_from(device.raw.pointer("/data/node")?.as_u64()?).ok()
}

/// The id of a backend by its object path, or by the name that RAMBlocks have where they are called by it.
fn id_of(path: &str) -> &str {
    path.strip_prefix("/objects/").unwrap_or(path)
}

impl Nodes {
    fn of(numa: &[qemu::cmdline::NumaNode], located: &Located, machine: Option<&str>) -> Self {
        let mut backends: BTreeMap<String, u32> = BTreeMap::new();
        for device in located.view.devices.iter().filter(|_| !numa.is_empty()) {
            if let (Some(path), Some(node)) = (&device.memdev, node_of(device)) {
                backends.insert(id_of(path).to_owned(), node);
            }
        }
        backends.extend(numa.iter().filter_map(|one| Some((one.memdev.clone()?, one.node))));
        let Some(machine) = machine.map(id_of) else { return Self { backends, cut: None } };
        if let [one] = numa {
            backends.entry(machine.to_owned()).or_insert(one.node);
        }
        let sizes: Option<Vec<(u32, u64)>> =
            numa.iter().map(|one| Some((one.node, one.memory_bytes?))).collect();
        Self { backends, cut: sizes.map(|sizes| (machine.to_owned(), sizes)) }
    }

    fn node(&self, region: &Region) -> Option<u32> {
        if region.kind != Kind::Ram {
            return None;
        }
        let block = id_of(region.block.as_deref()?);
        // virtio-mem's backends have the device's path before their id.
        let id = block.rsplit('/').next().unwrap_or(block);
        if let Some(node) = self.backends.get(block).or_else(|| self.backends.get(id)) {
            return Some(*node);
        }
        let (_, pieces) = self.cut.as_ref().filter(|(machine, _)| machine == block)?;
        let (mut from, end) = (0u64, region.block_offset.checked_add(region.len)?);
        for (node, size) in pieces {
            let to = from.checked_add(*size)?;
            if region.block_offset >= from && end <= to {
                return Some(*node);
            }
            from = to;
        }
        None
    }
}

/// The RAMBlocks; with the host's word on their pages where that is asked for.
fn blocks(
    located: &Located,
    process: &Process,
    host_nodes: bool,
    warnings: &mut Vec<String>,
) -> Vec<Block> {
    let maps =
        if host_nodes { numa::maps(process).map_err(|error| told(&error)) } else { Ok(None) };
    match &maps {
        Err(why) => warnings.push(format!("where the host has pages is not known: {why}")),
        Ok(None) if host_nodes => {
            warnings
                .push("where the host has pages is not known: its kernel has no NUMA".to_owned());
        }
        Ok(_) => {}
    }
    let maps = maps.ok().flatten();
    let of = |(index, block): (usize, &RamBlock)| {
        let shown = located.view.regions.iter().find(|place| place.block_index == Some(index));
        let hva = block.hva.or_else(|| {
            let place = shown?;
            place.hva?.checked_sub(place.region.block_offset)
        });
        let end = hva.and_then(|hva| hva.checked_add(block.total));
        let inside =
            |map: &&NumaMap| hva.is_some_and(|hva| map.start >= hva) && end > Some(map.start);
        let own: Option<Vec<&NumaMap>> = maps
            .as_ref()
            .filter(|_| hva.is_some())
            .map(|maps| maps.iter().filter(inside).collect());
        Block {
            name: block.name.clone(),
            used_bytes: block.used,
            total_bytes: block.total,
            page_bytes: block.page_size,
            hva,
            policy: own.as_ref().and_then(|own| Some(own.first()?.policy.clone())),
            nodes: own.map(|own| {
                let mut nodes = BTreeMap::new();
                for (node, bytes) in own.iter().flat_map(|map| &map.nodes) {
                    let sum = nodes.entry(*node).or_insert(0u64);
                    *sum = sum.saturating_add(*bytes);
                }
                nodes
            }),
        }
    };
    located.view.blocks.iter().enumerate().map(of).collect()
}

impl Route {
    fn of(route: &'static str, difference: Result<Option<String>, String>) -> Self {
        match difference {
            Ok(difference) => Self { route, difference, not_had: None },
            Err(why) => Self { route, difference: None, not_had: Some(why) },
        }
    }
}

/// The ways to the map beside the flat view.
fn routes(
    located: &Located,
    compared: &Result<Comparison, String>,
    arithmetic: Result<Option<Vec<GuestRange>>, String>,
    probe: Result<&Probe, &String>,
) -> Vec<Route> {
    let objects = match (arithmetic, compared) {
        (Err(why), _) => Err(why),
        (Ok(None), _) => Err("this machine shows its RAM in another way".to_owned()),
        (_, Err(why)) => Err(why.clone()),
        (Ok(Some(ranges)), Ok(Comparison { hidden, .. })) => {
            let regions = located.map.regions().iter();
            let shown = regions.clone().filter_map(Region::range);
            let ram = regions.filter(|region| region.kind == Kind::Ram).filter_map(Region::range);
            let under = hidden.iter().filter(|one| one.by.is_some());
            let under = under.filter_map(|one| GuestRange::new(one.gpa, one.len));
            let known: Vec<GuestRange> = shown.chain(under).chain(located.pluggable()).collect();
            Ok(apart(&ranges, &ram.collect::<Vec<_>>(), &known))
        }
    };
    let dump = probe.map(|probe| probe.map_difference.clone()).map_err(Clone::clone);
    vec![
        Route::of(
            "graph",
            compared.as_ref().map(|one| one.difference.clone()).map_err(Clone::clone),
        ),
        Route::of("objects", objects),
        Route::of("dump", dump),
    ]
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

    fn ram(block: &str, block_offset: u64, len: u64) -> Region {
        Region {
            gpa: block_offset,
            len,
            kind: Kind::Ram,
            name: block.to_owned(),
            owner: None,
            block: Some(block.to_owned()),
            block_offset,
            mapping: None,
            page_size: None,
            readonly: false,
        }
    }

    #[test]
    fn a_region_lies_in_the_node_of_its_backend() {
        let backends = BTreeMap::from([("r0".to_owned(), 0), ("r1".to_owned(), 1)]);
        let nodes = Nodes { backends, cut: None };
        let names = ["r0", "/objects/r1", "0000:00:03.0/r1", "r2", "0000:00:02.0/vga.vram"];
        let found: Vec<Option<u32>> =
            names.iter().map(|name| nodes.node(&ram(name, 0, 4096))).collect();
        assert_eq!(found, [Some(0), Some(1), Some(1), None, None]);
        let rom = Region { kind: Kind::Rom, ..ram("r0", 0, 4096) };
        assert_eq!(nodes.node(&rom), None);
    }

    #[test]
    fn one_block_is_cut_among_the_nodes_in_their_order() {
        let cut = ("pc.ram".to_owned(), vec![(0, 0), (1, 1 << 20), (2, 1 << 20)]);
        let nodes = Nodes { backends: BTreeMap::new(), cut: Some(cut) };
        let node = |from: u64, len: u64| nodes.node(&ram("pc.ram", from, len));
        assert_eq!((node(0, 1 << 20), node(1 << 20, 4096)), (Some(1), Some(2)));
        assert_eq!(node((1 << 20) - 4096, 8192), None, "in two nodes");
        assert_eq!(nodes.node(&ram("0000:00:03.0/vm0", 0, 4096)), None, "not the machine's block");
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
