//! How fast this guest's memory is read on this host: a short read, thrown away, so that the length
//! of a hold is predicted from a measurement.

use crate::copy::pages_of;
use evidence::block::{BLOCK_BYTES, index};
use evidence::{BLOCK_LEN, GuestRange, PageState};
use host::{GuestMemory, Source};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

/// Memory of each worker that the sample is read into, in blocks: more than its cache holds, as in
/// the hold, where every byte goes to memory.
const BLOCKS_A_WORKER: usize = 12;

/// Blocks that are looked at for wholly present ones.
const CANDIDATES: usize = 512;

/// Single pages that each worker reads.
const SINGLE_PAGES: usize = 64;

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Speed {
    /// Bytes a second, all workers together.
    pub bytes_per_s: u64,
    /// Nanoseconds for a page that is read alone.
    pub page_ns: u64,
    /// Bytes that the sample had.
    pub sampled_bytes: u64,
    /// How many workers there were.
    pub workers: u32,
}

/// Reads a sample of `resident` with `workers` threads; `None` when no block is wholly in memory.
/// Only pages that are in memory are read: nothing is brought back from swap.
pub fn measure(memory: &GuestMemory, resident: &[GuestRange], workers: usize) -> Option<Speed> {
    let workers = workers.max(1);
    let blocks = sample(memory, resident, workers * BLOCKS_A_WORKER);
    if blocks.is_empty() {
        return None;
    }
    let barrier = Barrier::new(workers);
    let read = |own: Vec<GuestRange>| -> Option<(Instant, Instant, u64, Duration)> {
        let mut buffer = vec![1u8; BLOCKS_A_WORKER * BLOCK_BYTES];
        let mut states = vec![PageState::Hole; pages_of(BLOCK_LEN)];
        barrier.wait();
        let began = Instant::now();
        let mut bytes = 0;
        for (block, to) in own.iter().zip(buffer.chunks_mut(BLOCK_BYTES)) {
            read(memory, *block, to, &mut states)?;
            bytes += block.len();
        }
        let ended = Instant::now();
        let first = own.first()?;
        for page in evidence::state::pages(*first).take(SINGLE_PAGES) {
            read(memory, page, &mut buffer, &mut states)?;
        }
        Some((began, ended, bytes, ended.elapsed()))
    };
    let read = &read;
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers)
            .map(|worker| {
                let own = blocks.iter().copied().skip(worker).step_by(workers).collect();
                scope.spawn(move || read(own))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().ok().flatten()).collect()
    });
    // A worker without a block has nothing to say.
    let results: Vec<_> = results.into_iter().flatten().collect();
    let began = results.iter().map(|r| r.0).min()?;
    let ended = results.iter().map(|r| r.1).max()?;
    let bytes: u64 = results.iter().map(|r| r.2).sum();
    let single = results.iter().map(|r| r.3).max()?;
    let nanoseconds = ended.duration_since(began).as_nanos().max(1);
    let bytes_per_s = u128::from(bytes) * 1_000_000_000 / nanoseconds;
    Some(Speed {
        bytes_per_s: u64::try_from(bytes_per_s).unwrap_or(u64::MAX).max(1),
        page_ns: u64::try_from(single.as_nanos() / SINGLE_PAGES as u128).unwrap_or(u64::MAX),
        sampled_bytes: bytes,
        workers: u32::try_from(workers).unwrap_or(u32::MAX),
    })
}

fn read(
    memory: &GuestMemory,
    at: GuestRange,
    to: &mut [u8],
    states: &mut [PageState],
) -> Option<()> {
    let (len, pages) = (index(at.len()), index(evidence::state::page_count(at)));
    memory.read(at, to.get_mut(..len)?, states.get_mut(..pages)?).ok()
}

/// At most `count` blocks that are wholly in memory, from all over the guest.
fn sample(memory: &GuestMemory, resident: &[GuestRange], count: usize) -> Vec<GuestRange> {
    let step = (resident.len() / CANDIDATES).max(1);
    let whole = |block: &&GuestRange| memory.is_wholly_present(**block).unwrap_or(false);
    let found: Vec<GuestRange> =
        resident.iter().step_by(step).take(CANDIDATES).filter(whole).copied().collect();
    let step = (found.len() / count.max(1)).max(1);
    found.into_iter().step_by(step).take(count).collect()
}
