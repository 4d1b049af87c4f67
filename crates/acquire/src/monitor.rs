//! The monitor: the first of the VM's QMP sockets that answers, proof of who answers, and all that
//! is asked there.
//!
//! `plan` asks by itself; in an acquisition only the guardian does.

use crate::amount;
use crate::chart::More;
use crate::find::LibvirtDomain;
use crate::log::Notes;
use crate::told;
use qemu::facts::{BlockTimes, Dump, Facts, Migration};
use qemu::graph::{Graph, Hidden};
use qemu::qmp::{Capability, Change, Exchange};
use qemu::{GuestView, Qmp, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a monitor may take to greet at least, however many are left to try.
const ONE_OF_MANY: Duration = Duration::from_secs(1);

/// How long the only one may take, and several together.
const ONLY_ONE: Duration = Duration::from_secs(4);

/// So many directories are passed on at most; QEMU has one monitor or two.
const MAX_FOREIGN: usize = 6;

/// How long a query may take. QEMU answers in its main loop, which a slow disk can block.
pub const QUERY: Duration = Duration::from_secs(10);

/// How often a map is charted whose guest changes it meanwhile.
const CHARTS: usize = 4;

/// The capability of QEMU's migration that makes a snapshot of it.
pub const SNAPSHOT: &str = "background-snapshot";

/// Which VM, and where it may be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Whom {
    /// The VM's name.
    pub name: String,
    /// QEMU's process.
    pub pid: u32,
    /// Sockets to try, in order.
    pub sockets: Vec<PathBuf>,
    /// The accelerator, as the process shows it.
    pub accelerator: String,
    /// Why the command line says that memory is hidden, if it does.
    pub confidential: Option<String>,
    /// The map is asked for all the same.
    #[serde(default)]
    pub accept_ciphertext: bool,
    /// libvirt has the monitor, and passes commands on.
    #[serde(default)]
    pub through: Option<LibvirtDomain>,
    /// Others need the monitor too: it is given back after each question.
    #[serde(default)]
    pub shared: bool,
    /// Where sockets are reached that cannot be reached by their paths; see [`Whom::foreign`].
    #[serde(skip)]
    pub reach: Vec<(PathBuf, PathBuf)>,
}

impl Whom {
    /// The sockets that lie in what another process sees as its file system. Only who may trace that
    /// process gets there: whoever may not is given their directories.
    pub fn foreign(&self) -> Vec<PathBuf> {
        let libvirt = self.through.iter().map(|domain| PathBuf::from(&domain.socket));
        let all = self.sockets.iter().cloned().chain(libvirt);
        all.filter(|path| path.starts_with("/proc")).take(MAX_FOREIGN).collect()
    }

    fn reach<'a>(&'a self, path: &'a Path) -> &'a Path {
        let mut known = self.reach.iter().filter(|(its, _)| its == path);
        known.next().map_or(path, |(_, reach)| reach.as_path())
    }
}

/// Why QEMU could not be asked. Goes from process to process: the causes are in the texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum AskError {
    /// No monitor can be used.
    #[error("{0}")]
    Monitor(String),
    /// QEMU does not answer as it should.
    #[error("QEMU cannot be asked: {0}")]
    Query(String),
    /// QEMU's answers are not understood or contradict each other.
    #[error("QEMU's map cannot be used: {0}")]
    Map(String),
}

/// What QEMU says of the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFacts {
    /// QEMU's version and package.
    pub qemu_version: String,
    /// The first two numbers of its version.
    pub qemu: (u32, u32),
    /// The machine type.
    pub machine: String,
    /// The VM's name, when QEMU has one.
    pub name: Option<String>,
    /// The VM's UUID, when it has one.
    pub uuid: Option<String>,
    /// QEMU's target: `x86_64`.
    pub arch: String,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The run state.
    pub run_state: String,
    /// The monitor's path.
    pub monitor: String,
}

