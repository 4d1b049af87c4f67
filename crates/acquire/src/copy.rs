//! The one loop: workers take blocks, each works on its own, nothing is queued.
//!
//! Capture passes, sealing and whatever reads the store again are all this loop with another
//! piece of work. A worker owns the item that it took, so results need no lock and no order;
//! what is ordered (the block records) is written afterwards from the cells.

use crate::event::{Event, Observer, Phase};
use crate::stop::Stop;
use evidence::block::{BLOCK_BYTES, BLOCK_PAGES, Block, TooManyBlocks, index};
use evidence::digest::Digest;
use evidence::record::Span;
use evidence::state::{page_count, pages};
use evidence::{GuestRange, MemoryMap, PAGE, PageState};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The pages of a block that two reads differ in: bit `n` is the block's `n`th page.
pub type Changed = [u64; BLOCK_PAGES.div_ceil(64)];

/// One block and all that is known of it: about 400 bytes for a MiB of guest.
#[derive(Debug)]
pub struct Cell {
    /// The addresses.
    pub block: Block,
    /// A state for each page.
    pub states: Box<[PageState]>,
    /// The read that the store holds.
    pub stored: Span,
    /// Number of the pass that the stored read belongs to, from 1; 0 before any.
    pub pass: u32,
    /// The read before it, when there was one.
    pub earlier: Option<Span>,
    /// Digest of the earlier read, when it differed.
    pub first: Option<Box<Digest>>,
    /// The pages that differed.
    pub changed: Option<Box<Changed>>,
    /// Digest of what the store holds; known after sealing.
    pub digest: Digest,
    /// The image holds it.
    pub sealed: bool,
}

/// The blocks of `map`, nothing known of them yet.
///
/// # Errors
/// [`TooManyBlocks`] before anything is allocated.
pub fn cells(map: &MemoryMap) -> Result<Vec<Cell>, TooManyBlocks> {
    Ok(evidence::block::cut(map)?.into_iter().map(Cell::new).collect())
}

impl Cell {
    /// A block of which nothing is known.
    pub fn new(block: Block) -> Self {
        Self {
            block,
            states: vec![PageState::Hole; index(page_count(block))].into(),
            stored: Span { t0_ns: 0, t1_ns: 0 },
            pass: 0,
            earlier: None,
            first: None,
            changed: None,
            digest: Digest::ZERO,
            sealed: false,
        }
    }

    /// Bytes of it that are in this state.
    pub fn bytes_in(&self, wanted: PageState) -> u64 {
        let count = self.states.iter().filter(|state| **state == wanted).count();
        let whole = u64::try_from(count).unwrap_or(u64::MAX).saturating_mul(PAGE);
        // Of its first and its last page only a part may be the block's.
        let before = self.block.start() % PAGE;
        let behind = (PAGE - self.block.end() % PAGE) % PAGE;
        let cut = |page: Option<&PageState>, bytes| if page == Some(&wanted) { bytes } else { 0 };
        whole - cut(self.states.first(), before) - cut(self.states.last(), behind)
    }

    /// Pages of virtio-mem, `pluggable`, that are not among what QEMU's dump names are not plugged in: so they are
    /// `from` no more. `dumped` is sorted.
    pub fn discard(&mut self, from: PageState, pluggable: &[GuestRange], dumped: &[GuestRange]) {
        if !pluggable.iter().any(|device| device.intersect(self.block).is_some()) {
            return;
        }
        let named = |page: GuestRange| {
            let behind = dumped.partition_point(|range| range.start() < page.end());
            let last = behind.checked_sub(1).and_then(|index| dumped.get(index));
            last.is_some_and(|range| range.end() > page.start())
        };
        for (page, state) in pages(self.block).zip(&mut self.states) {
            if *state == from && pluggable.iter().any(|device| device.covers(page)) && !named(page)
            {
                *state = PageState::Discarded;
            }
        }
    }
}

