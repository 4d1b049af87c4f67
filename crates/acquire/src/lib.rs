//! Policy: what an acquisition is. The library that `stillframe` and others call.
//!
//! [`acquire`] reads like the sentence: find, map, plan, guard, capture, map again, seal, exhibit.
//! It holds the branches; the other modules get what they need and do one thing.
#![forbid(unsafe_code)]

pub mod amount;
pub mod aside;
pub mod chart;
pub mod copy;
pub mod doctor;
pub mod draft;
pub mod event;
pub mod find;
pub mod guard;
pub mod guardian;
pub mod handed;
pub mod holder;
pub mod log;
pub mod look;
pub mod map;
pub mod method;
pub mod monitor;
pub mod plan;
pub mod reader;
pub mod record;
pub mod recover;
pub mod role;
pub mod seal;
pub mod speed;
pub mod stall;
pub mod stop;
pub mod undo;

use crate::copy::{Cell, Cut};
use crate::event::{Event, Observer};
use crate::guard::Guarded;
use crate::guardian::{Guardian, GuardianError, Parting};
use crate::log::Log;
use crate::look::Looked;
use crate::method::dump::{self, Dumped};
use crate::method::pmemsave;
use crate::method::process::{self, Frozen, NotHeld, Pass, PassError, Work};
use crate::method::sample::Samples;
use crate::method::snapshot::{self, Shot};
use crate::method::stream::{self, Destination, StreamError};
use crate::method::track;
use crate::monitor::Told;
use crate::plan::{
    Method, Plan, PlannedDump, PlannedHold, PlannedSlices, PlannedSnapshot, PlannedTracking,
    Refusal, Wish,
};
use crate::record::{Measure, Sealed, Story};
use crate::seal::process::Sealer;
use crate::stop::Stop;
use evidence::digest::Digest;
use evidence::exhibit;
use evidence::manifest::{self, BlocksFile, Class, FileRecord, Image, JournalFile, MapCheck};
use evidence::record::Span;
use evidence::{GuestRange, PageState};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

pub use crate::look::{Surveyed, survey};

