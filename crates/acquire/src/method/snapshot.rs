//! `snapshot`: QEMU stops the guest, protects its RAM from writing, lets it go on, and sends RAM as it
//! was at the stop; a process without rights reads the stream into the store.
//!
//! The image is that of the stop: a page that the guest writes later is sent before the write is let
//! through. Beside QEMU's word for that there is the *audit*: pages are read from outside while the
//! kernel shows them as still protected, and held against what QEMU sent of them.

use super::process::{Pass, PassError, Work};
use super::sample::{Samples, protected, sample};
use super::stream::{Destination, Taking};
use crate::copy::{Cell, Cut};
use crate::guardian::{Guardian, GuardianError, ShotEnd, Stops};
use crate::plan::PlannedSnapshot;
use crate::reader::{Kind, Whole};
use crate::told;
use evidence::MemoryMap;
use evidence::manifest;
use evidence::record::Span;
use host::clock::Moment;
use std::time::Duration;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// QEMU would not, or the guardian was lost.
    #[error("QEMU's snapshot did not begin")]
    Begin(#[source] GuardianError),
    /// What QEMU says of it in the end.
    #[error("QEMU's snapshot ended as {0}")]
    Ended(String),
}

/// What came of it.
pub struct Shot {
    /// For the record; absent when QEMU was not told to begin.
    pub snapshot: Option<manifest::Snapshot>,
    /// Pages read while they were protected.
    pub samples: Samples,
    /// State of the devices; empty when the stream was not whole.
    pub device_state: Vec<u8>,
    /// The rights of the process that read.
    pub rights: Option<manifest::Process>,
    /// What went otherwise than it should.
    pub doubts: Vec<String>,
    /// How it ended.
    pub end: Result<(), Cut<PassError>>,
}

/// Has QEMU take a snapshot and reads it. The cells know what came; nothing of the store is looked
/// at, for the reader writes it.
pub fn snapshot(
    work: &Work<'_>,
    map: &MemoryMap,
    planned: &PlannedSnapshot,
    into: &Destination<'_>,
    guardian: &mut Guardian,
    cells: &mut [Cell],
    passes: &mut Vec<Pass>,
) -> Shot {
    let mut shot = Shot {
        snapshot: None,
        samples: Samples::default(),
        device_state: Vec::new(),
        rights: None,
        doubts: Vec::new(),
        end: Ok(()),
    };
    let budget = Duration::from_nanos(planned.at_most_ns);
    let before = host::clock::now();
    let started = work
        .begin_pass()
        .and_then(|()| Taking::start(work, Kind::Snapshot, map, budget, into, cells));
    let mut taking = match started {
        Ok(taking) => taking,
        Err(cut) => return Shot { end: Err(cut), ..shot },
    };
    shot.rights = Some(taking.rights());
    let turn = taking.turn;
    let begun = taking.begin(false, |[theirs, ours, pulse]| {
        guardian.snapshot(planned.at_most_ns, turn, theirs, ours, pulse)
    });
    if let Err(error) = begun {
        taking.end_reader();
        return Shot { end: Err(failed(SnapshotError::Begin(error))), ..shot };
    }
    let (samples, read) = taking.read(|ended| sample(work, cells, protected, ended));
    let end = guardian.end_snapshot(read.is_ok());
    let clocks = (before, host::clock::now());
    if read.is_err() {
        taking.keep_what_came();
    }
    // From here on nothing writes into the store any more.
    taking.end_reader();
    shot.samples = samples;
    taking.collect(cells, &into.pluggable, read.as_ref().ok(), passes, u64::MAX);
    let ended = match &end {
        Ok(end) => as_ended(end),
        Err(error) => Err(SnapshotError::Ended(told(error))),
    };
    if let Ok(whole) = &read {
        shot.device_state = taking.state(whole);
    }
    let longest_wait_ns = taking.longest_wait_ns();
    // A successor of a guardian that was lost has put QEMU's settings back, or is at it.
    let restored = end.is_ok() || guardian.undone.iter().any(|undone| undone.held == "snapshot");
    let end = end.ok();
    let whole = read.as_ref().ok();
    let mut snapshot = record(work, &clocks, planned, end.as_ref(), whole);
    (snapshot.longest_wait_ns, snapshot.restored) = (longest_wait_ns, restored);
    shot.doubts.extend(doubts(&snapshot, &clocks, end.as_ref()));
    if whole.is_some() && shot.device_state.is_empty() {
        shot.doubts.push("the devices' state could not be kept".to_owned());
    }
    shot.snapshot = Some(snapshot);
    // Why the reading ended is why QEMU ended it, unless the guardian knows better.
    shot.end = match (read, ended) {
        (Ok(_), ended) => ended.map_err(failed),
        (Err(Cut::Failed(_)), Err(broken @ SnapshotError::Ended(_)))
            if end.is_some_and(|end| end.broken.is_some()) =>
        {
            Err(failed(broken))
        }
        (Err(cut), _) => Err(cut),
    };
    shot
}

fn failed(error: SnapshotError) -> Cut<PassError> {
    Cut::Failed(PassError::Snapshot(error))
}

