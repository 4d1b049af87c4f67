//! Find and map: everything that is known before anything is decided. Changes nothing.

use crate::aside::{self, Aside};
use crate::event::{Event, Observer};
use crate::find::{self, Row, Target};
use crate::guardian::Guardian;
use crate::log::{Log, Notes};
use crate::map::{self, Located};
use crate::method::{dump, stream};
use crate::monitor::{Asked, AskedAgain, Monitor, Told, VmFacts};
use crate::plan::{
    self, Facts, HoldFacts, OutputFacts, Plan, Refusal, SnapshotFacts, SwapWish, TrackFacts,
};
use crate::{Failure, Request, amount, draft, speed, told};
use evidence::format::{self, Arch, Format};
use evidence::manifest;
use evidence::map::Mapping;
use evidence::record::Span;
use evidence::{GuestRange, MemoryMap};
use host::guest_memory::{Held, Usage};
use host::{GuestMemory, RamStore};
use serde::Serialize;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// A VM, looked at.
pub struct Looked {
    /// The process.
    pub target: Target,
    /// What QEMU says of the VM.
    pub vm: VmFacts,
    /// Where its memory is.
    pub located: Located,
    /// How much memory it has.
    pub amount: manifest::Amount,
    /// What is done with each region, and with what is hidden.
    pub asides: Vec<Aside>,
    /// The way to read it.
    pub memory: GuestMemory,
    /// What the decision rests on.
    pub facts: Facts,
    /// Blocks that the host has memory for, in address order.
    pub resident: Vec<GuestRange>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// A second look, after the last read.
pub struct Again {
    /// Where its memory is now.
    pub located: Located,
    /// QEMU's run state now.
    pub run_state: String,
    /// What QEMU told unasked since the first look.
    pub events: Vec<Told>,
    /// How often the monitor was opened anew meanwhile.
    pub reopened: u32,
}

/// What `plan` shows.
pub struct Surveyed {
    /// The VM.
    pub row: Row,
    /// What the decision rests on.
    pub facts: Facts,
    /// The map.
    pub map: MemoryMap,
    /// What is done with each region, and with what is hidden.
    pub decisions: Vec<manifest::Decided>,
    /// What the head of QEMU's dump told, if it was to be asked.
    pub probe: Option<Probe>,
    /// What would be done, or why nothing.
    pub decision: Result<Plan, Refusal>,
}

/// What the head of QEMU's dump told; as [`evidence::manifest::Registers`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// The guest stood some time between, in nanoseconds since the survey began.
    pub stood: Span,
    /// The guest's instruction set.
    pub machine: String,
    /// The vCPUs by QEMU's index.
    pub cpus: Vec<u32>,
    /// How the memory that it names differs from the map; null when it does not.
    pub map_difference: Option<String>,
}

impl Surveyed {
    /// The survey as one JSON object.
    pub fn summary(&self) -> serde_json::Value {
        let (plan, refusal) = match &self.decision {
            Ok(plan) => (Some(plan), None),
            Err(refusal) => (None, Some(refusal)),
        };
        json!({ "vm": self.row, "facts": self.facts, "map": self.map, "decisions": self.decisions,
                "probe": self.probe, "plan": plan, "refusal": refusal })
    }
}

/// Finds the VM.
///
/// # Errors
/// [`Failure::Find`].
pub fn find(request: &Request, log: &Log) -> Result<Target, Failure> {
    log.add(
        "begin",
        json!({ "tool": "stillframe", "version": env!("CARGO_PKG_VERSION"), "vm": request.vm }),
    );
    let target = one(request)?;
    log.add("found", &target.row);
    Ok(target)
}

fn one(request: &Request) -> Result<Target, Failure> {
    let accept_ciphertext = request.wish.accept_ciphertext;
    Ok(Target { accept_ciphertext, ..find::one(&request.vm)? })
}

