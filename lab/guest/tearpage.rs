//! What a page of `tearbench` holds. Compiled twice: into the guest's program, which writes it, and
//! into the lab, which finds it in an image. Numbers are little endian.

use crate::pattern::{self, PAGE};

/// The magic, inverted: so a program that holds these bytes does not match its own pages.
const INVERTED: [u8; 16] = [
    !b's', !b't', !b'i', !b'l', !b'l', !b'f', !b'r', !b'a', !b'm', !b'e', !b' ', !b't', !b'e',
    !b'a', !b'r', !b'!',
];

/// First 16 bytes of every page, made when it is asked for.
pub fn magic() -> [u8; 16] {
    std::hint::black_box(INVERTED).map(|byte| !byte)
}

/// The layout described here.
pub const VERSION: u16 = 1;
/// Where the header's own checksum lies: CRC-32C of all bytes before it.
pub const CRC_AT: usize = 0x4c;
/// Where the body begins.
pub const BODY_AT: usize = 0x80;

/// Kind of a page whose words are a ring's.
pub const RING: u16 = 1;
/// Kind of a page with a vector clock.
pub const CLOCK: u16 = 2;
/// Kind of a page that is never written again.
pub const CANARY: u16 = 3;
/// Kind of a page of ledger entries.
pub const LEDGER: u16 = 4;
/// Kind of the page that says when its thread was last seen, and where it was missed.
pub const HEARTBEAT: u16 = 5;

/// Flag of a run that asked for huge pages.
pub const THP: u16 = 1;

/// Offsets in a ring's page of its three words, in the order of the stores.
pub const WORDS: [usize; 3] = [0x080, 0x7f8, 0xff8];

/// Most threads of a run: the entries of a vector clock.
pub const THREADS: usize = 16;
/// Where a vector clock's entries lie: the greatest number of each thread that was known.
pub const CLOCK_AT: usize = 0x100;

/// Length of a ledger entry: number, TSC, CLOCK_MONOTONIC, CLOCK_REALTIME (64 bits each), then the
/// CRC-32C of these and 32 bits of nothing.
pub const ENTRY: usize = 40;
/// Ledger entries in a page; the first lies at [`BODY_AT`].
pub const ENTRIES: usize = (PAGE - BODY_AT) / ENTRY;

/// In a heartbeat page, 64 bits each: the beat's number before anything else of it is written, the
/// TSC, CLOCK_MONOTONIC, CLOCK_REALTIME, the thread's last store, the beat's number again.
pub const BEAT_AT: usize = 0x080;
/// Length of what lies there.
pub const BEAT: usize = 48;
/// In a heartbeat page: how many gaps there were, the longest by the TSC in ticks, the longest by
/// CLOCK_MONOTONIC in nanoseconds.
pub const GAPS_AT: usize = 0x0c0;
/// In a heartbeat page: the last gaps, each of TSC before it, ticks, nanoseconds by
/// CLOCK_MONOTONIC, the thread's last store.
pub const GAP_LOG_AT: usize = 0x100;
/// Gaps that the page holds.
pub const GAP_LOG: usize = (PAGE - GAP_LOG_AT) / 32;

/// A thread's stores go round by round: the six words of its pair, then the three words of the next
/// page of its spread. Each is numbered, and the number is what is stored.
pub const ROUND: u64 = 9;
/// Words of a pair.
pub const PAIR_WORDS: u64 = 6;
/// Rings of a thread: number 2 t is thread t's pair, 2 t + 1 its spread.
pub const RINGS: u32 = 2;

/// The first 80 bytes of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// [`RING`], [`CLOCK`], ...
    pub kind: u16,
    /// [`THP`] or 0.
    pub flags: u16,
    /// The thread that writes here; 0 for canaries.
    pub thread: u16,
    /// What tells this run's pages from those of any other.
    pub run: [u8; 16],
    /// Which of the groups of this kind the page belongs to.
    pub group: u32,
    /// The page's number in its group.
    pub index: u32,
    /// K, the pages of the group.
    pub pages: u32,
    /// Groups of this kind.
    pub groups: u32,
    /// Virtual address in the program.
    pub va: u64,
    /// Guest frame number.
    pub pfn: u64,
    /// The program's PID.
    pub pid: u32,
}

