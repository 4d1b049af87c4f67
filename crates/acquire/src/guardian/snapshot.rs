//! QEMU's background snapshot, as the guardian conducts it: settings taken over and brought back,
//! the stop and its end heard, the stream broken when nobody reads it.
//!
//! QEMU (`migration.c`, `bg_migration_thread`) stops the guest, keeps the devices' state, protects
//! all RAM from writing, lets the guest go on, and sends RAM from then on. What fails before the
//! guest goes on leaves it stopped: QEMU does not undo its own stop.

use super::{announce, go_on, is_stopped};
use crate::monitor::{AskError, Monitor, SNAPSHOT};
use crate::stall::Watch;
use crate::undo::{Line, Undo};
use qemu::facts::Migration;
use qemu::qmp::{Capability, Change};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// What QEMU knows our descriptor by.
const FD: &str = "stillframe-snapshot";

/// What it is tried out by.
const PROBE: &str = "stillframe-probe";

/// How long QEMU may take to do what it is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long QEMU may take to end a snapshot whose stream is whole: the guest runs, and on a host that
/// swaps it was seen to take more than ten seconds.
pub(super) const ENDS: Duration = Duration::from_secs(20);

/// How long a guest that was stopped for a snapshot may take to go on by itself, once that has ended.
const GOES_ON: Duration = Duration::from_millis(50);

/// How often it is looked whether the stream is read.
pub(super) const LOOK: Duration = Duration::from_millis(5);

/// How often QEMU is asked how far it is.
const ASK: Duration = Duration::from_millis(50);

/// The same on a monitor that others need too.
const ASK_SHARED: Duration = Duration::from_secs(1);

/// How long it may take to answer: its main loop may wait for a page that is protected, just when the
/// stream is to be looked after.
const ANSWER: Duration = Duration::from_millis(50);

/// Stops that are kept, the last ones.
const TOLD: usize = 256;

/// A snapshot that is over. QEMU's capabilities of migration are what they were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShotEnd {
    /// What QEMU says of it.
    pub migration: Migration,
    /// When the guest was stopped and let go on, by QEMU for the snapshot or by others.
    pub told: Stops,
    /// The guardian broke the stream: why.
    pub broken: Option<String>,
    /// Parameters of migration, which a snapshot leaves alone, are others than before.
    pub parameters_differ: bool,
    /// The run state in the end.
    pub run_state: String,
}

/// QEMU's events STOP and RESUME, in microseconds of UTC by the host's clock, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stops {
    /// STOP.
    pub stops_us: Vec<i64>,
    /// RESUME.
    pub resumes_us: Vec<i64>,
}

impl Stops {
    /// Both with what was told later.
    fn and(&self, later: &Self) -> Self {
        let join = |before: &[i64], later: &[i64]| {
            let all = [before, later].concat();
            all.get(all.len().saturating_sub(TOLD)..).unwrap_or_default().to_vec()
        };
        Self {
            stops_us: join(&self.stops_us, &later.stops_us),
            resumes_us: join(&self.resumes_us, &later.resumes_us),
        }
    }
}

/// A snapshot under way.
#[derive(Debug)]
pub(super) struct Shot {
    watch: Watch,
    budget: Duration,
    found: Vec<Capability>,
    parameters: Value,
    until_ns: u64,
    /// Events of this connection before it.
    events: usize,
    /// What connections that were lost told.
    earlier: Stops,
    told: Stops,
    /// How often the guest was let go on before QEMU can have stopped it for the snapshot.
    resumes_before: usize,
    /// As in [`Line::Snapshot`].
    let_be: bool,
    asked: Instant,
    broken: Option<String>,
    end: Option<ShotEnd>,
}

/// The settings that a snapshot needs: itself, and nothing that it does not go with. `events` alone
/// goes with everything.
fn wanted(found: &[Capability]) -> Vec<Capability> {
    let wanted = found.iter().filter_map(|one| {
        let state = match one.capability.as_str() {
            SNAPSHOT => true,
            "events" => one.state,
            _ => false,
        };
        (state != one.state).then(|| Capability { capability: one.capability.clone(), state })
    });
    wanted.collect()
}

