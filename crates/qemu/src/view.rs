//! The guest's memory as QEMU sees it: flat view, RAMBlocks and addresses in QEMU's process, each
//! checked against the others.
//!
//! What QEMU says is taken in three ways that do not share code in QEMU (`info mtree`, `gpa2hva`,
//! `x-query-ramblock`) and held against a fourth, the sizes of `query-memory-size-summary`. A
//! contradiction is a refusal that names both sides.

use crate::facts::{DeviceType, Facts, MemoryDevice, MemorySize};
use crate::gpa2hva::{self, Gpa2Hva, NotAnAnswer};
use crate::mtree::{Entry, FlatView, FlatViews, MtreeError, Object, ObjectName, RangeType};
use crate::owner::{self, Role};
use crate::qmp::{Command, Hmp, Qmp, QmpError};
use crate::ramblock::{self, RamBlock, RamBlockError};
use crate::text::Excerpt;
use evidence::map::MapError;
use evidence::{GuestRange, Kind, MemoryMap, Region};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Distance of the bytes whose address is asked for.
const STEP: u64 = 1 << 30;

/// The most memory that a view may show in one range: bounds the questions asked.
const MAX_RANGE: u64 = 1 << 46;

/// How often a view is taken anew when the guest changes it meanwhile (firmware switches the PAM
/// registers many times within a second; virtio-mem that is being plugged in grows step by step).
const TRIES: usize = 10;

/// The pause before it is taken anew.
const PAUSE: Duration = Duration::from_millis(20);

/// One region and where QEMU keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewRegion {
    /// The region; `mapping` and `page_size` are absent, they are the host's to say.
    pub region: Region,
    /// Address of its first byte in QEMU's process; the region is linear from there. Absent for
    /// kinds that are not in the image.
    pub hva: Option<u64>,
    /// Its RAMBlock in [`GuestView::blocks`], when that is known.
    pub block_index: Option<usize>,
    /// QEMU's page size of that RAMBlock in bytes.
    pub block_page_size: Option<u64>,
}

/// A guest's memory as QEMU saw it at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestView {
    /// Text of `info mtree -f -o`.
    pub mtree: String,
    /// Text of `x-query-ramblock`.
    pub ramblock: String,
    /// Sizes of the guest's memory.
    pub size: MemorySize,
    /// The memory devices.
    pub devices: Vec<MemoryDevice>,
    /// The RAMBlocks.
    pub blocks: Vec<RamBlock>,
    /// The regions, ascending and disjoint.
    pub regions: Vec<ViewRegion>,
}

/// Why no view could be taken.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// `info mtree` is not understood.
    #[error(transparent)]
    Mtree(#[from] MtreeError),
    /// `x-query-ramblock` is not understood.
    #[error(transparent)]
    RamBlock(#[from] RamBlockError),
    /// `gpa2hva` is not understood.
    #[error(transparent)]
    Gpa2Hva(#[from] NotAnAnswer),
    /// `info mtree` shows memory where `gpa2hva` finds another thing.
    #[error("info mtree shows {name:?} at {gpa:#x}, but gpa2hva finds {found:?} there")]
    OtherThing {
        /// The address.
        gpa: u64,
        /// The MemoryRegion's name in the flat view.
        name: Excerpt,
        /// What `gpa2hva` says.
        found: Excerpt,
    },
    /// A range is not linear in QEMU's process.
    #[error("{name:?} at {gpa:#x} should lie at host address {expected:#x} but lies at {found:#x}")]
    NotLinear {
        /// The guest-physical address.
        gpa: u64,
        /// The MemoryRegion's name.
        name: Excerpt,
        /// Where it would lie if the range was linear.
        expected: u64,
        /// Where `gpa2hva` says it lies.
        found: u64,
    },
    /// Addresses and RAMBlocks contradict each other.
    #[error("{name:?} at {range} has host address {hva:#x} and offset {offset:#x}, but {block}")]
    Block {
        /// The region.
        range: GuestRange,
        /// The MemoryRegion's name.
        name: Excerpt,
        /// Its address in QEMU's process.
        hva: u64,
        /// Its offset in the MemoryRegion.
        offset: u64,
        /// What the RAMBlocks say.
        block: String,
    },
    /// RAM whose RAMBlock is not found: its size cannot be checked.
    #[error("no single RAMBlock fits the RAM {name:?} at {range}")]
    NoBlock {
        /// The region.
        range: GuestRange,
        /// The MemoryRegion's name.
        name: Excerpt,
    },
    /// The RAM found is not the RAM that QEMU says it has.
    #[error(
        "QEMU says that the guest has {base} bytes of RAM and {plugged} plugged, together \
         {}, but its memory map holds {found}", base.saturating_add(*plugged)
    )]
    Sum {
        /// `base-memory`.
        base: u64,
        /// `plugged-memory`.
        plugged: u64,
        /// Bytes of the RAMBlocks and memory devices found.
        found: u64,
    },
    /// A range ends at 2^64 or holds more than 64 TiB.
    #[error("the memory {name:?} from {first:#x} to {last:#x} is larger than any machine's")]
    TooLarge {
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
        /// The MemoryRegion's name.
        name: Excerpt,
    },
    /// The regions do not make a map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The guest changed its memory map each time while it was read.
    #[error("the guest's memory map changed {TRIES} times while it was read")]
    Restless,
}

