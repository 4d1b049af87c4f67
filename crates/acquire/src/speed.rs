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

/// Single pages that each worker reads in a round.
const SINGLE_PAGES: usize = 64;

/// Each worker reads its sample so often, and the round in the middle counts: on a busy host one
/// that was put aside for a while would tell of the others' work.
const ROUNDS: usize = 5;

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
    let read = |own: Vec<GuestRange>| -> Option<Own> {
        let mut buffer = vec![1u8; BLOCKS_A_WORKER * BLOCK_BYTES];
        let mut states = vec![PageState::Hole; pages_of(BLOCK_LEN)];
        let (mut all, mut single) = (Vec::new(), Vec::new());
        // Everybody comes here, also who has nothing to read.
        barrier.wait();
        let first = *own.first()?;
        for _ in 0..ROUNDS {
            let began = Instant::now();
            for (block, to) in own.iter().zip(buffer.chunks_mut(BLOCK_BYTES)) {
                read(memory, *block, to, &mut states)?;
            }
            all.push(began.elapsed());
            let began = Instant::now();
            for page in evidence::state::pages(first).take(SINGLE_PAGES) {
                read(memory, page, &mut buffer, &mut states)?;
            }
            single.push(began.elapsed());
        }
        let bytes = own.iter().map(|block| block.len()).sum();
        Some(Own { bytes, all: middle(all), single: middle(single) })
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
    let results: Vec<Own> = results.into_iter().flatten().collect();
    let single = results.iter().map(|own| own.single).max()?;
    let bytes_per_s: u128 = results.iter().map(Own::bytes_per_s).sum();
    Some(Speed {
        bytes_per_s: u64::try_from(bytes_per_s).unwrap_or(u64::MAX).max(1),
        page_ns: u64::try_from(single.as_nanos() / SINGLE_PAGES as u128).unwrap_or(u64::MAX),
        sampled_bytes: results.iter().map(|own| own.bytes).sum(),
        workers: u32::try_from(workers).unwrap_or(u32::MAX),
    })
}

/// What one worker found.
struct Own {
    bytes: u64,
    /// For all its blocks.
    all: Duration,
    /// For [`SINGLE_PAGES`].
    single: Duration,
}

impl Own {
    fn bytes_per_s(&self) -> u128 {
        u128::from(self.bytes) * 1_000_000_000 / self.all.as_nanos().max(1)
    }
}

/// The one in the middle; no time when there is none.
fn middle(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_that_was_put_aside_does_not_count() {
        let [short, long, longer] = [3, 4, 900].map(Duration::from_millis);
        assert_eq!(middle(vec![longer, short, longer, long, short]), long);
        assert_eq!(middle(Vec::new()), Duration::ZERO);
    }
}
