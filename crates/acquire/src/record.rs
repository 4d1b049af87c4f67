//! The record: what happened, put into the manifest. Every number here was measured.

use crate::copy::Cell;
use crate::find::Target;
use crate::guardian::is_stopped;
use crate::log::Log;
use crate::method::process::Pass;
use crate::monitor::VmFacts;
use crate::plan::Plan;
use crate::{CaseNotes, Request, amount};
use evidence::digest::{Digest, Hasher};
use evidence::manifest::{
    self, Change, Clock, FileRecord, Footprint, Host, JournalFile, Loss, LossKind, Manifest,
    MapCheck, Operator, SliceWay, Stable, StateBytes, Status, Tool, VOLATILE, Vm,
};
use evidence::record::Span;
use evidence::state::pages;
use evidence::{GuestRange, MemoryMap, PageState};
use host::source::Faults;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io;
use std::path::Path;

/// What is measured before and after.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measure {
    rss: Option<u64>,
    page_tables: Option<u64>,
    swapped: Option<u64>,
    available: Option<u64>,
}

impl Measure {
    /// Looks at the process and the host now.
    pub fn take(process: &host::Process) -> Self {
        let memory = process.memory().ok();
        Self {
            rss: memory.map(|m| m.rss),
            page_tables: memory.map(|m| m.page_tables),
            swapped: memory.map(|m| m.swap),
            available: host::memory::host_memory().ok().map(|m| m.available),
        }
    }
}

/// Everything that the manifest is made from, in the order in which it becomes known.
pub struct Story<'a> {
    /// What was asked for.
    pub request: &'a Request,
    /// The journal.
    pub log: &'a Log,
    /// UTC at the beginning.
    pub began: host::clock::Moment,
    /// The record's id.
    pub record_id: &'a str,
    /// The VM's process.
    pub target: &'a Target,
    /// What QEMU says of the VM.
    pub vm: &'a VmFacts,
    /// The map before the first read.
    pub map: &'a MemoryMap,
    /// What was decided.
    pub plan: &'a Plan,
    /// Before the first read.
    pub before: Measure,
    /// After the last read.
    pub after: Measure,
    /// How each imaged region was read, in the reader's word.
    pub readers: Vec<(GuestRange, &'static str)>,
    /// The passes.
    pub passes: Vec<Pass>,
    /// Ranges that were never reached.
    pub not_reached: Vec<GuestRange>,
    /// Pages that could not be read.
    pub faults: Faults,
    /// The map texts.
    pub map_check: MapCheck,
    /// The first difference between the maps.
    pub map_difference: Option<String>,
    /// QEMU's run state after the last read.
    pub run_state_after: Option<String>,
    /// What happened to the machine meanwhile.
    pub disturbances: Vec<String>,
    /// What was done with each region, and with what is hidden.
    pub decisions: Vec<manifest::Decided>,
    /// How much memory the guest has, and what moved in it.
    pub amount: manifest::Amount,
    /// Names of the events that QEMU told of during the acquisition.
    pub events: Vec<String>,
    /// The class that was earned.
    pub class: manifest::Class,
    /// The hold.
    pub hold: Option<manifest::Hold>,
    /// The audit read in it, and when.
    pub audit: Option<(manifest::Audit, Span)>,
    /// How the guest was followed.
    pub tracking: Option<manifest::Tracking>,
    /// What is known of QEMU's snapshot.
    pub snapshot: Option<manifest::Snapshot>,
    /// How QEMU copied in slices.
    pub slices: Option<manifest::Slices>,
    /// What is known of QEMU's dump.
    pub dump: Option<manifest::Dump>,
    /// QEMU's process may not be looked at.
    pub unseen: bool,
    /// The vCPUs' registers.
    pub registers: Option<manifest::Registers>,
    /// Files that belong to the exhibit beside image and record.
    pub attachments: Vec<FileRecord>,
    /// What was done to the guest in order to hold it.
    pub changes: Vec<Change>,
    /// What may weaken the claim of one instant.
    pub hold_caveats: Vec<String>,
    /// The rights of every process that took part.
    pub processes: Vec<manifest::Process>,
    /// Worker threads.
    pub workers: usize,
    /// Bytes that the store took.
    pub store_bytes: Option<u64>,
    /// What the operator was warned of.
    pub warnings: Vec<String>,
    /// Why it ended early.
    pub end_reason: Option<String>,
}

