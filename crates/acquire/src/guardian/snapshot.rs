//! QEMU's background snapshot, as the guardian conducts it: settings taken over and brought back,
//! the stop and its end heard, the stream broken when nobody reads it.
//!
//! QEMU (`migration.c`, `bg_migration_thread`) stops the guest, keeps the devices' state, protects
//! all RAM from writing, lets the guest go on, and sends RAM from then on. What fails before the
//! guest goes on leaves it stopped: QEMU does not undo its own stop.

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

/// How long a guest that was stopped for a snapshot may take to go on by itself, once that has ended.
const GOES_ON: Duration = Duration::from_millis(300);

/// How often it is looked whether the stream is read.
pub(super) const LOOK: Duration = Duration::from_millis(5);

/// Stops that are kept.
const TOLD: usize = 256;

/// How often QEMU is asked how far it is.
const ASK: Duration = Duration::from_millis(50);

/// A snapshot that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShotEnd {
    /// What QEMU says of it.
    pub migration: Migration,
    /// When the guest was stopped, by QEMU for the snapshot or by others, in microseconds of UTC by the
    /// host's clock, in order.
    pub stops_us: Vec<i64>,
    /// When it was let go on.
    pub resumes_us: Vec<i64>,
    /// The guardian broke the stream: why.
    pub broken: Option<String>,
    /// QEMU's settings are what they were; else what is not.
    pub not_restored: Option<String>,
    /// The run state in the end.
    pub run_state: String,
}

/// A snapshot under way.
#[derive(Debug)]
pub(super) struct Shot {
    watch: Watch,
    budget: Duration,
    found: Vec<Capability>,
    parameters: Value,
    /// Events before it.
    events: usize,
    stops_us: Vec<i64>,
    resumes_us: Vec<i64>,
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
        monitor.pass(PROBE, theirs.as_fd())?;
        monitor.change(&Change::CloseFd(PROBE.to_owned()), PATIENCE)?;
        let (found, parameters) = monitor.migration_settings()?;
        let line = Line::Snapshot { found: found.clone(), resumed: false, until_ns };
        announce(undo, &line)?;
        let begun = start(monitor, theirs, &found);
        let events = match begun {
            Ok(events) => events,
            Err(error) => {
                put_back(monitor, &found, false)?;
                announce(undo, &Line::Free)?;
                return Err(error);
            }
        };
        Ok(Self {
            watch,
            budget,
            found,
            parameters,
            events,
            stops_us: Vec::new(),
            resumes_us: Vec::new(),
            asked: Instant::now(),
            broken: None,
            end: None,
        })
    }

    /// It is over, and nothing more is to be looked at.
    pub(super) fn is_over(&self) -> bool {
        self.end.is_some()
    }

    /// Looks after it: breaks the stream if it is not read, and puts QEMU's settings back once it is
    /// over.
    ///
    /// # Errors
    /// [`AskError`]: nothing is known then.
    pub(super) fn tick(&mut self, monitor: &mut Monitor, undo: &mut Undo) -> Result<(), AskError> {
        if self.is_over() {
            return Ok(());
        }
        let stalled = self.watch.look().unwrap_or(Duration::MAX);
        if stalled > self.budget {
            return self.stop(monitor, undo, Some(format!("was not read for {stalled:?}")));
        }
        if self.asked.elapsed() < ASK {
            return Ok(());
        }
        let migration = monitor.migration()?;
        self.asked = Instant::now();
        self.hear(monitor, undo)?;
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
        self.hear(monitor, undo)?;
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
        let until = Instant::now() + PATIENCE;
        while !self.is_over() {
            if Instant::now() > until {
                return self.stop(monitor, undo, Some("QEMU did not end it".to_owned()));
            }
            std::thread::sleep(LOOK);
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

    /// Takes note of stops and of their ends.
    fn hear(&mut self, monitor: &mut Monitor, undo: &mut Undo) -> Result<(), AskError> {
        let told = monitor.told_since(self.events);
        let all = |name: &str| -> Vec<i64> {
            let named = told.iter().filter(|event| event.name == name);
            named.filter_map(|event| event.utc_us).take(TOLD).collect()
        };
        let (stops_us, resumes_us) = (all("STOP"), all("RESUME"));
        let news = self.resumes_us.is_empty() && !resumes_us.is_empty();
        (self.stops_us, self.resumes_us) = (stops_us, resumes_us);
        if news {
            // A guest that is found stopped from now on was stopped by somebody else.
            let found = self.found.clone();
            announce(undo, &Line::Snapshot { found, resumed: true, until_ns: 0 })?;
        }
        Ok(())
    }

    fn over(
        &mut self,
        monitor: &mut Monitor,
        undo: &mut Undo,
        migration: Migration,
    ) -> Result<(), AskError> {
        put_back(monitor, &self.found, !self.resumes_us.is_empty())?;
        self.hear(monitor, undo)?;
        let (_, parameters) = monitor.migration_settings()?;
        // Capabilities were looked at when they were put back.
        let not_restored = (parameters != self.parameters)
            .then(|| "QEMU's parameters of migration are not those from before".to_owned());
        let run_state = monitor.run_state()?;
        announce(undo, &Line::Free)?;
        self.end = Some(ShotEnd {
            migration,
            stops_us: self.stops_us.clone(),
            resumes_us: self.resumes_us.clone(),
            broken: self.broken.take(),
            not_restored,
            run_state,
        });
        Ok(())
    }
}

fn announce(undo: &mut Undo, line: &Line) -> Result<(), AskError> {
    undo.write(line).map_err(|error| {
        AskError::Query(format!("cannot write {}: {error}", undo.path().display()))
    })
}

/// Sets what a snapshot needs, and begins it.
fn start(monitor: &mut Monitor, theirs: &OwnedFd, found: &[Capability]) -> Result<usize, AskError> {
    monitor.change(&Change::SetCapabilities(wanted(found)), PATIENCE)?;
    monitor.pass(FD, theirs.as_fd())?;
    let events = monitor.told_so_far();
    monitor.change(&Change::MigrateToFd(FD.to_owned()), PATIENCE)?;
    Ok(events)
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

/// Ends what is left of a snapshot: QEMU's settings are `found` again, and a guest that it stopped,
/// and did not let go on, goes on. Gives back what was done, for people.
///
/// # Errors
/// [`AskError`]: to be tried again.
pub(super) fn put_back(
    monitor: &mut Monitor,
    found: &[Capability],
    resumed: bool,
) -> Result<String, AskError> {
    let migration = cancel(monitor)?;
    // Used up by the snapshot, if that began.
    let _ = monitor.change(&Change::CloseFd(FD.to_owned()), PATIENCE);
    let (now, _) = monitor.migration_settings()?;
    let changed = changed(found, &now);
    if !changed.is_empty() {
        monitor.change(&Change::SetCapabilities(changed), PATIENCE)?;
    }
    let (now, _) = monitor.migration_settings()?;
    if now != found {
        return Err(AskError::Query("QEMU's settings of migration do not come back".to_owned()));
    }
    let status = migration.status.unwrap_or_else(|| "none".to_owned());
    let mut text = format!("a snapshot ended as {status:?}; QEMU's settings were put back");
    // Its stop was ours, and it ended before QEMU let the guest go on.
    let until = Instant::now() + GOES_ON;
    while !resumed && status != "completed" && monitor.run_state()? == "paused" {
        if Instant::now() > until {
            monitor.change(&Change::Cont, PATIENCE)?;
            text.push_str("; the guest, which it had stopped, was told to go on");
            break;
        }
        std::thread::sleep(LOOK);
    }
    Ok(text)
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
}