/// Those of `found` that are otherwise in `now`.
fn changed(found: &[Capability], now: &[Capability]) -> Vec<Capability> {
    let same = |one: &&Capability| !now.iter().any(|now| now == *one);
    found.iter().filter(same).cloned().collect()
}

impl Shot {
    /// Has QEMU begin: `theirs` is its end of the socket, `watch` looks at the other. Nothing is
    /// changed before it is known that QEMU takes descriptors.
    ///
    /// # Errors
    /// [`AskError`]: QEMU's settings are as before, or are announced in `undo`.
    pub(super) fn begin(
        monitor: &mut Monitor,
        undo: &mut Undo,
        theirs: &OwnedFd,
        watch: Watch,
        budget: Duration,
        until_ns: u64,
    ) -> Result<Self, AskError> {
        let state = monitor.run_state()?;
        if state != "running" {
            return Err(AskError::Query(format!("the VM is {state:?}, not running")));
        }
        if monitor.migration()?.is_under_way() {
            return Err(AskError::Query("a migration is under way".to_owned()));
        }
        let (found, parameters) = monitor.migration_settings()?;
        let line = |begun| Line::Snapshot { found: found.clone(), begun, let_be: false, until_ns };
        announce(undo, &line(false))?;
        let (mut begun, mut events) = (false, 0);
        let started = start(monitor, theirs, &found, |monitor| {
            events = monitor.told_so_far();
            begun = true;
            announce(undo, &line(true))
        });
        let why = match started {
            Ok(None) => None,
            // Refused: whatever QEMU is busy with now is not ours.
            Ok(Some(why)) => {
                begun = false;
                Some(AskError::Query(why))
            }
            Err(error) => Some(error),
        };
        if let Some(error) = why {
            put_back(monitor, &found, begun, false)?;
            announce(undo, &Line::Free)?;
            return Err(error);
        }
        Ok(Self {
            watch,
            budget,
            found,
            parameters,
            until_ns,
            events,
            earlier: Stops::default(),
            told: Stops::default(),
            resumes_before: 0,
            let_be: false,
            asked: Instant::now(),
            broken: None,
            end: None,
        })
    }

    /// It is over, and nothing more is to be looked at.
    pub(super) fn is_over(&self) -> bool {
        self.end.is_some()
    }

    /// QEMU has told that it stopped the guest, and let it go on.
    pub(super) fn has_let_go(&self) -> bool {
        !self.told.stops_us.is_empty() && self.told.resumes_us.len() > self.resumes_before
    }

    /// Something is to be asked: how far QEMU is, once a second where others need the monitor too.
    pub(super) fn is_due(&self) -> bool {
        let every = if self.has_let_go() { ASK_SHARED } else { ASK };
        self.broken.is_some() || self.watch.is_hung_up() || self.asked.elapsed() >= every
    }

    /// Breaks the stream if it is not read. Asks QEMU nothing.
    pub(super) fn watch(&mut self) {
        let stalled = self.watch.look().unwrap_or(Duration::MAX);
        if stalled > self.budget && self.broken.is_none() {
            self.broken = Some(format!("was not read for {} ms", stalled.as_millis()));
            self.cut();
        }
    }

    /// The connection to QEMU is a new one, which tells nothing of what was.
    pub(super) fn reconnected(&mut self) {
        self.earlier = self.told.clone();
        self.events = 0;
    }

    /// Looks after it: ends it once it is broken, and puts QEMU's settings back once it is over.
    ///
    /// # Errors
    /// [`AskError`]: nothing is known then.
    pub(super) fn tick(&mut self, monitor: &mut Monitor, undo: &mut Undo) -> Result<(), AskError> {
        if self.is_over() {
            return Ok(());
        }
        if self.broken.is_some() {
            return self.stop(monitor, undo, None);
        }
        // QEMU lets go of the stream when it has ended: others may migrate from then on.
        if self.asked.elapsed() < ASK && !self.watch.is_hung_up() {
            return Ok(());
        }
        let Some(migration) = monitor.migration_soon(ANSWER)? else { return Ok(()) };
        self.asked = Instant::now();
        let in_setup = migration.status.as_deref() == Some("setup");
        self.hear(monitor, undo, in_setup)?;
        if in_setup && self.let_be {
            let why = "the VM was stopped by somebody else just before".to_owned();
            return self.stop(monitor, undo, Some(why));
        }
        if migration.is_under_way() { Ok(()) } else { self.over(monitor, undo, migration) }
    }

