//! The ring guest of the tear benchmark: a boot sector (`guest/ring.S`) and what it is told.

use std::fs;
use std::time::{Duration, SystemTime};

use crate::error::{Doing, Result, failed};
use crate::kit::Kit;

/// A disk sector, and where its parameters lie in it, as in `guest/ring.S`.
const SECTOR: usize = 512;
const PARAMETERS: usize = 0x190;
/// Size of the disk that the sector is on: less than a megabyte is no geometry for the firmware.
const DISK: usize = 1 << 20;

const MIB: u32 = 1 << 20;
/// The first page of a ring: above the firmware and the sector.
const BASE: u32 = 8 * MIB;
/// What the firmware keeps at the end of memory is not overwritten.
const TOP: u32 = MIB;

/// A ring of pages in a guest of a certain size. The guest first fills its memory, then stores
/// k = L, L + 1, L + 2, ... for ever, each into word k mod L, one store of 64 bits after the other.
/// The three words of a page follow each other, so a page torn in itself shows too.
#[derive(Debug, Clone)]
pub struct Ring {
    /// What tells this guest's pages from those of any other run.
    pub run: u64,
    /// Guest-physical address of the first page.
    pub base: u32,
    /// From one page to the next, in bytes.
    pub stride: u32,
    /// K, the number of pages.
    pub pages: u32,
    /// Rounds of an empty loop after each page: 0 for the fastest ring there is.
    pub delay: u32,
    /// The guest's memory.
    pub memory_mib: u32,
    /// After the first lap the CPU halts for ever: nothing in the guest changes any more.
    pub halts: bool,
}

impl Ring {
    /// Offsets in a page of its words, in the order of the ring.
    pub const OFFSETS: [usize; 3] = [0x080, 0x7f8, 0xff8];

    /// Two pages, half of the guest's memory apart: the best resolution in time.
    pub fn pair(memory_mib: u32) -> Self {
        Self::new(2, memory_mib / 2 * MIB, memory_mib)
    }

    /// 240 pages all over the guest's memory, at another offset in each megabyte.
    pub fn spread(memory_mib: u32) -> Self {
        let pages = 240;
        let even = (memory_mib * MIB - 2 * BASE) / pages;
        // An odd number of pages apart: at an even one they would share few places of a translator's TLB.
        Self::new(pages, ((even / 4096 + 1) | 1) * 4096, memory_mib)
    }

    /// Every page of the guest's memory from the first one up: so each write goes to a page that
    /// was not written for long.
    pub fn wide(memory_mib: u32) -> Self {
        Self::new((memory_mib * MIB - 2 * BASE) / 4096, 4096, memory_mib)
    }

    fn new(pages: u32, stride: u32, memory_mib: u32) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let run = since.as_secs() << 30 | u64::from(since.subsec_nanos());
        Self { run, base: BASE, stride, pages, delay: 0, memory_mib, halts: false }
    }

    /// The same with an empty loop of so many rounds after each page: a slow ring.
    pub fn delay(mut self, rounds: u32) -> Self {
        self.delay = rounds;
        self
    }

    /// The same, but that it halts after the first lap.
    pub fn halting(mut self) -> Self {
        self.halts = true;
        self
    }

    /// L, the number of words.
    pub fn words(&self) -> u64 {
        u64::from(self.pages) * 3
    }

    /// Guest-physical address of a page.
    pub fn gpa(&self, page: u32) -> u64 {
        u64::from(self.base) + u64::from(page) * u64::from(self.stride)
    }

    /// `writes` in `took`, per second.
    pub fn rate(writes: u64, took: Duration) -> u64 {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        writes.saturating_mul(1_000_000) / micros.max(1)
    }

    /// The certified resolution in nanoseconds at so many writes per second: an image whose words
    /// were read further apart is torn for certain, as 2 L - 1 stores lie between.
    pub fn resolution_ns(&self, per_second: u64) -> u64 {
        (2 * self.words() - 1).saturating_mul(1_000_000_000) / per_second.max(1)
    }

    /// The disk that boots this ring.
    pub(crate) fn disk(&self, kit: &Kit) -> Result<Vec<u8>> {
        let file = kit.ring();
        let missing = "reading the ring guest: run `cargo xtask setup`";
        let mut disk = fs::read(&file).doing(missing)?;
        if disk.len() != SECTOR {
            return Err(failed(format_args!("{} is no boot sector", file.display())));
        }
        let fill_to = self.memory_mib * MIB - TOP;
        let mut at = PARAMETERS;
        let mut put = |bytes: &[u8]| {
            disk[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&self.run.to_le_bytes());
        let halts = u32::from(self.halts);
        for word in [self.base, self.stride, self.pages, self.delay, fill_to, halts] {
            put(&word.to_le_bytes());
        }
        disk.resize(DISK, 0);
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ring_lies_in_the_memory_that_is_filled() {
        for memory_mib in [24, 32, 64, 128, 256, 512, 2048] {
            for ring in [Ring::pair(memory_mib), Ring::spread(memory_mib), Ring::wide(memory_mib)] {
                let end = ring.gpa(ring.pages - 1) + 4096;
                assert!(end <= u64::from(memory_mib * MIB - TOP), "{ring:?}");
                assert_eq!((ring.base % 4096, ring.stride % 4096), (0, 0));
                assert!(ring.stride >= 4096);
            }
        }
    }

    #[test]
    fn the_resolution_is_the_time_of_2l_less_one_stores() {
        let ring = Ring::pair(256);
        assert_eq!(ring.words(), 6);
        assert_eq!(Ring::rate(5_000_000, Duration::from_millis(500)), 10_000_000);
        assert_eq!(ring.resolution_ns(10_000_000), 1100);
    }
}