/// What the examiner says of the case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaseNotes {
    /// Case number.
    pub number: Option<String>,
    /// Exhibit number.
    pub exhibit: Option<String>,
    /// Who takes the image.
    pub examiner: Option<String>,
    /// On whose authority.
    pub authority: Option<String>,
}

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The VM: name, UUID, PID, or path of a QMP socket.
    pub vm: String,
    /// The directory that the exhibit is made in.
    pub output: Option<PathBuf>,
    /// How.
    pub wish: Wish,
    /// The most host memory that a RAM store may take, in bytes.
    pub max_ram: Option<u64>,
    /// The most bytes of guest memory that are read in a second.
    pub max_rate: Option<u64>,
    /// Whether the SHA-256 of the whole image file is computed.
    pub file_digest: bool,
    /// For the record.
    pub case: CaseNotes,
    /// Whether a survey holds the map against the head of QEMU's dump, for which QEMU stops the guest.
    pub probe: bool,
}

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No VM was found.
    #[error(transparent)]
    Find(#[from] find::FindError),
    /// QEMU cannot be asked, or its answers cannot be used.
    #[error(transparent)]
    Asked(#[from] monitor::AskError),
    /// The guardian was lost before anything was done.
    #[error(transparent)]
    Guardian(GuardianError),
    /// There is no map that can be trusted.
    #[error(transparent)]
    Map(#[from] map::LocateError),
    /// What was asked for is not possible or not safe.
    #[error("refused: {}", .0.reason)]
    Refused(Refusal),
    /// The host cannot be looked at.
    #[error("the host cannot be looked at")]
    Host(#[from] host::HostError),
    /// The output directory cannot be used.
    #[error("cannot make the exhibit in {}", path.display())]
    Output {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        cause: host::exhibit_dir::ExhibitError,
    },
    /// The head of QEMU's dump could not be read; the guest is as it was found.
    #[error("QEMU's dump could not be looked at")]
    Probe(#[source] Box<method::process::PassError>),
    /// The guest is not as it was found.
    #[error("the guest is not as it was found: {0}")]
    NotAsFound(String),
    /// The run began, and its record could not be written.
    #[error("the record of {} could not be written", exhibit.display())]
    Record {
        /// What is left of the exhibit.
        exhibit: PathBuf,
        /// Why.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Failure {
    /// What is left on disk.
    pub fn exhibit(&self) -> Option<PathBuf> {
        match self {
            Failure::Record { exhibit, .. } => Some(exhibit.clone()),
            _ => None,
        }
    }
}

/// How a run that began came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Everything was read and sealed.
    Complete,
    /// Complete, but something is not known or not as before.
    Losses(String),
    /// The operator ended it; the record is partial.
    Interrupted,
    /// It could not go on; the record is partial.
    Failed(String),
    /// The guest is not as it was found. Beats all.
    NotAsFound(String),
}

impl From<GuardianError> for Failure {
    fn from(error: GuardianError) -> Self {
        match error {
            GuardianError::Ask(error) => Failure::Asked(error),
            lost => Failure::Guardian(lost),
        }
    }
}

impl Ending {
    /// Why it is not complete.
    pub fn reason(&self) -> Option<String> {
        match self {
            Ending::Complete => None,
            Ending::Losses(reason) | Ending::Failed(reason) | Ending::NotAsFound(reason) => {
                Some(reason.clone())
            }
            Ending::Interrupted => Some("interrupted by the operator".to_owned()),
        }
    }

    /// Whether the exhibit gets its final name.
    fn is_whole(&self) -> bool {
        matches!(self, Ending::Complete | Ending::Losses(_))
    }
}

/// What a run left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// How it came out.
    pub ending: Ending,
    /// The exhibit: its directory, `.partial` when it is not whole.
    pub exhibit: Option<PathBuf>,
}

/// Takes an image of a running VM's memory.
///
/// # Errors
/// [`Failure`] when nothing was done, or when the record of a run could not be written. A run that
/// began and could not go on is no error: it has an [`Ending`] and a record that says so.
pub fn acquire(request: &Request, tell: &dyn Observer, stop: &Stop) -> Result<Done, Failure> {
    let log = Log::begin();
    let began = host::clock::now();
    let target = look::find(request, &log)?; // find
    let mut guardian = Guardian::start(&target, &log)?;
    let looked = look::look(request, target, guardian.look()?, &log)?; // map
    looked.tell(tell);
    let plan = plan::choose(&looked.facts, &request.wish).map_err(Failure::Refused)?; // plan
    looked.tell_plan(&plan, tell);
    let mut guarded = guard::guard(request, &looked, &plan, &log, &began, tell, stop)?; // guard
    let mut run = Run::new(&looked, guarded.refusal.take());
    if run.end.is_none() {
        run.capture(request, &looked, &plan, &mut guarded, &mut guardian, &log, tell, stop); // capture
    }
    run.map_again(&looked, &mut guardian, &log, &began, tell);
    run.part(guardian, &log, tell);
    run.asides(request, &looked, &guarded, &log, tell, stop);
    let sealed = run.seal(request, &plan, &mut guarded, &log, tell, &stop.next());
    run.exhibit(request, &looked, &plan, guarded, sealed, &log, &began) // exhibit
}

/// Threads that read and hash: one a CPU.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

/// What happens to a run between guard and exhibit.
struct Run {
    cells: Vec<Cell>,
    passes: Vec<Pass>,
    before: Measure,
    after: Measure,
    not_reached: Vec<GuestRange>,
    /// Why it ended early.
    end: Option<Ending>,
    map_after: Option<(FileRecord, Vec<u8>)>,
    map_difference: Option<String>,
    run_state_after: Option<String>,
    /// What was done with each region, and with what is hidden.
    decisions: Vec<manifest::Decided>,
    /// Why the guest's memory is hidden from the host, if it is.
    ciphertext: Option<String>,
    /// Files beside the image.
    files: Vec<FileRecord>,
    /// What the head of QEMU's dump names, where it was had for the registers: of virtio-mem what is plugged in.
    dumped: Option<Vec<GuestRange>>,
    /// How much memory the guest has, before and after.
    amount: manifest::Amount,
    /// Names of the events that QEMU told of meanwhile.
    events: Vec<String>,
    /// What happened to the machine meanwhile.
    disturbances: Vec<String>,
    /// How each region was read.
    readers: Vec<(GuestRange, &'static str)>,
    /// What went otherwise than it should, after the plan.
    warnings: Vec<String>,
    /// The hold and what was done in it.
    held: Option<Held>,
    /// How the guest was followed.
    tracking: Option<manifest::Tracking>,
    /// What is known of QEMU's snapshot.
    snapshot: Option<manifest::Snapshot>,
    /// How QEMU copied in slices.
    slices: Option<manifest::Slices>,
    /// What is known of QEMU's dump.
    dump: Option<manifest::Dump>,
    /// The registers, and the dump's head that has them.
    registers: Option<(manifest::Registers, Vec<u8>)>,
    /// Pages of it that were read while they were protected, and when.
    shot_audit: Option<(manifest::Audit, Span)>,
    /// State of the devices by the snapshot's stream.
    device_state: Vec<u8>,
    /// The rights of the process that read it.
    readers_rights: Vec<manifest::Process>,
    /// How long tries to hold the guest stalled it in vain, in nanoseconds.
    stalls_ns: Vec<u64>,
    /// What was done to the guest in order to hold it.
    changes: Vec<manifest::Change>,
    /// What is known of the guardian, once it is gone.
    parting: Parting,
    /// The rights of the processes that sealed.
    sealers: Vec<manifest::Process>,
}

/// A hold that is over.
struct Held {
    hold: manifest::Hold,
    audit: Option<(manifest::Audit, Span)>,
}

impl Held {
    /// Why the image is not one of one instant after all.
    fn void(&self) -> Option<&'static str> {
        let differs = self.audit.as_ref().is_some_and(|(audit, _)| audit.differing > 0);
        match (self.hold.lasted, differs) {
            (false, _) => Some("the hold did not last until the last read"),
            (true, true) => Some("pages differed when they were read again in the hold"),
            (true, false) => None,
        }
    }
}

impl Run {
    fn new(looked: &Looked, refusal: Option<Ending>) -> Self {
        let before = Measure::take(&looked.target.process);
        Self {
            cells: Vec::new(),
            passes: Vec::new(),
            before,
            after: before,
            not_reached: Vec::new(),
            end: refusal,
            map_after: None,
            map_difference: None,
            run_state_after: None,
            decisions: looked.asides.iter().map(|aside| aside.decided.clone()).collect(),
            ciphertext: looked.facts.confidential.clone(),
            files: Vec::new(),
            dumped: None,
            amount: looked.amount.clone(),
            events: Vec::new(),
            disturbances: Vec::new(),
            readers: Vec::new(),
            warnings: Vec::new(),
            held: None,
            tracking: None,
            snapshot: None,
            slices: None,
            dump: None,
            registers: None,
            shot_audit: None,
            device_state: Vec::new(),
            readers_rights: Vec::new(),
            stalls_ns: Vec::new(),
            changes: Vec::new(),
            parting: Parting::default(),
            sealers: Vec::new(),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "capture is where everything meets")]
    fn capture(
        &mut self,
        request: &Request,
        looked: &Looked,
        plan: &Plan,
        guarded: &mut Guarded,
        guardian: &mut Guardian,
        log: &Log,
        tell: &dyn Observer,
        stop: &Stop,
    ) {
        self.cells = match copy::cells(&looked.located.map) {
            Ok(cells) => cells,
            Err(error) => {
                self.end = Some(Ending::Failed(error.to_string()));
                return;
            }
        };
        let guarded_again = &*guarded;
        let work = Work {
            source: &looked.memory,
            store: guarded_again.store(),
            log,
            workers: cpus(),
            max_rate: request.max_rate,
            stop,
            observer: tell,
        };
        log.add("capture", json!({ "blocks": self.cells.len(), "workers": work.workers }));
        // QEMU's streams have everything.
        let streams = plan.snapshot.is_some() || plan.dump.is_some();
        let excluded = if streams { Vec::new() } else { self.take_excluded() };
        let mut samples = None;
        // As near as may be to the instant that the image will show.
        let registers_first = plan.method != Method::Track;
        if registers_first {
            self.take_registers(plan, looked, guardian, log, tell);
        }
        let result = match (&plan.hold, &plan.tracking, &plan.snapshot) {
            (Some(held), Some(tracking), _) => self.track(&work, looked, held, tracking, guardian),
            (Some(held), None, _) => self.freeze(&work, looked, held, guarded_again, guardian),
            (None, _, Some(planned)) => {
                let shot = self.snapshot(&work, looked, planned, guarded_again, guardian);
                shot.and_then(|shot| {
                    samples = Some(shot.samples);
                    shot.end
                })
            }
            (None, _, None) => match (&plan.slices, &plan.dump) {
                (Some(planned), _) => self.pmemsave(&work, planned, looked, guardian),
                (None, Some(planned)) => {
                    let dumped = self.dump(&work, looked, planned, guarded_again, guardian);
                    dumped.and_then(|dumped| {
                        samples = Some(dumped.samples);
                        dumped.end
                    })
                }
                (None, None) => process::live(&work, &mut self.cells, &mut self.passes),
            },
        };
        if !registers_first {
            self.take_registers(plan, looked, guardian, log, tell);
        }
        let result = result.and(self.close_store(guarded, samples, log));
        for pass in &self.passes {
            log.add(
                "pass",
                json!({ "n": pass.n, "t0_ns": pass.span.t0_ns, "t1_ns": pass.span.t1_ns,
                        "changed_pages": pass.changed_pages }),
            );
        }
        self.end = match result {
            Ok(()) => None,
            Err(Cut::Stopped) => Some(Ending::Interrupted),
            Err(Cut::Late) => Some(Ending::Failed(
                "the stall budget was used up before all memory was read; the guest was let go"
                    .to_owned(),
            )),
            Err(Cut::Failed(error)) => Some(Ending::Failed(told(&error))),
        };
        self.after = Measure::take(&looked.target.process);
        let by_qemu = plan
            .snapshot
            .map(|_| "qemu-stream")
            .or(plan.slices.map(|_| "qemu-pmemsave"))
            .or(plan.dump.map(|_| "qemu-dump"));
        self.readers = looked.readers();
        self.readers.iter_mut().for_each(|(_, word)| *word = by_qemu.unwrap_or(word));
        self.drop_unreached(guarded);
        self.put_back(excluded);
    }

    /// One pass inside a hold. The guest goes on when this returns.
    fn freeze(
        &mut self,
        work: &Work<'_>,
        looked: &Looked,
        planned: &PlannedHold,
        guarded: &Guarded,
        guardian: &mut Guardian,
    ) -> Result<(), Cut<PassError>> {
        if let Err(error) = guarded.top_up(looked) {
            self.warnings.push(format!(
                "memory that the guest touched lately was not set aside before the hold: {}",
                told(&error)
            ));
        }
        let process = &looked.target.process;
        let (cells, passes, stalls) = (&mut self.cells, &mut self.passes, &mut self.stalls_ns);
        let frozen = process::freeze(work, process, planned, guardian, cells, passes, stalls);
        self.changes.extend(record::stalls_change(&self.stalls_ns));
        self.changes.extend(match &frozen {
            Ok(frozen) => record::hold_change(&frozen.hold, frozen.told_qemu),
            Err(NotHeld::Guardian(_)) => record::no_hold_change(planned.kind),
            Err(_) => None,
        });
        let frozen = frozen.map_err(|error| Cut::Failed(PassError::NotHeld(error)))?;
        let Frozen { hold, audit, end, doubt, .. } = frozen;
        work.log.add("hold", &hold);
        if let Some((audit, span)) = &audit {
            work.log.add("audit", json!({ "audit": audit, "span": span }));
        }
        self.warnings.extend(doubt);
        self.hold_ended(hold, audit);
        end
    }

    /// Passes over the running guest, then a hold for the rest.
    fn track(
        &mut self,
        work: &Work<'_>,
        looked: &Looked,
        held: &PlannedHold,
        planned: &PlannedTracking,
        guardian: &mut Guardian,
    ) -> Result<(), Cut<PassError>> {
        let process = &looked.target.process;
        let (cells, passes, stalls) = (&mut self.cells, &mut self.passes, &mut self.stalls_ns);
        let tracked = track::track(work, process, held, planned, guardian, cells, passes, stalls);
        self.changes.extend(record::stalls_change(&self.stalls_ns));
        self.changes.extend(tracked.tracking.as_ref().map(record::tracking_change));
        if planned.rounds_unheld > 0 {
            let text = "the marks of written pages were cleared with the guest running, as asked: \
                        writes were lost";
            self.disturbances.push(text.to_owned());
        }
        self.warnings.extend(tracked.doubts);
        self.tracking = tracked.tracking;
        if let Some(hold) = tracked.hold {
            work.log.add("hold", &hold);
            if let Some((audit, span)) = &tracked.audit {
                work.log.add("audit", json!({ "audit": audit, "span": span }));
            }
            self.hold_ended(hold, tracked.audit);
        }
        tracked.end
    }

    /// Has QEMU copy its memory, slice by slice.
    fn pmemsave(
        &mut self,
        work: &Work<'_>,
        planned: &PlannedSlices,
        looked: &Looked,
        guardian: &mut Guardian,
    ) -> Result<(), Cut<PassError>> {
        let (cells, passes) = (&mut self.cells, &mut self.passes);
        let through = looked.target.through.as_ref();
        let sliced = pmemsave::pmemsave(work, planned, through, guardian, cells, passes);
        let unseen = looked.located.unseen.is_some();
        self.changes.push(match &sliced.slices {
            Some(slices) => record::slices_change(slices, unseen),
            None => record::no_slices_change(unseen),
        });
        self.warnings.extend(sliced.doubt);
        if let Some(slices) = &sliced.slices {
            work.log.add("slices", slices);
            if slices.over_budget > 0 {
                self.warnings.push(format!(
                    "QEMU took longer than the stall budget for {} of {} slices, {} ms at most: they \
                     were made smaller, and greater again where they took little: {} bytes in the end",
                    slices.over_budget,
                    slices.count,
                    slices.longest_ns.div_ceil(1_000_000),
                    slices.last_bytes
                ));
            }
        }
        self.slices = sliced.slices;
        sliced.end
    }

    /// Memory that the store has room for, a little more than it had: a stream begins.
    fn top_up(&mut self, looked: &Looked, guarded: &Guarded) -> Vec<GuestRange> {
        let topped_up = guarded.top_up(looked);
        if let Err(error) = &topped_up {
            self.warnings.push(format!(
                "memory that the guest touched lately was not set aside before QEMU began: {}",
                told(error)
            ));
        }
        let resident = topped_up.unwrap_or_default();
        if resident.is_empty() { looked.resident.clone() } else { resident }
    }

    /// Has QEMU dump and reads it.
    fn dump(
        &mut self,
        work: &Work<'_>,
        looked: &Looked,
        planned: &PlannedDump,
        guarded: &Guarded,
        guardian: &mut Guardian,
    ) -> Result<Dumped, Cut<PassError>> {
        let reserved = self.top_up(looked, guarded);
        let into = destination(looked, guarded, &reserved)?;
        let map = &looked.located.map;
        let (cells, passes) = (&mut self.cells, &mut self.passes);
        let mut dumped = dump::dump(work, map, planned, &into, guardian, cells, passes);
        self.readers_rights.extend(dumped.rights.take());
        self.warnings.append(&mut dumped.doubts);
        self.changes.push(match &dumped.hold {
            Some(hold) => record::dump_change(hold),
            None => record::no_dump_change(),
        });
        work.log.add("dump", &dumped.dump);
        self.dump = dumped.dump.take();
        self.keep_registers(dumped.head.take(), work.log);
        if let Some(hold) = dumped.hold.take() {
            work.log.add("hold", &hold);
            self.hold_ended(hold, None);
        }
        Ok(dumped)
    }

    /// Has QEMU begin a dump for its head, which has the registers.
    fn take_registers(
        &mut self,
        plan: &Plan,
        looked: &Looked,
        guardian: &mut Guardian,
        log: &Log,
        tell: &dyn Observer,
    ) {
        let Some(at_most_ns) = plan.registers_ns else { return };
        match stream::dump_head(guardian, Duration::from_nanos(at_most_ns)) {
            Ok(read) => {
                self.dumped = Some(read.head.ranges());
                let registers = dump::registers_of(&read, log, &looked.located);
                self.changes.push(record::registers_change(&registers));
                self.readers_rights.push(read.rights);
                self.keep_registers(Some((registers, read.bytes)), log);
            }
            Err(error) => {
                self.changes.push(record::no_registers_change());
                let text = format!("the registers could not be taken: {}", told(&error));
                tell.event(Event::Warning { text: text.clone() });
                self.warnings.push(text);
            }
        }
    }

    /// What QEMU's dump says of the memory must be what the map says.
    fn keep_registers(&mut self, head: Option<(manifest::Registers, Vec<u8>)>, log: &Log) {
        let Some((registers, bytes)) = head else { return };
        log.add("registers", &registers);
        if let Some(difference) = &registers.map_difference {
            self.disturbances.push(format!("QEMU's dump told of other memory: {difference}"));
        }
        match bytes.is_empty() {
            true => self.warnings.push("the registers could not be kept".to_owned()),
            false => self.registers = Some((registers, bytes)),
        }
    }

    /// Has QEMU take a snapshot and reads it.
    fn snapshot(
        &mut self,
        work: &Work<'_>,
        looked: &Looked,
        planned: &PlannedSnapshot,
        guarded: &Guarded,
        guardian: &mut Guardian,
    ) -> Result<Shot, Cut<PassError>> {
        let reserved = self.top_up(looked, guarded);
        let into = destination(looked, guarded, &reserved)?;
        let map = &looked.located.map;
        let (cells, passes) = (&mut self.cells, &mut self.passes);
        let mut shot = snapshot::snapshot(work, map, planned, &into, guardian, cells, passes);
        self.readers_rights.extend(shot.rights.take());
        let change = match &shot.snapshot {
            Some(snapshot) => record::snapshot_change(snapshot),
            None => record::no_snapshot_change(),
        };
        self.changes.push(change);
        self.warnings.append(&mut shot.doubts);
        if let Some(snapshot) = &shot.snapshot {
            // The devices stand in the manifest, and a line has a limit.
            work.log
                .add("snapshot", manifest::Snapshot { devices: Vec::new(), ..snapshot.clone() });
            if shot.end.is_ok() && snapshot.stop.is_none() {
                let text = "QEMU did not tell when it stopped the guest: the instant is not known";
                self.disturbances.push(text.to_owned());
            }
        }
        self.snapshot = shot.snapshot.take();
        self.device_state = std::mem::take(&mut shot.device_state);
        Ok(shot)
    }

    /// Nobody else writes the store any more: what was sampled of a snapshot is held against it.
    fn close_store(
        &mut self,
        guarded: &mut Guarded,
        samples: Option<Samples>,
        log: &Log,
    ) -> Result<(), Cut<PassError>> {
        let Some(samples) = samples else { return Ok(()) };
        let written: Vec<GuestRange> = self
            .cells
            .iter()
            .filter(|cell| cell.states.contains(&PageState::Data))
            .map(|cell| cell.block)
            .collect();
        let unusable = |error: host::StoreError| {
            let cause = std::io::Error::other(told(&error));
            let what = "the end of writing into the store";
            Cut::Failed(PassError::Stream(StreamError::Make { what, cause }))
        };
        guarded.close_store(&written).map_err(unusable)?;
        let audit = samples.audit(&self.cells, guarded.store());
        match &audit {
            Some((audit, span)) => log.add("audit", json!({ "audit": audit, "span": span })),
            None => {
                let text =
                    "no page that nobody could write was read from outside: QEMU was done sooner";
                self.warnings.push(text.to_owned());
            }
        }
        // A dump's samples are of its hold.
        if let Some(held) = &mut self.held {
            held.audit = audit;
            let voided = held.void().map(str::to_owned);
            let new = voided.filter(|text| !self.disturbances.contains(text));
            self.disturbances.extend(new);
            return Ok(());
        }
        self.shot_audit = audit;
        let differing = self.shot_audit.as_ref().map_or(0, |(audit, _)| audit.differing);
        if differing > 0 {
            self.disturbances.push(format!(
                "{differing} pages that nobody could write were sent otherwise than they were read"
            ));
        }
        Ok(())
    }

    /// Keeps what is known of the hold in which the image was taken.
    fn hold_ended(&mut self, hold: manifest::Hold, audit: Option<(manifest::Audit, Span)>) {
        if audit.as_ref().is_some_and(|(audit, _)| audit.pages == 0) {
            let text = "no page was read again in the hold: the stall budget was used up";
            self.warnings.push(text.to_owned());
        }
        let held = Held { hold, audit };
        self.disturbances.extend(held.void().map(str::to_owned));
        self.held = Some(held);
    }

    /// The class that the image earned.
    fn class(&self, plan: &Plan) -> Class {
        let whole = self.end.is_none() && self.not_reached.is_empty();
        // A machine that did not stay itself between the looks has no map for the instant. A hold
        // that is void is among the disturbances.
        let same = self.map_difference.is_none() && self.disturbances.is_empty();
        let stood = self.snapshot.as_ref().is_some_and(|snapshot| snapshot.stop.is_some());
        let instant = self.held.is_some() || stood;
        if instant && whole && same { plan.class } else { Class::None }
    }

    /// Blocks that no pass reached are losses, not blocks of the image.
    fn drop_unreached(&mut self, guarded: &Guarded) {
        self.not_reached =
            self.cells.iter().filter(|cell| cell.pass == 0).map(|cell| cell.block).collect();
        // Where the store is the image, whoever was ended while he wrote may have left bytes there.
        for block in self.not_reached.iter().filter(|_| guarded.ram().is_none()) {
            let _ = guarded.file.punch(*block);
        }
        self.cells.retain(|cell| cell.pass > 0);
    }

    /// Reads what is not in the image and has files of its own.
    fn asides(
        &mut self,
        request: &Request,
        looked: &Looked,
        guarded: &Guarded,
        log: &Log,
        tell: &dyn Observer,
        stop: &Stop,
    ) {
        if self.end.is_some() {
            aside::none(&mut self.decisions, "the acquisition ended before");
            return;
        }
        let asides = aside::read(&looked.asides, looked, request, log, guarded, stop);
        let text = |what: &manifest::Decided, why: &str| {
            format!("{} {:?} at {:#x}: {why}", what.kind, what.name, what.gpa)
        };
        for (planned, came) in looked.asides.iter().zip(&asides.decided) {
            let warning = match (planned.place.is_some(), came.taken, came.known) {
                (true, manifest::Taken::Nowhere, _) => text(came, &came.why),
                (true, _, false) => {
                    text(came, "some of it could not be read, and is zeros in its file")
                }
                _ => continue,
            };
            tell.event(Event::Warning { text: warning.clone() });
            self.warnings.push(warning);
        }
        if asides.stopped {
            self.end.get_or_insert(Ending::Interrupted);
        }
        (self.decisions, self.files) = (asides.decided, asides.files);
        log.add("asides", json!({ "files": self.files.len() }));
        // The last read was one of these.
        self.after = Measure::take(&looked.target.process);
    }

    /// Takes out the blocks of regions that are left out on request, so that nobody reads them.
    fn take_excluded(&mut self) -> Vec<Cell> {
        let excluded = self.excluded();
        let is = |cell: &Cell| excluded.iter().any(|range| range.covers(cell.block));
        let (out, kept) = std::mem::take(&mut self.cells).into_iter().partition(is);
        self.cells = kept;
        out
    }

    /// Holes of virtio-mem that QEMU's dump does not name are not plugged in; where nothing was plugged meanwhile.
    fn discard(&mut self, pluggable: &[GuestRange]) {
        let still = Some(&self.amount.devices_before) == self.amount.devices_after.as_ref();
        let Some(dumped) = self.dumped.as_ref().filter(|_| still) else { return };
        for cell in &mut self.cells {
            cell.discard(PageState::Hole, pluggable, dumped);
        }
    }

    /// The regions that are left out on request.
    fn excluded(&self) -> Vec<GuestRange> {
        let excluded = self.decisions.iter().filter(|one| one.taken == manifest::Taken::Excluded);
        excluded.filter_map(|one| GuestRange::new(one.gpa, one.len)).collect()
    }

    /// Puts such blocks back in their places, and says of each that it was left out. What was read of them
    /// all the same, as QEMU's streams have everything, does not come into the image.
    fn put_back(&mut self, out: Vec<Cell>) {
        let Some(pass) = self.passes.first() else { return };
        let (excluded, span) = (self.excluded(), pass.span);
        self.cells.extend(out);
        self.cells.sort_by_key(|cell| cell.block.start());
        let is = |cell: &&mut Cell| excluded.iter().any(|range| range.covers(cell.block));
        for cell in self.cells.iter_mut().filter(is) {
            let states = vec![PageState::Excluded; cell.states.len()];
            *cell = Cell { states: states.into(), stored: span, pass: 1, ..Cell::new(cell.block) };
        }
    }

    /// Whether QEMU still says the same of the guest's memory.
    fn map_again(
        &mut self,
        looked: &Looked,
        guardian: &mut Guardian,
        log: &Log,
        began: &host::clock::Moment,
        tell: &dyn Observer,
    ) {
        let asked = match guardian.again() {
            // Its successor asks.
            Err(GuardianError::Lost(_)) => guardian.again(),
            other => other,
        };
        if guardian.lost > 0 {
            let text = "QEMU's events may have been missed: the guardian was lost".to_owned();
            self.disturbances.push(text);
        }
        if let Ok(asked) = &asked {
            amount::after(&mut self.amount, asked);
        }
        match asked.map_err(Failure::from).and_then(|asked| looked.again(asked)) {
            Ok(again) => {
                let text = again.located.text().into_bytes();
                self.map_after = Some((record::file_record(exhibit::MAP_AFTER, &text), text));
                self.map_difference = looked.located.difference(&again.located);
                self.run_state_after = Some(again.run_state.clone());
                for event in &again.events {
                    log.add("event", event);
                }
                if again.reopened > 0 {
                    self.warnings.push(format!(
                        "the monitor was opened anew {} times, and what QEMU told in between nobody heard",
                        again.reopened
                    ));
                }
                let until_us = self.last_moment_us(log, began);
                let disturbances = disturbances(&again.events, &again.run_state, until_us);
                for text in &disturbances {
                    tell.event(Event::Warning { text: format!("meanwhile {text}") });
                }
                self.disturbances.extend(disturbances);
                self.events = again.events.into_iter().map(|event| event.name).collect();
            }
            Err(error) => {
                let reason = format!("the map could not be taken again: {}", told(&error));
                log.add("map-again", json!({ "error": reason }));
                self.end.get_or_insert(Ending::Failed(reason));
                return;
            }
        }
        self.discard(&looked.located.pluggable());
        log.add("map-again", json!({ "difference": self.map_difference }));
        if let Some(difference) = &self.map_difference {
            tell.event(Event::MapChanged { difference: difference.clone() });
        }
    }

    /// The last moment that the image shows, in microseconds of UTC: what QEMU told of later happened
    /// to another machine than the one in the image. Absent when nothing was held.
    fn last_moment_us(&self, log: &Log, began: &host::clock::Moment) -> Option<i64> {
        let held = self.held.as_ref().map(|held| held.hold.released_ns);
        let stood = || self.snapshot.as_ref()?.stop.map(|stop| stop.t1_ns);
        let origin_ns = log.since_ns(began.monotonic_ns);
        host::clock::later_us(began, held.or_else(stood)?.saturating_sub(origin_ns))
    }

    /// The guardian goes, and with it the claim to the VM.
    fn part(&mut self, mut guardian: Guardian, log: &Log, tell: &dyn Observer) {
        guardian.leave();
        let parting = guardian.bye();
        log.add("parted", json!({ "guardians_lost": parting.lost }));
        if parting.lost > 0 {
            let text = format!("the guardian was lost {} times and replaced", parting.lost);
            tell.event(Event::Warning { text: text.clone() });
            self.warnings.push(text);
        }
        for undone in &parting.undone {
            self.warnings.push(format!("undone: {}", undone.text));
        }
        self.parting = parting;
    }

    /// Store to image. Without a block there is nothing to seal.
    fn seal(
        &mut self,
        request: &Request,
        plan: &Plan,
        guarded: &mut Guarded,
        log: &Log,
        tell: &dyn Observer,
        stop: &Stop,
    ) -> Option<Sealed> {
        if self.cells.is_empty() {
            return None;
        }
        log.add("seal", json!({ "blocks": self.cells.len() }));
        match self.try_seal(request, plan, guarded, tell, stop) {
            Ok(sealed) => Some(sealed),
            Err(error) => {
                let reason = told(&error);
                log.add("seal", json!({ "error": reason }));
                self.end.get_or_insert(Ending::Failed(reason));
                None
            }
        }
    }

    fn try_seal(
        &mut self,
        request: &Request,
        plan: &Plan,
        guarded: &mut Guarded,
        tell: &dyn Observer,
        stop: &Stop,
    ) -> Result<Sealed, seal::SealError> {
        let (other_bytes_sha256, sha256) = self.seal_image(request, guarded, tell, stop)?;
        guarded.give_back_ram();
        let records = seal::records(&self.cells, guarded.new_file(exhibit::BLOCKS)?)?;
        tell.event(Event::Sealed {
            memory_root: records.memory_root.to_string(),
            data_bytes: self.bytes_in(PageState::Data),
            file_bytes: guarded.layout.len,
        });
        Ok(Sealed {
            image: Image {
                file: exhibit::image_name(plan.format),
                format: plan.format,
                len: guarded.layout.len,
                sha256,
                segments: guarded.layout.segments.list().len() as u64,
                other_bytes_sha256,
            },
            blocks: BlocksFile {
                file: exhibit::BLOCKS.to_owned(),
                count: records.count,
                sha256: records.sha256,
            },
            memory_root: records.memory_root,
        })
    }

    /// Brings everything into the image, by a process that can do nothing else. Gives back the
    /// digests of other bytes and of the file.
    fn seal_image(
        &mut self,
        request: &Request,
        guarded: &Guarded,
        tell: &dyn Observer,
        stop: &Stop,
    ) -> Result<(Digest, Option<Digest>), seal::SealError> {
        let ram = guarded.ram();
        let empty = seal::empty(&mut self.cells, &guarded.file, ram.is_none());
        let mut sealer = Sealer::new(&mut self.cells, &guarded.file, ram, cpus(), tell)?;
        // A block that is on disk already needs only its digest: nothing is gained by stopping.
        let never = Stop::new();
        let ended = sealer.blocks(if ram.is_some() { stop } else { &never });
        match ended {
            Ok(()) => {}
            Err(Cut::Stopped | Cut::Late) => {
                self.end.get_or_insert(Ending::Interrupted);
            }
            Err(Cut::Failed(error)) => {
                self.end.get_or_insert(Ending::Failed(told(&error)));
            }
        }
        let broken = sealer.collect(&mut self.cells);
        if broken > 0 {
            self.end.get_or_insert(Ending::Failed(format!(
                "the process that seals told of {broken} blocks as it may not"
            )));
        }
        self.cells.extend(empty);
        self.cells.sort_by_key(|cell| cell.block.start());
        self.drop_unsealed(guarded);
        let other_bytes_sha256 = seal::pieces(&guarded.layout, &guarded.file)?;
        seal::finish(&guarded.file, guarded.layout.len)?;
        let sha256 = match request.file_digest {
            true => self.file_digest(&mut sealer, guarded.layout.len, tell, stop),
            false => None,
        };
        let lost = sealer.lost.iter().map(|lost| format!("a process that sealed was lost: {lost}"));
        self.warnings.extend(lost);
        self.sealers = std::mem::take(&mut sealer.rights);
        Ok((other_bytes_sha256, sha256))
    }

    /// Blocks that did not come into the image are losses; what is there stays, whatever ended the
    /// sealing.
    fn drop_unsealed(&mut self, guarded: &Guarded) {
        for cell in self.cells.iter().filter(|cell| !cell.sealed) {
            // Half a block is none, and its space is wanted for the record.
            let _ = guarded.file.punch(cell.block);
            self.not_reached.push(cell.block);
        }
        self.not_reached.sort();
        self.cells.retain(|cell| cell.sealed);
    }

    /// The digest of the whole file, unless the operator or the disk has enough.
    fn file_digest(
        &mut self,
        sealer: &mut Sealer<'_>,
        len: u64,
        tell: &dyn Observer,
        stop: &Stop,
    ) -> Option<Digest> {
        let text = match sealer.digest(len, stop) {
            Ok(digest) => return Some(digest),
            Err(Cut::Stopped | Cut::Late) => {
                "the file digest was left out when the operator interrupted".to_owned()
            }
            Err(Cut::Failed(error)) => {
                let text = format!("the image could not be read back: {}", told(&error));
                self.end.get_or_insert(Ending::Failed(text.clone()));
                text
            }
        };
        tell.event(Event::Warning { text: text.clone() });
        self.warnings.push(text);
        None
    }

    fn bytes_in(&self, wanted: PageState) -> u64 {
        self.cells.iter().map(|cell| cell.bytes_in(wanted)).sum()
    }

    /// How the run came out, all considered.
    fn ending(&self) -> Ending {
        if let Some(what) = &self.parting.not_as_found {
            return Ending::NotAsFound(what.clone());
        }
        if let Some(end) = &self.end {
            return end.clone();
        }
        if let Some(void) = self.held.as_ref().and_then(Held::void) {
            return Ending::Losses(format!("the image does not show one instant: {void}"));
        }
        let unreadable = self.bytes_in(PageState::Unreadable);
        if let Some(difference) = &self.map_difference {
            return Ending::Losses(format!("the memory map changed meanwhile: {difference}"));
        }
        let excluded = self.bytes_in(PageState::Excluded);
        match (self.disturbances.first(), unreadable, excluded) {
            (Some(what), ..) => Ending::Losses(format!("meanwhile {what}")),
            (None, 1.., _) => Ending::Losses(format!("{unreadable} bytes could not be read")),
            (None, 0, 1..) => Ending::Losses(format!(
                "{excluded} bytes were left out on request (--exclude, --swap skip)"
            )),
            (None, 0, 0) => match &self.ciphertext {
                Some(what) => Ending::Losses(plan::ciphertext(what)),
                None => Ending::Complete,
            },
        }
    }

    /// Writes what is left of the record, the manifest last, and gives the exhibit its name.
    #[expect(clippy::too_many_arguments, reason = "everything that is known goes into the record")]
    fn exhibit(
        mut self,
        request: &Request,
        looked: &Looked,
        plan: &Plan,
        guarded: Guarded,
        sealed: Option<Sealed>,
        log: &Log,
        began: &host::clock::Moment,
    ) -> Result<Done, Failure> {
        let (ending, class) = (self.ending(), self.class(plan));
        if sealed.is_none() {
            guarded.remove_image();
        }
        let path = guarded.path();
        let fail = |cause: Box<dyn std::error::Error + Send + Sync>| Failure::Record {
            exhibit: path.clone(),
            cause,
        };
        if let Some((record, text)) = &self.map_after {
            guarded.write(&record.file, text).map_err(|e| fail(Box::new(e)))?;
        }
        if sealed.is_none() {
            aside::no_image(&mut self.decisions);
        }
        let mut attachments = self.files;
        if !self.device_state.is_empty() {
            let state = &self.device_state;
            guarded.write(exhibit::DEVICE_STATE, state).map_err(|e| fail(Box::new(e)))?;
            attachments.push(record::file_record(exhibit::DEVICE_STATE, state));
        }
        if let Some((registers, head)) = &self.registers {
            guarded.write(&registers.file, head).map_err(|e| fail(Box::new(e)))?;
            attachments.push(record::file_record(&registers.file, head));
        }
        log.add("end", json!({ "reason": ending.reason() }));
        let head = log.close().map_err(|e| fail(Box::new(e)))?;
        let whole = ending.is_whole();
        let story = Story {
            request,
            log,
            began: began.clone(),
            record_id: &guarded.record_id,
            target: &looked.target,
            vm: &looked.vm,
            map: &looked.located.map,
            plan,
            before: self.before,
            after: self.after,
            readers: self.readers,
            passes: self.passes,
            not_reached: self.not_reached,
            faults: looked.memory.take_faults(),
            map_check: MapCheck {
                before: Some(guarded.map_before.clone()),
                equal: self.map_after.as_ref().map(|_| self.map_difference.is_none()),
                after: self.map_after.map(|(record, _)| record),
            },
            map_difference: self.map_difference,
            run_state_after: self.run_state_after,
            decisions: self.decisions,
            amount: self.amount,
            events: self.events,
            disturbances: self.disturbances,
            class,
            hold: self.held.as_ref().map(|held| held.hold.clone()),
            audit: self.held.as_ref().and_then(|held| held.audit.clone()).or(self.shot_audit),
            tracking: self.tracking,
            snapshot: self.snapshot,
            slices: self.slices,
            dump: self.dump,
            unseen: looked.located.unseen.is_some(),
            registers: self.registers.map(|(registers, _)| registers),
            attachments,
            changes: self.changes,
            hold_caveats: plan::hold_caveats(&looked.facts, plan.hold)
                .into_iter()
                .chain(looked.facts.confidential.as_deref().map(plan::ciphertext))
                .collect(),
            processes: processes(&self.parting, &[self.readers_rights, self.sealers].concat()),
            workers: cpus(),
            store_bytes: guarded.store_bytes(),
            warnings: [looked.warnings.clone(), plan.warnings.clone(), self.warnings].concat(),
            end_reason: if whole { None } else { ending.reason() },
        };
        let journal =
            JournalFile { file: exhibit::JOURNAL.to_owned(), lines: head.lines, head: head.digest };
        let manifest = story.manifest(&self.cells, sealed, journal);
        let bytes = manifest.to_json().map_err(|e| fail(Box::new(e)))?;
        let sums = seal::sums(&manifest, &bytes, &guarded).map_err(|e| fail(Box::new(e)))?;
        guarded.write(exhibit::SUMS, sums.as_bytes()).map_err(|e| fail(Box::new(e)))?;
        guarded.write(exhibit::MANIFEST, &bytes).map_err(|e| fail(Box::new(e)))?;
        let exhibit = match guarded.finish(whole) {
            Ok(exhibit) => exhibit,
            Err(e) => return Err(fail(Box::new(e))),
        };
        Ok(Done { ending, exhibit: Some(exhibit) })
    }
}

/// Where a stream goes: the store, opened for another process, and where memory lies in it.
fn destination<'a>(
    looked: &Looked,
    guarded: &'a Guarded,
    reserved: &'a [GuestRange],
) -> Result<Destination<'a>, Cut<PassError>> {
    let make =
        |cause| Cut::Failed(PassError::Stream(StreamError::Make { what: "a descriptor", cause }));
    let (file, segments) = guarded.open_store().map_err(make)?;
    let spare = guarded.ram().map(host::RamStore::spare);
    let pluggable = looked.located.pluggable();
    Ok(Destination { file, segments, reserved, spare, pluggable })
}

/// The rights of every process that took part.
fn processes(parting: &Parting, others: &[manifest::Process]) -> Vec<manifest::Process> {
    let capture = role::own_rights("capture");
    parting.rights.iter().cloned().chain(capture).chain(others.iter().cloned()).collect()
}

/// What happened between the first look and `until_us`, or the last look, that makes the image one of
/// a machine that did not stay itself. `events` are in order.
fn disturbances(events: &[Told], run_state: &str, until_us: Option<i64>) -> Vec<String> {
    let of_event = |name: &str| match name {
        "RESET" => Some("the machine was reset: the image may hold two boots"),
        "SHUTDOWN" => Some("the machine shut down"),
        "DEVICE_DELETED" => Some("a device was unplugged"),
        "MEMORY_DEVICE_SIZE_CHANGE" => Some("a memory device changed its size"),
        _ => None,
    };
    let later = |event: &Told| match (event.utc_us, until_us) {
        // QEMU stamps an event when it tells of it, a little after it happened.
        (Some(event), Some(until)) => event > until + TELLING_US,
        _ => false,
    };
    let mut texts: Vec<String> = events
        .iter()
        .filter(|event| !later(event))
        .filter_map(|event| of_event(&event.name))
        .map(str::to_owned)
        .collect();
    // A machine that migrates is stopped in the end, and QEMU tells of that.
    let stop = events.iter().rfind(|event| event.name == "STOP");
    let migrates = ["postmigrate", "finish-migrate", "inmigrate"].contains(&run_state);
    if migrates && !stop.is_some_and(later) {
        texts.push(format!("the machine began to migrate: it is {run_state:?}"));
    }
    texts.dedup();
    texts
}

/// How long after something happened QEMU may still be busy before it tells of it: 100 ms.
const TELLING_US: i64 = 100_000;

/// An error with its causes on one line, for the record.
pub(crate) fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_that_did_not_last_and_a_page_that_differed_are_void() {
        let hold = |lasted| manifest::Hold {
            kind: manifest::HoldKind::Ptrace,
            began_ns: 1,
            held_ns: 2,
            released_ns: 3,
            ended_ns: 4,
            threads: 1,
            tries: 1,
            lasted,
            budget_ns: 5,
            expected_ns: 3,
        };
        let audited = |differing: &[u64]| {
            Some((manifest::Audit::new(4096, differing), Span { t0_ns: 2, t1_ns: 3 }))
        };
        let void = |lasted, audit| Held { hold: hold(lasted), audit }.void().is_some();
        assert!(!void(true, None) && !void(true, audited(&[])));
        assert!(void(true, audited(&[0x1000])) && void(false, audited(&[])));
    }

    #[test]
    fn what_happens_after_the_instant_disturbs_nothing() {
        let told = |name: &str, utc_us| Told { name: name.into(), data: json!(null), utc_us };
        let seen = |events: &[Told], run_state: &str, until_us| {
            disturbances(events, run_state, until_us).len()
        };
        let reset = [told("RESET", Some(1_000_000))];
        assert_eq!(seen(&reset, "running", None), 1);
        assert_eq!(seen(&reset, "running", Some(2_000_000)), 1);
        assert_eq!(seen(&reset, "running", Some(1_000_000 - TELLING_US)), 1, "told late, perhaps");
        assert_eq!(seen(&reset, "running", Some(800_000)), 0);
        assert_eq!(seen(&[told("RESET", None)], "running", Some(1)), 1, "nobody knows when");
        // Our own stop of the machine says nothing of a migration.
        let stops = [told("STOP", Some(500_000)), told("RESUME", Some(600_000))];
        assert_eq!(seen(&stops, "postmigrate", Some(550_000)), 1);
        let migrated = [&stops[..], &[told("STOP", Some(9_000_000))]].concat();
        assert_eq!(seen(&migrated, "postmigrate", Some(550_000)), 0);
        assert_eq!(seen(&migrated, "postmigrate", None), 1);
    }
}