impl GuestView {
    /// Asks QEMU for the guest's memory; each query is given up after `timeout`. Only queries are
    /// sent.
    ///
    /// # Errors
    /// [`ViewError`]: a text that is not understood, or two answers that contradict each other.
    pub fn take(qmp: &mut Qmp, timeout: Duration) -> Result<Self, ViewError> {
        for _ in 0..TRIES {
            let texts = Texts::take(qmp, timeout)?;
            let drawn = draw(qmp, timeout, &texts);
            // A contradiction may only mean that the guest changed the map between two answers.
            let again = Texts::take(qmp, timeout)?;
            let layout = texts.memory == again.memory && texts.ramblock == again.ramblock;
            // Sizes may move on: a view is of one moment, and its own sizes were held against it.
            let sizes = texts.size == again.size && texts.devices == again.devices;
            match drawn {
                Ok(view) if layout => return Ok(view),
                Err(error) if layout && sizes => return Err(error),
                _ => std::thread::sleep(PAUSE),
            }
        }
        Err(ViewError::Restless)
    }

    /// The map that the regions make; what the host knows of them is still absent.
    ///
    /// # Errors
    /// [`MapError`] cannot happen for a view that was taken, and is not hidden if it does.
    pub fn map(&self) -> Result<MemoryMap, MapError> {
        MemoryMap::new(self.regions.iter().map(|r| r.region.clone()).collect())
    }

    /// Whether the guest's memory is laid out the same in both views. The texts may differ: QEMU
    /// prints flat views in no fixed order.
    pub fn same_memory(&self, other: &Self) -> bool {
        let region = |view: &Self, place: &ViewRegion| {
            // Blocks that no region shows come and go, and move the others in the list.
            let block = place.block_index.and_then(|index| view.blocks.get(index)).cloned();
            (ViewRegion { block_index: None, ..place.clone() }, block)
        };
        let regions = |view: &Self| -> Vec<_> {
            view.regions.iter().map(|place| region(view, place)).collect()
        };
        let same = self.size == other.size && self.devices == other.devices;
        same && regions(self) == regions(other)
    }
}

/// What is compared before and after.
struct Texts {
    mtree: String,
    memory: FlatView,
    ramblock: String,
    size: MemorySize,
    devices: Vec<MemoryDevice>,
}

impl Texts {
    fn take(qmp: &mut Qmp, timeout: Duration) -> Result<Self, ViewError> {
        let mtree = qmp.hmp(Hmp::InfoMtreeFlatOwners, timeout)?;
        let memory = FlatViews::parse(&mtree)?.memory()?.entries.clone();
        // Number and list of address spaces are of no concern and not stable.
        let memory = FlatView { number: 0, address_spaces: Vec::new(), entries: memory };
        let ramblock = ramblock_text(qmp, timeout)?;
        let mut facts = Facts::of(qmp, timeout);
        let (size, devices) = (facts.memory_size()?, facts.memory_devices()?);
        Ok(Self { mtree, memory, ramblock, size, devices })
    }
}