impl Header {
    /// The bytes, with the checksum behind them.
    pub fn encode(&self) -> [u8; CRC_AT + 4] {
        let mut bytes = [0; CRC_AT + 4];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(&magic());
        for part in [VERSION, self.kind, self.flags, self.thread] {
            put(&part.to_le_bytes());
        }
        put(&self.run);
        for part in [self.group, self.index, self.pages, self.groups] {
            put(&part.to_le_bytes());
        }
        put(&self.va.to_le_bytes());
        put(&self.pfn.to_le_bytes());
        put(&self.pid.to_le_bytes());
        let crc = crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

/// A ledger entry as it lies in its page.
pub fn ledger_entry(number: u64, tsc: u64, monotonic_ns: u64, realtime_ns: u64) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    for (at, part) in [number, tsc, monotonic_ns, realtime_ns].into_iter().enumerate() {
        bytes[at * 8..at * 8 + 8].copy_from_slice(&part.to_le_bytes());
    }
    let crc = crc32c(&bytes[..32]);
    bytes[32..36].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Everything from [`BODY_AT`] on of the canary in frame `pfn` of run `run`.
pub fn canary_body(run: &[u8; 16], pfn: u64, body: &mut [u8]) {
    let half = |at: usize| (0..8).fold(0, |n, i| n | u64::from(run[at + i]) << (8 * i));
    let mut state = (half(0) ^ half(8).rotate_left(17) ^ pfn.rotate_left(32)) | 1;
    for word in body.chunks_exact_mut(8) {
        word.copy_from_slice(&pattern::next(&mut state).to_le_bytes());
    }
}

/// CRC-32C (Castagnoli), as iSCSI and ext4 use it.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!0, |crc: u32, byte| crc >> 8 ^ REMAINDERS[usize::from(crc.to_le_bytes()[0] ^ byte)])
}

/// What each byte leaves when it is divided by the polynomial.
const REMAINDERS: [u32; 256] = {
    let mut table = [0; 256];
    let (mut byte, mut number) = (0, 0);
    while byte < table.len() {
        let (mut crc, mut bit): (u32, u32) = (number, 0);
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
            bit += 1;
        }
        table[byte] = crc;
        (byte, number) = (byte + 1, number + 1);
    }
    table
};

/// Which of a program's pages are taken for what, as indices into its list of frame numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// One per thread.
    pub threads: Vec<Share>,
    /// The pages that are left.
    pub canaries: Vec<usize>,
}

/// The pages of one thread.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Share {
    /// Two pages, as far apart as can be.
    pub pair: Vec<usize>,
    /// Pages all over the memory between them.
    pub spread: Vec<usize>,
    /// Two pages for vector clocks, beside the pair.
    pub clocks: Vec<usize>,
    /// Pages of the ledger.
    pub ledger: Vec<usize>,
    /// The page of the heartbeat.
    pub heartbeat: usize,
}

/// First frame number at 4 GiB.
pub const FOUR_GIB: u64 = 1 << 20;

/// Shares the pages out, `spread` and `ledger` of them for each thread's ring and ledger. The first
/// thread gets the lowest and the highest frame, and each further thread's rings lie inside those of
/// the thread before, by a fixed part of the memory on either side of the 4 GiB line: so one
/// thread's vector clock lies well beyond the other's rings. `None` when there are too few pages.
pub fn share_out(frames: &[u64], threads: usize, spread: usize, ledger: usize) -> Option<Layout> {
    let needed = (2 + spread + 2 + ledger + 1).checked_mul(threads)?;
    if frames.len() < needed.checked_mul(2)? || spread < 2 {
        return None;
    }
    let mut order: Vec<usize> = (0..frames.len()).collect();
    order.sort_unstable_by_key(|&page| frames[page]);
    let last = order.len() - 1;
    let below = order.partition_point(|&page| frames[page] < FOUR_GIB);
    // With all memory on one side, the middle stands for the line.
    let line = if below == 0 || below > last { order.len() / 2 } else { below };
    let inside = |part: usize, thread: usize| part * thread / (4 * threads);
    let mut free = Free(order.into_iter().map(Some).collect());
    let mut layout = Layout::default();
    for thread in 0..threads {
        let (low, high) = (inside(line, thread), last - inside(last + 1 - line, thread));
        layout.threads.push(Share {
            pair: vec![free.from(low)?, free.down_from(high)?],
            clocks: vec![free.from(low)?, free.down_from(high)?],
            ..Share::default()
        });
    }
    for (thread, share) in layout.threads.iter_mut().enumerate() {
        let (low, high) = (inside(line, thread), last - inside(last + 1 - line, thread));
        let even = |page: usize, of: usize| low + (high - low) * page / of;
        for page in 0..spread {
            // The lower half looks for a free page upwards, the upper half downwards.
            let at = even(page, spread - 1);
            let free = if page < spread / 2 { free.from(at) } else { free.down_from(at) };
            share.spread.push(free?);
        }
        share.heartbeat = free.from(even(1, 2))?;
        share.ledger = (0..ledger).map(|_| free.from(even(1, 2))).collect::<Option<_>>()?;
    }
    layout.canaries = free.0.into_iter().flatten().collect();
    Some(layout)
}

