//! The checker of `tearbench`'s images: what pages of a Linux guest say of the instant they show.
//!
//! It is given an image and nothing else. Pages are found by what is in them. Each thread of the
//! guest numbers its stores, so its words are judged like a ring's (`tear.rs`); a thread's vector
//! clock tells what others had stored before; the ledger says when a store was made by the guest's
//! own clocks.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Result, failed};
use crate::tear::{Verdict, Word, judge_words};
use crate::tearpage::{self, CANARY, CLOCK, HEARTBEAT, LEDGER, RING, RINGS, ROUND, THREADS};

const PAGE: usize = 4096;

/// What tells one run of the program from any other.
pub type RunId = [u8; 16];

/// A page by its kind, its group and its number there, as in [`tearpage::Header`].
pub type PageId = (u16, u32, u32);

/// One pass over an image, a piece at a time in any order.
#[derive(Debug, Default)]
pub struct Scan {
    runs: BTreeMap<RunId, Run>,
    broken: Vec<u64>,
}

/// Pages of one run.
#[derive(Debug, Default)]
struct Run {
    /// Groups of each kind, and pages of each group, as the first page found says.
    groups: BTreeMap<u16, u32>,
    pages: BTreeMap<(u16, u32), u32>,
    found: BTreeSet<PageId>,
    flaws: Flaws,
    rings: BTreeMap<(u32, u32), [u64; 3]>,
    clocks: Vec<[u64; THREADS]>,
    canaries: BTreeMap<u32, bool>,
    ledger: Ledger,
    half_written: u32,
    gaps: Vec<Gaps>,
}

/// What is wrong with an image besides tearing. Such an image is not judged.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Flaws {
    /// Pages that the image has not, canaries aside, which are counted.
    pub missing: Vec<PageId>,
    /// Pages that it has more than once: stale copies.
    pub duplicate: Vec<PageId>,
    /// Addresses in the image of pages that carry another frame's number.
    pub misplaced: Vec<u64>,
    /// Addresses of pages that begin as the program's do and have another checksum, or say what
    /// cannot be.
    pub broken: Vec<u64>,
    /// Words with a value that was never stored there: the page and the word.
    pub foreign: Vec<(PageId, usize)>,
}

/// The start of a page, its checksum being right.
struct Header {
    kind: u16,
    thread: u16,
    run: RunId,
    group: u32,
    index: u32,
    pages: u32,
    groups: u32,
    pfn: u64,
}

impl Header {
    fn read(page: &[u8]) -> Option<Self> {
        let crc = tearpage::crc32c(&page[..tearpage::CRC_AT]);
        if u32_at(page, tearpage::CRC_AT) != crc || u16_at(page, 0x10) != tearpage::VERSION {
            return None;
        }
        let header = Self {
            kind: u16_at(page, 0x12),
            thread: u16_at(page, 0x16),
            run: page[0x18..0x28].try_into().ok()?,
            group: u32_at(page, 0x28),
            index: u32_at(page, 0x2c),
            pages: u32_at(page, 0x30),
            groups: u32_at(page, 0x34),
            pfn: u64_at(page, 0x40),
        };
        let thread = match header.kind {
            RING => header.group / RINGS,
            CLOCK | LEDGER | HEARTBEAT => header.group,
            CANARY => 0,
            _ => return None,
        };
        let sound = header.index < header.pages && header.group < header.groups;
        let own = u32::from(header.thread) == thread && usize::from(header.thread) < THREADS;
        (sound && own).then_some(header)
    }

    fn id(&self) -> PageId {
        (self.kind, self.group, self.index)
    }
}

impl Scan {
    /// A scan that has seen nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at the pages of a piece that lies at `gpa`, a page's address, in the image.
    pub fn piece(&mut self, gpa: u64, bytes: &[u8]) {
        let magic = tearpage::magic();
        for (at, page) in (gpa..).step_by(PAGE).zip(bytes.chunks_exact(PAGE)) {
            if page.starts_with(&magic) {
                match Header::read(page) {
                    Some(header) => {
                        let run = self.runs.entry(header.run).or_default();
                        run.page(at, &header, page);
                    }
                    None => self.broken.push(at),
                }
            }
        }
    }

    /// The runs that left pages in the image.
    pub fn runs(&self) -> Vec<RunId> {
        self.runs.keys().copied().collect()
    }

    /// What was wrong with the image, all of it having been looked at.
    pub fn flaws(&self, run: &RunId) -> Flaws {
        let mut flaws = self.runs.get(run).map_or_else(|| Run::default().flaws(), Run::flaws);
        flaws.broken.extend(&self.broken);
        flaws
    }

    /// What a run's pages say, all of the image having been looked at. A failure when it has flaws.
    pub fn report(&self, run: &RunId) -> Result<Report> {
        let flaws = self.flaws(run);
        if flaws != Flaws::default() {
            return Err(failed(format_args!(
                "the image has not the pages as they were: {flaws:x?}"
            )));
        }
        let run = self.runs.get(run).ok_or_else(|| failed("no page of this run"))?;
        run.report()
    }
}

impl Run {
    fn page(&mut self, at: u64, header: &Header, page: &[u8]) {
        let (kind, group) = (header.kind, header.group);
        let groups = *self.groups.entry(kind).or_insert(header.groups);
        let pages = *self.pages.entry((kind, group)).or_insert(header.pages);
        if groups != header.groups || pages != header.pages {
            self.flaws.broken.push(at);
        } else if header.pfn.checked_mul(4096) != Some(at) {
            self.flaws.misplaced.push(at);
        } else if !self.found.insert(header.id()) {
            self.flaws.duplicate.push(header.id());
        } else {
            self.body(header, page);
        }
    }

