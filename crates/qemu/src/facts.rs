//! Typed queries: what QEMU says of itself and of its guest's memory.
//!
//! Shapes are those of QEMU's schema (`qapi/*.json`). Fields that an older QEMU has not are
//! options; fields that we do not need are not read.

use crate::qmp::{Capability, Command, Qmp, QmpError, Version};
use crate::text::Excerpt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::time::Duration;

/// The guest's run state (`query-status`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// QEMU's word: `running`, `paused`, `inmigrate`, `postmigrate`, ...
    pub status: String,
    /// Whether the guest's CPUs run.
    pub running: bool,
}

/// Whether KVM runs the guest (`query-kvm`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Kvm {
    /// This QEMU has KVM built in.
    pub present: bool,
    /// The guest runs on it.
    pub enabled: bool,
}

/// Sizes of the guest's memory in bytes (`query-memory-size-summary`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySize {
    /// What the machine started with (`-m`): `base-memory`.
    #[serde(rename = "base-memory")]
    pub base: u64,
    /// What is plugged into it, `plugged-memory`: DIMMs, NVDIMMs without their label area, virtio-pmem, and of
    /// virtio-mem what the guest has now (seen in 7.2 and 10.0; `get_plugged_memory_size`).
    #[serde(rename = "plugged-memory", default)]
    pub plugged: Option<u64>,
}

/// What a memory device is (`query-memory-devices`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DeviceType {
    /// `dimm`: RAM.
    Dimm,
    /// `nvdimm`: persistent memory.
    Nvdimm,
    /// `virtio-mem`: RAM of which the guest has a part.
    VirtioMem,
    /// `virtio-pmem`: a file of the host, mapped into the guest.
    VirtioPmem,
    /// `sgx-epc`: enclave memory; not readable from outside.
    SgxEpc,
    /// A device that this program does not know.
    Other(String),
}

impl DeviceType {
    /// QEMU's word for it.
    pub fn word(&self) -> &str {
        match self {
            Self::Dimm => "dimm",
            Self::Nvdimm => "nvdimm",
            Self::VirtioMem => "virtio-mem",
            Self::VirtioPmem => "virtio-pmem",
            Self::SgxEpc => "sgx-epc",
            Self::Other(word) => word,
        }
    }
}

/// A memory device (`query-memory-devices`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDevice {
    /// What it is.
    pub device_type: DeviceType,
    /// The user's id.
    pub id: Option<String>,
    /// Object path of its memory backend.
    pub memdev: Option<String>,
    /// Guest-physical address.
    pub addr: Option<u64>,
    /// Bytes that it gives the guest now: of an NVDIMM without the label area, of virtio-mem what
    /// is plugged.
    pub size: Option<u64>,
    /// virtio-mem: bytes that it can give.
    pub max_size: Option<u64>,
    /// virtio-mem: bytes that it was asked to give.
    pub requested_size: Option<u64>,
    /// virtio-mem: bytes that are plugged or not as one.
    pub block_size: Option<u64>,
    /// All of QEMU's answer.
    pub raw: Value,
}

/// What a block device has done since QEMU started (`query-blockstats`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockTimes {
    /// The device: its id, else its QOM path, else its node's name.
    pub device: String,
    /// Requests that have ended: reads, writes, flushes, discards.
    pub requests: u64,
    /// How long they took, added up, in nanoseconds.
    pub total_ns: u64,
}

/// A migration or a snapshot (`query-migrate`); all `None` when there was none yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// QEMU's word: `active`, `completed`, `failed` ..
    pub status: Option<String>,
    /// How long the guest stood, in milliseconds.
    pub downtime: Option<u64>,
    /// From the command to the end, in milliseconds.
    #[serde(rename = "total-time")]
    pub total_time: Option<u64>,
    /// Until the guest was stopped, in milliseconds.
    #[serde(rename = "setup-time")]
    pub setup_time: Option<u64>,
    /// Why it failed.
    #[serde(rename = "error-desc")]
    pub error_desc: Option<String>,
}

impl Migration {
    /// Whether QEMU is busy with it (`qapi/migration.json`, MigrationStatus).
    pub fn is_under_way(&self) -> bool {
        let ended = ["none", "cancelled", "completed", "failed"];
        self.status.as_deref().is_some_and(|status| !ended.contains(&status))
    }
}

/// QEMU's last dump (`query-dump`, and the `result` of the event `DUMP_COMPLETED`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Dump {
    /// QEMU's word: `none`, `active`, `completed`, `failed`.
    pub status: String,
    /// Bytes of memory written.
    pub completed: u64,
    /// Bytes of memory to be written; 0 when there was no dump yet.
    pub total: u64,
}