/// A page of 4 KiB.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Buffers of one worker: two blocks, so that a read can be compared with the one before.
///
/// Lent from a page's beginning on: the kernel copies whole pages twice as fast to whole pages
/// (measured: 19 GB/s a core against 9), and direct I/O needs no other buffer.
pub struct Scratch {
    new: Box<[u8]>,
    old: Box<[u8]>,
    states: Box<[PageState]>,
}

/// Number of 4 KiB cells that `len` bytes touch at most.
pub fn pages_of(len: u64) -> usize {
    index(len.div_ceil(PAGE) + 1)
}

impl Scratch {
    /// For `workers` workers. Every byte is written once: no memory is taken later, when the guest
    /// may be held.
    pub fn for_workers(workers: usize) -> Vec<Self> {
        (0..workers.max(1)).map(|_| Self::new()).collect()
    }

    pub(crate) fn new() -> Self {
        // Not 0, for which the kernel would give no memory yet.
        let bytes = || vec![1u8; BLOCK_BYTES + PAGE_BYTES].into_boxed_slice();
        Self { new: bytes(), old: bytes(), states: vec![PageState::Hole; BLOCK_PAGES].into() }
    }

    /// The two buffers and the states, cut to `block`.
    pub fn parts(&mut self, block: Block) -> (&mut [u8], &mut [u8], &mut [PageState]) {
        let (len, pages) = (index(block.len()), index(page_count(block)));
        let skip = |buffer: &[u8]| buffer.as_ptr().align_offset(PAGE_BYTES);
        let (new, old) = (skip(&self.new), skip(&self.old));
        (&mut self.new[new..][..len], &mut self.old[old..][..len], &mut self.states[..pages])
    }
}

/// How the loop runs: one worker for each scratch that it is given.
pub struct Setting<'a> {
    /// Bytes per second that all workers together may take; `None`: no limit.
    pub max_rate: Option<u64>,
    /// Asked between two items.
    pub stop: &'a Stop,
    /// When the loop ends, done or not: looked at between two items.
    pub until: Option<Instant>,
    /// Told how far the loop is, five times a second.
    pub observer: &'a dyn Observer,
    /// The phase that progress is told of.
    pub phase: Phase,
    /// The pass, when the phase has passes.
    pub pass: Option<u32>,
}

/// Why the loop ended before its last block.
#[derive(Debug)]
pub enum Cut<E> {
    /// The operator asked.
    Stopped,
    /// [`Setting::until`] was reached.
    Late,
    /// A worker failed; the first failure is kept.
    Failed(E),
}

/// Something that the loop takes: it has a length.
pub trait Item: Send {
    /// Bytes, for progress.
    fn bytes(&self) -> u64;

    /// Bytes that the work on it took, for the rate; asked afterwards.
    fn cost(&self) -> u64;
}

impl Item for Cell {
    fn bytes(&self) -> u64 {
        self.block.len()
    }

    fn cost(&self) -> u64 {
        let read = self.states.iter().filter(|state| **state != PageState::Hole).count();
        // Counts of pages of one block.
        (read as u64 * PAGE).min(self.block.len())
    }
}

/// Runs `work` on every item.
///
/// # Errors
/// [`Cut`]; items that were worked on stay as the work left them.
pub fn each<T: Item, E: Send>(
    items: &mut [T],
    setting: &Setting<'_>,
    scratches: &mut [Scratch],
    work: impl Fn(&mut T, &mut Scratch) -> Result<(), E> + Sync,
) -> Result<(), Cut<E>> {
    let total = items.iter().fold(0u64, |sum, item| sum.saturating_add(item.bytes()));
    let queue = Mutex::new(items.iter_mut());
    let failure: Mutex<Option<E>> = Mutex::new(None);
    let pace = Pace::new(setting.max_rate);
    let done = AtomicU64::new(0);
    let teller = Teller::new(setting, total);
    let late = || setting.until.is_some_and(|until| Instant::now() >= until);
    teller.tell(0);
    let (work, ends) = (&work, || setting.stop.asked() || late() || lock(&failure).is_some());
    thread::scope(|scope| {
        for scratch in scratches {
            scope.spawn(|| {
                while !ends() {
                    pace.wait(ends);
                    let Some(item) = lock(&queue).next() else { break };
                    let bytes = item.bytes();
                    if let Err(error) = work(item, scratch) {
                        lock(&failure).get_or_insert(error);
                        break;
                    }
                    pace.add(item.cost());
                    let now = done.fetch_add(bytes, Ordering::Relaxed);
                    teller.tell_sometimes(now + bytes);
                }
            });
        }
    });
    if let Some(error) = lock(&failure).take() {
        return Err(Cut::Failed(error));
    }
    let finished = done.load(Ordering::Relaxed);
    teller.tell(finished);
    match finished < total {
        true if setting.stop.asked() => Err(Cut::Stopped),
        true => Err(Cut::Late),
        false => Ok(()),
    }
}