/// Looks and decides, and leaves it at that. Reads a sample of guest memory to know how long a
/// hold would last, and keeps nothing of it.
///
/// # Errors
/// [`Failure`] when the VM cannot be looked at.
pub fn survey(request: &Request) -> Result<Surveyed, Failure> {
    let (target, log) = (one(request)?, Log::begin());
    let (looked, probe) = match request.probe {
        false => {
            let whom = target.whom();
            let asked = Monitor::open(&whom, &Notes::default())?.look(&whom)?;
            (look(request, target, asked, &log)?, None)
        }
        true => probe(request, target, &log)?,
    };
    let decision = plan::choose(&looked.facts, &request.wish);
    let Looked { target, facts, located, asides, .. } = looked;
    let decisions = asides.into_iter().map(|aside| aside.decided).collect();
    Ok(Surveyed { row: target.row, facts, map: located.map, decisions, probe, decision })
}

/// Looks, and holds the map against the head of QEMU's dump.
fn probe(request: &Request, target: Target, log: &Log) -> Result<(Looked, Option<Probe>), Failure> {
    let mut guardian = Guardian::start(&target, log)?;
    let looked = look(request, target, guardian.look()?, log)?;
    plan::can_probe(&looked.facts).map_err(Failure::Refused)?;
    let probe = dumped_head(guardian, &looked.located, request.wish.stall_budget, log)?;
    Ok((looked, Some(probe)))
}

/// Has QEMU begin a dump for its head, against which the map is held. As that stops the guest, it is done as
/// an acquisition is: by a guardian, which lets go whatever happens, and ends here.
///
/// # Errors
/// [`Failure::Probe`] when the head was not had; [`Failure::NotAsFound`].
pub(crate) fn dumped_head(
    mut guardian: Guardian,
    located: &Located,
    at_most: Duration,
    log: &Log,
) -> Result<Probe, Failure> {
    let read = stream::dump_head(&mut guardian, at_most);
    let again = guardian.again();
    let parting = guardian.bye();
    if let Some(what) = parting.not_as_found {
        return Err(Failure::NotAsFound(what));
    }
    let read = read.map_err(|error| Failure::Probe(Box::new(error)))?;
    let manifest::Registers { stood, machine, cpus, mut map_difference, .. } =
        dump::registers_of(&read, log, located);
    if let Some(difference) = &mut map_difference
        && !again.is_ok_and(|again| again.view.same_memory(&located.view))
    {
        difference.push_str("; the guest has changed its map meanwhile, or cannot be asked");
    }
    Ok(Probe { stood, machine, cpus, map_difference })
}

/// Maps the VM's memory by what QEMU `asked` said, and gathers what the decision rests on.
///
/// # Errors
/// [`Failure`].
pub fn look(request: &Request, target: Target, asked: Asked, log: &Log) -> Result<Looked, Failure> {
    let mut warnings: Vec<String> = asked.warnings().chain(target.warnings()).collect();
    let Some(view) = asked.view else {
        let facts = Facts { confidential: asked.confidential, ..Facts::default() };
        return Err(Failure::Refused(refusal_of(&facts, request)));
    };
    let amount = amount::before(&view, &asked.balloon);
    let mut asides = aside::decide(&view, &asked.hidden, &request.wish);
    if let Err(why) = &asked.balloon {
        warnings.push(format!("the balloon is not known: {why}"));
    }
    let (located, mut memory) = map::locate(view, &target.process)?;
    if request.wish.swap == SwapWish::Skip {
        memory.leave_swapped();
    }
    if located.unseen.is_some() {
        asides.iter_mut().for_each(|aside| aside.leave("QEMU's process may not be looked at"));
    }
    warnings.extend(aside::warnings(&asides, &request.wish));
    let blocks = evidence::block::cut(&located.map).map_err(|error| {
        Failure::Refused(Refusal {
            reason: error.to_string(),
            rejected: Vec::new(),
            remedies: Vec::new(),
        })
    })?;
    let resident = memory.resident(&blocks)?;
    let qemu = FromQemu {
        vm: &asked.vm,
        confidential: asked.confidential,
        aside_bytes: aside::bytes(&asides),
        migration: asked.migration,
        watchdogs: asked.watchdogs,
        snapshots: asked.snapshots.is_some(),
        block_jobs: asked.block_jobs,
    };
    let facts = facts(request, &target, qemu, &located, &memory, &resident)?;
    log.add("mapped", json!({ "regions": located.map.regions().len(), "facts": facts }));
    if asked.snapshots == Some(true) {
        warnings.push(
            "QEMU's capability background-snapshot is set already, and not by us: a migration of this VM \
             would end with the VM running in two places; it is left set"
                .to_owned(),
        );
    }
    if memory.reads_around_ksm() {
        warnings.push(
            "KSM may have merged pages: memory is read the slower way that keeps them so"
                .to_owned(),
        );
    }
    Ok(Looked { target, vm: asked.vm, located, amount, asides, memory, facts, resident, warnings })
}