fn ramblock_text(qmp: &mut Qmp, timeout: Duration) -> Result<String, QmpError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Text {
        human_readable_text: String,
    }
    match qmp.query::<Text>(Command::XQueryRamblock, json!({}), timeout) {
        Ok(text) => Ok(text.human_readable_text.replace("\r\n", "\n")),
        // It is marked unstable and may go away; before 6.2 there was only this.
        Err(error) if error.is_unknown_command() => qmp.hmp(Hmp::InfoRamblock, timeout),
        Err(error) => Err(error),
    }
}

fn draw(qmp: &mut Qmp, timeout: Duration, texts: &Texts) -> Result<GuestView, ViewError> {
    let blocks = ramblock::parse(&texts.ramblock)?;
    let mut facts = Facts::of(qmp, timeout);
    let (size, devices) = (texts.size, texts.devices.clone());
    let mut roles = Roles::new(&mut facts, &size, &devices)?;

    let mut drawn = Vec::new();
    for entry in texts.memory.entries.iter().filter(|e| e.range_type.is_memory()) {
        let role = roles.of(&mut facts, entry)?;
        drawn.push((role, draw_region(facts.qmp(), timeout, entry, role, &blocks)?));
    }
    check_bases(&drawn, &blocks)?;
    check_sum(&size, &devices, &drawn, &blocks)?;

    let regions: Vec<ViewRegion> = drawn.into_iter().map(|(_, region)| region).collect();
    let (mtree, ramblock) = (texts.mtree.clone(), texts.ramblock.clone());
    let view = GuestView { mtree, ramblock, size, devices, blocks, regions };
    view.map()?;
    Ok(view)
}

/// Finds out what owners are, asking QEMU at most once for each.
struct Roles {
    base_memory: u64,
    backends: HashMap<String, Role>,
    asked: HashMap<Object, Role>,
}

impl Roles {
    fn new(
        facts: &mut Facts<'_>,
        size: &MemorySize,
        devices: &[MemoryDevice],
    ) -> Result<Self, QmpError> {
        let mut backends = HashMap::new();
        for device in devices {
            let role = match device.device_type {
                DeviceType::Dimm => Role::Dimm,
                DeviceType::Nvdimm => Role::Nvdimm,
                DeviceType::VirtioMem => Role::VirtioMem,
                DeviceType::VirtioPmem => Role::VirtioPmem,
                DeviceType::SgxEpc => Role::SgxEpc,
                DeviceType::Other(_) => Role::Device,
            };
            backends.extend(device.memdev.clone().map(|path| (path, role)));
        }
        if let Some(path) = facts.memory_backend()? {
            backends.insert(path, Role::MachineRam);
        }
        Ok(Self { base_memory: size.base, backends, asked: HashMap::new() })
    }

    fn of(&mut self, facts: &mut Facts<'_>, entry: &Entry) -> Result<Role, QmpError> {
        let Some(owner) = &entry.owner else { return Ok(Role::Nobody) };
        if let Some(&role) = self.asked.get(owner) {
            return Ok(role);
        }
        let role = match &owner.name {
            ObjectName::Id(id) => device_role(facts, &format!("/machine/peripheral/{id}"))?,
            ObjectName::Path(path) if owner.is_device => device_role(facts, path)?,
            ObjectName::Path(path) => match self.backends.get(path) {
                Some(&role) => role,
                None => self.backend_role(facts, path)?,
            },
            ObjectName::Type(_) => Role::Device,
        };
        self.asked.insert(owner.clone(), role);
        Ok(role)
    }