    /// Ends it, done or not.
    ///
    /// # Errors
    /// [`AskError`]
    pub(super) fn stop(
        &mut self,
        monitor: &mut Monitor,
        undo: &mut Undo,
        why: Option<String>,
    ) -> Result<(), AskError> {
        self.broken = self.broken.take().or(why);
        self.cut();
        let migration = cancel(monitor)?;
        self.hear(monitor, undo, false)?;
        self.over(monitor, undo, migration)
    }

    /// Waits until QEMU has ended it by itself.
    ///
    /// # Errors
    /// [`AskError`], also when it takes too long.
    pub(super) fn finish(
        &mut self,
        monitor: &mut Monitor,
        undo: &mut Undo,
    ) -> Result<(), AskError> {
        let until = Instant::now() + ENDS;
        while !self.is_over() {
            if Instant::now() > until {
                return self.stop(monitor, undo, Some("QEMU did not end it".to_owned()));
            }
            std::thread::sleep(LOOK);
            self.watch();
            self.tick(monitor, undo)?;
        }
        Ok(())
    }

    /// Breaks the stream.
    pub(super) fn cut(&self) {
        self.watch.cut();
    }

    /// What came of it.
    pub(super) fn end(&self) -> Option<&ShotEnd> {
        self.end.as_ref()
    }

    /// Takes note of stops and of their ends. While QEMU is `in_setup`, others made them.
    fn hear(
        &mut self,
        monitor: &mut Monitor,
        undo: &mut Undo,
        in_setup: bool,
    ) -> Result<(), AskError> {
        let told = monitor.told_since(self.events);
        let all = |name: &str| -> Vec<i64> {
            let named = told.iter().filter(|event| event.name == name);
            named.filter_map(|event| event.utc_us).collect()
        };
        let now = Stops { stops_us: all("STOP"), resumes_us: all("RESUME") };
        self.told = self.earlier.and(&now);
        let (stops, resumes) = (self.told.stops_us.len(), self.told.resumes_us.len());
        let let_be = if in_setup {
            self.resumes_before = resumes;
            stops > resumes
        } else {
            resumes > self.resumes_before
        };
        if let_be && !self.let_be {
            // A guest that is found stopped from now on was stopped by somebody else.
            self.let_be = true;
            let (found, until_ns) = (self.found.clone(), self.until_ns);
            announce(undo, &Line::Snapshot { found, begun: true, let_be, until_ns })?;
        }
        Ok(())
    }

    fn over(
        &mut self,
        monitor: &mut Monitor,
        undo: &mut Undo,
        migration: Migration,
    ) -> Result<(), AskError> {
        put_back(monitor, &self.found, true, self.let_be)?;
        self.hear(monitor, undo, false)?;
        let (_, parameters) = monitor.migration_settings()?;
        let run_state = monitor.run_state()?;
        announce(undo, &Line::Free)?;
        self.end = Some(ShotEnd {
            migration,
            told: self.told.clone(),
            broken: self.broken.take(),
            parameters_differ: parameters != self.parameters,
            run_state,
        });
        Ok(())
    }
}

/// Tries out whether QEMU takes descriptors, sets what a snapshot needs, and begins it; `before` is
/// called just before that. Gives back why QEMU refused, if it did.
fn start(
    monitor: &mut Monitor,
    theirs: &OwnedFd,
    found: &[Capability],
    before: impl FnOnce(&mut Monitor) -> Result<(), AskError>,
) -> Result<Option<String>, AskError> {
    monitor.pass(PROBE, theirs.as_fd())?;
    monitor.change(&Change::CloseFd(PROBE.to_owned()), PATIENCE)?;
    let capabilities = Change::SetCapabilities(wanted(found));
    if let Some(why) = monitor.change_unless_refused(&capabilities, PATIENCE)? {
        return Ok(Some(why));
    }
    monitor.pass(FD, theirs.as_fd())?;
    before(monitor)?;
    monitor.change_unless_refused(&Change::MigrateToFd(FD.to_owned()), PATIENCE)
}