/// A lock whose holder cannot leave it broken: every critical section here is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Keeps all workers together below a rate.
struct Pace {
    rate: Option<u64>,
    began: Instant,
    granted: AtomicU64,
}

impl Pace {
    fn new(rate: Option<u64>) -> Self {
        Self { rate, began: Instant::now(), granted: AtomicU64::new(0) }
    }

    /// Counts `bytes` that were read.
    fn add(&self, bytes: u64) {
        self.granted.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Returns when more may be read, or when the run shall end.
    fn wait(&self, ends: impl Fn() -> bool) {
        let Some(rate) = self.rate else { return };
        let before = self.granted.load(Ordering::Relaxed);
        #[expect(clippy::cast_precision_loss, reason = "a pause, not a record")]
        let due = self.began + Duration::from_secs_f64(before as f64 / rate.max(1) as f64);
        while !ends() {
            let Some(left) = due.checked_duration_since(Instant::now()) else { return };
            thread::sleep(left.min(Duration::from_millis(10)));
        }
    }
}

/// Tells progress, not more often than anybody can see.
struct Teller<'a> {
    setting: &'a Setting<'a>,
    total: u64,
    last: Mutex<Instant>,
}

impl<'a> Teller<'a> {
    fn new(setting: &'a Setting<'a>, total: u64) -> Self {
        Self { setting, total, last: Mutex::new(Instant::now()) }
    }

    fn tell(&self, done_bytes: u64) {
        self.setting.observer.event(Event::Progress {
            phase: self.setting.phase,
            pass: self.setting.pass,
            done_bytes,
            total_bytes: self.total,
        });
    }

    fn tell_sometimes(&self, done_bytes: u64) {
        // A worker that finds the lock taken has nothing to add.
        let Ok(mut last) = self.last.try_lock() else { return };
        if last.elapsed() >= Duration::from_millis(200) {
            *last = Instant::now();
            self.tell(done_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_state_are_those_of_its_pages() {
        for (start, len) in [(0x1000, 0x3000), (0x1200, 0x2000), (0x1200, 0x100), (0x1000, 0x2fff)]
        {
            let mut cell = Cell::new(GuestRange::new(start, len).unwrap());
            for index in 0..cell.states.len() {
                cell.states[index] = PageState::Data;
                for wanted in [PageState::Data, PageState::Hole] {
                    let its = pages(cell.block).zip(&cell.states);
                    let its = its.filter(|(_, state)| **state == wanted);
                    let sum: u64 = its.map(|(page, _)| page.len()).sum();
                    assert_eq!(cell.bytes_in(wanted), sum, "{start:#x} {len:#x} {index}");
                }
            }
        }
    }

    #[test]
    fn what_a_dump_does_not_name_is_not_plugged_in() {
        let range = |start, len| GuestRange::new(start, len).unwrap();
        let mut cell = Cell::new(range(0x10_0000, 0x4000));
        cell.states[2] = PageState::Data;
        cell.discard(PageState::Hole, &[range(0x10_1000, 0x10_0000)], &[range(0x10_3000, 0x1000)]);
        let wanted = [PageState::Hole, PageState::Discarded, PageState::Data, PageState::Hole];
        assert_eq!(*cell.states, wanted, "outside, unplugged, with bytes, named by the dump");
    }
}