    /// A backend that neither the machine nor a memory device names: RAM of a NUMA node, or
    /// memory that a device shares with others (ivshmem). Node RAM lies in a container as large
    /// as all of the machine's RAM that has itself no container (`numa_init_memdev_container`);
    /// shared memory lies in a bus.
    fn backend_role(&self, facts: &mut Facts<'_>, path: &str) -> Result<Role, QmpError> {
        if !path.starts_with("/objects/") {
            return Ok(Role::Device);
        }
        for region in facts.memory_regions_of(path)? {
            let Some(container) = facts.qom_link(&region, "container")? else { continue };
            let holds_all_ram = facts.qom_get::<u64>(&container, "size")? == self.base_memory
                && facts.qom_link(&container, "container")?.is_none();
            if holds_all_ram {
                return Ok(Role::MachineRam);
            }
        }
        Ok(Role::Device)
    }
}

fn device_role(facts: &mut Facts<'_>, path: &str) -> Result<Role, QmpError> {
    let device_type: String = facts.qom_get(path, "type")?;
    Ok(if device_type.starts_with("cfi.pflash") {
        Role::RomDevice
    } else if device_type.starts_with("vfio-") {
        Role::Passthrough
    } else {
        Role::Device
    })
}

fn draw_region(
    qmp: &mut Qmp,
    timeout: Duration,
    entry: &Entry,
    role: Role,
    blocks: &[RamBlock],
) -> Result<ViewRegion, ViewError> {
    let range = entry.range().filter(|range| range.len() <= MAX_RANGE).ok_or_else(|| {
        ViewError::TooLarge {
            first: entry.first,
            last: entry.last,
            name: Excerpt::new(&entry.name),
        }
    })?;
    // Entries that are no memory were left out before.
    let mut kind = owner::kind(entry, role).unwrap_or(Kind::RamDevice);
    let mut hva = None;
    if kind.in_image() {
        hva = linear_hva(qmp, timeout, entry, range)?;
        if hva.is_none() {
            // Shown read-only and yet not memory: a device answers, so it is never read.
            kind = Kind::Romd;
        }
    }
    let block_index = match hva {
        Some(hva) if blocks.iter().any(|block| block.hva.is_some()) => {
            Some(block_by_hva(entry, range, hva, blocks)?)
        }
        _ => block_by_name(entry, range, blocks),
    };
    let block = block_index.and_then(|index| blocks.get(index));
    let owner = entry.owner.as_ref().or(entry.parent.as_ref());
    let region = Region {
        gpa: range.start(),
        len: range.len(),
        kind,
        name: entry.name.clone(),
        owner: owner.map(Object::to_string),
        // virtio-pmem's has no name.
        block: block.map(|block| block.name.clone()).filter(|name| !name.is_empty()),
        block_offset: entry.offset,
        mapping: None,
        page_size: None,
        readonly: matches!(entry.range_type, RangeType::Rom | RangeType::Romd),
    };
    let block_page_size = block.map(|block| block.page_size);
    Ok(ViewRegion { region, hva, block_index, block_page_size })
}

/// The addresses whose host address is asked for: both ends and every GiB between.
fn probes(range: GuestRange) -> impl Iterator<Item = u64> {
    let steps = (range.len() - 1) / STEP;
    let ends_on_step = (range.len() - 1).is_multiple_of(STEP);
    let last = Some(range.last()).filter(|_| !ends_on_step);
    (0..=steps).map(move |step| range.start() + step * STEP).chain(last)
}