/// The refusal that `facts` lead to; they always do.
pub(crate) fn refusal_of(facts: &Facts, request: &Request) -> Refusal {
    plan::choose(facts, &request.wish).err().unwrap_or(Refusal {
        reason: "the guest's memory is hidden from the host".to_owned(),
        rejected: Vec::new(),
        remedies: Vec::new(),
    })
}

/// What of QEMU's answers the decision rests on.
struct FromQemu<'a> {
    vm: &'a VmFacts,
    confidential: Option<String>,
    /// Of what lies beside the image.
    aside_bytes: u64,
    migration: Option<String>,
    watchdogs: Vec<String>,
    snapshots: bool,
    block_jobs: Vec<String>,
}

fn facts(
    request: &Request,
    target: &Target,
    qemu: FromQemu<'_>,
    located: &Located,
    memory: &GuestMemory,
    resident: &[GuestRange],
) -> Result<Facts, Failure> {
    let usage = memory.usage()?;
    let limit = RamStore::limit(request.max_ram).map_err(|error| match error {
        host::StoreError::Host(error) => Failure::Host(error),
        other => Failure::Refused(Refusal {
            reason: other.to_string(),
            rejected: Vec::new(),
            remedies: Vec::new(),
        }),
    })?;
    let output = match &request.output {
        Some(path) => Some(output_facts(path, target)?),
        None => None,
    };
    let snapshot = snapshot_facts(target, located, memory, &usage, &qemu);
    Ok(Facts {
        run_state: qemu.vm.run_state.clone(),
        confidential: qemu.confidential,
        migration: qemu.migration,
        through_libvirt: target.through.is_some(),
        shared_monitor: target.row.proxmox.is_some(),
        locked_for: target.row.proxmox.as_ref().and_then(|vm| vm.lock.clone()),
        watchdogs: qemu.watchdogs,
        hold: hold_facts(target, memory, resident, &usage),
        track: track_facts(memory),
        snapshot,
        unseen: located.unseen.clone(),
        dump_unfit: dump_unfit(&qemu.vm.arch, located),
        max_rate: request.max_rate,
        image_bytes: located.map.imaged_len(),
        resident_bytes: usage.iter().map(|u| u.resident).sum(),
        reserve_bytes: resident.iter().map(|block| block.len()).sum(),
        swapped_bytes: usage.iter().map(|u| u.swapped).sum(),
        swapped_shared_bytes: swapped_shared(memory, &usage),
        aside_bytes: qemu.aside_bytes,
        available_bytes: host::memory::host_memory()?.available,
        ram_limit_bytes: limit.bytes,
        ram_limit_by: limit.bound.to_string(),
        output,
        format_unfit: unfit(request, qemu.vm, &located.map),
    })
}

/// Bytes of shared memory in swap.
fn swapped_shared(memory: &GuestMemory, usage: &[Usage]) -> u64 {
    let places = memory.places().iter().zip(usage);
    places
        .filter(|(held, _)| held.mapping() == Mapping::Shared)
        .map(|(_, usage)| usage.swapped)
        .sum()
}