    fn body(&mut self, header: &Header, page: &[u8]) {
        match header.kind {
            RING => {
                let words = tearpage::WORDS.map(|offset| u64_at(page, offset));
                self.rings.insert((header.group, header.index), words);
            }
            CLOCK => {
                let entry = |thread: usize| u64_at(page, tearpage::CLOCK_AT + 8 * thread);
                self.clocks.push(std::array::from_fn(entry));
            }
            CANARY => {
                let mut expected = [0; PAGE - tearpage::BODY_AT];
                tearpage::canary_body(&header.run, header.pfn, &mut expected);
                self.canaries.insert(header.index, page[tearpage::BODY_AT..] == expected);
            }
            LEDGER => {
                let entries = page[tearpage::BODY_AT..].chunks_exact(tearpage::ENTRY);
                entries.for_each(|entry| self.entry(header.thread, entry));
            }
            _ => self.heartbeat(header.thread, page),
        }
    }

    /// An entry, unless it was never written or was being written.
    fn entry(&mut self, thread: u16, entry: &[u8]) {
        if entry.iter().all(|byte| *byte == 0) {
            return;
        }
        if u32_at(entry, 32) != tearpage::crc32c(&entry[..32]) {
            self.half_written += 1;
            return;
        }
        self.ledger.add(thread, u64_at(entry, 0), Entry::read(&entry[8..]));
    }

    /// The last beat is one more entry of the ledger.
    fn heartbeat(&mut self, thread: u16, page: &[u8]) {
        let beat = &page[tearpage::BEAT_AT..][..tearpage::BEAT];
        if let Some((_, number, entry)) = beat_in(beat) {
            self.ledger.add(thread, number, entry);
        }
        let at = |word: usize| u64_at(page, tearpage::GAPS_AT + 8 * word);
        self.gaps.push(Gaps { count: at(0), longest_ticks: at(1), longest_monotonic_ns: at(2) });
    }

    fn flaws(&self) -> Flaws {
        let mut flaws = self.flaws.clone();
        for kind in [RING, CLOCK, LEDGER, HEARTBEAT] {
            // A group, or a kind, of which nothing is there has one page that is missing.
            for group in 0..self.groups.get(&kind).copied().unwrap_or(1) {
                let pages = self.pages.get(&(kind, group)).copied().unwrap_or(1);
                let ids = (0..pages).map(|index| (kind, group, index));
                flaws.missing.extend(ids.filter(|id| !self.found.contains(id)));
            }
        }
        for ((group, index), words) in &self.rings {
            let found = self.words(*group, *index, words);
            let wrong = found.iter().enumerate().filter(|(_, found)| found.is_empty());
            flaws.foreign.extend(wrong.map(|(word, _)| ((RING, *group, *index), word)));
        }
        flaws
    }

    /// Rounds after which a thread comes to the same page of its spread again: K.
    fn spread(&self, group: u32) -> u64 {
        let spread = group / RINGS * RINGS + 1;
        self.pages.get(&(RING, spread)).copied().unwrap_or(1).max(1).into()
    }

    /// The stores that the words of a page show.
    fn words(&self, group: u32, index: u32, values: &[u64]) -> Vec<Vec<Word>> {
        let (index, pages) = (u64::from(index), self.spread(group));
        let found = |(word, &value): (u64, &u64)| match group % RINGS {
            0 => Word::found(value, ROUND, index * 3 + word, ROUND * pages),
            _ => {
                let residue = ROUND * index + tearpage::PAIR_WORDS + word;
                Word::found(value, ROUND * pages, residue, ROUND * pages)
            }
        };
        (0..).zip(values).map(found).collect()
    }

    fn report(&self) -> Result<Report> {
        let threads = self.groups.get(&CLOCK).copied().unwrap_or(0);
        let judged = |groups: &[u32]| {
            let mut words = Vec::new();
            for ((group, index), values) in &self.rings {
                if groups.contains(group) {
                    words.extend(self.words(*group, *index, values).into_iter().flatten());
                }
            }
            judge_words(&words).ok_or_else(|| failed("a thread without words"))
        };
        let (mut rings, mut all) = (Vec::new(), Vec::new());
        for thread in 0..threads {
            let own = [RINGS * thread, RINGS * thread + 1];
            rings.push(Rings { pair: judged(&own[..1])?, spread: judged(&own[1..])? });
            all.push(judged(&own)?);
        }
        let beyond = |clock: &&[u64; THREADS]| {
            clock.iter().zip(&all).any(|(known, found)| *known > found.max)
        };
        let canaries = self.pages.get(&(CANARY, 0)).copied().unwrap_or(0);
        let whole = self.canaries.values().filter(|whole| **whole).count();
        Ok(Report {
            rings,
            clocks: count(self.clocks.len()),
            clock_violations: count(self.clocks.iter().filter(beyond).count()),
            threads: all,
            canaries,
            canaries_lost: canaries - count(whole),
            half_written: self.half_written,
            ledger: self.ledger.clone(),
            gaps: self.gaps.clone(),
        })
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// What the two rings of a thread say, each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Two pages as far apart as can be.
    pub pair: Verdict,
    /// Pages all over the memory.
    pub spread: Verdict,
}

/// Where a thread was missed: it was not seen for a millisecond and more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gaps {
    /// How often.
    pub count: u64,
    /// The longest in ticks of the TSC.
    pub longest_ticks: u64,
    /// The longest by CLOCK_MONOTONIC.
    pub longest_monotonic_ns: u64,
}

/// What an image says of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Each thread's rings.
    pub rings: Vec<Rings>,
    /// All words of each thread together: its stores are in one order, whatever ring they go to.
    pub threads: Vec<Verdict>,
    /// Vector clocks found.
    pub clocks: u32,
    /// Those of them that know of a store of which the image has no trace: the thread that wrote the
    /// clock had seen it, so it came before.
    pub clock_violations: u32,
    /// Canaries that there were.
    pub canaries: u32,
    /// Those of them that the image has not, or not as they were written.
    pub canaries_lost: u32,
    /// Ledger entries that were being written: at most one of each thread in one instant.
    pub half_written: u32,
    /// When the stores were made.
    pub ledger: Ledger,
    /// Each thread's gaps, as far as the guest knew.
    pub gaps: Vec<Gaps>,
}

