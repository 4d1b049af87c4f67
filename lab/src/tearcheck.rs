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
        let mut flaws = self.runs.get(run).map(Run::flaws).unwrap_or_default();
        flaws.broken.extend(&self.broken);
        flaws
    }

    /// What a run's pages say, all of the image having been looked at. A failure when it has flaws.
    pub fn report(&self, run: &RunId) -> Result<Report> {
        let flaws = self.flaws(run);
        if flaws != Flaws::default() {
            return Err(failed(format_args!("the image has not the pages as they were: {flaws:x?}")));
        }
        match self.runs.get(run) {
            Some(run) => run.report(),
            None => Err(failed(format_args!("no page of run {run:x?}"))),
        }
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
            let wrong = |&(word, value): &(usize, u64)| !self.stored_there(*group, *index, word, value);
            let wrong = words.iter().copied().enumerate().filter(wrong);
            flaws.foreign.extend(wrong.map(|(word, _)| ((RING, *group, *index), word)));
        }
        flaws
    }

    /// Rounds after which a thread comes to the same page of its spread again: K.
    fn spread(&self, group: u32) -> u64 {
        let spread = group / RINGS * RINGS + 1;
        self.pages.get(&(RING, spread)).copied().unwrap_or(1).max(1).into()
    }

    /// Whether a writer ever stores this number there.
    fn stored_there(&self, group: u32, index: u32, word: usize, value: u64) -> bool {
        let (round, place) = (value / ROUND, value % ROUND);
        let word = u64::try_from(word).unwrap_or(u64::MAX);
        let (index, pages) = (u64::from(index), self.spread(group));
        let here = match group % RINGS {
            0 => place == index * 3 + word,
            _ => place == tearpage::PAIR_WORDS + word && round % pages == index,
        };
        here && round >= pages
    }

    fn report(&self) -> Result<Report> {
        let threads = self.groups.get(&CLOCK).copied().unwrap_or(0);
        let judged = |groups: &[u32]| {
            let mut words = Vec::new();
            for ((group, _), values) in &self.rings {
                if groups.contains(group) {
                    let pair = group % RINGS == 0;
                    let lap = if pair { ROUND } else { ROUND * self.spread(*group) };
                    words.extend(values.iter().map(|&value| Word { value, lap }));
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
        let at = (0..).zip(&self.threads).filter_map(|(thread, verdict)| {
            self.ledger.realtime_ns(thread, verdict.cut)
        });
        let times: Vec<i64> = at.collect();
        times.iter().max().unwrap_or(&0) - times.iter().min().unwrap_or(&0)
    }

    /// When memory looked like this image, by the guest's CLOCK_REALTIME: after every entry that is
    /// in it, and before the entries that `later` has beyond, which is the ledger of a later image.
    /// The first entry beyond does not count: its clock may have been read before.
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