/// What sealing gave.
pub struct Sealed {
    /// The image.
    pub image: manifest::Image,
    /// The block records.
    pub blocks: manifest::BlocksFile,
    /// The memory root.
    pub memory_root: Digest,
}

impl Story<'_> {
    /// The manifest. `cells` are the blocks that were reached; `sealed` is absent when there is no
    /// image.
    pub fn manifest(
        &self,
        cells: &[Cell],
        sealed: Option<Sealed>,
        journal: JournalFile,
    ) -> Manifest {
        let has_image = sealed.is_some();
        let (image, blocks, memory_root) = match sealed {
            Some(s) => (Some(s.image), Some(s.blocks), Some(s.memory_root)),
            None => (None, None, None),
        };
        let status = match (&self.end_reason, has_image) {
            (None, _) => Status::Complete,
            (Some(_), true) => Status::Partial,
            (Some(_), false) => Status::Failed,
        };
        Manifest {
            schema: manifest::SCHEMA.to_owned(),
            record_id: self.record_id.to_owned(),
            status,
            end_reason: self.end_reason.clone(),
            class: self.class,
            method: self.plan.method,
            tau: self.tau(),
            hold: self.hold.clone(),
            audit: self.audit.as_ref().map(|(audit, _)| audit.clone()),
            tracking: self.tracking.clone(),
            snapshot: self.snapshot.clone(),
            slices: self.slices.clone(),
            dump: self.dump.clone(),
            registers: self.registers(),
            case: case(&self.request.case),
            operator: operator(),
            clock: self.clock(),
            tool: tool(),
            processes: self.processes.clone(),
            host: host(),
            vm: self.vm_record(),
            map: self.map.clone(),
            map_check: self.map_check.clone(),
            decisions: self.decisions.clone(),
            amount: Some(self.amount.clone()),
            parameters: self.parameters(),
            window: self.window(cells),
            passes: self.passes.iter().map(|pass| self.pass(pass)).collect(),
            stable: if has_image && self.tracking.is_none() { stable(cells) } else { None },
            states: if has_image { states(cells) } else { StateBytes::default() },
            losses: self.losses(cells, has_image),
            store: self.plan.store,
            image,
            memory_root,
            blocks,
            journal,
            attachments: self.attachments.clone(),
            footprint: self.footprint(),
            changes_made: self.changes(),
            disturbances: self.disturbances.clone(),
            caveats: self.caveats(),
            limitations: [
                limitations(
                    self.tracking.is_some(),
                    &self.attachments,
                    self.snapshot.is_some(),
                    self.unseen,
                ),
                amount::limitation(&self.amount).into_iter().collect(),
            ]
            .concat(),
            warnings: self.warnings.clone(),
        }
    }

    /// The instant that the image shows: the middle of the hold, or of a snapshot's stop, which bounds it; in UTC the error
    /// of the host's clock comes on top.
    fn tau(&self) -> Option<manifest::Tau> {
        let held = self.hold.as_ref().map(|hold| (hold.held_ns, hold.released_ns));
        let stood = || self.snapshot.as_ref()?.stop.map(|stop| (stop.t0_ns, stop.t1_ns));
        let (from, to) = held.or_else(stood).filter(|_| self.class != manifest::Class::None)?;
        let half = to.saturating_sub(from).div_ceil(2);
        let mono_ns = from + (to.saturating_sub(from)) / 2;
        // Without an answer, the most that the kernel ever says: 16 s.
        let clock_error = host::clock::sync()
            .map_or(16_000_000_000, |sync| sync.max_error_us.saturating_mul(1000));
        Some(manifest::Tau {
            mono_ns,
            utc: host::clock::later(&self.began, mono_ns.saturating_sub(self.origin_ns()))?,
            bound_ns: half.saturating_add(clock_error),
        })
    }

    /// The registers; of the instant when the guest stood from then to the end.
    fn registers(&self) -> Option<manifest::Registers> {
        let registers = self.registers.clone()?;
        let stood = is_stopped(&self.vm.run_state)
            && self.run_state_after.as_deref() == Some(self.vm.run_state.as_str())
            && !self.events.iter().any(|name| name == "RESUME" || name == "RESET");
        let own = registers.source == manifest::RegistersSource::Dump;
        Some(manifest::Registers { of_tau: (own || stood) && self.tau().is_some(), ..registers })
    }

    /// What lies between time 0 of the record and the moment in which UTC was looked at.
    fn origin_ns(&self) -> u64 {
        self.log.since_ns(self.began.monotonic_ns)
    }

    fn clock(&self) -> Clock {
        let end = host::clock::now();
        let sync = host::clock::sync().ok();
        Clock {
            utc_start: self.began.utc.clone(),
            utc_end: end.utc.clone(),
            mono_end_ns: self.log.now_ns(),
            synchronised: sync.map(|s| s.synchronised),
            estimated_error_us: sync.map(|s| s.estimated_error_us),
            max_error_us: sync.map(|s| s.max_error_us),
            step_us: host::clock::step_us(&self.began, &end),
            local_offset_s: Some(host::clock::local_offset_s()),
        }
    }

    fn vm_record(&self) -> Vm {
        let target = self.target;
        Vm {
            name: self.vm.name.clone().or_else(|| target.cmdline.name.clone()).unwrap_or_default(),
            uuid: self.vm.uuid.clone(),
            pid: target.row.pid,
            start_time_ticks: target.process.start_time(),
            exe: target.row.exe.clone(),
            exe_sha256: file_digest(Path::new(&format!("/proc/{}/exe", target.row.pid))).ok(),
            qemu_version: self.vm.qemu_version.clone(),
            machine: self.vm.machine.clone(),
            arch: self.vm.arch.clone(),
            accelerator: self.vm.accelerator.clone(),
            cpus: self.vm.cpus,
            cmdline: redacted(&target.argv),
            monitor: self.vm.monitor.clone(),
            run_state_before: self.vm.run_state.clone(),
            run_state_after: self.run_state_after.clone(),
        }
    }

    fn parameters(&self) -> Map<String, Value> {
        let wish = &self.request.wish;
        let readers: Vec<Value> = self
            .readers
            .iter()
            .map(|(range, word)| json!({ "range": range.to_string(), "reader": word }))
            .collect();
        let value = json!({
            "passes": self.passes.len(),
            "workers": self.workers,
            "max_rate_bytes_per_s": self.request.max_rate,
            "max_ram_bytes": self.request.max_ram,
            "hold": wish.hold,
            "planned_hold": self.plan.hold,
            "stall_budget_ms": u64::try_from(wish.stall_budget.as_millis()).unwrap_or(u64::MAX),
            "swap": wish.swap,
            "accept_ciphertext": wish.accept_ciphertext,
            "force_output": wish.force_output,
            "why": self.plan.why,
            "store_why": self.plan.store_why,
            "rejected": self.plan.rejected,
            "readers": readers,
        });
        match value {
            Value::Object(object) => object,
            _ => Map::new(),
        }
    }

    /// From the first to the last read of any block, whether its pass ended or not.
    fn window(&self, cells: &[Cell]) -> Option<Span> {
        let spans = cells.iter().flat_map(|cell| [Some(cell.stored), cell.earlier]).flatten();
        let passes = self.passes.iter().map(|pass| pass.span);
        let audit = self.audit.as_ref().map(|(_, span)| *span);
        spans.chain(passes).chain(audit).reduce(Span::join)
    }

    fn pass(&self, pass: &Pass) -> manifest::Pass {
        manifest::Pass {
            n: pass.n,
            t0_ns: pass.span.t0_ns,
            t1_ns: pass.span.t1_ns,
            bytes: pass.bytes,
        }
    }

    /// Unreadable pages and what was not reached, in address order, neighbours merged.
    fn losses(&self, cells: &[Cell], has_image: bool) -> Vec<Loss> {
        if !has_image {
            return Vec::new();
        }
        let streamed = self.snapshot.is_some() || self.dump.is_some();
        let lost = cells.iter().filter(|cell| cell.states.iter().any(|state| !state.known()));
        let unreadable = lost.flat_map(|cell| {
            pages(cell.block).zip(&cell.states).filter_map(|(page, state)| match state {
                PageState::Unreadable => Some((page, LossKind::Unreadable)),
                PageState::Excluded => Some((page, LossKind::Excluded)),
                _ => None,
            })
        });
        let not_reached = self.not_reached.iter().map(|range| (*range, LossKind::NotReached));
        let mut all: Vec<(GuestRange, LossKind)> = unreadable.chain(not_reached).collect();
        all.sort_by_key(|(range, _)| range.start());
        let mut merged: Vec<(GuestRange, LossKind)> = Vec::new();
        for (range, kind) in all {
            let joined = merged.last().and_then(|(last, last_kind)| {
                let touches = last.end() == range.start() && *last_kind == kind;
                let joined = GuestRange::from_ends(last.start(), range.end())?;
                (touches && self.map.find(joined).is_some()).then_some(joined)
            });
            match (joined, merged.last_mut()) {
                (Some(joined), Some(last)) => last.0 = joined,
                _ => merged.push((range, kind)),
            }
        }
        merged.truncate(manifest::MAX_LOSSES);
        let not_reached = self.end_reason.clone().unwrap_or_else(|| "not reached".to_owned());
        merged
            .into_iter()
            .map(|(range, kind)| Loss {
                gpa: range.start(),
                len: range.len(),
                kind,
                reason: match kind {
                    LossKind::NotReached => not_reached.clone(),
                    LossKind::Excluded => self.left_out(range).to_owned(),
                    LossKind::Unreadable if streamed => "QEMU's stream did not have it".to_owned(),
                    LossKind::Unreadable => fault_reason(&self.faults, range),
                },
            })
            .collect()
    }

    /// Why a range was left out on request.
    fn left_out(&self, range: GuestRange) -> &'static str {
        let mut excluded =
            self.decisions.iter().filter(|one| one.taken == manifest::Taken::Excluded);
        let is = |one: &manifest::Decided| {
            GuestRange::new(one.gpa, one.len).is_some_and(|region| region.covers(range))
        };
        match excluded.any(is) {
            true => "left out on request: --exclude",
            false => "in the host's swap, and left there on request: --swap skip",
        }
    }

    fn footprint(&self) -> Footprint {
        let peak = host::memory::peak_rss().ok();
        // The RAM store's pages count as resident memory of ours; the figure is without them.
        let in_ram = (self.plan.store == manifest::StoreKind::Ram).then_some(self.store_bytes);
        Footprint {
            qemu_rss_before: self.before.rss,
            qemu_rss_after: self.after.rss,
            qemu_page_tables_before: self.before.page_tables,
            qemu_page_tables_after: self.after.page_tables,
            swapped_before: self.before.swapped,
            swapped_after: self.after.swapped,
            host_available_before: self.before.available,
            host_available_after: host::memory::host_memory().ok().map(|m| m.available),
            tool_peak_rss: peak
                .map(|peak| peak.saturating_sub(in_ram.flatten().unwrap_or_default())),
            store_bytes: self.store_bytes,
        }
    }

    fn changes(&self) -> Vec<Change> {
        let mut changes = vec![Change {
            what: "queries were sent to QEMU's monitor, each of them in the journal; nothing was \
                   changed by them"
                .to_owned(),
            why: "only QEMU knows the guest's memory map".to_owned(),
        }];
        if self.target.through.is_some() {
            let why = "libvirt has QEMU's monitor".to_owned();
            changes.push(Change { what: crate::plan::TAINT.to_owned(), why });
        }
        changes.extend(self.changes.iter().cloned());
        if let (Some(before), Some(after)) = (self.before.swapped, self.after.swapped)
            && after < before
        {
            changes.push(Change {
                what: format!("{} bytes of QEMU's memory came back from swap", before - after),
                why: "memory that is swapped out can only be read by bringing it back".to_owned(),
            });
        }
        changes
    }

    fn caveats(&self) -> Vec<String> {
        let mut caveats = Vec::new();
        if self.plan.method == manifest::Method::Live {
            caveats.push(
                "live: the guest ran while its memory was read; pages that differ between the two \
                 passes are listed in the block records, a page that changed and changed back \
                 between them is not seen"
                    .to_owned(),
            );
        }
        if self.slices.is_some() {
            caveats.push(
                "pmemsave: the guest ran between the slices that QEMU copied; each page was read from \
                 outside just before, and those that differ are listed in the block records"
                    .to_owned(),
            );
        }
        if self.class == manifest::Class::None {
            caveats.extend(amount::caveat(&self.amount));
        }
        caveats.extend(self.hold_caveats.iter().cloned());
        caveats.extend(self.tracking.iter().flat_map(tracking_caveats));
        if self.hold.as_ref().is_some_and(|hold| hold.kind == manifest::HoldKind::Ptrace) {
            caveats.push(
                "what a disk or a device had under way by direct access when the guest was held may \
                 have come into its memory during the hold; the guest had not been told that it was \
                 there"
                    .to_owned(),
            );
        }
        if self.hold.is_some() && self.class == manifest::Class::None {
            caveats.push("the guest was held, but the image does not show one instant".to_owned());
        }
        if let Some(difference) = &self.map_difference {
            caveats.push(format!("the memory map changed during the acquisition: {difference}"));
        }
        if !self.events.is_empty() {
            caveats.push(format!(
                "QEMU told of these events during the acquisition: {}",
                self.events.join(", ")
            ));
        }
        caveats
    }
}