/// The range's address in QEMU's process, the same at each probe; `None` when a device answers at
/// a range that is called `rom`.
fn linear_hva(
    qmp: &mut Qmp,
    timeout: Duration,
    entry: &Entry,
    range: GuestRange,
) -> Result<Option<u64>, ViewError> {
    let mut base = None;
    for gpa in probes(range) {
        let text = qmp.hmp(Hmp::Gpa2Hva(gpa), timeout)?;
        let other = |found: &str| ViewError::OtherThing {
            gpa,
            name: Excerpt::new(&entry.name),
            found: Excerpt::new(found),
        };
        let hva = match gpa2hva::parse(gpa, &text)? {
            Gpa2Hva::At { name, hva } if name == entry.name => hva,
            Gpa2Hva::NotRam if entry.range_type == RangeType::Rom && base.is_none() => {
                return Ok(None);
            }
            Gpa2Hva::At { name, .. } => return Err(other(&name)),
            Gpa2Hva::NotRam | Gpa2Hva::Unmapped => return Err(other(text.trim_end())),
        };
        let base = *base.get_or_insert(hva);
        let expected = base.wrapping_add(gpa - range.start());
        if expected != hva {
            let name = Excerpt::new(&entry.name);
            return Err(ViewError::NotLinear { gpa, name, expected, found: hva });
        }
    }
    Ok(base)
}

/// The RAMBlock that holds all of the region by address, and has it at the flat view's offset.
fn block_by_hva(
    entry: &Entry,
    range: GuestRange,
    hva: u64,
    blocks: &[RamBlock],
) -> Result<usize, ViewError> {
    let refuse = |block: String| ViewError::Block {
        range,
        name: Excerpt::new(&entry.name),
        hva,
        offset: entry.offset,
        block,
    };
    let inside = |block: &RamBlock| {
        let into = block.hva.and_then(|start| hva.checked_sub(start))?;
        (into < block.total).then_some(into)
    };
    let found = blocks.iter().enumerate().find_map(|(at, b)| Some((at, b, inside(b)?)));
    let Some((index, block, into)) = found else {
        return Err(refuse("no RAMBlock holds that address".into()));
    };
    if into != entry.offset {
        let name = Excerpt::new(&block.name);
        return Err(refuse(format!("RAMBlock {name:?} has that address at offset {into:#x}")));
    }
    if block.total - into < range.len() {
        let name = Excerpt::new(&block.name);
        return Err(refuse(format!("RAMBlock {name:?} has only {:#x} bytes", block.total)));
    }
    Ok(index)
}

/// The only RAMBlock whose name ends with the MemoryRegion's and that is long enough.
fn block_by_name(entry: &Entry, range: GuestRange, blocks: &[RamBlock]) -> Option<usize> {
    let fits = |block: &RamBlock| {
        let named = block.name == entry.name
            || block.name.strip_suffix(&entry.name).is_some_and(|device| device.ends_with('/'));
        let end = entry.offset.checked_add(range.len());
        named && !entry.name.is_empty() && end.is_some_and(|end| end <= block.total)
    };
    let mut found = blocks.iter().enumerate().filter(|(_, block)| fits(block));
    let (index, _) = found.next()?;
    found.next().is_none().then_some(index)
}

/// Every region of one RAMBlock must lie at one base address in QEMU's process.
fn check_bases(drawn: &[(Role, ViewRegion)], blocks: &[RamBlock]) -> Result<(), ViewError> {
    let mut bases = BTreeMap::new();
    for (_, ViewRegion { region, hva, block_index, .. }) in drawn {
        let (Some(hva), Some(index), Some(range)) = (*hva, *block_index, region.range()) else {
            continue;
        };
        let base = hva.wrapping_sub(region.block_offset);
        let first = *bases.entry(index).or_insert(base);
        if first != base {
            let name = blocks.get(index).map_or("", |block| &block.name);
            return Err(ViewError::Block {
                range,
                name: Excerpt::new(&region.name),
                hva,
                offset: region.block_offset,
                block: format!(
                    "another region has RAMBlock {:?} begin at {first:#x}",
                    Excerpt::new(name)
                ),
            });
        }
    }
    Ok(())
}