impl Report {
    /// Whether no instant of the guest looked like this.
    pub fn is_torn(&self) -> bool {
        self.clock_violations > 0
            || count(self.threads.len()) < self.half_written
            || self.threads.iter().any(Verdict::is_torn)
    }

    /// Share of the canaries that are lost.
    pub fn canary_loss(&self) -> f64 {
        f64::from(self.canaries_lost) / f64::from(self.canaries.max(1))
    }

    /// How much time the image spans beyond one instant, by the ledger: the longest of all threads,
    /// from the store that overwrote the first word to the store that is in the last.
    pub fn smear_ns(&self) -> i64 {
        let smear = |(thread, verdict): (u16, &Verdict)| {
            let gone = verdict.max.checked_sub(verdict.smear_writes)? + 1;
            let [from, to] = [gone, verdict.max].map(|n| self.ledger.realtime_ns(thread, n));
            verdict.is_torn().then_some(to? - from?)
        };
        (0..).zip(&self.threads).filter_map(smear).max().unwrap_or(0)
    }

    /// How far the threads' cuts lie apart by the ledger. No verdict: a thread that was not running
    /// is where it was.
    pub fn skew_ns(&self) -> i64 {
        let at = (0..)
            .zip(&self.threads)
            .filter_map(|(thread, verdict)| self.ledger.realtime_ns(thread, verdict.cut));
        let times: Vec<i64> = at.collect();
        times.iter().max().unwrap_or(&0) - times.iter().min().unwrap_or(&0)
    }

    /// When memory looked like this image, by the guest's CLOCK_REALTIME: after every entry that is
    /// in it, and before the entries that `later` has beyond, which is the ledger of a later image.
    /// The first entry beyond does not count: its clock may have been read before. A failure when the
    /// threads are of two instants, which their own words do not show.
    pub fn instant(&self, later: &Ledger) -> Result<Instant> {
        if self.is_torn() {
            return Err(failed("a torn image shows no instant"));
        }
        let (mut from_ns, mut to_ns) = (i64::MIN, i64::MAX);
        for (thread, verdict) in (0..).zip(&self.threads) {
            let none = |what: &str| failed(format_args!("thread {thread} has no entry {what}"));
            let own = self.ledger.entries(thread).range(..=verdict.cut).next_back();
            let beyond = later.entries(thread).range(verdict.cut + 1..).nth(1);
            from_ns = from_ns.max(own.ok_or_else(|| none("before"))?.1.realtime_ns);
            to_ns = to_ns.min(beyond.ok_or_else(|| none("behind"))?.1.realtime_ns);
        }
        // One thread wrote what another had not written when it was later already.
        if from_ns > to_ns {
            return Err(failed(format_args!("of two instants, {} ns apart", from_ns - to_ns)));
        }
        Ok(Instant { from_ns, to_ns })
    }
}

/// What the guest's clocks were when a store had been made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The CPU's counter.
    pub tsc: u64,
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: i64,
    /// CLOCK_REALTIME.
    pub realtime_ns: i64,
}

impl Entry {
    fn read(bytes: &[u8]) -> Self {
        let time = |at: usize| i64::try_from(u64_at(bytes, at)).unwrap_or(i64::MAX);
        Self { tsc: u64_at(bytes, 0), monotonic_ns: time(8), realtime_ns: time(16) }
    }
}

/// Number, last store and clocks of a heartbeat, from [`tearpage::BEAT`] bytes of its page. `None`
/// while it is being written, and before the first.
pub fn beat_in(bytes: &[u8]) -> Option<(u64, u64, Entry)> {
    let (begun, done) = (u64_at(bytes, 0), u64_at(bytes, 40));
    (begun == done && done > 0).then(|| (done, u64_at(bytes, 32), Entry::read(&bytes[8..])))
}

/// The ledgers of all threads: when they had made which store.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Ledger(Vec<BTreeMap<u64, Entry>>);

impl Ledger {
    fn add(&mut self, thread: u16, number: u64, entry: Entry) {
        let thread = usize::from(thread);
        self.0.resize(self.0.len().max(thread + 1), BTreeMap::new());
        self.0[thread].insert(number, entry);
    }

    /// Takes in what another image of the same run says.
    pub fn merge(&mut self, other: &Self) {
        for (thread, entries) in (0..).zip(&other.0) {
            entries.iter().for_each(|(number, entry)| self.add(thread, *number, *entry));
        }
    }

    /// A thread's entries by the number of the last store before.
    pub fn entries(&self, thread: u16) -> &BTreeMap<u64, Entry> {
        static NONE: BTreeMap<u64, Entry> = BTreeMap::new();
        self.0.get(usize::from(thread)).unwrap_or(&NONE)
    }

    /// CLOCK_REALTIME when a thread made store `number`: between two entries by the line through
    /// them, after the last by the line through the last two. `None` before the first.
    pub fn realtime_ns(&self, thread: u16, number: u64) -> Option<i64> {
        let entries = self.entries(thread);
        let (at, entry) = entries.range(..=number).next_back()?;
        let next = entries.range(number + 1..).next();
        let before = entries.range(..*at).next_back();
        let (low, high) = match (next, before) {
            (Some(next), _) => ((at, entry), next),
            (None, Some(before)) => (before, (at, entry)),
            (None, None) => return Some(entry.realtime_ns),
        };
        let took = i128::from(high.1.realtime_ns) - i128::from(low.1.realtime_ns);
        let past = took * i128::from(number - at) / i128::from(high.0 - low.0).max(1);
        Some(entry.realtime_ns.saturating_add(i64::try_from(past).ok()?))
    }
}