/// Everything that is asked before anything is decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The VM.
    pub vm: VmFacts,
    /// Monitors that were passed over, each with its reason.
    pub skipped: Vec<String>,
    /// Why the guest's memory is hidden from the host, if it is; the map is not asked for then.
    pub confidential: Option<String>,
    /// A migration under way, in QEMU's word for its status.
    pub migration: Option<String>,
    /// Emulated watchdogs, by QEMU's names of their types.
    pub watchdogs: Vec<String>,
    /// QEMU can take background snapshots; the capability is set or, as it should be, not.
    pub snapshots: Option<bool>,
    /// Block jobs under way.
    pub block_jobs: Vec<String>,
    /// The balloon.
    pub balloon: amount::Asked,
    /// Memory that lies under something else.
    pub hidden: Result<Vec<Hidden>, String>,
    /// The memory map.
    pub view: Option<GuestView>,
}

impl Asked {
    /// What the operator should know of how it was asked.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        self.skipped.iter().map(|text| format!("monitor skipped: {text}"))
    }
}

/// What is asked once more after the last read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskedAgain {
    /// The memory map.
    pub view: GuestView,
    /// The balloon.
    pub balloon: amount::Asked,
    /// The run state.
    pub run_state: String,
    /// What QEMU told unasked since the monitor was opened.
    pub events: Vec<Told>,
    /// How often the monitor was opened anew: what QEMU told meanwhile nobody heard.
    #[serde(default)]
    pub reopened: u32,
}

/// An event of QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Its name.
    pub name: String,
    /// Its data.
    pub data: Value,
    /// When, in microseconds of UTC by QEMU's clock, which is the host's; absent when QEMU could not
    /// read it.
    pub utc_us: Option<i64>,
}

/// A monitor of a VM, and nobody else's.
#[derive(Debug)]
pub struct Monitor {
    qmp: Qmp,
    skipped: Vec<String>,
    /// Events taken out of the connection and not yet handed on.
    events: Vec<Told>,
}

impl Monitor {
    /// Connects to the first monitor that greets; every command sent on it goes into `notes`.
    ///
    /// # Errors
    /// [`AskError::Monitor`], within 5 seconds unless the VM has more than four monitors.
    pub fn open(whom: &Whom, notes: &Notes) -> Result<Self, AskError> {
        Self::open_within(whom, one_of(whom.sockets.len()), notes)
    }

    /// The same for a guest that may stand meanwhile: where there are several, the next one is tried after a second.
    ///
    /// # Errors
    /// As [`Monitor::open`].
    pub fn open_at_once(whom: &Whom, notes: &Notes) -> Result<Self, AskError> {
        Self::open_within(whom, ONE_OF_MANY, notes)
    }

    fn open_within(whom: &Whom, wait: Duration, notes: &Notes) -> Result<Self, AskError> {
        if let Some(domain) = &whom.through {
            return through(whom, domain, notes).map_err(AskError::Monitor);
        }
        match whom.sockets.as_slice() {
            [] => {
                return Err(AskError::Monitor(format!(
                    "{:?} (PID {}) has no QMP socket on its command line, and the map must come \
                     from QEMU",
                    whom.name, whom.pid
                )));
            }
            [path] => {
                let cannot = |error: String| {
                    AskError::Monitor(format!("the monitor cannot be used: {error}"))
                };
                let qmp = connect(whom, path, ONLY_ONE, notes).map_err(|e| cannot(told(&e)))?;
                return identified(qmp, whom.pid).map_err(AskError::Monitor);
            }
            _ => {}
        }
        let mut tried = Vec::new();
        for path in &whom.sockets {
            let found = connect(whom, path, wait, notes)
                .map_err(|error| told(&error))
                .and_then(|qmp| identified(qmp, whom.pid));
            match found {
                Ok(monitor) => return Ok(Self { skipped: tried, ..monitor }),
                Err(error) => tried.push(error),
            }
        }
        Err(AskError::Monitor(format!("no monitor of the VM answers: {}", tried.join("; "))))
    }