/// What the image of `track` rests on.
fn tracking_caveats(tracking: &manifest::Tracking) -> Vec<String> {
    let ms = |ns: u64| ns.div_ceil(1_000_000);
    let horizon = ms(tracking.io_horizon_ns);
    let mut caveats = vec![format!(
        "track: what a device writes into memory by direct access is taken to arrive within {horizon} ms \
         (--io-horizon) after the device was given the page; what arrives later can be missing in the \
         image"
    )];
    if let Some(latency) = tracking.block_latency_ns.filter(|ns| *ns > tracking.io_horizon_ns) {
        caveats.push(format!(
            "a block device took {} ms for a request during the acquisition, longer than that: pages \
             that it wrote can be older than the image's instant",
            ms(latency)
        ));
    }
    caveats
}

/// Why the guest is held at all.
const ONE_INSTANT: &str = "the image is to show one instant";

fn for_one_instant(what: String) -> Change {
    Change { what, why: ONE_INSTANT.to_owned() }
}

/// What a hold changed; a VM that was found paused is left so, and QEMU not `told`.
pub fn hold_change(hold: &manifest::Hold, told: bool) -> Option<Change> {
    let ms = hold.stall_ns().div_ceil(1_000_000);
    match (hold.kind, told) {
        (manifest::HoldKind::Ptrace, _) => Some(for_one_instant(format!(
            "QEMU's threads were stopped by ptrace for {ms} ms at most and let go again; the guest's \
             clock ran on"
        ))),
        (manifest::HoldKind::Stop, true) => Some(for_one_instant(format!(
            "QEMU was told `stop` and `cont`: the guest stood for {ms} ms at most, its clock with it, \
             and QEMU wrote its disks out"
        ))),
        (manifest::HoldKind::Stop, false) | (manifest::HoldKind::Dump, _) => None,
    }
}

