//! A guest's memory, to be looked at: QEMU's graph of MemoryRegions, the flat view drawn from it, what the
//! host keeps behind each region, and the ways to the map held against each other. Reads no guest memory,
//! and changes nothing, but that the guest stands for milliseconds for a probe.

use crate::find::{self, Row, Target};
use crate::guardian::Guardian;
use crate::log::{Log, Notes};
use crate::look::{self, Probe};
use crate::map::{self, Located};
use crate::method::{dump, stream};
use crate::monitor::{Asked, Monitor, VmFacts};
use crate::plan::{self, Facts, Refusal, TAINT};
use crate::{Failure, told};
use evidence::manifest::Registers;
use evidence::map::Mapping;
use evidence::range::hex;
use evidence::{GuestRange, Kind, Region};
use host::Process;
use host::numa::{self, NumaMap};
use qemu::facts::{DeviceType, MemoryDevice, MemorySize};
use qemu::graph::{Graph, Hidden};
use qemu::{FlatViews, RamBlock};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// What is to be shown.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Also hold the map against the head of QEMU's dump: QEMU stops the guest for it, at most so long.
    pub probe: Option<Duration>,
    /// Also say on which of the host's NUMA nodes the pages lie.
    pub host_nodes: bool,
}

/// All that `stillframe map` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Chart {
    /// The VM.
    pub vm: Row,
    /// What QEMU says of it.
    pub qemu: VmFacts,
    /// Sizes of the guest's memory.
    pub size: MemorySize,
    /// Bytes of RAM that the balloon leaves the guest, plugged in ones among them; null without a balloon.
    pub balloon_bytes: Option<u64>,
    /// The flat view: what answers where, as far as it is memory. Ascending.
    pub regions: Vec<Charted>,
    /// Memory that lies under something else; null when it is not known: see `warnings`.
    pub hidden: Option<Vec<Hidden>>,
    /// QEMU's RAMBlocks.
    pub blocks: Vec<Block>,
    /// The memory devices.
    pub devices: Vec<Device>,
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

/// A memory device.
#[derive(Clone, Debug, Serialize)]
pub struct Device {
    /// QEMU's word: `dimm`, `virtio-mem`.
    pub device: String,
    /// The user's id.
    pub id: Option<String>,
    /// Guest-physical address.
    #[serde(serialize_with = "hex::optional")]
    pub addr: Option<u64>,
    /// Bytes that it gives the guest now.
    pub size_bytes: Option<u64>,
    /// virtio-mem: bytes that it can give.
    pub max_bytes: Option<u64>,
    /// Object path of its backend.
    pub backend: Option<String>,
}