/// QEMU's watchdog devices (`hw/watchdog/`); the one in ICH9-LPC aside.
const WATCHDOGS: [&str; 8] = [
    "i6300esb",
    "ib700",
    "diag288",
    "sbsa_gwdt",
    "cmsdk-apb-watchdog",
    "aspeed.wdt",
    "imx2.wdt",
    "allwinner-wdt",
];

/// Where devices are that were given an id, and where those are that were not.
const PERIPHERAL: &str = "/machine/peripheral";
const PERIPHERAL_ANON: &str = "/machine/peripheral-anon";

/// A property of an object, as `qom-list` shows it.
#[derive(Deserialize)]
struct Child {
    name: String,
    r#type: String,
}

/// Typed queries, each with one deadline.
#[derive(Debug)]
pub struct Facts<'a> {
    qmp: &'a mut Qmp,
    timeout: Duration,
}

impl<'a> Facts<'a> {
    /// Asks through `qmp`; each query is given up after `timeout`.
    pub fn of(qmp: &'a mut Qmp, timeout: Duration) -> Self {
        Self { qmp, timeout }
    }

    /// The connection.
    pub(crate) fn qmp(&mut self) -> &mut Qmp {
        self.qmp
    }

    pub(crate) fn query<T: serde::de::DeserializeOwned>(
        &mut self,
        command: Command,
    ) -> Result<T, QmpError> {
        self.qmp.query(command, json!({}), self.timeout)
    }

    /// QEMU's version.
    ///
    /// # Errors
    /// As [`Qmp::query`], here and below.
    pub fn version(&mut self) -> Result<Version, QmpError> {
        self.query(Command::QueryVersion)
    }