/// What a snapshot changed.
pub fn snapshot_change(snapshot: &manifest::Snapshot) -> Change {
    let stood = match snapshot.stop {
        Some(stop) => format!("for {} ms", (stop.t1_ns - stop.t0_ns).div_ceil(1_000_000)),
        None => "for a time that is not known".to_owned(),
    };
    let settings = if snapshot.restored { "were put back" } else { "may not be as before" };
    for_one_instant(format!(
        "QEMU was told to take a background snapshot: it gave each page of the guest an entry in its \
         page tables, stopped the guest {stood}, its clock with it, wrote its disks out, and let each \
         page be written again once it had been sent. Its settings of migration {settings}; its \
         query-migrate tells of this snapshot until the next migration"
    ))
}

/// What may have been done where no snapshot began.
pub fn no_snapshot_change() -> Change {
    let what = "QEMU was perhaps told to take a background snapshot, and its settings of migration were \
                put back, unless this record says otherwise: the journal has what was sent";
    for_one_instant(what.to_owned())
}

/// What QEMU's dump changed.
pub fn dump_change(hold: &manifest::Hold) -> Change {
    for_one_instant(format!(
        "QEMU was told to dump (dump-guest-memory) into a socket of ours (getfd): the guest stood for {} ms \
         at most, its clock with it, QEMU wrote its disks out and read every page; its query-dump tells of \
         this dump until the next one",
        hold.stall_ns().div_ceil(1_000_000)
    ))
}