/// Waits until QEMU is not busy with a snapshot any more; tells it to end it.
fn cancel(monitor: &mut Monitor) -> Result<Migration, AskError> {
    let until = Instant::now() + PATIENCE;
    loop {
        let migration = monitor.migration()?;
        if !migration.is_under_way() {
            return Ok(migration);
        }
        if Instant::now() > until {
            let status = migration.status.unwrap_or_default();
            return Err(AskError::Query(format!("QEMU's snapshot does not end: it is {status:?}")));
        }
        if migration.status.as_deref() != Some("cancelling") {
            monitor.change(&Change::MigrateCancel, PATIENCE)?;
        }
        std::thread::sleep(LOOK);
    }
}

/// Ends what is left of a snapshot: a guest that QEMU stopped for it, and did not let go on, goes on,
/// and QEMU's settings are `found` again. `begun` and `let_be` are those of [`Line::Snapshot`]. Gives
/// back what was done, for people.
///
/// # Errors
/// [`AskError`]: to be tried again.
pub(super) fn put_back(
    monitor: &mut Monitor,
    found: &[Capability],
    begun: bool,
    let_be: bool,
) -> Result<String, AskError> {
    // What was not begun is not ours to cancel.
    let migration = if begun { cancel(monitor)? } else { monitor.migration()? };
    let status = migration.status.unwrap_or_else(|| "none".to_owned());
    let mut text = match begun {
        true => format!("a snapshot ended as {status:?}"),
        false => "a snapshot was not begun".to_owned(),
    };
    // The guest before the settings.
    if begun && !let_be && status != "completed" && goes_on(monitor)? {
        text.push_str("; the guest, which it had stopped, was told to go on");
    }
    for name in [FD, PROBE] {
        // Used up by the snapshot, or closed already.
        let _ = monitor.change(&Change::CloseFd(name.to_owned()), PATIENCE);
    }
    let (now, _) = monitor.migration_settings()?;
    let changed = changed(found, &now);
    if !changed.is_empty() {
        monitor.change(&Change::SetCapabilities(changed), PATIENCE)?;
    }
    let (now, _) = monitor.migration_settings()?;
    if now != found {
        return Err(AskError::Query("QEMU's settings of migration do not come back".to_owned()));
    }
    text.push_str("; QEMU's settings are as they were");
    Ok(text)
}

/// Lets a guest go on that does not do so by itself; says whether that was needed.
fn goes_on(monitor: &mut Monitor) -> Result<bool, AskError> {
    let until = Instant::now() + GOES_ON;
    while is_stopped(&monitor.run_state()?) {
        if Instant::now() > until {
            return go_on(monitor).map(|_| true);
        }
        std::thread::sleep(LOOK);
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_go_with_a_snapshot_is_off_meanwhile() {
        let one = |name: &str, state| Capability { capability: name.to_owned(), state };
        let found =
            [one("xbzrle", true), one("events", true), one(SNAPSHOT, false), one("multifd", false)];
        let wanted = wanted(&found);
        assert_eq!(wanted, [one("xbzrle", false), one(SNAPSHOT, true)]);
        let mut now = found.to_vec();
        now[0].state = false;
        now[2].state = true;
        assert_eq!(changed(&found, &now), [one("xbzrle", true), one(SNAPSHOT, false)]);
        assert!(changed(&found, &found).is_empty());
    }

    #[test]
    fn of_stops_the_last_are_kept() {
        let many =
            |from: i64| Stops { stops_us: (from..from + 200).collect(), resumes_us: vec![from] };
        let all = many(0).and(&many(200));
        assert_eq!((all.stops_us.len(), all.stops_us.last()), (TOLD, Some(&399)));
        assert_eq!(all.resumes_us, [0, 200]);
    }
}