    /// The guest's name (`-name`); `None` when it has none.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn name(&mut self) -> Result<Option<String>, QmpError> {
        #[derive(Deserialize)]
        struct Name {
            name: Option<String>,
        }
        Ok(self.query::<Name>(Command::QueryName)?.name)
    }

    /// The guest's UUID, in the form `8-4-4-4-12`; all zeros when none was set.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn uuid(&mut self) -> Result<String, QmpError> {
        #[derive(Deserialize)]
        struct Uuid {
            #[serde(rename = "UUID")]
            uuid: String,
        }
        Ok(self.query::<Uuid>(Command::QueryUuid)?.uuid)
    }

    /// QEMU's target, such as `x86_64`.
    ///
    /// # Errors
    /// As every query.
    pub fn arch(&mut self) -> Result<String, QmpError> {
        #[derive(Deserialize)]
        struct Target {
            arch: String,
        }
        Ok(self.query::<Target>(Command::QueryTarget)?.arch)
    }

    /// Number of virtual CPUs. Does not interrupt them (qapi/machine.json, `query-cpus-fast`).
    ///
    /// # Errors
    /// As every query.
    pub fn cpus(&mut self) -> Result<usize, QmpError> {
        Ok(self.query::<Vec<Value>>(Command::QueryCpusFast)?.len())
    }

    /// The run state.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn status(&mut self) -> Result<Status, QmpError> {
        self.query(Command::QueryStatus)
    }

    /// Whether KVM runs the guest.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn kvm(&mut self) -> Result<Kvm, QmpError> {
        self.query(Command::QueryKvm)
    }

    /// The machine type with its version, such as `pc-q35-10.0`, `microvm`.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn machine_type(&mut self) -> Result<String, QmpError> {
        let name: String = self.qom_get("/machine", "type")?;
        Ok(name.strip_suffix("-machine").map_or(name.clone(), str::to_owned))
    }

    /// Object path of the backend that holds the machine's RAM; `None` with NUMA backends.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn memory_backend(&mut self) -> Result<Option<String>, QmpError> {
        self.qom_link("/machine", "memory-backend")
    }

    /// Sizes of the guest's memory.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn memory_size(&mut self) -> Result<MemorySize, QmpError> {
        self.query(Command::QueryMemorySizeSummary)
    }

    /// The memory devices.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn memory_devices(&mut self) -> Result<Vec<MemoryDevice>, QmpError> {
        let command = Command::QueryMemoryDevices;
        let list: Vec<Value> = self.query(command)?;
        let shape = |what: &str| QmpError::Shape { command: command.word(), what: what.into() };
        list.into_iter()
            .map(|raw| parse_device(raw).ok_or_else(|| shape("a device without type or data")))
            .collect()
    }

    /// Why the guest's memory is encrypted or hidden from the host; `None` when it is not.
    ///
    /// # Errors
    /// As [`Qmp::query`]. That QEMU has no such feature built in is no error.
    pub fn confidential(&mut self) -> Result<Option<String>, QmpError> {
        if let Some(object) = self.qom_link("/machine", "confidential-guest-support")? {
            return Ok(Some(format!("confidential-guest-support is {object}")));
        }
        #[derive(Deserialize)]
        struct Sev {
            enabled: bool,
        }
        match self.query::<Sev>(Command::QuerySev) {
            Ok(sev) => Ok(sev.enabled.then(|| "query-sev says enabled".into())),
            Err(error) if error.is_unknown_command() => Ok(None),
            // "SEV feature is not available" and the like: target/i386/sev*.c
            Err(QmpError::Refused { desc, .. })
                if desc.to_string().contains("SEV")
                    && ["not available", "not enabled", "not supported"]
                        .iter()
                        .any(|no| desc.to_string().contains(no)) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// What QEMU says of its last migration or snapshot (`query-migrate`).
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn migration(&mut self) -> Result<Migration, QmpError> {
        let said: Migration = self.query(Command::QueryMigrate)?;
        let short = |text: Option<String>| text.map(|text| Excerpt::new(&text).to_string());
        Ok(Migration { status: short(said.status), error_desc: short(said.error_desc), ..said })
    }

    /// What QEMU says of its last dump (`query-dump`). `failed` before the guest runs again: the event
    /// RESUME tells of that.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn dump(&mut self) -> Result<Dump, QmpError> {
        let said: Dump = self.query(Command::QueryDump)?;
        Ok(Dump { status: Excerpt::new(&said.status).to_string(), ..said })
    }

    /// All capabilities of migration that this QEMU has, and which are set.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn migration_capabilities(&mut self) -> Result<Vec<Capability>, QmpError> {
        self.query(Command::QueryMigrateCapabilities)
    }

    /// All parameters of migration, as QEMU has them.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn migration_parameters(&mut self) -> Result<Value, QmpError> {
        self.query(Command::QueryMigrateParameters)
    }

    /// The block jobs under way (mirror, backup, commit ..), each by type and device.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn block_jobs(&mut self) -> Result<Vec<String>, QmpError> {
        #[derive(Deserialize)]
        struct Job {
            r#type: String,
            device: String,
        }
        let jobs: Vec<Job> = self.query(Command::QueryBlockJobs)?;
        let told = |job: Job| format!("{} of {:?}", Excerpt::new(&job.r#type), job.device);
        Ok(jobs.into_iter().map(told).collect())
    }

    /// A property of an object.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn qom_get<T: serde::de::DeserializeOwned>(
        &mut self,
        path: &str,
        property: &str,
    ) -> Result<T, QmpError> {
        let arguments = json!({ "path": path, "property": property });
        self.qmp.query(Command::QomGet, arguments, self.timeout)
    }

    /// How many requests each block device has done, and how long they took in all.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn block_times(&mut self) -> Result<Vec<BlockTimes>, QmpError> {
        Ok(self.query::<Vec<Value>>(Command::QueryBlockstats)?.iter().map(block_times).collect())
    }

    /// A property that points to another object; `None` when it points nowhere, or the object has
    /// no such property (an older QEMU).
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn qom_link(&mut self, path: &str, property: &str) -> Result<Option<String>, QmpError> {
        let target = self.qom_get_if_there::<String>(path, property)?;
        Ok(target.filter(|target| !target.is_empty()))
    }

    /// A property of an object; `None` when it has no such property (an older QEMU).
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn qom_get_if_there<T: serde::de::DeserializeOwned>(
        &mut self,
        path: &str,
        property: &str,
    ) -> Result<Option<T>, QmpError> {
        match self.qom_get(path, property) {
            Ok(value) => Ok(Some(value)),
            // "Property 'pc-q35-10.0-machine.x' not found": qom/object.c
            Err(QmpError::Refused { desc, .. })
                if desc.to_string().starts_with("Property '")
                    && desc.to_string().ends_with(&format!(".{property}' not found")) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Paths of the MemoryRegions that are children of an object.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn memory_regions_of(&mut self, path: &str) -> Result<Vec<String>, QmpError> {
        let children = self.children(path)?;
        let regions = children.into_iter().filter(|c| c.r#type == "child<memory-region>");
        Ok(regions.map(|child| format!("{path}/{}", child.name)).collect())
    }

    fn children(&mut self, path: &str) -> Result<Vec<Child>, QmpError> {
        self.qmp.query(Command::QomList, json!({ "path": path }), self.timeout)
    }

    /// The machine's emulated watchdogs by their QOM types, such as `i6300esb`: their timers run
    /// on QEMU's virtual clock. The timeouts that the guest has set are not to be had: no property
    /// shows them.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub fn watchdogs(&mut self) -> Result<Vec<String>, QmpError> {
        let mut found = Vec::new();
        for (path, kind) in self.devices(&["/machine/unattached", PERIPHERAL, PERIPHERAL_ANON])? {
            let counts = match kind.as_str() {
                // Its TCO watchdog resets the machine unless a strap forbids it.
                // An older QEMU without the property: assume that it resets.
                "ICH9-LPC" => !self.qom_get::<bool>(&path, "noreboot").unwrap_or(false),
                kind => WATCHDOGS.contains(&kind),
            };
            if counts {
                found.push(kind);
            }
        }
        Ok(found)
    }

    /// The first device of such a QOM type that was plugged in by `-device` or `device_add`, as an object path.
    ///
    /// # Errors
    /// As [`Qmp::query`].
    pub(crate) fn plugged_in(
        &mut self,
        is: impl Fn(&str) -> bool,
    ) -> Result<Option<String>, QmpError> {
        let mut devices = self.devices(&[PERIPHERAL, PERIPHERAL_ANON])?.into_iter();
        Ok(devices.find(|(_, kind)| is(kind)).map(|(path, _)| path))
    }

    /// The objects in these containers: path and QOM type.
    fn devices(&mut self, containers: &[&str]) -> Result<Vec<(String, String)>, QmpError> {
        let mut found = Vec::new();
        for path in containers {
            found.extend(self.children(path)?.into_iter().filter_map(|child| {
                let kind = child.r#type.strip_prefix("child<")?.strip_suffix('>')?;
                Some((format!("{path}/{}", child.name), kind.to_owned()))
            }));
        }
        Ok(found)
    }
}

fn block_times(raw: &Value) -> BlockTimes {
    let name = |key: &str| raw.get(key).and_then(Value::as_str).filter(|name| !name.is_empty());
    let device = name("device").or_else(|| name("qdev")).or_else(|| name("node-name"));
    let sum = |suffix: &str| {
        ["rd", "wr", "flush", "unmap"].iter().fold(0u64, |sum, kind| {
            let number = raw.pointer(&format!("/stats/{kind}_{suffix}")).and_then(Value::as_u64);
            sum.saturating_add(number.unwrap_or_default())
        })
    };
    BlockTimes {
        device: device.unwrap_or_default().to_owned(),
        requests: sum("operations"),
        total_ns: sum("total_time_ns"),
    }
}

fn parse_device(raw: Value) -> Option<MemoryDevice> {
    let data = raw.get("data").filter(|data| data.is_object())?;
    let number = |key: &str| data.get(key).and_then(Value::as_u64);
    let text = |key: &str| data.get(key).and_then(Value::as_str).map(str::to_owned);
    let device_type = match raw.get("type")?.as_str()? {
        "dimm" => DeviceType::Dimm,
        "nvdimm" => DeviceType::Nvdimm,
        "virtio-mem" => DeviceType::VirtioMem,
        "virtio-pmem" => DeviceType::VirtioPmem,
        "sgx-epc" => DeviceType::SgxEpc,
        other => DeviceType::Other(other.into()),
    };
    Some(MemoryDevice {
        device_type,
        id: text("id"),
        memdev: text("memdev"),
        addr: number("addr").or_else(|| number("memaddr")),
        size: number("size"),
        max_size: number("max-size"),
        requested_size: number("requested-size"),
        block_size: number("block-size"),
        raw: raw.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_requests_of_a_disk_are_added_up() {
        let raw = json!({"device": "", "qdev": "/machine/peripheral/d0/virtio-backend",
            "node-name": "#block155", "stats": {"rd_operations": 3, "wr_operations": 4,
            "flush_operations": 1, "unmap_operations": 0, "rd_total_time_ns": 900,
            "wr_total_time_ns": 80, "flush_total_time_ns": 7, "rd_bytes": 12_288}});
        let BlockTimes { device, requests, total_ns } = block_times(&raw);
        assert_eq!(
            (&*device, requests, total_ns),
            ("/machine/peripheral/d0/virtio-backend", 8, 987)
        );
        assert_eq!(block_times(&json!(7)).requests, 0);
    }

    #[test]
    fn devices_are_read_by_type() {
        let device = parse_device(json!({"type": "virtio-mem", "data": {
            "memdev": "/objects/vm0", "memaddr": 4_563_402_752_u64, "block-size": 2_097_152,
            "size": 0, "node": 0, "max-size": 536_870_912, "requested-size": 268_435_456, "id": "vmem0"}}))
        .unwrap();
        assert_eq!(device.device_type, DeviceType::VirtioMem);
        assert_eq!((device.addr, device.size), (Some(4_563_402_752), Some(0)));
        assert_eq!(device.max_size, Some(512 << 20));
        let device = parse_device(json!({"type": "dimm", "data": {"addr": 1, "size": 2}})).unwrap();
        assert_eq!((device.device_type, device.addr), (DeviceType::Dimm, Some(1)));
        let device = parse_device(json!({"type": "cxl", "data": {}})).unwrap();
        assert_eq!(device.device_type, DeviceType::Other("cxl".into()));
        assert!(parse_device(json!({"type": "dimm"})).is_none());
    }
}
