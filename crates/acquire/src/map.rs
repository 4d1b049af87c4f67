//! Map: QEMU's word on guest memory joined with the host's, and held against it.

use evidence::map::MapError;
use evidence::{GuestRange, MemoryMap};
use host::{GuestMemory, HostError, Place, Process};
use qemu::GuestView;
use qemu::facts::{DeviceType, MemoryDevice};
use std::fmt::Write as _;

/// Where a guest's memory is: by QEMU's word, checked against the host's.
#[derive(Debug)]
pub struct Located {
    /// The regions, with how the host keeps each that is read.
    pub map: MemoryMap,
    /// Where each of those lies in QEMU's process.
    pub places: Vec<Place>,
    /// What QEMU said.
    pub view: GuestView,
    /// The mappings of the host that hold guest memory, as `/proc/PID/maps` prints them.
    pub mappings: Vec<String>,
    /// Why this user may not look at QEMU's process, if so: then the host's side is not known, and
    /// nothing can be read but through QEMU.
    pub unseen: Option<String>,
}

/// Why there is no map that can be trusted.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// The regions are not ascending and disjoint.
    #[error("QEMU's regions make no map")]
    Map(#[from] MapError),
    /// The host's mappings do not agree with it, or cannot be read.
    #[error("the host's side of the map cannot be used")]
    Host(#[from] HostError),
    /// A region that is read has no address in QEMU's process.
    #[error("QEMU gives no host address for region {name:?} at {gpa:#x}")]
    NoAddress {
        /// The region.
        name: String,
        /// Its first guest-physical address.
        gpa: u64,
    },
    /// The page sizes of QEMU and host differ.
    #[error(
        "QEMU says that block {block:?} has pages of {qemu} bytes, the host says {host} bytes for \
         the mapping at {hva:#x}"
    )]
    PageSize {
        /// The RAMBlock.
        block: String,
        /// QEMU's word.
        qemu: u64,
        /// The host's.
        host: u64,
        /// Where.
        hva: u64,
    },
}

/// Looks at the process and joins what it shows with what QEMU said. Opens guest memory for
/// reading; reads none.
///
/// # Errors
/// [`LocateError`] names both sides of every disagreement.
pub fn locate(view: GuestView, process: &Process) -> Result<(Located, GuestMemory), LocateError> {
    let places = places(&view)?;
    let (memory, unseen) = match GuestMemory::open(process, &places) {
        // Who may ask QEMU need not be allowed to look at it.
        Err(error @ HostError::Refused { .. }) => {
            let ranges = places.iter().map(|place| place.range).collect();
            (GuestMemory::unseen(process, ranges)?, Some(crate::told(&error)))
        }
        other => (other?, None),
    };
    let map = join(&view, &memory)?;
    let mut mappings: Vec<String> =
        memory.places().iter().map(|held| held.vma().to_string()).collect();
    mappings.dedup();
    Ok((Located { map, places, view, mappings, unseen }, memory))
}

fn places(view: &GuestView) -> Result<Vec<Place>, LocateError> {
    let mut places = Vec::new();
    for entry in &view.regions {
        let region = &entry.region;
        let Some(range) = region.range().filter(|_| region.kind.in_image()) else { continue };
        let hva = entry
            .hva
            .ok_or_else(|| LocateError::NoAddress { name: region.name.clone(), gpa: region.gpa })?;
        places.push(Place { range, hva });
    }
    Ok(places)
}

/// Adds the host's word to each region that is read.
fn join(view: &GuestView, memory: &GuestMemory) -> Result<MemoryMap, LocateError> {
    let mut held = memory.places().iter();
    let mut regions = Vec::with_capacity(view.regions.len());
    for entry in &view.regions {
        let mut region = entry.region.clone();
        if region.kind.in_image()
            && let Some(held) = held.next()
        {
            if let Some(qemu) = entry.block_page_size
                && qemu != held.page_size()
            {
                return Err(LocateError::PageSize {
                    block: region.block.clone().unwrap_or_default(),
                    qemu,
                    host: held.page_size(),
                    hva: held.place().hva,
                });
            }
            region.mapping = Some(held.mapping());
            region.page_size = Some(held.page_size());
        }
        regions.push(region);
    }
    Ok(MemoryMap::new(regions)?)
}

impl Located {
    /// The texts that the map was drawn from, for the exhibit.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# QEMU: info mtree -f -o\n{}", self.view.mtree.trim_end());
        let _ = writeln!(text, "\n# QEMU: x-query-ramblock\n{}", self.view.ramblock.trim_end());
        let _ = writeln!(
            text,
            "\n# QEMU: query-memory-size-summary\nbase-memory {}\nplugged-memory {}",
            self.view.size.base,
            self.view.size.plugged.map_or_else(|| "none".to_owned(), |n| n.to_string()),
        );
        let _ = writeln!(text, "\n# QEMU: query-memory-devices");
        for device in &self.view.devices {
            let _ = writeln!(text, "{}", device.raw);
        }
        let _ = writeln!(text, "\n# host: mappings of the process that hold guest memory");
        if self.mappings.is_empty() {
            let _ = writeln!(text, "# not shown to this user");
        }
        for mapping in &self.mappings {
            let _ = writeln!(text, "{mapping}");
        }
        text
    }

    /// Where virtio-mem devices may have no memory plugged, ascending.
    pub fn pluggable(&self) -> Vec<GuestRange> {
        let devices = self.view.devices.iter();
        let pluggable = devices.filter(|device| device.device_type == DeviceType::VirtioMem);
        let range = |device: &MemoryDevice| GuestRange::new(device.addr?, device.max_size?);
        pluggable.filter_map(range).collect()
    }

    /// The first difference between two looks, both sides named; `None` when there is none.
    pub fn difference(&self, after: &Located) -> Option<String> {
        let (before_regions, after_regions) = (self.map.regions(), after.map.regions());
        for pair in before_regions.iter().zip(after_regions) {
            if pair.0 != pair.1 {
                return Some(format!("before {}, after {}", told(pair.0), told(pair.1)));
            }
        }
        if before_regions.len() != after_regions.len() {
            let only = |longer: &[evidence::Region], shorter: usize| {
                longer.get(shorter).map_or_else(String::new, told)
            };
            return Some(if before_regions.len() > after_regions.len() {
                format!("gone: {}", only(before_regions, after_regions.len()))
            } else {
                format!("new: {}", only(after_regions, before_regions.len()))
            });
        }
        for (before, after) in self.places.iter().zip(&after.places) {
            if before != after {
                return Some(format!(
                    "{} was at host address {:#x}, is at {:#x}",
                    before.range, before.hva, after.hva
                ));
            }
        }
        (!self.view.same_memory(&after.view))
            .then(|| "sizes or memory devices, see the map texts".to_owned())
    }
}

fn told(region: &evidence::Region) -> String {
    let range = region.range().map_or_else(String::new, |range| range.to_string());
    format!("{} {:?} at {range}", region.kind.word(), region.name)
}