/// Whether the VM's threads may be held, and how fast its memory is read.
fn hold_facts(
    target: &Target,
    memory: &GuestMemory,
    resident: &[GuestRange],
    usage: &[Usage],
) -> HoldFacts {
    // Of shared memory it cannot be told which pages are in swap: such a place is not sampled.
    let swapped =
        |place: &(&Held, &Usage)| place.0.mapping() == Mapping::Shared && place.1.swapped > 0;
    let left_out: Vec<GuestRange> = memory
        .places()
        .iter()
        .zip(usage)
        .filter(swapped)
        .map(|(held, _)| held.place().range)
        .collect();
    let sampled: Vec<GuestRange> = resident
        .iter()
        .filter(|block| !left_out.iter().any(|place| place.covers(**block)))
        .copied()
        .collect();
    let tracer = target.process.tracer().ok().flatten();
    let threads = target.process.threads().map_or(0, |threads| threads.len());
    let (vhost_in_kernel, writers) = writers(target, memory);
    HoldFacts {
        traced_by: tracer,
        vhost_in_kernel,
        writers,
        threads: u32::try_from(threads).unwrap_or(u32::MAX),
        lock_limit_bytes: host::privilege::lock_limit(),
        // Of what may not be looked at, nothing is read.
        speed: speed::measure(memory, if memory.is_seen() { &sampled } else { &[] }, crate::cpus()),
    }
}

/// Whether the kernel tracks what the guest writes, tried out on memory of our own.
fn track_facts(memory: &GuestMemory) -> TrackFacts {
    let unfit = |why: String| TrackFacts { unfit: Some(why), ..TrackFacts::default() };
    if !memory.is_seen() {
        return unfit("QEMU's process may not be looked at".to_owned());
    }
    if !cfg!(target_arch = "x86_64") {
        return unfit("soft-dirty is known to be right on x86-64 hosts only".to_owned());
    }
    if let Some((range, why)) = memory.untracked() {
        return unfit(format!("{range}: {why}"));
    }
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    match host::soft_dirty::probe() {
        Ok(probe) => TrackFacts {
            unfit: None,
            clear_a_gib_ns: nanos(probe.clear_a_gib),
            scan_a_gib_ns: nanos(probe.scan_a_gib),
        },
        Err(error) => unfit(told(&error)),
    }
}

/// The first QEMU that lets a guest go on when its snapshot is broken off (8.1), and leaves one stopped
/// that others stopped just before (`vm_resume` in `bg_migration_vm_start_bh`, 9.0).
const SAFE_QEMU: (u32, u32) = (9, 0);

/// Whether QEMU can take a snapshot of this VM on this host.
fn snapshot_facts(
    target: &Target,
    located: &Located,
    memory: &GuestMemory,
    usage: &[Usage],
    qemu: &FromQemu<'_>,
) -> SnapshotFacts {
    let holes = memory.places().iter().zip(usage).filter_map(|(held, usage)| {
        let shared = matches!(held.mapping(), Mapping::Shared | Mapping::SharedHugetlb);
        shared.then(|| held.place().range.len().saturating_sub(usage.resident))
    });
    // Of memory that may not be looked at, all could be holes.
    let unseen = if located.unseen.is_some() { located.map.imaged_len() } else { 0 };
    let known = SnapshotFacts {
        shared_hole_bytes: holes.sum::<u64>() + unseen,
        block_jobs: qemu.block_jobs.clone(),
        ..SnapshotFacts::default()
    };
    let unfit = |why: String, remedy: Option<&str>| SnapshotFacts {
        unfit: Some(why),
        remedy: remedy.map(str::to_owned),
        ..known.clone()
    };
    if !qemu.snapshots {
        return unfit(
            "this QEMU has no background-snapshot (since 6.0, on Linux)".to_owned(),
            None,
        );
    }
    if qemu.vm.qemu < SAFE_QEMU {
        // Lab: an_old_qemu_that_is_left_alone_hangs_for_ever.
        let why = "before 8.1 it leaves the guest's memory protected when a snapshot is broken off, and \
                   the guest then waits for ever (QEMU's commit 3a8b81f2e639); before 9.0 it starts a \
                   guest that others stop meanwhile";
        return unfit(why.to_owned(), None);
    }
    if let Some(held) = memory.places().iter().find(|held| held.page_size() >= 1 << 30) {
        return unfit(format!("{} lies on pages of 1 GiB", held.place().range), None);
    }
    if let Some(why) = odd(located) {
        return unfit(why, None);
    }
    if !host::userfault::is_allowed_to(&target.process) {
        let why = "QEMU may not use userfaultfd on this host (vm.unprivileged_userfaultfd is 0, and \
                   QEMU has no CAP_SYS_PTRACE and cannot open /dev/userfaultfd)";
        return unfit(why.to_owned(), Some("sysctl vm.unprivileged_userfaultfd=1"));
    }
    match host::userfault::probe() {
        Ok(probe) => SnapshotFacts {
            protect_a_gib_ns: u64::try_from(probe.protect_a_gib.as_nanos()).unwrap_or(u64::MAX),
            ..known
        },
        // Whether QEMU can, QEMU will say; what it takes is not known.
        Err(error) => unfit(format!("userfaultfd could not be tried out: {}", told(&error)), None),
    }
}