/// The guest's RAM that was found is the RAM that QEMU says it has.
///
/// Counted are the RAMBlocks of the machine's RAM and of DIMMs, as long as they are and not as far
/// as they are seen (VGA and BIOS hide parts); and what the other memory devices say they give,
/// because of these QEMU counts another length than the RAMBlock's (virtio-mem: what is plugged;
/// NVDIMM: without the label area).
fn check_sum(
    size: &MemorySize,
    devices: &[MemoryDevice],
    drawn: &[(Role, ViewRegion)],
    blocks: &[RamBlock],
) -> Result<(), ViewError> {
    let mut used = BTreeMap::new();
    for (role, ViewRegion { region, block_index, .. }) in drawn {
        if !matches!(role, Role::MachineRam | Role::Dimm) {
            continue;
        }
        match (block_index.and_then(|at| Some((at, blocks.get(at)?))), region.range()) {
            (Some((at, block)), _) => {
                used.insert(at, block.used);
            }
            (None, Some(range)) => {
                return Err(ViewError::NoBlock { range, name: Excerpt::new(&region.name) });
            }
            (None, None) => {}
        }
    }
    let others = devices.iter().filter(|device| device.device_type != DeviceType::Dimm);
    let given = others.filter_map(|device| device.size);
    let found = used.into_values().chain(given).fold(0u64, u64::saturating_add);
    let (base, plugged) = (size.base, size.plugged.unwrap_or(0));
    if base.checked_add(plugged) == Some(found) {
        Ok(())
    } else {
        Err(ViewError::Sum { base, plugged, found })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mtree::tests::entry;

    fn probed(start: u64, len: u64) -> Vec<u64> {
        probes(GuestRange::new(start, len).unwrap()).collect()
    }

    #[test]
    fn both_ends_and_every_gib_are_asked() {
        assert_eq!(probed(0x1000, 1), [0x1000]);
        assert_eq!(probed(0x1000, 0x1000), [0x1000, 0x1fff]);
        assert_eq!(probed(0, STEP), [0, STEP - 1]);
        assert_eq!(probed(0, STEP + 1), [0, STEP]);
        assert_eq!(probed(5, 2 * STEP + 2), [5, STEP + 5, 2 * STEP + 5, 2 * STEP + 6]);
    }

    fn block(name: &str, hva: Option<u64>, used: u64) -> RamBlock {
        RamBlock {
            name: name.into(),
            page_size: 4096,
            ram_addr: 0,
            used,
            total: used,
            hva,
            read_only: None,
        }
    }

    #[test]
    fn a_block_is_found_by_address_and_checked_by_offset() {
        let blocks = [block("a", Some(0x10_0000), 0x4000), block("", Some(0x20_0000), 0x4000)];
        let find = |offset, len: u64, hva| {
            let entry = entry("b", 0, len - 1, offset);
            block_by_hva(&entry, entry.range().unwrap(), hva, &blocks)
        };
        assert_eq!(find(0x1000, 0x3000, 0x20_1000).unwrap(), 1);
        for (offset, len, hva) in
            [(0x1000, 0x3001, 0x20_1000), (0, 0x1000, 0x20_1000), (0x4000, 1, 0x20_4000)]
        {
            let error = find(offset, len, hva).unwrap_err();
            assert!(matches!(error, ViewError::Block { .. }), "{error}");
            assert!(error.to_string().contains(&format!("{hva:#x}")), "{error}");
        }
    }

    #[test]
    fn a_block_is_found_by_name_only_when_it_is_the_only_one() {
        let find = |blocks: &[RamBlock], name: &str, offset| {
            let entry = entry(name, 0, 0xfff, offset);
            block_by_name(&entry, entry.range().unwrap(), blocks)
        };
        let blocks = [
            block("pc.ram", None, 0x4000),
            block("0000:00:02.0/vga.vram", None, 0x4000),
            block("", None, 0x4000),
        ];
        assert_eq!(find(&blocks, "pc.ram", 0x3000), Some(0));
        assert_eq!(find(&blocks, "pc.ram", 0x3001), None, "too short");
        assert_eq!(find(&blocks, "vga.vram", 0), Some(1));
        assert_eq!(find(&blocks, "vram", 0), None, "not a whole name");
        assert_eq!(find(&blocks, "", 0), None);
        let two = [block("0/vga.vram", None, 0x4000), block("1/vga.vram", None, 0x4000)];
        assert_eq!(find(&two, "vga.vram", 0), None, "ambiguous");
    }
}