    fn facts(&mut self) -> Facts<'_> {
        Facts::of(&mut self.qmp, QUERY)
    }

    /// Asks for everything, the map last. Queries only.
    ///
    /// # Errors
    /// [`AskError`].
    pub fn look(&mut self, whom: &Whom) -> Result<Asked, AskError> {
        let query = |error: QmpError| AskError::Query(told(&error));
        let (vm, confidential, migration) = self.ask(whom).map_err(query)?;
        let confidential = confidential.or_else(|| whom.confidential.clone());
        let watchdogs = self.facts().watchdogs().map_err(query)?;
        let capabilities = self.facts().migration_capabilities().map_err(query)?;
        let mut of_snapshots = capabilities.iter().filter(|one| one.capability == SNAPSHOT);
        let snapshots = of_snapshots.next().map(|one| one.state);
        let block_jobs = self.facts().block_jobs().map_err(query)?;
        let balloon = self.balloon();
        let asked_for = confidential.is_none() || whom.accept_ciphertext;
        let view = if asked_for { Some(self.view()?) } else { None };
        let hidden =
            view.as_ref().map_or_else(|| Err("no map".to_owned()), |view| self.hidden(view));
        let skipped = std::mem::take(&mut self.skipped);
        Ok(Asked {
            vm,
            skipped,
            confidential,
            migration,
            watchdogs,
            snapshots,
            block_jobs,
            balloon,
            hidden,
            view,
        })
    }

    /// Asks once more, after the last read. Queries only.
    ///
    /// # Errors
    /// [`AskError`].
    pub fn again(&mut self) -> Result<AskedAgain, AskError> {
        let view = self.view()?;
        let balloon = self.balloon();
        let run_state = self.run_state()?;
        self.take_events();
        let (events, reopened) = (std::mem::take(&mut self.events), self.qmp.reconnects());
        Ok(AskedAgain { view, balloon, run_state, events, reopened })
    }

    /// What the graph has and the flat view does not show. That it is not known stands in nobody's way.
    fn hidden(&mut self, view: &GuestView) -> Result<Vec<Hidden>, String> {
        let graph = self.graph()?;
        let compared = graph.against(&view.mtree)?;
        match compared.difference {
            // The guest has changed its machine meanwhile, as firmware does.
            Some(difference) => Err(difference),
            None => Ok(compared.hidden),
        }
    }

    /// QEMU's graph, or why it is not to be had.
    fn graph(&mut self) -> Result<Graph, String> {
        let graph = Graph::take(&mut self.qmp, QUERY).map_err(|error| told(&error))?;
        graph.map_err(|error| told(&error))
    }

    /// The balloon. That QEMU does not tell stands in nobody's way.
    fn balloon(&mut self) -> amount::Asked {
        qemu::balloon::take(&mut self.facts()).map_err(|error| told(&error))
    }

    fn view(&mut self) -> Result<GuestView, AskError> {
        GuestView::take(&mut self.qmp, QUERY).map_err(|error| AskError::Map(told(&error)))
    }

    /// What is shown of memory beyond the map, which is taken again until it stands on both sides of the rest.
    /// Queries only. What QEMU does not answer is told where it would stand.
    ///
    /// # Errors
    /// [`AskError::Map`].
    pub(crate) fn chart(&mut self, mut view: GuestView) -> Result<(GuestView, More), AskError> {
        for _ in 0..CHARTS {
            let graph = self.graph();
            let mut facts = self.facts();
            let arithmetic = qemu::arithmetic::ram(&mut facts, &view.devices).map_err(|e| told(&e));
            let backend = facts.memory_backend().map_err(|error| told(&error));
            let balloon = self.balloon();
            let again = self.view()?;
            if view.same_memory(&again) {
                return Ok((view, More { graph, arithmetic, backend, balloon }));
            }
            view = again;
        }
        let why = "the guest changes its map faster than it can be looked at".to_owned();
        let (graph, arithmetic) = (Err(why.clone()), Err(why.clone()));
        Ok((view, More { graph, arithmetic, backend: Err(why.clone()), balloon: Err(why) }))
    }

    /// The run state.
    ///
    /// # Errors
    /// [`AskError::Query`].
    pub fn run_state(&mut self) -> Result<String, AskError> {
        let status = self.facts().status().map_err(|error| AskError::Query(told(&error)))?;
        Ok(status.status)
    }

    /// What the block devices have done so far.
    ///
    /// # Errors
    /// [`AskError::Query`].
    pub fn block_times(&mut self) -> Result<Vec<BlockTimes>, AskError> {
        self.facts().block_times().map_err(|error| AskError::Query(told(&error)))
    }

    /// Stops the guest, or lets it go on.
    ///
    /// # Errors
    /// [`AskError::Query`]; after a timeout QEMU may still do it.
    pub fn change(&mut self, change: &Change, within: Duration) -> Result<(), AskError> {
        self.qmp.change(change, within).map_err(|error| AskError::Query(told(&error)))
    }

    /// As [`Monitor::change`]; a refusal is no error, and has changed nothing: why.
    ///
    /// # Errors
    /// [`AskError::Query`]: QEMU may do it.
    pub fn change_unless_refused(
        &mut self,
        change: &Change,
        within: Duration,
    ) -> Result<Option<String>, AskError> {
        match self.qmp.change(change, within) {
            Ok(()) => Ok(None),
            Err(error @ QmpError::Refused { .. }) => Ok(Some(told(&error))),
            Err(error) => Err(AskError::Query(told(&error))),
        }
    }

    /// As [`Monitor::migration`], asked many times a second: it waits no longer than `within`, and
    /// stands in no journal. `None`: QEMU has not answered yet.
    ///
    /// # Errors
    /// [`AskError::Query`].
    pub fn migration_soon(&mut self, within: Duration) -> Result<Option<Migration>, AskError> {
        self.qmp.tell(false);
        let answer = Facts::of(&mut self.qmp, within).migration();
        self.qmp.tell(true);
        match answer {
            Ok(migration) => Ok(Some(migration)),
            Err(QmpError::Timeout { .. }) => Ok(None),
            Err(error) => Err(AskError::Query(told(&error))),
        }
    }

    /// Gives QEMU a copy of `fd` under `name`.
    ///
    /// # Errors
    /// [`AskError::Query`].
    pub fn pass(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), AskError> {
        self.qmp.pass(name, fd, QUERY).map_err(|error| AskError::Query(told(&error)))
    }

    /// As [`Monitor::change`], done so often that it stands in no journal by itself.
    ///
    /// # Errors
    /// As [`Monitor::change`].
    pub fn change_untold(&mut self, change: &Change, within: Duration) -> Result<(), AskError> {
        self.qmp.tell(false);
        let done = self.change(change, within);
        self.qmp.tell(true);
        done
    }

    /// What QEMU says of its last migration or snapshot.
    ///
    /// # Errors
    /// [`AskError::Query`].
    pub fn migration(&mut self) -> Result<Migration, AskError> {
        self.facts().migration().map_err(|error| AskError::Query(told(&error)))
    }

    /// What QEMU says of its last dump. Asked many times a second, it stands in no journal.
    ///
    /// # Errors
    /// [`AskError::Query`].
    pub fn dump(&mut self) -> Result<Dump, AskError> {
        self.qmp.tell(false);
        let dump = self.facts().dump();
        self.qmp.tell(true);
        dump.map_err(|error| AskError::Query(told(&error)))
    }

    /// Which of QEMU's settings of migration are set, and its parameters.
    ///
    /// # Errors
    /// [`AskError::Query`].
    pub fn migration_settings(&mut self) -> Result<(Vec<Capability>, Value), AskError> {
        let mut facts = self.facts();
        let ask = |error: QmpError| AskError::Query(told(&error));
        let capabilities = facts.migration_capabilities().map_err(ask)?;
        Ok((capabilities, facts.migration_parameters().map_err(ask)?))
    }

    /// How many events QEMU has told until now.
    pub fn told_so_far(&mut self) -> usize {
        self.take_events();
        self.events.len()
    }

    /// The events behind the first `from`.
    pub fn told_since(&mut self, from: usize) -> &[Told] {
        self.take_events();
        self.events.get(from..).unwrap_or_default()
    }

    /// Whether QEMU told of one of these events since the last call of this or of
    /// [`Monitor::again`].
    pub fn heard(&mut self, names: &[&str]) -> bool {
        let from = self.events.len();
        self.take_events();
        self.events.iter().skip(from).any(|event| names.contains(&event.name.as_str()))
    }

    fn take_events(&mut self) {
        let events = self.qmp.take_events().into_iter();
        self.events.extend(events.map(|event| {
            let known = event.seconds >= 0;
            let utc_us = event.seconds.saturating_mul(1_000_000).saturating_add(event.microseconds);
            Told { name: event.name, data: event.data, utc_us: known.then_some(utc_us) }
        }));
    }

    fn ask(&mut self, whom: &Whom) -> Result<(VmFacts, Option<String>, Option<String>), QmpError> {
        let path = self.qmp.path().display();
        let monitor = match self.qmp.domain() {
            Some(domain) => format!("{path} (libvirt's domain {:?})", domain.name),
            None => path.to_string(),
        };
        let mut facts = self.facts();
        let version = facts.version()?;
        let number = version.qemu;
        let kvm = facts.kvm()?.enabled;
        let nil = "00000000-0000-0000-0000-000000000000";
        let vm = VmFacts {
            qemu_version: format!(
                "{}.{}.{} {}",
                number.major, number.minor, number.micro, version.package
            )
            .trim_end()
            .to_owned(),
            qemu: (number.major, number.minor),
            machine: facts.machine_type()?,
            name: facts.name()?,
            uuid: Some(facts.uuid()?).filter(|uuid| uuid != nil),
            arch: facts.arch()?,
            cpus: u32::try_from(facts.cpus()?).unwrap_or(u32::MAX),
            accelerator: if kvm { "kvm".to_owned() } else { whom.accelerator.clone() },
            run_state: facts.status()?.status,
            monitor,
        };
        let migration = facts.migration()?;
        let migration = migration.status.clone().filter(|_| migration.is_under_way());
        Ok((vm, facts.confidential()?, migration))
    }
}