/// What may have been done where no dump began.
pub fn no_dump_change() -> Change {
    let what =
        "QEMU was perhaps told to dump, and the socket was closed: the journal has what was sent";
    for_one_instant(what.to_owned())
}

/// What a dump changed of which nothing but the head was read.
pub fn registers_change(registers: &manifest::Registers) -> Change {
    let Span { t0_ns, t1_ns } = registers.stood;
    Change {
        what: format!(
            "QEMU was told to dump (dump-guest-memory) into a socket of ours (getfd), which was closed behind \
             the registers: the guest stood some time of {} ms, its clock with it, and QEMU wrote its disks \
             out; its query-dump tells of a failed dump until the next one",
            (t1_ns - t0_ns).div_ceil(1_000_000)
        ),
        why: "the registers of the vCPUs were asked for".to_owned(),
    }
}

/// What may have been done where no registers came.
pub fn no_registers_change() -> Change {
    Change {
        what: "QEMU was perhaps told to dump for its head, and the socket was closed: the journal has what was \
               sent"
            .to_owned(),
        why: "the registers of the vCPUs were asked for".to_owned(),
    }
}

/// What QEMU's copying changed; of an `unseen` process it goes by a path.
pub fn slices_change(slices: &manifest::Slices, unseen: bool) -> Change {
    let ms = slices.longest_ns.div_ceil(1_000_000);
    let by = match slices.by {
        SliceWay::Pmemsave if unseen => {
            "QEMU copied the guest's memory with pmemsave into a file of ours in /dev/shm, which it could open \
             by its path and only we could read, and which was removed"
        }
        SliceWay::Pmemsave => {
            "QEMU was given a file of ours in memory (getfd), copied the guest's memory into it with \
             pmemsave, and gave it back (closefd)"
        }
        SliceWay::MemoryPeek => {
            "libvirt had QEMU copy the guest's memory with pmemsave (DOMAIN_MEMORY_PEEK) into files on the \
             host's disk, in libvirt's directory of the domain, each of which it read and removed: what they \
             held may be found on that disk"
        }
    };
    Change {
        what: format!(
            "{by}: {} times, at most {} bytes at a time; the guest waited for QEMU where it needed it, for \
             {ms} ms at most each time",
            slices.count, slices.slice_bytes
        ),
        why: "QEMU's own copy was asked for".to_owned(),
    }
}