/// A snapshot that QEMU ended in any way but whole.
fn as_ended(end: &ShotEnd) -> Result<(), SnapshotError> {
    let status = end.migration.status.as_deref().unwrap_or("none");
    let why = end.broken.as_ref().or(end.migration.error_desc.as_ref());
    match (status, why) {
        ("completed", None) => Ok(()),
        (status, Some(why)) => Err(SnapshotError::Ended(format!("{status:?}: {why}"))),
        (status, None) => Err(SnapshotError::Ended(format!("{status:?}"))),
    }
}

/// What the manifest says of it.
fn record(
    work: &Work<'_>,
    clocks: &(Moment, Moment),
    planned: &PlannedSnapshot,
    end: Option<&ShotEnd>,
    whole: Option<&Whole>,
) -> manifest::Snapshot {
    let at = |us: i64| host::clock::monotonic_at(&clocks.0, us).map(|ns| work.log.since_ns(ns));
    let page_ns = whole.map(|whole| work.log.since_ns(whole.first_page_ns));
    let stop = end.zip(page_ns).and_then(|(end, page_ns)| stop_of(&end.told, at, page_ns));
    manifest::Snapshot {
        status: end.and_then(|end| end.migration.status.clone()),
        error: end.and_then(|end| end.migration.error_desc.clone()),
        stop: stop.filter(|_| !is_stepped(clocks)),
        qemu_downtime_ms: end.and_then(|end| end.migration.downtime),
        qemu_total_ms: end.and_then(|end| end.migration.total_time),
        expected_ns: planned.expected_ns,
        budget_ns: planned.at_most_ns,
        longest_wait_ns: 0,
        restored: false,
        machine: whole.map(|whole| whole.machine.clone()),
        stream_bytes: whole.map(|whole| whole.len),
        pages: whole.map(|whole| whole.pages),
        zero_pages: whole.map(|whole| whole.zero_pages),
        other_pages: whole.map(|whole| whole.other_pages),
        devices: whole.map(|whole| whole.devices.clone()).unwrap_or_default(),
        unaccounted: whole.and_then(|whole| whole.unaccounted.clone()),
    }
}

/// The stop that was the snapshot's: that before its first page came. When others stopped the guest
/// between the command and that page too, which of them it was cannot be told: then all of them, from the
/// first stop to the end of the last. `at` brings a time of QEMU's to that of the record.
fn stop_of(told: &Stops, at: impl Fn(i64) -> Option<u64>, page_ns: u64) -> Option<Span> {
    let stops = told.stops_us.iter().filter_map(|us| at(*us)).filter(|ns| *ns <= page_ns);
    let stops: Vec<u64> = stops.collect();
    let (t0_ns, last_ns) = (*stops.first()?, *stops.last()?);
    let t1_ns = told.resumes_us.iter().filter_map(|us| at(*us)).find(|ns| *ns >= last_ns)?;
    Some(Span { t0_ns, t1_ns })
}

/// Whether UTC was set meanwhile, by which QEMU tells of the stop.
pub(super) fn is_stepped(clocks: &(Moment, Moment)) -> bool {
    host::clock::step_us(&clocks.0, &clocks.1).is_none_or(|step| step.unsigned_abs() > STEP_US)
}

/// How far UTC and monotonic time drift apart in an hour under a time service that slews.
const STEP_US: u64 = 5_000;

/// What went otherwise than it should, and may be whole all the same.
fn doubts(
    snapshot: &manifest::Snapshot,
    clocks: &(Moment, Moment),
    end: Option<&ShotEnd>,
) -> Vec<String> {
    let ms = |ns: u64| ns.div_ceil(1_000_000);
    let mut doubts = Vec::new();
    let stood = snapshot.stop.map(|stop| stop.t1_ns - stop.t0_ns);
    if let Some(stood) = stood.filter(|stood| *stood > snapshot.budget_ns) {
        doubts.push(format!(
            "QEMU stopped the guest for {} ms; {} ms were expected and {} ms allowed: once begun, the \
             stop could not be cut short",
            ms(stood),
            ms(snapshot.expected_ns),
            ms(snapshot.budget_ns)
        ));
    }
    if let Some(place) = &snapshot.unaccounted {
        doubts.push(format!("the devices' state is not as QEMU describes it: {place}"));
    }
    if is_stepped(clocks) {
        doubts.push("the host's clock was set while QEMU sent its snapshot".to_owned());
    }
    if end.is_some_and(|end| end.parameters_differ) {
        doubts.push(
            "somebody else changed QEMU's parameters of migration meanwhile; a snapshot sets none"
                .to_owned(),
        );
    }
    doubts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stop_is_before_the_first_page() {
        let end = |stops_us: &[i64], resumes_us: &[i64]| Stops {
            stops_us: stops_us.to_vec(),
            resumes_us: resumes_us.to_vec(),
        };
        let stop = |told: &Stops| stop_of(told, |us| u64::try_from(us).ok(), 100);
        let span = |t0_ns, t1_ns| Some(Span { t0_ns, t1_ns });
        assert_eq!(stop(&end(&[90], &[110])), span(90, 110));
        // Others stopped it too: before, or before the first page was read, and after.
        assert_eq!(stop(&end(&[10, 90, 200], &[20, 95, 210])), span(10, 95));
        assert_eq!(stop(&end(&[200], &[210])), None);
        assert_eq!(stop(&end(&[90], &[])), None);
    }
}
