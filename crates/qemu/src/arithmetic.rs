//! Where the guest's RAM lies by the addresses that QEMU's objects say: a second way to the map, which
//! shares no code in QEMU with the monitor's texts.
//!
//! Every MemoryRegion is an object with `addr`, `size` and `container`. A region that is in containers
//! lies at the sum of the addresses on the way up. PCs show their RAM through two aliases,
//! `ram-below-4g` and `ram-above-4g`, which say where they lie (the second at 4 GiB, or at 1 TiB beside
//! an AMD IOMMU); others, such as aarch64's `virt`, have the backend's region in a container itself.
//! Memory devices say where they were plugged in.

use crate::facts::{DeviceType, Facts, MemoryDevice};
use crate::qmp::QmpError;
use evidence::GuestRange;

/// How many containers a region may lie in.
const MAX_DEPTH: usize = 64;

/// The aliases of PCs.
const ALIASES: [&str; 2] = ["ram-below-4g", "ram-above-4g"];

/// The guest's RAM, ascending: of the machine, and what its memory devices can have; whatever lies over it.
/// `None` for a machine that shows its RAM in another way.
///
/// # Errors
/// The monitor's.
pub fn ram(
    facts: &mut Facts<'_>,
    devices: &[MemoryDevice],
) -> Result<Option<Vec<GuestRange>>, QmpError> {
    let Some(mut ranges) = machine(facts)? else { return Ok(None) };
    ranges.extend(devices.iter().filter_map(device));
    ranges.sort_by_key(|range| range.start());
    Ok(Some(ranges))
}

/// What a memory device can show the guest. An NVDIMM is no RAM.
fn device(device: &MemoryDevice) -> Option<GuestRange> {
    let len = match device.device_type {
        DeviceType::Dimm => device.size,
        DeviceType::VirtioMem => device.max_size,
        _ => None,
    };
    GuestRange::new(device.addr?, len?)
}

fn machine(facts: &mut Facts<'_>) -> Result<Option<Vec<GuestRange>>, QmpError> {
    let unattached = facts.memory_regions_of("/machine/unattached")?;
    let mut ranges = Vec::new();
    for alias in ALIASES {
        let path = format!("/machine/unattached/{alias}[0]");
        if unattached.contains(&path)
            && let Some(base) = address(facts, &path)?
            && let Some(range) = GuestRange::new(base, facts.qom_get(&path, "size")?)
        {
            ranges.push(range);
        }
    }
    if !ranges.is_empty() {
        return Ok(Some(ranges));
    }
    let Some(backend) = facts.memory_backend()? else { return Ok(None) };
    for region in facts.memory_regions_of(&backend)? {
        if facts.qom_link(&region, "container")?.is_some()
            && let Some(base) = address(facts, &region)?
            && let Some(range) = GuestRange::new(base, facts.qom_get(&region, "size")?)
        {
            ranges.push(range);
        }
    }
    Ok(Some(ranges).filter(|ranges| !ranges.is_empty()))
}

/// The address of a region's first byte: the sum on the way up.
fn address(facts: &mut Facts<'_>, region: &str) -> Result<Option<u64>, QmpError> {
    let (mut at, mut path) = (0u64, region.to_owned());
    for _ in 0..MAX_DEPTH {
        let Some(sum) = at.checked_add(facts.qom_get(&path, "addr")?) else { return Ok(None) };
        at = sum;
        match facts.qom_link(&path, "container")? {
            None => return Ok(Some(at)),
            Some(container) => path = container,
        }
    }
    Ok(None)
}