/// What may have been done where QEMU copied nothing.
pub fn no_slices_change(unseen: bool) -> Change {
    let what = match unseen {
        true => "a file for QEMU to copy memory into was perhaps made in /dev/shm, and removed",
        false => {
            "QEMU was perhaps given a file of ours in memory (getfd), and it was taken back (closefd): the \
             journal has what was sent"
        }
    };
    Change { what: what.to_owned(), why: "QEMU's own copy was asked for".to_owned() }
}

/// What following the guest changed.
pub fn tracking_change(tracking: &manifest::Tracking) -> Change {
    let ms = |span: &Span| (span.t1_ns - span.t0_ns).div_ceil(1_000_000);
    let rounds = &tracking.rounds;
    let longest = rounds.iter().map(|round| ms(&round.stall)).max().unwrap_or_default();
    let clears = rounds.iter().filter_map(|round| round.clear.as_ref());
    let clears: Vec<u64> = std::iter::once(&tracking.first_clear).chain(clears).map(ms).collect();
    for_one_instant(format!(
        "QEMU's threads were stopped by ptrace {} times, for {longest} ms at most each time, and let go \
         again; the guest's clock ran on. The kernel's marks of written pages (soft-dirty) of QEMU's \
         process were cleared {} times, which took {} ms at most and makes the first write to each page \
         after it slower",
        rounds.len(),
        clears.len(),
        clears.iter().max().unwrap_or(&0),
    ))
}

/// What may have been done where there was no hold in the end.
pub fn no_hold_change(kind: manifest::HoldKind) -> Option<Change> {
    (kind == manifest::HoldKind::Stop).then(|| {
        let what = "QEMU was perhaps told `stop`, and then `cont`: the journal has what was sent";
        for_one_instant(what.to_owned())
    })
}

/// What holds by ptrace that were given up did to the guest, each so many nanoseconds.
pub fn stalls_change(stalls_ns: &[u64]) -> Option<Change> {
    let longest = stalls_ns.iter().max()?.div_ceil(1_000_000);
    Some(for_one_instant(format!(
        "{} times QEMU's threads were stopped by ptrace and let go again at once, for {longest} ms at \
         most: not all of them stopped in time",
        stalls_ns.len()
    )))
}

