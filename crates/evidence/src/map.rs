//! The memory map: which guest-physical ranges are memory, and of what kind.

use crate::GuestRange;
use crate::range::hex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// More regions than any machine has; a map beyond it is refused, not processed.
///
/// A guest with 256 DIMMs, each cut by overlays, stays below 2,000.
pub const MAX_REGIONS: usize = 65_536;

/// What kind of memory a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The guest's RAM: owned by the machine, a memory backend, a DIMM, virtio-mem. Also RAM that
    /// the chipset shows read-only (PAM shadow).
    Ram,
    /// ROM that is plain memory to the host: BIOS, option ROMs.
    Rom,
    /// A ROM device (pflash): reads may reach the device model, so it is never read.
    Romd,
    /// RAM that a device owns, such as VGA memory.
    DeviceRam,
    /// Persistent memory. QEMU's own dump leaves it out.
    Nvdimm,
    /// Memory of a passed-through device (VFIO BAR): reading touches hardware, so it is never read.
    RamDevice,
}

impl Kind {
    /// Whether regions of this kind are in the image: what QEMU's own dump holds.
    pub fn in_image(self) -> bool {
        matches!(self, Kind::Ram | Kind::Rom | Kind::DeviceRam)
    }

    /// The kind's word in the record.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Ram => "ram",
            Kind::Rom => "rom",
            Kind::Romd => "romd",
            Kind::DeviceRam => "device-ram",
            Kind::Nvdimm => "nvdimm",
            Kind::RamDevice => "ram-device",
        }
    }
}

/// How the host keeps a region's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mapping {
    /// Private anonymous memory.
    Anonymous,
    /// Shared mapping of a memfd, shm or ordinary file.
    Shared,
    /// Shared mapping of hugetlbfs.
    SharedHugetlb,
    /// Private mapping of a file: written pages are the process's, the others the file's.
    PrivateFile,
    /// Private mapping of hugetlbfs.
    PrivateHugetlb,
}

impl Mapping {
    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Shared => "shared",
            Self::SharedHugetlb => "shared hugetlb",
            Self::PrivateFile => "private file",
            Self::PrivateHugetlb => "private hugetlb",
        }
    }
}

/// One range of guest-physical memory that is one thing throughout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// First guest-physical address.
    #[serde(with = "hex")]
    #[schemars(with = "String")]
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: Kind,
    /// QEMU's name of the MemoryRegion.
    pub name: String,
    /// Who owns it, in QEMU's words (`-o`): an object path or a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// QEMU's name of the RAMBlock behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<String>,
    /// Offset of the region's first byte in that RAMBlock.
    #[serde(default, with = "hex")]
    #[schemars(with = "String")]
    pub block_offset: u64,
    /// How the host keeps it; absent for regions that are not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapping: Option<Mapping>,
    /// The host's page size behind it in bytes; absent for regions that are not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// The guest cannot write it now: ROM, or RAM shown read-only.
    pub readonly: bool,
}

impl Region {
    /// The region's addresses; `None` when its length is 0 or its end wraps. Never `None` for a
    /// region of a [`MemoryMap`].
    pub fn range(&self) -> Option<GuestRange> {
        GuestRange::new(self.gpa, self.len)
    }
}

/// Why regions do not make a map.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MapError {
    /// A region is empty or wraps.
    #[error("region {name:?} at {gpa:#x} has length {len:#x}, which is empty or wraps")]
    Empty {
        /// The region's name.
        name: String,
        /// Its first address.
        gpa: u64,
        /// Its length.
        len: u64,
    },
    /// Two regions overlap, or are not in ascending order.
    #[error("region {second} follows {first} but does not lie behind it")]
    Order {
        /// The earlier region, as text.
        first: String,
        /// The later one.
        second: String,
    },
    /// More than [`MAX_REGIONS`].
    #[error("{0} regions are more than the {MAX_REGIONS} that a map may have")]
    TooMany(usize),
}

/// A guest's memory: regions in ascending order, disjoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct MemoryMap {
    regions: Vec<Region>,
}

impl<'de> Deserialize<'de> for MemoryMap {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let regions = Vec::<Region>::deserialize(d)?;
        MemoryMap::new(regions).map_err(serde::de::Error::custom)
    }
}

impl MemoryMap {
    /// The map of `regions`, which must be ascending and disjoint.
    ///
    /// # Errors
    /// [`MapError`] names the first region that breaks the rule.
    pub fn new(regions: Vec<Region>) -> Result<Self, MapError> {
        if regions.len() > MAX_REGIONS {
            return Err(MapError::TooMany(regions.len()));
        }
        let mut before: Option<(GuestRange, &str)> = None;
        for region in &regions {
            let range = region.range().ok_or_else(|| MapError::Empty {
                name: region.name.clone(),
                gpa: region.gpa,
                len: region.len,
            })?;
            if let Some((earlier, name)) = before
                && range.start() < earlier.end()
            {
                return Err(MapError::Order {
                    first: format!("{name:?} ({earlier})"),
                    second: format!("{:?} ({range})", region.name),
                });
            }
            before = Some((range, &region.name));
        }
        Ok(Self { regions })
    }

    /// All regions, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The regions that are in the image, ascending, each with its addresses.
    pub fn imaged(&self) -> impl Iterator<Item = (&Region, GuestRange)> {
        self.regions
            .iter()
            .filter(|r| r.kind.in_image())
            .filter_map(|r| r.range().map(|range| (r, range)))
    }

    /// Bytes that the image holds, holes and zeros included.
    pub fn imaged_len(&self) -> u64 {
        self.imaged().fold(0u64, |sum, (_, range)| sum.saturating_add(range.len()))
    }

    /// The imaged region that holds all of `range`.
    pub fn find(&self, range: GuestRange) -> Option<&Region> {
        let after = self.regions.partition_point(|r| r.gpa <= range.start());
        let region = self.regions.get(after.checked_sub(1)?)?;
        region.range()?.covers(range).then_some(region)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A plain RAM region for tests.
    pub(crate) fn ram(gpa: u64, len: u64) -> Region {
        Region {
            gpa,
            len,
            kind: Kind::Ram,
            name: "pc.ram".into(),
            owner: None,
            block: Some("pc.ram".into()),
            block_offset: gpa,
            mapping: Some(Mapping::Anonymous),
            page_size: Some(4096),
            readonly: false,
        }
    }

    #[test]
    fn order_and_overlap_are_refused_by_name() {
        assert!(MemoryMap::new(vec![ram(0, 0x1000), ram(0x1000, 0x1000)]).is_ok());
        let error = MemoryMap::new(vec![ram(0, 0x1001), ram(0x1000, 0x1000)]).unwrap_err();
        assert!(error.to_string().contains("0x1000-0x1fff"), "{error}");
        assert!(matches!(MemoryMap::new(vec![ram(5, 0)]), Err(MapError::Empty { .. })));
        assert!(matches!(MemoryMap::new(vec![ram(u64::MAX, 2)]), Err(MapError::Empty { .. })));
    }

    #[test]
    fn json_goes_through_the_constructor() {
        let map = MemoryMap::new(vec![ram(0, 0x1000), ram(0x10_0000, 0x1000)]).unwrap();
        let text = serde_json::to_string(&map).unwrap();
        assert_eq!(serde_json::from_str::<MemoryMap>(&text).unwrap(), map);
        let swapped = serde_json::to_string(&[ram(0x10_0000, 0x1000), ram(0, 0x1000)]).unwrap();
        assert!(serde_json::from_str::<MemoryMap>(&swapped).is_err());
    }
}