/// Pages by frame number; `None` where one was taken.
struct Free(Vec<Option<usize>>);

impl Free {
    /// The first free page at this place or above.
    fn from(&mut self, at: usize) -> Option<usize> {
        self.0.get_mut(at..)?.iter_mut().find_map(Option::take)
    }

    /// The first free page at this place or below.
    fn down_from(&mut self, at: usize) -> Option<usize> {
        self.0.get_mut(..=at)?.iter_mut().rev().find_map(Option::take)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa); // RFC 3720, B.4
    }

    /// Frames in no order, some below the line.
    fn frames(below: u64, above: u64) -> Vec<u64> {
        let all = (0..below).map(|n| 0x1000 + n).chain((0..above).map(|n| FOUR_GIB + n));
        let mut all: Vec<u64> = all.collect();
        let mut state = 5;
        for at in (1..all.len()).rev() {
            all.swap(at, usize::try_from(pattern::next(&mut state)).expect("64 bits") % (at + 1));
        }
        all
    }

    #[test]
    fn every_page_is_taken_once() {
        for (below, above, threads) in [(300, 500, 2), (0, 800, 2), (800, 0, 1), (40, 2000, 4)] {
            let frames = frames(below, above);
            let layout = share_out(&frames, threads, 32, 3).expect("enough pages");
            let mut taken = layout.canaries.clone();
            for share in &layout.threads {
                taken.extend(share.pair.iter().chain(&share.spread).chain(&share.clocks));
                taken.extend(share.ledger.iter().chain([&share.heartbeat]));
                let lens = [&share.pair, &share.spread, &share.clocks, &share.ledger];
                assert_eq!(lens.map(Vec::len), [2, 32, 2, 3]);
            }
            taken.sort_unstable();
            assert!(taken.into_iter().eq(0..frames.len()), "{below} and {above}");
        }
    }

    #[test]
    fn every_ring_lies_on_both_sides_and_inside_the_one_before() {
        let frames = frames(300, 500);
        let layout = share_out(&frames, 2, 32, 3).expect("enough pages");
        let of = |pages: &[usize]| {
            let all: Vec<u64> = pages.iter().map(|&page| frames[page]).collect();
            (all.iter().min().copied(), all.iter().max().copied())
        };
        for share in &layout.threads {
            for pages in [&share.pair, &share.spread, &share.clocks] {
                assert!(of(pages).0 < Some(FOUR_GIB) && of(pages).1 >= Some(FOUR_GIB));
            }
            let below = share.spread.iter().filter(|&&page| frames[page] < FOUR_GIB).count();
            assert!((8..24).contains(&below), "{below} of 32 are below");
        }
        let [first, second] = &layout.threads[..] else { panic!("two threads") };
        assert_eq!(of(&first.pair), (Some(0x1000), Some(FOUR_GIB + 499)));
        // A thread's clocks lie an eighth of each side beyond the rings of the next.
        assert!(of(&first.clocks).0 < Some(0x1000 + 5) && of(&second.spread).0 > Some(0x1000 + 30));
        assert!(
            of(&first.clocks).1 > of(&second.spread).1 && of(&second.pair).0 > of(&first.clocks).0
        );
        assert_eq!(share_out(&frames[..100], 2, 32, 3), None, "too few pages");
    }
}