/// Why QEMU's dump cannot be used, if it cannot.
pub(crate) fn dump_unfit(arch: &str, located: &Located) -> Option<String> {
    match arch {
        "x86_64" | "i386" | "aarch64" => odd(located),
        _ => Some(format!("that of a guest of {arch:?} is not understood")),
    }
}

/// Why pages cannot be told apart by their addresses, if they cannot.
fn odd(located: &Located) -> Option<String> {
    let odd = |region: &evidence::Region| {
        [region.gpa, region.len, region.block_offset].iter().any(|at| at % evidence::PAGE != 0)
    };
    let (region, _) = located.map.imaged().find(|(region, _)| odd(region))?;
    Some(format!("{:?} does not begin and end with a page", region.name))
}

/// Who writes guest memory beside QEMU's threads: whether vhost threads of the kernel do, and what
/// no hold reaches.
fn writers(target: &Target, memory: &GuestMemory) -> (bool, Vec<String>) {
    let links: Vec<String> = target
        .process
        .fds()
        .unwrap_or_default()
        .iter()
        .map(|fd| String::from_utf8_lossy(&fd.link).into_owned())
        .collect();
    let opens = |prefix: &str| links.iter().any(|link| link.starts_with(prefix));
    let vhost = ["/dev/vhost-net", "/dev/vhost-vsock", "/dev/vhost-scsi"].into_iter().any(opens);
    // Since Linux 6.4 they are threads of the process, and ptrace stops them.
    let reached = target.process.thread_names().iter().any(|name| name.starts_with("vhost-"));
    let mut writers: Vec<String> = links
        .iter()
        .filter(|link| {
            // `/dev/vfio/vfio` is the container, which any user of VFIO opens.
            (link.starts_with("/dev/vfio/") && *link != "/dev/vfio/vfio")
                || link.starts_with("/dev/vhost-vdpa")
                || link.starts_with("/dev/infiniband/")
        })
        .cloned()
        .collect();
    let said =
        |word: &str| target.argv.iter().any(|arg| String::from_utf8_lossy(arg).contains(word));
    for word in ["vhost-user", "ivshmem", "nvme://"] {
        if said(word) {
            writers.push(format!("{word} (on QEMU's command line)"));
        }
    }
    // A backend of vhost-user that was plugged in later is on no command line.
    writers.extend(memory.sharers().unwrap_or_default().iter().map(|process| {
        let exe = process.exe().unwrap_or_default();
        let exe = String::from_utf8_lossy(&exe).into_owned();
        format!("process {} ({exe}), which maps the guest's memory,", process.pid())
    }));
    writers.sort();
    writers.dedup();
    (vhost && !reached, writers)
}

