//! `dump`: QEMU stops the guest, writes its memory into a socket of ours, and lets the guest go on. A
//! process without rights reads it into the store.
//!
//! The guest stands from the command to the last byte: the hold, which the stall budget bounds. Capture
//! and guardian each cut the socket when it is used up; QEMU's next write fails then, and the guest goes
//! on. Pages are read from outside meanwhile and held against what QEMU wrote: the audit.

use super::process::{Pass, PassError, Work};
use super::sample::{Samples, sample, standing};
use super::stream::{Destination, DumpHead, Taking};
use crate::copy::{Cell, Cut};
use crate::guardian::{DumpBegun, DumpEnd, Guardian, GuardianError};
use crate::log::Log;
use crate::map::Located;
use crate::plan::PlannedDump;
use crate::reader::{Head, Kind, Whole};
use evidence::manifest::{self, HoldKind, Registers, RegistersSource};
use evidence::record::Span;
use evidence::{GuestRange, MemoryMap};
use host::clock::Moment;
use std::time::Duration;

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// QEMU would not, or the guardian was lost.
    #[error("QEMU's dump did not begin")]
    Begin(#[source] GuardianError),
    /// It is not known how it ended.
    #[error("how QEMU's dump ended is not known")]
    End(#[source] GuardianError),
    /// What QEMU says of it in the end.
    #[error("QEMU's dump ended as {0}")]
    Ended(String),
}

/// What came of it.
pub struct Dumped {
    /// For the record; absent when QEMU was not told to begin.
    pub dump: Option<manifest::Dump>,
    /// The guest's stop.
    pub hold: Option<manifest::Hold>,
    /// What the dump has before memory, and its description.
    pub head: Option<(Registers, Vec<u8>)>,
    /// Pages read while the guest stood.
    pub samples: Samples,
    /// The rights of the process that read.
    pub rights: Option<manifest::Process>,
    /// What went otherwise than it should.
    pub doubts: Vec<String>,
    /// How it ended.
    pub end: Result<(), Cut<PassError>>,
}

/// Has QEMU dump and reads it. The cells know what came; nothing of the store is looked at, for the
/// reader writes it.
pub fn dump(
    work: &Work<'_>,
    map: &MemoryMap,
    planned: &PlannedDump,
    into: &Destination<'_>,
    guardian: &mut Guardian,
    cells: &mut [Cell],
    passes: &mut Vec<Pass>,
) -> Dumped {
    let nothing = |end| Dumped {
        dump: None,
        hold: None,
        head: None,
        samples: Samples::default(),
        rights: None,
        doubts: Vec::new(),
        end: Err(end),
    };
    let budget = Duration::from_nanos(planned.at_most_ns);
    let before = host::clock::now();
    let started =
        work.begin_pass().and_then(|()| Taking::start(work, Kind::Dump, map, budget, into, cells));
    let mut taking = match started {
        Ok(taking) => taking,
        Err(cut) => return nothing(cut),
    };
    let rights = Some(taking.rights());
    let until_ns = host::clock::monotonic_ns().saturating_add(planned.at_most_ns);
    let begun = taking.begin(true, |[theirs, ours, _]| guardian.dump(until_ns, theirs, ours));
    let begun = match begun {
        Ok(Some(begun)) => begun,
        Ok(None) => return nothing(Cut::Late),
        Err(error) => {
            taking.end_reader();
            let cut = Cut::Failed(PassError::Dump(DumpError::Begin(error)));
            return Dumped { rights, ..nothing(cut) };
        }
    };
    let (samples, read) = taking.read(|ended| sample(work, cells, standing, ended));
    let end = guardian.end_dump();
    let clocks = (before, host::clock::now());
    if read.is_err() {
        taking.keep_what_came();
    }
    // From here on nothing writes into the store any more.
    taking.end_reader();
    let now_ns = host::clock::monotonic_ns();
    let came = read.as_ref().map_or((now_ns, now_ns), |whole| (whole.first_page_ns, whole.last_ns));
    let (hold, mut doubts) = hold(work.log, planned, begun, end.as_ref().ok(), came, &clocks);
    taking.collect(cells, &into.pluggable, read.as_ref().ok(), passes, hold.released_ns);
    let whole = read.as_ref().ok();
    let stood = Span { t0_ns: hold.held_ns, t1_ns: hold.released_ns };
    let head = whole.and_then(|whole| {
        let head = whole.head.as_ref()?;
        let of = (map, &into.pluggable[..]);
        Some((registers(head, RegistersSource::Dump, stood, true, of), taking.state(whole)))
    });
    let dump = record(end.as_ref().ok(), whole, taking.longest_wait_ns());
    if dump.status.is_none() {
        doubts.push("QEMU did not tell how its dump ended".to_owned());
    }
    Dumped {
        end: ended(read.map(drop), end),
        samples: samples.before(hold.released_ns),
        dump: Some(dump),
        hold: Some(hold),
        head,
        rights,
        doubts,
    }
}

/// Why it ended as it did: why the reading ended, unless the guardian knows better.
fn ended(
    read: Result<(), Cut<PassError>>,
    end: Result<DumpEnd, GuardianError>,
) -> Result<(), Cut<PassError>> {
    let failed = |error: DumpError| Cut::Failed(PassError::Dump(error));
    match (read, end) {
        (Err(Cut::Failed(_)), Ok(end)) if end.expired => Err(Cut::Late),
        (Err(cut), _) => Err(cut),
        (Ok(()), Err(error)) => Err(failed(DumpError::End(error))),
        (Ok(()), Ok(end)) => match (end.status.as_deref(), end.error) {
            (Some("completed"), None) => Ok(()),
            (status, why) => {
                let status = status.unwrap_or("unknown");
                let why = why.map_or_else(String::new, |why| format!(": {why}"));
                Err(failed(DumpError::Ended(format!("{status:?}{why}"))))
            }
        },
    }
}

/// The stop, in the record's time. The first page and the last bytes came at `first_ns` and `last_ns`.
fn hold(
    log: &Log,
    planned: &PlannedDump,
    begun: DumpBegun,
    end: Option<&DumpEnd>,
    (first_ns, last_ns): (u64, u64),
    clocks: &(Moment, Moment),
) -> (manifest::Hold, Vec<String>) {
    let mut doubts = Vec::new();
    let ended_ns = end.map_or_else(host::clock::monotonic_ns, |end| end.ended_ns);
    // QEMU tells by UTC when the guest goes on, just before it does.
    let resumed_ns = end
        .and_then(|end| end.resumed_us)
        .filter(|_| !super::snapshot::is_stepped(clocks))
        .and_then(|us| host::clock::monotonic_at(&clocks.0, us));
    let found_standing = end.is_some_and(|end| !end.ran);
    let released_ns = match resumed_ns {
        Some(ns) => ns,
        None if found_standing => ended_ns,
        None => {
            doubts.push(
                "the host's clock was set while QEMU dumped: when exactly it let the guest go on is not \
                 known, only that its last byte was written before"
                    .to_owned(),
            );
            last_ns
        }
    };
    // The answer can be behind the first bytes, and the guest stood before both.
    let held_ns = begun.held_ns.min(first_ns).max(begun.began_ns);
    let released_ns = released_ns.clamp(held_ns, ended_ns.max(held_ns));
    let hold = manifest::Hold {
        kind: HoldKind::Dump,
        began_ns: log.since_ns(begun.began_ns),
        held_ns: log.since_ns(held_ns),
        released_ns: log.since_ns(released_ns),
        ended_ns: log.since_ns(ended_ns.max(held_ns)),
        threads: 0,
        tries: 1,
        lasted: end.is_some_and(|end| end.lasted),
        budget_ns: planned.at_most_ns,
        expected_ns: planned.expected_ns,
    };
    (hold, doubts)
}

fn record(end: Option<&DumpEnd>, whole: Option<&Whole>, longest_wait_ns: u64) -> manifest::Dump {
    manifest::Dump {
        status: end.and_then(|end| end.status.clone()),
        error: end.and_then(|end| end.error.clone()),
        stream_bytes: whole.map(|whole| whole.len),
        pages: whole.map(|whole| whole.pages),
        zero_pages: whole.map(|whole| whole.zero_pages),
        other_pages: whole.map(|whole| whole.other_pages),
        longest_wait_ns,
    }
}

/// What the manifest says of a dump's head.
fn registers(
    head: &Head,
    source: RegistersSource,
    stood: Span,
    of_tau: bool,
    (map, pluggable): (&MemoryMap, &[GuestRange]),
) -> Registers {
    Registers {
        source,
        stood,
        of_tau,
        machine: head.machine.clone(),
        cpus: head.cpus.clone(),
        guest_note: head.guest_note,
        map_difference: map_difference(&head.memory, map, pluggable),
        file: evidence::exhibit::DUMP_HEAD.to_owned(),
    }
}

/// What the manifest says of the head of a dump that was read for its own sake.
pub fn registers_of(read: &DumpHead, log: &Log, located: &Located) -> Registers {
    let (begun, end) = &read.stood;
    // Some time between command and end: it is not known better, and about a millisecond.
    let stood = Span { t0_ns: log.since_ns(begun.began_ns), t1_ns: log.since_ns(end.ended_ns) };
    let of = (&located.map, &located.pluggable()[..]);
    registers(&read.head, RegistersSource::HeaderOnlyDump, stood, false, of)
}

/// How the memory that QEMU's dump names (start and length) differs from the map's imaged memory; NVDIMMs
/// are in the dump and not in the image. Of `pluggable` memory the dump has what is plugged. `None`: it does
/// not differ.
pub fn map_difference(
    dumped: &[(u64, u64)],
    map: &MemoryMap,
    pluggable: &[GuestRange],
) -> Option<String> {
    let range = |&(start, len): &(u64, u64)| GuestRange::new(start, len);
    let dumped: Vec<GuestRange> = dumped.iter().filter_map(range).collect();
    let there = [&dumped, pluggable].concat();
    if let Some(missing) = map.imaged().find_map(|(_, range)| range.first_outside(&there)) {
        return Some(format!("the map has {missing}, and QEMU's dump does not"));
    }
    let known: Vec<GuestRange> = map.regions().iter().filter_map(evidence::Region::range).collect();
    let new = dumped.iter().find_map(|range| range.first_outside(&known))?;
    Some(format!("QEMU's dump has {new}, and the map does not"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use evidence::{Kind as RegionKind, Region};

    fn region(gpa: u64, len: u64, kind: RegionKind) -> Region {
        Region {
            gpa,
            len,
            kind,
            name: "pc.ram".into(),
            owner: None,
            block: Some("pc.ram".into()),
            block_offset: 0,
            mapping: None,
            page_size: None,
            readonly: false,
        }
    }

    #[test]
    fn the_memory_of_a_dump_is_that_of_the_map() {
        let ram = RegionKind::Ram;
        let regions = vec![
            region(0, 0xc0000, ram),
            region(0xc0000, 0x40000, ram),
            region(1 << 32, 1 << 20, ram),
            region(1 << 33, 1 << 20, RegionKind::Nvdimm),
        ];
        let map = MemoryMap::new(regions).unwrap();
        let differs = |dumped: &[(u64, u64)]| map_difference(dumped, &map, &[]);
        let whole = [(0, 1 << 20), (1 << 32, 1 << 20)];
        assert_eq!(differs(&whole), None);
        // Cut otherwise, in another order, and with what is in the map and not in the image.
        let cut = [(1 << 33, 1 << 20), (1 << 32, 1 << 20), (0x1000, 0xff000), (0, 0x1000)];
        assert_eq!(differs(&cut), None);
        let less = [whole[0], (1 << 32, 1 << 19)];
        let told = differs(&less).unwrap();
        assert!(told.starts_with("the map has 0x100080000-0x1000fffff, and"), "{told}");
        let pluggable = [GuestRange::new(1 << 32, 1 << 20).unwrap()];
        assert_eq!(map_difference(&less, &map, &pluggable), None, "not plugged in");
        assert!(map_difference(&less[1..], &map, &pluggable).is_some());
        let more = [whole[0], whole[1], (1 << 34, 0x1000)];
        assert!(differs(&more).unwrap().starts_with("QEMU's dump has"));
    }
}