impl From<&MemoryDevice> for Device {
    fn from(device: &MemoryDevice) -> Self {
        Self {
            device: match &device.device_type {
                DeviceType::Dimm => "dimm",
                DeviceType::Nvdimm => "nvdimm",
                DeviceType::VirtioMem => "virtio-mem",
                DeviceType::VirtioPmem => "virtio-pmem",
                DeviceType::SgxEpc => "sgx-epc",
                DeviceType::Other(word) => word,
            }
            .to_owned(),
            id: device.id.clone(),
            addr: device.addr,
            size_bytes: device.size,
            max_bytes: device.max_size,
            backend: device.memdev.clone(),
        }
    }
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

/// Looks at the VM's memory.
///
/// # Errors
/// [`Failure`] when the VM cannot be looked at.
pub fn chart(vm: &str, wish: &Wish) -> Result<Chart, Failure> {
    let target = find::one(vm)?;
    let whom = target.whom();
    let mut monitor = Monitor::open(&whom, &Notes::default())?;
    let mut asked = monitor.look(&whom)?;
    let mut warnings = before(&target);
    warnings.extend(asked.skipped.iter().map(|text| format!("monitor skipped: {text}")));
    let Some(view) = asked.view.take() else {
        let facts = Facts { confidential: asked.confidential, ..Facts::default() };
        let refusal = plan::refuse_unreadable(&facts).err();
        return Err(Failure::Refused(refusal.unwrap_or_else(|| Refusal::new("no map", &[]))));
    };
    let (view, more) = monitor.chart(view)?;
    // Others may need it: what the host has behind the guest's memory takes its time.
    drop(monitor);
    let (located, memory) = map::locate(view, &target.process)?;
    let usage = memory.usage()?;
    if let Some(why) = &located.unseen {
        warnings.push(format!("what the host has behind it may not be looked at: {why}"));
    }
    let probe = match wish.probe {
        Some(at_most) => probe(&target, &asked, &located, at_most)?,
        None => Err("not asked for: --probe".to_owned()),
    };
    let drawn = drawn(&more.graph, &located);
    if let Err(why) = &drawn.hidden {
        warnings.push(format!("what is hidden is not known: {why}"));
    }
    if let Err(why) = &more.balloon {
        warnings.push(format!("the balloon: {why}"));
    }
    let unknown = drawn.unknown.iter();
    warnings.extend(
        unknown.map(|(range, alias)| format!("what {alias:?} shows at {range} is not known")),
    );
    let nodes = Nodes::of(&target.cmdline.numa, &located, more.backend.as_deref());
    let regions = regions(&located, &usage, &nodes);
    let routes = routes(&located, &drawn, more.arithmetic, probe.as_ref());
    Ok(Chart {
        blocks: blocks(&located, &target.process, wish.host_nodes, &mut warnings),
        ksm_pages: memory.merged_pages(),
        vm: target.row,
        qemu: asked.vm,
        size: located.view.size,
        balloon_bytes: more.balloon.ok().flatten(),
        devices: located.view.devices.iter().map(Device::from).collect(),
        regions,
        hidden: drawn.hidden.ok(),
        graph: more.graph.ok(),
        routes,
        probe: probe.ok(),
        warnings,
    })
}

/// What is to be said before a VM is asked anything.
///
/// # Errors
/// The VM is not found.
pub fn warnings_before(vm: &str) -> Result<Vec<String>, Failure> {
    Ok(before(&find::one(vm)?))
}

fn before(target: &Target) -> Vec<String> {
    let unknown = |text: &String| format!("whether the VM is libvirt's could not be asked: {text}");
    let taint = target.through.is_some().then(|| TAINT.to_owned());
    taint.into_iter().chain(target.silent.iter().map(unknown)).collect()
}

/// Asks for the head of QEMU's dump. As that stops the guest, it is done as an acquisition is: by a guardian,
/// which lets go whatever happens. The inner error is why it was not asked for, or not had.
fn probe(
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
    if let Err(refusal) = plan::refuse_unreadable(&facts).and_then(|()| plan::can_dump(&facts)) {
        return Ok(Err(refusal.reason));
    }
    let log = Log::begin();
    let mut guardian = match Guardian::start(target, &log) {
        Ok(guardian) => guardian,
        Err(Failure::Refused(refusal)) => return Ok(Err(refusal.reason)),
        Err(other) => return Err(other),
    };
    let before = guardian.look().map(|asked| asked.view);
    let read = stream::dump_head(&mut guardian, at_most);
    let after = guardian.again().map(|again| Some(again.view));
    let parting = guardian.bye();
    if let Some(what) = parting.not_as_found {
        return Err(Failure::NotAsFound(what));
    }
    let read = match read {
        Err(error) => return Ok(Err(told(&error))),
        Ok(read) => read,
    };
    let Registers { stood, machine, cpus, map_difference, .. } =
        dump::registers_of(&read, &log, located);
    for view in [before, after] {
        match view {
            Err(error) => return Ok(Err(told(&error))),
            Ok(Some(view)) if view.same_memory(&located.view) => {}
            Ok(_) => return Ok(Err("the guest changed its map meanwhile".to_owned())),
        }
    }
    Ok(Ok(Probe { stood, machine, cpus, map_difference }))
}

/// What is asked of QEMU beyond the map; in place of each, why QEMU did not say.
pub(crate) struct More {
    /// The graph.
    pub(crate) graph: Result<Graph, String>,
    /// RAM by the objects' addresses; `None` for a machine that shows it in another way.
    pub(crate) arithmetic: Result<Option<Vec<GuestRange>>, String>,
    /// Object path of the backend that is the machine's RAM, where there is one.
    pub(crate) backend: Option<String>,
    /// Bytes that the balloon leaves the guest.
    pub(crate) balloon: Result<Option<u64>, String>,
}

/// What the graph says of the flat view.
struct Drawn {
    difference: Result<Option<String>, String>,
    hidden: Result<Vec<Hidden>, String>,
    unknown: Vec<(GuestRange, String)>,
}

fn drawn(graph: &Result<Graph, String>, located: &Located) -> Drawn {
    let views = FlatViews::parse(&located.view.mtree).map_err(|error| told(&error));
    let entries = match (graph, &views) {
        (Err(why), _) => Err(format!("QEMU's graph: {why}")),
        (_, Err(why)) => Err(why.clone()),
        (Ok(graph), Ok(views)) => match views.memory() {
            Ok(memory) => Ok((graph, &memory.entries)),
            Err(error) => Err(told(&error)),
        },
    };
    match entries {
        Err(why) => Drawn { difference: Err(why.clone()), hidden: Err(why), unknown: Vec::new() },
        Ok((graph, entries)) => Drawn {
            difference: graph.difference(entries),
            hidden: graph.hidden(entries),
            unknown: graph.leaves().map_or_else(|_| Vec::new(), |leaves| leaves.unknown),
        },
    }
}

fn regions(located: &Located, usage: &[host::guest_memory::Usage], nodes: &Nodes) -> Vec<Charted> {
    let pluggable = located.pluggable();
    let mut usage = usage.iter().filter(|_| located.unseen.is_none());
    let charted = |region: &Region, hva: Option<u64>| {
        let used = if region.kind.in_image() { usage.next() } else { None };
        let shared = matches!(region.mapping, Some(Mapping::Shared | Mapping::SharedHugetlb));
        let of_device = |range: GuestRange| pluggable.iter().any(|device| device.covers(range));
        Charted {
            region: region.clone(),
            hva,
            node: nodes.node(region),
            image: decision(region.kind),
            pages: used.map(|used| Pages {
                kept_bytes: used.resident,
                swapped_bytes: (!shared).then_some(used.swapped),
                hole_bytes: region.len.saturating_sub(used.resident),
                pluggable: region.range().is_some_and(of_device),
            }),
        }
    };
    let all = located.map.regions().iter().zip(&located.view.regions);
    let mut charted = charted;
    all.map(|(region, place)| charted(region, place.hva)).collect()
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
        let sizes: Vec<(u32, u64)> =
            numa.iter().filter_map(|one| Some((one.node, one.memory_bytes?))).collect();
        // The machine's one block, cut among the nodes; a single node has all of it.
        let Some(machine) = machine.map(id_of) else { return Self { sizes: Vec::new(), backends } };
        if let ([one], []) = (numa, &sizes[..]) {
            backends.entry(machine.to_owned()).or_insert(one.node);
        }
        let block = located.view.blocks.iter().find(|block| id_of(&block.name) == machine);
        let sum = sizes.iter().fold(0u64, |sum, (_, size)| sum.saturating_add(*size));
        let whole = block.is_some_and(|block| block.total == sum) && sizes.len() == numa.len();
        Self { sizes: if whole { sizes } else { Vec::new() }, backends }
    }