/// Room on the output's filesystem, and whether the VM's disks lie on it too.
fn output_facts(path: &Path, target: &Target) -> Result<OutputFacts, Failure> {
    host::exhibit_dir::check_parent(path)
        .map_err(|cause| Failure::Output { path: path.to_owned(), cause })?;
    let system = host::fs::file_system(path)?;
    // Where a process's descriptors cannot be listed, `plan` says so.
    let disks = target.process.disks().unwrap_or_default();
    let vm_disk = disks
        .iter()
        .find(|fd| fd.file.dev == system.dev && fd.writable)
        .map(|fd| String::from_utf8_lossy(&fd.link).into_owned());
    Ok(OutputFacts {
        path: path.display().to_string(),
        in_memory: matches!(system.kind.as_str(), "tmpfs" | "ramfs"),
        free_bytes: system.free,
        total_bytes: system.total,
        vm_disk,
    })
}

/// The architecture that an ELF image of the guest says; `None` when none is known for it.
pub fn arch(word: &str) -> Option<Arch> {
    match word {
        "x86_64" | "i386" => Some(Arch::X86_64),
        "aarch64" => Some(Arch::Aarch64),
        _ => None,
    }
}

/// Why the image does not fit the format, if it does not.
fn unfit(request: &Request, vm: &VmFacts, map: &MemoryMap) -> Option<String> {
    let format = request.wish.format;
    if format == Format::Elf && arch(&vm.arch).is_none() {
        return Some(format!("no ELF machine is known here for a guest of {:?}", vm.arch));
    }
    let arch = arch(&vm.arch).unwrap_or(Arch::X86_64);
    format::encode(format, arch, map, &[]).err().map(|error| error.to_string())
}

impl Looked {
    /// Tells who was found.
    pub fn tell(&self, observer: &dyn Observer) {
        observer.event(Event::Found {
            name: self.target.row.name.clone(),
            uuid: self.vm.uuid.clone(),
            pid: self.target.row.pid,
            monitor: self.vm.monitor.clone(),
        });
        for text in &self.warnings {
            observer.event(Event::Warning { text: text.clone() });
        }
    }

    /// Tells what was decided.
    pub fn tell_plan(&self, plan: &Plan, observer: &dyn Observer) {
        observer.event(Event::Plan {
            method: plan.method.word().to_owned(),
            class: plan.class,
            store: plan.store.word().to_owned(),
            format: plan.format.to_string(),
            image_bytes: self.facts.image_bytes,
            resident_bytes: self.facts.resident_bytes,
            output_bytes: plan.output_bytes,
        });
        for text in &plan.warnings {
            observer.event(Event::Warning { text: text.clone() });
        }
    }

    /// The second look: the same process, and the map drawn anew from what QEMU said then.
    ///
    /// # Errors
    /// [`Failure`], also when the process is not the one that was found.
    pub fn again(&self, asked: AskedAgain) -> Result<Again, Failure> {
        let process = &self.target.process;
        if !process.still_same() {
            return Err(Failure::Host(host::HostError::Exited { pid: process.pid() }));
        }
        self.memory.check_mappings()?;
        let AskedAgain { view, run_state, events, reopened, .. } = asked;
        let (located, _) = map::locate(view, process)?;
        Ok(Again { located, run_state, events, reopened })
    }

    /// How each imaged region is read.
    pub fn readers(&self) -> Vec<(GuestRange, &'static str)> {
        let places = self.memory.places().iter();
        let seen = places.map(|held| (held.place().range, held.reader().word()));
        match self.memory.is_seen() {
            true => seen.collect(),
            false => self.located.map.imaged().map(|(_, range)| (range, "none")).collect(),
        }
    }

    /// The exhibit's name.
    pub fn exhibit_name(&self, utc: &str, record_id: &str) -> String {
        draft::name(&self.target.row.name, utc, record_id)
    }

    /// The image's layout.
    ///
    /// # Errors
    /// The map does not fit the format; `plan` has refused that before.
    pub fn layout(
        &self,
        format: Format,
        notes: &[evidence::format::Note],
    ) -> Result<evidence::format::Layout, evidence::format::FormatError> {
        // Raw and LiME name no architecture; ELF of an unknown one was refused by the plan.
        let arch = arch(&self.vm.arch).unwrap_or(Arch::X86_64);
        format::encode(format, arch, &self.located.map, notes)
    }
}