/// A while, by the guest's CLOCK_REALTIME, in which memory looked like an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instant {
    /// The image has something that was written then.
    pub from_ns: i64,
    /// By then something was written that it has not.
    pub to_ns: i64,
}

/// What a record says of the instant, in UTC by the host's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Declared {
    /// τ in nanoseconds since 1970.
    pub utc_ns: i64,
    /// How far the instant may lie from it.
    pub bound_ns: i64,
}

/// The guest's CLOCK_REALTIME less the host's UTC: it lies between these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offset {
    /// At least.
    pub low_ns: i64,
    /// At most.
    pub high_ns: i64,
}

impl Offset {
    /// Every offset between two measured ones.
    pub fn hull(self, other: Self) -> Self {
        let (low_ns, high_ns) = (self.low_ns.min(other.low_ns), self.high_ns.max(other.high_ns));
        Self { low_ns, high_ns }
    }

    /// How exactly it is known.
    pub fn width_ns(&self) -> i64 {
        self.high_ns - self.low_ns
    }
}

impl Declared {
    /// How far the instant lies outside of what is declared: 0 is inside, less than 0 before. It is
    /// outside only when no moment of the one is a moment of the other, wherever the guest's clock
    /// is in the offset.
    pub fn misses_ns(&self, instant: &Instant, offset: &Offset) -> i64 {
        let first = self.utc_ns - self.bound_ns + offset.low_ns;
        let last = self.utc_ns + self.bound_ns + offset.high_ns;
        (instant.from_ns - last).max(0) - (first - instant.to_ns).max(0)
    }

    /// A false τ would not pass if it were farther off than this.
    pub fn power_ns(&self, instant: &Instant, offset: &Offset) -> i64 {
        2 * self.bound_ns + offset.width_ns() + (instant.to_ns - instant.from_ns)
    }
}