    fn node(&self, region: &Region) -> Option<u32> {
        if region.kind != Kind::Ram {
            return None;
        }
        // virtio-mem's backends have the device's path before their id.
        let block = id_of(region.block.as_deref()?);
        let id = block.rsplit('/').next().unwrap_or(block);
        if let Some(node) = self.backends.get(block).or_else(|| self.backends.get(id)) {
            return Some(*node);
        }
        if self.backends.contains_key(block) || region.block.as_deref()?.contains('/') {
            return None;
        }
        let (mut from, end) = (0u64, region.block_offset.saturating_add(region.len));
        for (node, size) in &self.sizes {
            let to = from.saturating_add(*size);
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
    let maps = if host_nodes { Some(numa::maps(process)) } else { None };
    let maps = match maps {
        None => None,
        Some(Ok(None)) => {
            warnings
                .push("where the host has pages is not known: its kernel has no NUMA".to_owned());
            None
        }
        Some(Ok(maps)) => maps,
        Some(Err(error)) => {
            warnings.push(format!("where the host has pages is not known: {}", told(&error)));
            None
        }
    };
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
    drawn: &Drawn,
    arithmetic: Result<Option<Vec<GuestRange>>, String>,
    probe: Result<&Probe, &String>,
) -> Vec<Route> {
    let objects = match (arithmetic, &drawn.hidden) {
        (Err(why), _) => Err(why),
        (Ok(None), _) => Err("this machine shows its RAM in another way".to_owned()),
        (_, Err(why)) => Err(why.clone()),
        (Ok(Some(ranges)), Ok(hidden)) => {
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
        Route::of("graph", drawn.difference.clone()),
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
        let nodes = Nodes { sizes: Vec::new(), backends };
        let names = ["r0", "/objects/r1", "0000:00:03.0/r1", "r2", "0000:00:02.0/vga.vram"];
        let found: Vec<Option<u32>> =
            names.iter().map(|name| nodes.node(&ram(name, 0, 4096))).collect();
        assert_eq!(found, [Some(0), Some(1), Some(1), None, None]);
        let rom = Region { kind: Kind::Rom, ..ram("r0", 0, 4096) };
        assert_eq!(nodes.node(&rom), None);
    }

    #[test]
    fn one_block_is_cut_among_the_nodes_in_their_order() {
        let nodes =
            Nodes { sizes: vec![(0, 0), (1, 1 << 20), (2, 1 << 20)], backends: BTreeMap::new() };
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
