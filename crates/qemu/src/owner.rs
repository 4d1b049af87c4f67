//! What kind of memory a flat range is: decided by who owns it.
//!
//! QEMU's own word is not enough. It calls a range `ram` that may be the guest's RAM, a graphics
//! card's or a file of the host, and `rom` whatever is shown read-only, be it the guest's RAM (PAM
//! shadow of 0xc0000-0xfffff), a BIOS in plain memory, or a flash device. What owners are, seen in
//! QEMU 7.2 and 10.0 on pc, q35 and microvm:
//!
//! | range | owner (`-o`) |
//! | --- | --- |
//! | the machine's RAM | `obj path=/objects/pc.ram`, or the backend that the user named |
//! | RAM of a NUMA node | `obj path=/objects/ID`; its MemoryRegion lies in one container of all RAM |
//! | pc-dimm, nvdimm (`nv-ram`), virtio-mem, virtio-pmem | `obj path=/objects/ID`, named by `query-memory-devices` |
//! | ivshmem-plain | `obj path=/objects/ID` too, but in the PCI bus's container |
//! | VGA, QXL, bochs-display, virtio-vga | the device |
//! | BIOS, pc.rom, isa-bios | none; microvm's BIOS is `ram` that the guest can write |
//! | OVMF's code and variables | the device `/machine/system.flashN`: `romd` at its own place, `rom` for the read-only copy below 1 MiB |

use crate::mtree::{Entry, RangeType};
use evidence::Kind;

/// What an owner uses a MemoryRegion for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// RAM that the machine started with.
    MachineRam,
    /// RAM of a pc-dimm.
    Dimm,
    /// RAM of which a virtio-mem device gives the guest a part.
    VirtioMem,
    /// A file of the host that a virtio-pmem device shows. QEMU's dump holds it.
    VirtioPmem,
    /// Memory of an NVDIMM.
    Nvdimm,
    /// SGX enclave memory: the host reads only ones.
    SgxEpc,
    /// A flash device: reads may reach the device model.
    RomDevice,
    /// A passed-through device: reads touch hardware.
    Passthrough,
    /// Any other device.
    Device,
    /// Nobody: firmware that the machine loads.
    Nobody,
}

impl Role {
    /// Whether the guest uses it as its RAM.
    pub fn is_ram(self) -> bool {
        matches!(self, Self::MachineRam | Self::Dimm | Self::VirtioMem)
    }
}

/// The kind of a range whose owner has `role`; `None` when it is no memory.
pub fn kind(entry: &Entry, role: Role) -> Option<Kind> {
    Some(match (entry.range_type, role) {
        (RangeType::Io | RangeType::Container, _) => return None,
        (RangeType::RamDevice, _) | (_, Role::Passthrough | Role::SgxEpc) => Kind::RamDevice,
        (RangeType::Romd, _) | (_, Role::RomDevice) => Kind::Romd,
        _ if entry.nonvolatile => Kind::Nvdimm,
        (_, Role::Nvdimm) => Kind::Nvdimm,
        (_, role) if role.is_ram() => Kind::Ram,
        (RangeType::Rom, Role::Device | Role::Nobody) => Kind::Rom,
        (_, _) => Kind::DeviceRam,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_decides() {
        let kind = |range_type, nonvolatile, role| {
            let entry = Entry {
                first: 0,
                last: 0xfff,
                priority: 0,
                range_type,
                nonvolatile,
                name: "x".into(),
                offset: 0,
                owner: None,
                parent: None,
                orphan: false,
                in_kvm: false,
            };
            super::kind(&entry, role)
        };
        use RangeType::*;
        assert_eq!(kind(Ram, false, Role::MachineRam), Some(Kind::Ram));
        assert_eq!(kind(Rom, false, Role::MachineRam), Some(Kind::Ram), "PAM shadow");
        assert_eq!(kind(Rom, false, Role::Nobody), Some(Kind::Rom), "BIOS");
        assert_eq!(kind(Ram, false, Role::Nobody), Some(Kind::DeviceRam), "BIOS of microvm");
        assert_eq!(kind(Rom, false, Role::RomDevice), Some(Kind::Romd), "OVMF below 1 MiB");
        assert_eq!(kind(Romd, false, Role::Device), Some(Kind::Romd));
        assert_eq!(kind(Ram, false, Role::Device), Some(Kind::DeviceRam), "VGA");
        assert_eq!(kind(Ram, false, Role::VirtioPmem), Some(Kind::DeviceRam));
        assert_eq!(kind(Rom, false, Role::VirtioPmem), Some(Kind::DeviceRam));
        assert_eq!(kind(Ram, true, Role::Nvdimm), Some(Kind::Nvdimm));
        assert_eq!(kind(Ram, false, Role::SgxEpc), Some(Kind::RamDevice));
        assert_eq!(kind(RamDevice, false, Role::Device), Some(Kind::RamDevice));
        assert_eq!(kind(Rom, false, Role::Passthrough), Some(Kind::RamDevice));
        assert_eq!(kind(Io, false, Role::Device), None);
    }
}