/// Nanoseconds since 1970 of a time such as `2026-11-25T12:04:08.123456789Z`.
pub fn utc_ns(text: &str) -> Option<i64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let numbers = |text: &str, mark: char| {
        text.split(mark).map(|part| part.parse::<i64>().ok()).collect::<Option<Vec<_>>>()
    };
    let (whole, fraction) = time.split_once('.').unwrap_or((time, ""));
    let ([year, month, day], [hours, minutes, seconds]) =
        (<[i64; 3]>::try_from(numbers(date, '-')?).ok()?, numbers(whole, ':')?.try_into().ok()?);
    if fraction.len() > 9 || !(1..=12).contains(&month) || !(1970..2200).contains(&year) {
        return None;
    }
    let ns: i64 = format!("{fraction:0<9}").parse().ok()?;
    // Years begin in March: so the leap day is the last.
    let (year, month) = if month < 3 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    let seconds = (days - 719_468) * 86_400 + hours * 3600 + minutes * 60 + seconds;
    seconds.checked_mul(1_000_000_000)?.checked_add(ns)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tearpage::{FOUR_GIB, Layout};

    const RUN: RunId = *b"run of the tests";
    const SPREAD: usize = 4;
    /// Stores from the first word of a spread ring to itself again.
    const LAP: u64 = ROUND * 4;
    /// Stores between two entries of the ledger, and what a store takes in nanoseconds.
    const EVERY: u64 = 50;
    const STORE_NS: u64 = 1000;
    /// When store 0 was made.
    const BEGAN_NS: u64 = 1_000_000_000;

    /// A guest with two threads that does in memory what the program does.
    struct Guest {
        frames: Vec<u64>,
        layout: Layout,
    }

    /// An image: pages by address.
    type Pages = BTreeMap<u64, Vec<u8>>;

    fn put(page: &mut [u8], at: usize, value: u64) {
        page[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// The number in a word after store `n`, by looking for it: `place` in the round, and of the
    /// rounds each one, or each fourth.
    fn stored(place: u64, page: Option<u64>, n: u64) -> u64 {
        let here = |k: &u64| k % ROUND == place && page.is_none_or(|page| k / ROUND % 4 == page);
        (0..=n).rev().find(here).expect("stored in the first lap")
    }

    fn time_ns(n: u64) -> u64 {
        BEGAN_NS + n * STORE_NS
    }

    impl Guest {
        fn new() -> Self {
            let frames: Vec<u64> = (0x100..0x120).chain(FOUR_GIB..FOUR_GIB + 0x20).collect();
            let layout = tearpage::share_out(&frames, 2, SPREAD, 2).expect("enough pages");
            Self { frames, layout }
        }

        fn gpa(&self, page: usize) -> u64 {
            self.frames[page] * 4096
        }

        /// All pages after store `n[t]` of each thread t; each had seen the other's store 20 before.
        fn at(&self, n: [u64; 2]) -> Pages {
            let page = |kind, thread: u16, group, groups, list: &[usize], index: usize| {
                let header = tearpage::Header {
                    kind,
                    flags: 0,
                    thread,
                    run: RUN,
                    group,
                    index: count(index),
                    pages: count(list.len()),
                    groups,
                    va: 0x7000_0000,
                    pfn: self.frames[list[index]],
                    pid: 77,
                };
                let mut bytes = vec![0; PAGE];
                bytes[..tearpage::CRC_AT + 4].copy_from_slice(&header.encode());
                bytes
            };
            let mut filled = Vec::new();
            for (t, share) in [0u16, 1].into_iter().zip(&self.layout.threads) {
                let (own, n) = (u32::from(t), n[usize::from(t)]);
                for index in 0..2 {
                    let mut bytes = page(RING, t, 2 * own, 4, &share.pair, index);
                    for (word, offset) in (0..).zip(tearpage::WORDS) {
                        let place = 3 * u64::try_from(index).expect("0 or 1") + word;
                        put(&mut bytes, offset, stored(place, None, n));
                    }
                    filled.push((share.pair[index], bytes));
                }
                for index in 0..SPREAD {
                    let mut bytes = page(RING, t, 2 * own + 1, 4, &share.spread, index);
                    let number = u64::try_from(index).expect("small");
                    for (word, offset) in (0..).zip(tearpage::WORDS) {
                        put(&mut bytes, offset, stored(6 + word, Some(number), n));
                    }
                    filled.push((share.spread[index], bytes));
                }
                filled.extend(self.rest(t, n, &page));
            }
            for (index, &place) in self.layout.canaries.iter().enumerate() {
                let mut bytes = page(CANARY, 0, 0, 1, &self.layout.canaries, index);
                let body = &mut bytes[tearpage::BODY_AT..];
                tearpage::canary_body(&RUN, self.frames[place], body);
                filled.push((place, bytes));
            }
            let addressed = filled.into_iter().map(|(place, bytes)| (self.gpa(place), bytes));
            let mut pages: Pages = addressed.collect();
            // What each had seen of the other, which takes both.
            for (t, share) in self.layout.threads.iter().enumerate() {
                for &place in &share.clocks {
                    let bytes = pages.get_mut(&self.gpa(place)).expect("a clock");
                    put(bytes, tearpage::CLOCK_AT + 8 * t, n[t]);
                    put(bytes, tearpage::CLOCK_AT + 8 * (1 - t), n[1 - t] - 20);
                }
            }
            pages
        }

        /// Clocks, ledger and heartbeat of a thread.
        fn rest(
            &self,
            t: u16,
            n: u64,
            page: &impl Fn(u16, u16, u32, u32, &[usize], usize) -> Vec<u8>,
        ) -> Vec<(usize, Vec<u8>)> {
            let (share, own) = (&self.layout.threads[usize::from(t)], u32::from(t));
            let mut filled = Vec::new();
            for (index, &place) in share.clocks.iter().enumerate() {
                filled.push((place, page(CLOCK, t, own, 2, &share.clocks, index)));
            }
            let mut numbers = (0..=n).step_by(usize::try_from(EVERY).expect("small"));
            for (index, &place) in share.ledger.iter().enumerate() {
                let mut bytes = page(LEDGER, t, own, 2, &share.ledger, index);
                let room = bytes[tearpage::BODY_AT..].chunks_exact_mut(tearpage::ENTRY);
                for (entry, number) in room.zip(&mut numbers) {
                    let time = time_ns(number);
                    let made = tearpage::ledger_entry(number, number * 3, time - 7, time);
                    entry.copy_from_slice(&made);
                }
                filled.push((place, bytes));
            }
            let mut bytes = page(HEARTBEAT, t, own, 2, &[share.heartbeat], 0);
            let last = n - n % 10;
            let beat = [n / 10, last * 3, time_ns(last) - 7, time_ns(last), last, n / 10];
            let gaps = [2, 300 + u64::from(t), 100];
            let beat = (tearpage::BEAT_AT..).step_by(8).zip(beat);
            for (at, value) in beat.chain((tearpage::GAPS_AT..).step_by(8).zip(gaps)) {
                put(&mut bytes, at, value);
            }
            filled.push((share.heartbeat, bytes));
            filled
        }

        /// A page of a thread's, for a test that changes it.
        fn page<'a>(&self, pages: &'a mut Pages, place: usize) -> &'a mut Vec<u8> {
            pages.get_mut(&self.gpa(place)).expect("there")
        }
    }

    fn scan(pages: &Pages) -> Scan {
        let mut scan = Scan::new();
        pages.iter().for_each(|(gpa, bytes)| scan.piece(*gpa, bytes));
        scan
    }

    fn report(pages: &Pages) -> Report {
        scan(pages).report(&RUN).expect("no flaw")
    }

    const N: [u64; 2] = [400, 613];
    const LATER: [u64; 2] = [400 + 3 * LAP, 613 + 3 * LAP];

    #[test]
    fn every_instant_is_whole() {
        let guest = Guest::new();
        for n in 2 * LAP..5 * LAP {
            let report = report(&guest.at([n, n + 31]));
            assert!(!report.is_torn(), "{n}: {report:?}");
            let cuts: Vec<u64> = report.threads.iter().map(|verdict| verdict.cut).collect();
            assert_eq!(cuts, [n, n + 31]);
            assert!(report.threads.iter().all(|v| v.off_cut == 0 && v.violations == 0));
            let rings = report.rings.iter().flat_map(|rings| [rings.pair, rings.spread]);
            assert_eq!(rings.map(|ring| ring.words).collect::<Vec<_>>(), [6, 12, 6, 12]);
            assert_eq!((report.clocks, report.clock_violations), (4, 0));
            assert_eq!((report.canaries_lost, report.half_written, report.smear_ns()), (0, 0, 0));
        }
    }

    #[test]
    fn the_least_splice_is_torn() {
        let guest = Guest::new();
        let (whole, later) = (guest.at(N), guest.at(LATER));
        for (t, share) in guest.layout.threads.iter().enumerate() {
            for &place in share.pair.iter().chain(&share.spread) {
                let mut spliced = whole.clone();
                // Half a page: one word of three.
                let from = &later[&guest.gpa(place)][..2048];
                guest.page(&mut spliced, place)[..2048].copy_from_slice(from);
                let half = report(&spliced);
                assert!(half.is_torn() && half.threads[t].is_torn(), "half of {place}: {half:?}");
                spliced.insert(guest.gpa(place), later[&guest.gpa(place)].clone());
                let one = report(&spliced);
                assert!(one.threads[t].is_torn(), "page {place}");
                assert!(!one.threads[1 - t].is_torn(), "the other thread");
                let rings = [one.rings[t].pair, one.rings[t].spread].map(|ring| ring.is_torn());
                let in_pair = share.pair.contains(&place);
                assert_eq!(rings, [in_pair, !in_pair], "page {place}");
            }
        }
    }

    /// The certified resolution: so many stores between the reads of the two pages of a pair, however
    /// far the spread ring is from coming round.
    #[test]
    fn two_rounds_less_one_store_between_the_pages_of_a_pair_are_seen() {
        let guest = Guest::new();
        let late = 2 * ROUND - 1;
        for n in N[0]..N[0] + ROUND {
            let (mut pages, later) = (guest.at([n, N[1]]), guest.at([n + late, N[1]]));
            let gpa = guest.gpa(guest.layout.threads[0].pair[1]);
            pages.insert(gpa, later[&gpa].clone());
            let rings = report(&pages).rings[0];
            assert!(rings.pair.is_torn() && !rings.spread.is_torn(), "{n}");
        }
    }

    /// Pages of a copy that goes up through memory while the guest goes on.
    #[test]
    fn a_copy_that_takes_time_is_torn() {
        let guest = Guest::new();
        for share in [10, 2] {
            let (mut pages, later) = (guest.at(N), guest.at(LATER));
            let part = pages.len() / share;
            pages.extend(later.into_iter().take(part));
            let report = report(&pages);
            assert!(report.is_torn(), "1 of {share}: {report:?}");
            assert!(report.smear_ns() > 0 && report.skew_ns() > 0);
        }
    }

    /// Each of the two rings is of an instant, but not both of the same.
    #[test]
    fn the_rings_of_a_thread_are_one_writer() {
        let guest = Guest::new();
        let (whole, later) = (guest.at(N), guest.at(LATER));
        let mut spliced = whole.clone();
        for &place in &guest.layout.threads[1].pair {
            spliced.insert(guest.gpa(place), later[&guest.gpa(place)].clone());
        }
        let report = report(&spliced);
        let own = report.rings[1];
        assert!(!own.pair.is_torn() && !own.spread.is_torn() && report.threads[1].is_torn());
        assert!(report.is_torn() && !report.threads[0].is_torn());
    }

    #[test]
    fn the_smear_is_what_lies_between() {
        let guest = Guest::new();
        let (mut pages, later) = (guest.at(N), guest.at(LATER));
        let place = guest.layout.threads[0].pair[1];
        pages.insert(guest.gpa(place), later[&guest.gpa(place)].clone());
        // The heartbeat stayed behind; the ledger of both is at hand.
        for &place in &guest.layout.threads[0].ledger {
            pages.insert(guest.gpa(place), later[&guest.gpa(place)].clone());
        }
        let report = report(&pages);
        let verdict = report.threads[0];
        assert!(verdict.smear_writes > 2 * LAP, "{verdict:?}");
        // The first word to go is one of the pair's, which comes round within nine stores.
        let last = verdict.max - verdict.smear_writes;
        assert!(last >= N[0] && last < N[0] + ROUND, "{verdict:?}");
        let ns = i64::try_from((verdict.smear_writes - 1) * STORE_NS).expect("small");
        assert_eq!(report.smear_ns(), ns);
    }

    #[test]
    fn a_clock_may_know_all_there_is_and_no_more() {
        let guest = Guest::new();
        for (t, share) in guest.layout.threads.iter().enumerate() {
            for (u, n) in N.into_iter().enumerate() {
                for (more, violations) in [(0, 0), (1, 1), (1000, 1)] {
                    let mut pages = guest.at(N);
                    let bytes = guest.page(&mut pages, share.clocks[1]);
                    put(bytes, tearpage::CLOCK_AT + 8 * u, n + more);
                    let report = report(&pages);
                    assert_eq!(report.clock_violations, violations, "{t} of {u} and {more}");
                    assert_eq!(report.is_torn(), violations > 0);
                    assert!(!report.threads.iter().any(Verdict::is_torn));
                }
            }
        }
    }

    #[test]
    fn one_entry_of_each_thread_may_be_half_written() {
        let guest = Guest::new();
        let mut pages = guest.at(N);
        let places = [(0, 0), (1, 0), (0, 1)];
        for (broken, (t, entry)) in (1..).zip(places) {
            let bytes = guest.page(&mut pages, guest.layout.threads[t].ledger[0]);
            bytes[tearpage::BODY_AT + entry * tearpage::ENTRY + 9] ^= 1;
            let report = report(&pages);
            assert_eq!((report.half_written, report.is_torn()), (broken, broken > 2));
        }
    }

    #[test]
    fn an_image_without_its_pages_as_they_were_is_not_judged() {
        let guest = Guest::new();
        let (whole, share) = (guest.at(N), &guest.layout.threads[1]);
        let flaws = |pages: &Pages| {
            let scan = scan(pages);
            assert!(scan.report(&RUN).is_err(), "{:?}", scan.flaws(&RUN));
            scan.flaws(&RUN)
        };
        let none = Flaws::default;
        let kinds = [
            ((RING, 2, 1), share.pair[1]),
            ((RING, 3, 2), share.spread[2]),
            ((CLOCK, 1, 0), share.clocks[0]),
            ((LEDGER, 1, 1), share.ledger[1]),
            ((HEARTBEAT, 1, 0), share.heartbeat),
        ];
        for (id, place) in kinds {
            let gpa = guest.gpa(place);
            let mut without = whole.clone();
            without.remove(&gpa);
            assert_eq!(flaws(&without), Flaws { missing: vec![id], ..none() });
            let changed = |at: usize, bits: u8| {
                let mut pages = whole.clone();
                pages.get_mut(&gpa).expect("there")[at] ^= bits;
                flaws(&pages)
            };
            assert_eq!(changed(3, 1), Flaws { missing: vec![id], ..none() }, "no magic");
            let broken = Flaws { missing: vec![id], broken: vec![gpa], ..none() };
            for at in [0x10, 0x12, 0x28, 0x40, 0x4c] {
                assert_eq!(changed(at, 0x10), broken, "byte {at:#x} of {id:?}");
            }
        }
        let mut scan = scan(&whole);
        scan.piece(guest.gpa(share.pair[0]), &whole[&guest.gpa(share.pair[0])]);
        let twice = Flaws { duplicate: vec![(RING, 2, 0)], ..none() };
        assert_eq!(scan.flaws(&RUN), twice);
        let mut moved = whole.clone();
        let page = moved.remove(&guest.gpa(share.clocks[0])).expect("there");
        moved.insert(0x5000, page);
        let misplaced = Flaws { misplaced: vec![0x5000], missing: vec![(CLOCK, 1, 0)], ..none() };
        assert_eq!(flaws(&moved), misplaced);
        assert_eq!(flaws(&Pages::new()).missing.len(), 4, "nothing of any kind");
    }

    /// A header that is right in itself and says what cannot be.
    #[test]
    fn a_header_that_cannot_be_is_no_page() {
        let guest = Guest::new();
        let gpa = guest.gpa(guest.layout.threads[0].clocks[0]);
        let changes = [(0x12, 9), (0x16, 1), (0x28, 7), (0x2c, 2), (0x30, 3), (0x34, 3), (0x10, 2)];
        for (at, value) in changes {
            let mut pages = guest.at(N);
            let page = pages.get_mut(&gpa).expect("there");
            page[at] = value;
            let crc = tearpage::crc32c(&page[..tearpage::CRC_AT]);
            page[tearpage::CRC_AT..tearpage::CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
            let flaws = scan(&pages).flaws(&RUN);
            assert!(!flaws.broken.is_empty(), "{at:#x}: {flaws:?}");
            assert!(scan(&pages).report(&RUN).is_err());
        }
        // A third thread's page of a ring that is one too many.
        let gpa = guest.gpa(guest.layout.threads[0].pair[0]);
        let mut page = guest.at(N).remove(&gpa).expect("there");
        (page[0x16], page[0x28]) = (2, 4);
        let crc = tearpage::crc32c(&page[..tearpage::CRC_AT]);
        page[tearpage::CRC_AT..tearpage::CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        let mut scan = Scan::new();
        scan.piece(gpa, &page);
        assert_eq!(scan.flaws(&RUN).broken, [gpa]);
    }

    #[test]
    fn numbers_that_were_never_stored_there_are_foreign() {
        let guest = Guest::new();
        let share = &guest.layout.threads[0];
        let cases = [
            (share.pair[1], (RING, 0, 1), 1, [ROUND * 40 + 5, ROUND * 40 + 1, 4, ROUND * 3 + 4]),
            (share.spread[2], (RING, 1, 2), 0, [ROUND * 41 + 6, ROUND * 42 + 7, 6, ROUND * 2 + 6]),
        ];
        for (place, id, word, values) in cases {
            for value in values {
                let mut pages = guest.at(N);
                put(guest.page(&mut pages, place), tearpage::WORDS[word], value);
                let flaws = scan(&pages).flaws(&RUN);
                assert_eq!(flaws.foreign, [(id, word)], "{value}");
            }
        }
        // The same words with numbers that are stored there.
        let mut pages = guest.at(N);
        put(guest.page(&mut pages, share.pair[1]), tearpage::WORDS[1], ROUND * 40 + 4);
        put(guest.page(&mut pages, share.spread[2]), tearpage::WORDS[0], ROUND * 42 + 6);
        assert_eq!(scan(&pages).flaws(&RUN), Flaws::default());
    }

    #[test]
    fn canaries_that_are_changed_or_gone_are_lost() {
        let guest = Guest::new();
        let canaries = &guest.layout.canaries;
        let mut pages = guest.at(N);
        assert_eq!(report(&pages).canaries, count(canaries.len()));
        guest.page(&mut pages, canaries[0])[4095] ^= 1;
        assert_eq!(report(&pages).canaries_lost, 1);
        guest.page(&mut pages, canaries[5])[tearpage::BODY_AT] ^= 1;
        assert_eq!(report(&pages).canaries_lost, 2);
        pages.remove(&guest.gpa(canaries[1]));
        guest.page(&mut pages, canaries[2]).fill(0);
        let lost = report(&pages);
        assert_eq!(lost.canaries_lost, 4);
        assert!((lost.canary_loss() - 4.0 / f64::from(lost.canaries)).abs() < 1e-9);
        assert!(!lost.is_torn());
        // Another canary's body is not this one's.
        let mut swapped = guest.at(N);
        let body = guest.page(&mut swapped, canaries[3])[tearpage::BODY_AT..].to_vec();
        guest.page(&mut swapped, canaries[4])[tearpage::BODY_AT..].copy_from_slice(&body);
        assert_eq!(report(&swapped).canaries_lost, 1);
    }

    #[test]
    fn runs_are_kept_apart() {
        let guest = Guest::new();
        let mut scan = scan(&guest.at(N));
        let mut other = guest.at(LATER).remove(&guest.gpa(0)).expect("there");
        other[0x18] ^= 0xff;
        let crc = tearpage::crc32c(&other[..tearpage::CRC_AT]);
        other[tearpage::CRC_AT..tearpage::CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        scan.piece(guest.gpa(0), &other);
        assert_eq!(scan.runs().len(), 2);
        assert!(!scan.report(&RUN).expect("whole").is_torn());
        assert!(scan.report(&[0; 16]).is_err(), "no such run");
    }

    #[test]
    fn gaps_are_read() {
        let report = report(&Guest::new().at(N));
        let gaps = |longest_ticks| Gaps { count: 2, longest_ticks, longest_monotonic_ns: 100 };
        assert_eq!(report.gaps, [gaps(300), gaps(301)]);
    }

    fn entry(realtime_ns: i64) -> Entry {
        Entry { tsc: 0, monotonic_ns: 0, realtime_ns }
    }

    fn ledger(entries: &[(u16, u64, i64)]) -> Ledger {
        let mut ledger = Ledger::default();
        entries.iter().for_each(|(thread, n, time)| ledger.add(*thread, *n, entry(*time)));
        ledger
    }

    #[test]
    fn the_ledger_tells_when() {
        let times = ledger(&[(0, 100, 1000), (0, 200, 3000), (0, 300, 4000), (1, 5, 77)]);
        let cases = [
            (0, 99, None),
            (0, 100, Some(1000)),
            (0, 150, Some(2000)),
            (0, 200, Some(3000)),
            (0, 290, Some(3900)),
            (0, 300, Some(4000)),
            (0, 450, Some(5500)),
            (1, 5, Some(77)),
            (1, 9, Some(77)),
            (2, 9, None),
        ];
        for (thread, number, expected) in cases {
            assert_eq!(times.realtime_ns(thread, number), expected, "{number} of {thread}");
        }
        let mut merged = ledger(&[(1, 4, 70)]);
        merged.merge(&times);
        assert_eq!(merged.entries(0), times.entries(0));
        assert_eq!(merged.entries(1).keys().collect::<Vec<_>>(), [&4, &5]);
    }

    #[test]
    fn a_heartbeat_that_is_being_written_is_none() {
        let guest = Guest::new();
        let mut pages = guest.at(N);
        let thread = &guest.layout.threads[0];
        let last = |pages: &Pages| {
            let last = report(pages).ledger.entries(0).last_key_value().map(|(n, _)| *n);
            last.expect("an entry")
        };
        guest.page(&mut pages, thread.heartbeat)[tearpage::BEAT_AT + 0x20] += 5;
        assert_eq!(last(&pages), 405, "the heartbeat's last store");
        guest.page(&mut pages, thread.heartbeat)[tearpage::BEAT_AT] += 1;
        assert_eq!(last(&pages), 400, "the ledger's last entry");
        guest.page(&mut pages, thread.heartbeat)[tearpage::BEAT_AT..][..48].fill(0);
        assert_eq!(last(&pages), 400, "before the first beat");
        assert_eq!(beat_in(&[0; tearpage::BEAT]), None, "no beat is no entry");
    }

    #[test]
    fn the_instant_lies_between_two_entries() {
        let guest = Guest::new();
        let early = report(&guest.at([400, 413]));
        let mut all = early.ledger.clone();
        all.merge(&report(&guest.at([800, 800])).ledger);
        let instant = early.instant(&all).expect("an instant");
        // The last heartbeat before, of the thread that is further by its clock; then the second
        // entry behind, of the thread that is less far.
        let time = |n: u64| i64::try_from(time_ns(n)).expect("small");
        assert_eq!(instant, Instant { from_ns: time(410), to_ns: time(500) });
        // At most so far apart; farther, the one is behind what the other comes before.
        for (ahead, holds) in [(509, true), (510, false), (613, false)] {
            let image = report(&guest.at([400, ahead]));
            assert!(!image.is_torn());
            assert_eq!(image.instant(&all).is_ok(), holds, "{ahead}");
        }
        assert!(early.instant(&early.ledger.clone()).is_err(), "nothing later");
        assert!(early.instant(&Ledger::default()).is_err());
        let mut torn = early.clone();
        torn.clock_violations = 1;
        assert!(torn.instant(&all).is_err(), "no instant");
        let mut blind = early;
        blind.ledger = ledger(&[(0, 401, 5), (1, 600, 5)]);
        assert!(blind.instant(&all).is_err(), "no entry of thread 0 before");
    }

    #[test]
    fn a_declared_time_is_held_against_the_guests() {
        let offset = Offset { low_ns: 1000, high_ns: 1010 };
        let instant = Instant { from_ns: 6000, to_ns: 6200 };
        let misses = |utc_ns, bound_ns| Declared { utc_ns, bound_ns }.misses_ns(&instant, &offset);
        // In the guest's time it begins at τ - 100 + 1000, and ends at τ + 100 + 1010.
        let cases =
            [(4890, 0), (4889, 1), (4000, 890), (5100, 0), (5300, 0), (5301, -1), (6300, -1000)];
        for (utc_ns, expected) in cases {
            assert_eq!(misses(utc_ns, 100), expected, "{utc_ns}");
        }
        assert_eq!(
            [misses(4990, 0), misses(4989, 0), misses(5200, 0), misses(5201, 0)],
            [0, 1, 0, -1]
        );
        let declared = Declared { utc_ns: 5000, bound_ns: 100 };
        assert_eq!(declared.power_ns(&instant, &offset), 410);
        // No τ that is farther off than that passes, whatever passes.
        for utc_ns in 4890..=5300 {
            assert!(misses(utc_ns - 411, 100) > 0 && misses(utc_ns + 411, 100) < 0);
        }
        let hull = offset.hull(Offset { low_ns: 990, high_ns: 1005 });
        assert_eq!((hull, hull.width_ns()), (Offset { low_ns: 990, high_ns: 1010 }, 20));
    }

    #[test]
    fn times_in_utc_are_read() {
        let cases = [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("1970-01-02T00:00:01.5Z", Some(86_401_500_000_000)),
            ("2000-02-29T23:59:59.000000001Z", Some(951_868_799_000_000_001)),
            ("2000-03-01T00:00:00Z", Some(951_868_800_000_000_000)),
            ("2026-11-25T12:04:08.123456Z", Some(1_795_608_248_123_456_000)),
            ("2026-11-25T12:04:08+00:00", None),
            ("2026-13-25T12:04:08Z", None),
            ("2026-11-25T12:04Z", None),
            ("2026-11-25T12:04:08.1234567890Z", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(utc_ns(text), expected, "{text}");
        }
    }
}
