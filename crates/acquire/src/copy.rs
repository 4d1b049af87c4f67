//! The one loop: workers take blocks, each works on its own, nothing is queued.
//!
//! Capture passes, sealing and whatever reads the store again are all this loop with another
//! piece of work. A worker owns the cell that it took, so results need no lock and no order;
//! what is ordered (the block records) is written afterwards from the cells.

use crate::event::{Event, Observer, Phase};
use crate::stop::Stop;
use evidence::block::{BLOCK_BYTES, BLOCK_PAGES, Block, TooManyBlocks, index};
use evidence::digest::Digest;
use evidence::record::Span;
use evidence::state::page_count;
use evidence::{MemoryMap, PageState};
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
    Ok(evidence::block::cut(map)?
        .into_iter()
        .map(|block| Cell {
            block,
            states: vec![PageState::Hole; index(page_count(block))].into(),
            stored: Span { t0_ns: 0, t1_ns: 0 },
            pass: 0,
            earlier: None,
            first: None,
            changed: None,
            digest: Digest::ZERO,
            sealed: false,
        })
        .collect())
}

const PAGE_BYTES: usize = 4096;

/// Buffers of one worker: two blocks, so that a read can be compared with the one before.
///
/// Lent from a page's beginning on: the kernel copies whole pages twice as fast to whole pages
/// (measured: 19 GB/s a core against 9), and direct I/O needs no other buffer.
pub struct Scratch {
    new: Box<[u8]>,
    old: Box<[u8]>,
    states: Box<[PageState]>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let bytes = || vec![0u8; BLOCK_BYTES + PAGE_BYTES].into_boxed_slice();
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

/// How the loop runs.
pub struct Setting<'a> {
    /// Worker threads, at least one.
    pub workers: usize,
    /// Bytes per second that all workers together may take; `None`: no limit.
    pub max_rate: Option<u64>,
    /// Asked between two blocks.
    pub stop: &'a Stop,
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
    /// A worker failed; the first failure is kept.
    Failed(E),
}

/// Runs `work` on every cell.
///
/// # Errors
/// [`Cut`]; cells that were worked on stay as the work left them.
pub fn each<E: Send>(
    cells: &mut [Cell],
    setting: &Setting<'_>,
    work: impl Fn(&mut Cell, &mut Scratch) -> Result<(), E> + Sync,
) -> Result<(), Cut<E>> {
    let total = cells.iter().fold(0u64, |sum, cell| sum.saturating_add(cell.block.len()));
    let queue = Mutex::new(cells.iter_mut());
    let failure: Mutex<Option<E>> = Mutex::new(None);
    let pace = Pace::new(setting.max_rate);
    let done = AtomicU64::new(0);
    let teller = Teller::new(setting, total);
    teller.tell(0);
    thread::scope(|scope| {
        for _ in 0..setting.workers.max(1) {
            scope.spawn(|| {
                let mut scratch = Scratch::new();
                while !setting.stop.asked() && lock(&failure).is_none() {
                    let Some(cell) = lock(&queue).next() else { break };
                    pace.wait(cell.block.len(), setting.stop);
                    if let Err(error) = work(cell, &mut scratch) {
                        lock(&failure).get_or_insert(error);
                        break;
                    }
                    let now = done.fetch_add(cell.block.len(), Ordering::Relaxed);
                    teller.tell_sometimes(now + cell.block.len());
                }
            });
        }
    });
    if let Some(error) = lock(&failure).take() {
        return Err(Cut::Failed(error));
    }
    let finished = done.load(Ordering::Relaxed);
    teller.tell(finished);
    if finished < total { Err(Cut::Stopped) } else { Ok(()) }
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

    /// Returns when `bytes` more may be read, or when the run shall end.
    fn wait(&self, bytes: u64, stop: &Stop) {
        let Some(rate) = self.rate else { return };
        let before = self.granted.fetch_add(bytes, Ordering::Relaxed);
        #[expect(clippy::cast_precision_loss, reason = "a pause, not a record")]
        let due = self.began + Duration::from_secs_f64(before as f64 / rate.max(1) as f64);
        while !stop.asked() {
            let Some(left) = due.checked_duration_since(Instant::now()) else { return };
            thread::sleep(left.min(Duration::from_millis(50)));
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