/// What the kernel said of the pages that could not be read: each error once.
/// Why pages of `range` could not be read, as far as the list of such pages reaches.
fn fault_reason(faults: &Faults, range: GuestRange) -> String {
    let mut texts: Vec<String> = Vec::new();
    for fault in
        faults.list.iter().filter(|fault| (range.start()..range.end()).contains(&fault.gpa))
    {
        let text = match fault.errno {
            0 => "the file behind the memory ends before it".to_owned(),
            number => io::Error::from_raw_os_error(number).to_string(),
        };
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    if texts.is_empty() { "the host could not read it".to_owned() } else { texts.join("; ") }
}

fn limitations(
    tracked: bool,
    attachments: &[FileRecord],
    snapshot: bool,
    unseen: bool,
) -> Vec<String> {
    let attached = |name: &str| attachments.iter().any(|file| file.file == name);
    let sampled = snapshot.then_some(
        "The audit read of a snapshot draws from the pages that were protected when it came to them: a page \
         that had lost its protection is not among them.",
    );
    let registers = match (
        attached(evidence::exhibit::DEVICE_STATE),
        attached(evidence::exhibit::DUMP_HEAD),
    ) {
        (true, _) => {
            "vCPU registers and device state are in the attachment device-state.bin, as QEMU writes them, \
             and not in the image."
        }
        (false, true) => {
            "vCPU registers are in the attachment dump-head.bin, as QEMU writes them, and not in the image; \
             no device state is kept."
        }
        (false, false) => "vCPU registers and device state are not part of this image.",
    };
    let unseen = unseen.then_some(
        "Whoever ran the tool was not allowed to look at QEMU's process: that its memory lies where QEMU says, \
         and that QEMU gave what it holds, was not checked from outside; memory that the host had nothing \
         behind cannot be told from zeros.",
    );
    let tracked = tracked.then_some(
        "Whether somebody else cleared the kernel's marks of written pages in QEMU's process during \
         the acquisition can only be seen in part.",
    );
    [
        VOLATILE,
        registers,
        "Memory that the chipset hides under overlays (legacy VGA hole, SMRAM), ROM devices (pflash) \
         and NVDIMMs are not in this image; decisions say which have files of their own, read behind the image \
         and not at its instant, and which were not read.",
        "Pages in state hole had no memory behind them on the host; whether the guest never touched \
         them or gave them back cannot be told from the host.",
        "Whoever has the host's root rights can forge what this tool was shown.",
    ]
    .into_iter()
    .chain(tracked)
    .chain(sampled)
    .chain(unseen)
    .map(str::to_owned)
    .collect()
}

fn case(notes: &CaseNotes) -> manifest::Case {
    manifest::Case {
        number: notes.number.clone(),
        exhibit: notes.exhibit.clone(),
        examiner: notes.examiner.clone(),
        authority: notes.authority.clone(),
    }
}

fn operator() -> Operator {
    let facts = host::facts::host_facts().ok();
    Operator {
        uid: facts.as_ref().map_or(u32::MAX, |f| f.uid),
        euid: facts.as_ref().map_or(u32::MAX, |f| f.euid),
        gid: host::facts::gid(),
        loginuid: facts.as_ref().and_then(|f| f.login_uid),
        user: facts.and_then(|f| f.user),
        sudo_user: std::env::var("SUDO_USER").ok(),
        tty: host::facts::tty(),
    }
}

fn tool() -> Tool {
    Tool {
        name: "stillframe".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        exe_sha256: file_digest(Path::new("/proc/self/exe")).ok(),
        argv: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
    }
}

fn host() -> Host {
    let facts = host::facts::host_facts().ok();
    let text = |of: fn(&host::facts::HostFacts) -> &String| {
        facts.as_ref().map_or_else(String::new, |facts| of(facts).clone())
    };
    Host {
        hostname: text(|f| &f.hostname),
        kernel: text(|f| &f.kernel),
        machine: text(|f| &f.machine),
        distribution: host::facts::distribution(),
        boot_id: text(|f| &f.boot_id),
        cpus: u32::try_from(crate::cpus()).unwrap_or(u32::MAX),
        mem_total: host::memory::host_memory().map_or(0, |m| m.total),
    }
}

/// What stands in for a secret.
const HIDDEN: &str = "(not recorded)";

/// Keys whose values are secrets wherever they stand.
const SECRET_KEYS: [&str; 6] = ["password", "passwd", "key", "cookie", "cookie-secret", "secret"];

/// QEMU's arguments for the record, without the secrets in them.
fn redacted(argv: &[Vec<u8>]) -> Vec<String> {
    argv.iter().map(|arg| redacted_argument(&String::from_utf8_lossy(arg))).collect()
}

fn redacted_argument(text: &str) -> String {
    if text.starts_with('{')
        && let Ok(mut value) = serde_json::from_str::<Value>(text)
    {
        redact_json(&mut value);
        return value.to_string();
    }
    // `-object secret,data=..`: there `data` is the secret itself. `,,` is a comma in a value.
    let is_secret_object = text.starts_with("secret") || text.contains("qom-type=secret");
    let parts: Vec<String> = text
        .replace(",,", "\0")
        .split(',')
        .map(|part| match part.split_once('=') {
            Some((key, _)) if is_secret_key(key) || (is_secret_object && key == "data") => {
                format!("{key}={HIDDEN}")
            }
            _ => without_user_info(part),
        })
        .collect();
    parts.join(",").replace('\0', ",,")
}

fn is_secret_key(key: &str) -> bool {
    // `file.password`, `tls.key`: what counts is the last part of a dotted key.
    let last = key.rsplit('.').next().unwrap_or(key);
    SECRET_KEYS.contains(&last)
}

fn redact_json(value: &mut Value) {
    match value {
        Value::Object(object) => {
            let is_secret = object.get("qom-type").and_then(Value::as_str) == Some("secret");
            for (key, value) in object {
                if value.is_string() && (is_secret_key(key) || (is_secret && key == "data")) {
                    *value = HIDDEN.into();
                } else {
                    redact_json(value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact_json),
        Value::String(text) => *text = without_user_info(text),
        _ => {}
    }
}

/// `https://user:pass@host/` without what stands before the `@`.
fn without_user_info(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let host_end = rest.find('/').unwrap_or(rest.len());
    match rest.get(..host_end).and_then(|authority| authority.rfind('@')) {
        Some(at) => format!("{scheme}://{HIDDEN}{}", rest.get(at..).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// How far the two reads of the blocks agreed: pages whose bytes were read both times.
fn stable(cells: &[Cell]) -> Option<Stable> {
    let records = cells.iter().filter(|cell| cell.earlier.is_some()).map(crate::seal::record);
    let counts = records.map(|record| (record.pages_equal(), record.pages_changed()));
    let (equal, changed) = counts.fold((0u64, 0u64), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    Stable::new(equal, changed)
}

fn states(cells: &[Cell]) -> StateBytes {
    use PageState::{Data, Discarded, Excluded, Hole, Unreadable, Zero};
    let mut bytes = StateBytes::default();
    for cell in cells {
        for state in [Data, Zero, Hole, Discarded, Unreadable, Excluded] {
            bytes.add(state, cell.bytes_in(state));
        }
    }
    bytes
}

/// SHA-256 of a file.
pub fn file_digest(path: &Path) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hasher.finish())
}

/// A small file of the exhibit, as the manifest names it.
pub fn file_record(file: &str, bytes: &[u8]) -> FileRecord {
    FileRecord {
        file: file.to_owned(),
        len: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        sha256: evidence::digest::sha256(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_the_command_line_are_not_recorded() {
        let argv = [
            "-object",
            "secret,id=s0,data=hunter2,format=raw",
            "-spice",
            "port=1,password=hunter2",
            "-drive",
            "file=data=x,if=virtio",
            r#"{"qom-type":"secret","id":"s1","data":"hunter2"}"#,
            r#"{"driver":"https","url":"https://me:hunter2@host/a"}"#,
            "id=s0,qom-type=secret,data=hunter2",
            "password=a,,hunter2,port=1",
            "file=https://me:hunter2@host/disk,format=raw",
            "driver=rbd,file.key=hunter2",
        ];
        let argv: Vec<Vec<u8>> = argv.iter().map(|arg| arg.as_bytes().to_vec()).collect();
        let text = redacted(&argv).join(" ");
        assert!(!text.contains("hunter2"), "{text}");
        assert!(text.contains("file=data=x,if=virtio"), "{text}");
    }
}