/// How long one of so many monitors may take to greet. QEMU does so in its main loop, which a busy host
/// or a slow disk can hold up.
fn one_of(monitors: usize) -> Duration {
    let monitors = u32::try_from(monitors).unwrap_or(u32::MAX);
    ONLY_ONE.checked_div(monitors).unwrap_or_default().max(ONE_OF_MANY)
}

/// The kernel says who listens on the socket; a name in a command line proves nothing.
fn identified(qmp: Qmp, pid: u32) -> Result<Monitor, String> {
    let peer = qmp.peer().map_err(|error| told(&error))?.and_then(|peer| peer.pid);
    if peer == Some(pid) {
        return Ok(Monitor { qmp, skipped: Vec::new(), events: Vec::new() });
    }
    let peer = peer.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
    let path = qmp.path().display();
    Err(format!("{path} is served by process {peer}, not by the VM's process {pid}"))
}

/// The monitor of a domain, through libvirt. Whose it is, libvirt says, and QEMU must agree: the kernel
/// shows only libvirt.
fn through(whom: &Whom, known: &LibvirtDomain, notes: &Notes) -> Result<Monitor, String> {
    let (libvirt, domain) = known.connect(whom.reach(Path::new(&known.socket)), ONLY_ONE)?;
    let place = format!("libvirt's {}", known.socket);
    let fail = |error: &dyn std::error::Error| format!("{place}: {}", told(error));
    let mut qmp = Qmp::through(libvirt, &known.uri, domain, ONLY_ONE, Some(transcript(notes)))
        .map_err(|e| fail(&e))?;
    let uuid = Facts::of(&mut qmp, QUERY).uuid().map_err(|e| fail(&e))?;
    if !uuid.eq_ignore_ascii_case(&known.uuid) {
        return Err(format!("{place}: QEMU's UUID is {uuid}, libvirt's {}", known.uuid));
    }
    Ok(Monitor { qmp, skipped: Vec::new(), events: Vec::new() })
}

fn connect(whom: &Whom, path: &Path, wait: Duration, notes: &Notes) -> Result<Qmp, QmpError> {
    Qmp::connect_with(path, whom.reach(path), wait, Some(transcript(notes)))
}

/// Writes every command into the journal.
fn transcript(notes: &Notes) -> qemu::qmp::Transcript {
    let notes = notes.clone();
    Box::new(move |exchange: &Exchange<'_>| {
        let took = exchange.finished.saturating_duration_since(exchange.started);
        let mut line = json!({
            "command": exchange.command,
            "arguments": exchange.arguments,
            "outcome": exchange.outcome.word(),
            "took_ns": u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
        });
        if let (Some(error), Some(object)) = (exchange.error, line.as_object_mut()) {
            object.insert("error".to_owned(), error.to_string().into());
        }
        notes.add("qmp", line);
    })
}
