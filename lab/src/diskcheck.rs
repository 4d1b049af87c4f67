//! The checker of `diskread`'s images: whether what a device wrote into memory is as old as what a CPU
//! wrote about it.
//!
//! It is given an image and nothing else. The ledgers are found by what is in them, and say where the
//! pages lie. A read that has ended was noted; so at every instant each page holds the block of the
//! read that is noted for it, or, one page for each thread, all or part of the block of the next read
//! into it, which is under way. A page with an older block is *stale*: it was copied before the device
//! wrote it and not again. One with a newer block is *ahead*: its ledger is older.

use std::collections::BTreeMap;
use std::fmt;

use crate::diskpage::{self, ENTRIES_AT, ENTRY, MARK};
use crate::error::{Result, failed};
use crate::pattern::PAGE;

/// One pass over an image, a piece at a time in any order.
#[derive(Debug, Default)]
pub struct Scan {
    ledgers: BTreeMap<u32, Ledger>,
    /// By the address: the numbers of the blocks of which there is something in the page.
    pages: BTreeMap<u64, Vec<u64>>,
    flaws: Flaws,
}

/// What is wrong with an image besides its age. Such an image is not judged.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Flaws {
    /// Threads whose ledger the image has not.
    pub missing_ledgers: Vec<u32>,
    /// Addresses of pages of which the ledgers tell, and where there is no block.
    pub missing: Vec<u64>,
    /// Addresses of ledgers that carry another frame's number, say what cannot be, or are there
    /// already.
    pub misplaced: Vec<u64>,
    /// Addresses of pages that hold something else among what is of a block, or a block that was
    /// never read into them.
    pub foreign: Vec<u64>,
}

/// A thread's ledger: where it lies, the address of each page, and the last read into it that had ended.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ledger {
    at: u64,
    threads: u32,
    pages: u64,
    blocks: u64,
    entries: Vec<(u64, u64)>,
}

/// What the pages of one image say.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// How many there are.
    pub pages: u64,
    /// Pages into which a read was under way that had written something of its block.
    pub landing: u64,
    /// Pages with an older block than the one that had been read.
    pub stale: u64,
    /// How many reads into the page the oldest of them lacks. The disk comes round again.
    pub oldest: u64,
    /// Pages with a newer block than the one that was being read.
    pub ahead: u64,
}

impl Verdict {
    /// Both together.
    fn and(self, other: &Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            landing: self.landing + other.landing,
            stale: self.stale + other.stale,
            oldest: self.oldest.max(other.oldest),
            ahead: self.ahead + other.ahead,
        }
    }

    /// Whether the guest's memory looked like this at some instant.
    pub fn is_one_instant(&self) -> bool {
        self.stale == 0 && self.ahead == 0
    }
}

impl Scan {
    /// Looks at the pages of a piece that lies at `gpa`, a page's address, in the image.
    pub fn piece(&mut self, gpa: u64, bytes: &[u8]) {
        let magics = [diskpage::block_magic(), diskpage::ledger_magic()];
        for (at, page) in (gpa..).step_by(PAGE).zip(bytes.chunks_exact(PAGE)) {
            match magics.iter().position(|magic| page.starts_with(magic)) {
                Some(0) => self.block(at, page),
                Some(_) => self.ledger(at, page),
                None => {}
            }
        }
    }

    fn block(&mut self, at: u64, page: &[u8]) {
        let magic = diskpage::block_magic();
        if page.chunks_exact(MARK).any(|mark| !mark.starts_with(&magic)) {
            self.flaws.foreign.push(at);
        }
        let mut numbers: Vec<u64> = page.chunks_exact(MARK).map(|mark| u64_at(mark, 8)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        self.pages.insert(at, numbers);
    }

    fn ledger(&mut self, at: u64, page: &[u8]) {
        let [thread, threads, pages, blocks] = [8, 12, 16, 20].map(|at| u32_at(page, at));
        let each = pages.checked_div(threads).map_or(0, to_usize);
        let header = diskpage::Header { thread, threads, pages, blocks, pfn: at / 4096 };
        // At every page where it does not belong there is a copy, at best.
        let sound = page.starts_with(&header.encode())
            && thread < threads
            && pages % threads == 0
            && blocks.checked_rem(pages) == Some(0)
            && each <= diskpage::ENTRIES;
        let entries = page[ENTRIES_AT..].chunks_exact(ENTRY).take(each);
        let entries =
            entries.map(|entry| (u64_at(entry, 0).saturating_mul(4096), u64_at(entry, 8)));
        let (pages, blocks) = (u64::from(pages), u64::from(blocks));
        let ledger = Ledger { at, threads, pages, blocks, entries: entries.collect() };
        if !sound || self.ledgers.insert(thread, ledger).is_some() {
            self.flaws.misplaced.push(at);
        }
    }

    /// What the image shows, all of it having been looked at. A failure when it has flaws.
    pub fn verdict(&self) -> Result<Verdict> {
        Ok(self.verdicts(1)?.into_iter().next().unwrap_or_default())
    }

    /// The same of each disk, of which there are so many: thread t reads number t modulo that.
    pub fn verdicts(&self, disks: usize) -> Result<Vec<Verdict>> {
        let (verdicts, flaws) = self.judge();
        if flaws != Flaws::default() || verdicts.is_empty() {
            return Err(failed(format_args!(
                "the image has not the pages of {} threads as they were: {flaws:x?}",
                verdicts.len()
            )));
        }
        let of = |disk| verdicts.iter().skip(disk).step_by(disks.max(1));
        Ok((0..disks).map(|disk| of(disk).fold(Verdict::default(), |sum, v| sum.and(v))).collect())
    }

    /// Address of every page that is read into, then of every ledger.
    pub fn places(&self) -> (Vec<u64>, Vec<u64>) {
        let ledgers = self.ledgers.values();
        let pages = ledgers.clone().flat_map(|ledger| ledger.entries.iter().map(|(at, _)| *at));
        (pages.collect(), ledgers.map(|ledger| ledger.at).collect())
    }

    /// Of each thread.
    fn judge(&self) -> (Vec<Verdict>, Flaws) {
        let (mut verdicts, mut flaws) = (Vec::new(), Flaws::default());
        flaws.misplaced.clone_from(&self.flaws.misplaced);
        let threads = self.ledgers.values().next().map_or(0, |ledger| ledger.threads);
        flaws.missing_ledgers = (0..threads).filter(|t| !self.ledgers.contains_key(t)).collect();
        for ledger in self.ledgers.values() {
            // The thread's next read goes to the page of its oldest one.
            let mut verdict = Verdict::default();
            let next = ledger.entries.iter().map(|(_, read)| *read).min();
            for (at, read) in &ledger.entries {
                let Some(numbers) = self.pages.get(at) else {
                    flaws.missing.push(*at);
                    continue;
                };
                let fits = |number: &u64| {
                    *number < ledger.blocks && number % ledger.pages == read % ledger.pages
                };
                if !numbers.iter().all(fits) || self.flaws.foreign.contains(at) {
                    flaws.foreign.push(*at);
                    continue;
                }
                verdict.add(numbers, *read, ledger, next == Some(*read));
            }
            verdicts.push(verdict);
        }
        (verdicts, flaws)
    }
}

impl Verdict {
    /// Counts a page that holds something of these blocks; `is_next` when a read into it may be under
    /// way.
    fn add(&mut self, numbers: &[u64], read: u64, ledger: &Ledger, is_next: bool) {
        // The disk comes round after so many reads into a page: what is nearer is meant.
        let round = ledger.blocks / ledger.pages;
        let later = |number: &u64| {
            (number + ledger.blocks - read % ledger.blocks) % ledger.blocks / ledger.pages
        };
        let older = |number: &u64| Some(later(number)).filter(|n| 2 * n > round).map(|n| round - n);
        let oldest = numbers.iter().filter_map(older).max();
        let newer = numbers.iter().map(later).filter(|n| 2 * n <= round).max().unwrap_or(0);
        self.pages += 1;
        self.stale += u64::from(oldest.is_some());
        self.oldest = self.oldest.max(oldest.unwrap_or(0));
        self.ahead += u64::from(newer > u64::from(is_next));
        self.landing += u64::from(is_next && newer == 1);
    }
}

fn to_usize(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// What so many images showed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Runs {
    /// All images.
    pub images: u32,
    /// Images with a stale page.
    pub stale: u32,
    /// Images that are of no instant at all.
    pub torn: u32,
    /// All of them together.
    pub sum: Verdict,
}

impl Runs {
    /// Counts an image.
    pub fn count(&mut self, verdict: &Verdict) {
        self.images += 1;
        self.stale += u32::from(verdict.stale > 0);
        self.torn += u32::from(!verdict.is_one_instant());
        self.sum = self.sum.and(verdict);
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { images, stale, sum, .. } = self;
        write!(f, "{stale}/{images} stale, {} of {} pages", sum.stale, sum.pages)?;
        if sum.stale > 0 {
            write!(f, ", by {} reads at most", sum.oldest)?;
        }
        if sum.ahead > 0 {
            write!(f, ", {} ahead", sum.ahead)?;
        }
        write!(f, ", {} being written", sum.landing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diskpage::Header;

    const THREADS: u32 = 2;
    /// K.
    const PAGES: u32 = 6;
    const BLOCKS: u32 = 60;

    /// A guest of pages at 0, 4096, ... whose ledgers lie behind them, and which can be copied page by
    /// page.
    #[derive(Clone)]
    struct Model {
        memory: Vec<[u8; PAGE]>,
    }

    impl Model {
        fn new() -> Self {
            let mut memory = vec![[0; PAGE]; to_usize(PAGES + THREADS)];
            for page in 0..PAGES {
                diskpage::block(u64::from(page), &mut memory[to_usize(page)]);
            }
            for thread in 0..THREADS {
                let pfn = u64::from(PAGES + thread);
                let header = Header { thread, threads: THREADS, pages: PAGES, blocks: BLOCKS, pfn };
                let ledger = &mut memory[to_usize(PAGES + thread)];
                ledger[..diskpage::HEADER].copy_from_slice(&header.encode());
                for (at, page) in (thread..PAGES).step_by(to_usize(THREADS)).enumerate() {
                    let entry = &mut ledger[ENTRIES_AT + at * ENTRY..];
                    entry[..8].copy_from_slice(&u64::from(page).to_le_bytes());
                    entry[8..16].copy_from_slice(&u64::from(page).to_le_bytes());
                }
            }
            Self { memory }
        }

        /// The device writes so many bytes of what read `n` brings.
        fn land(&mut self, n: u64, bytes: usize) {
            let mut block = [0; PAGE];
            diskpage::block(n % u64::from(BLOCKS), &mut block);
            let page = usize::try_from(n % u64::from(PAGES)).expect("small");
            self.memory[page][..bytes].copy_from_slice(&block[..bytes]);
        }

        /// The thread notes read `n`.
        fn note(&mut self, n: u64) {
            let page = usize::try_from(n % u64::from(PAGES)).expect("small");
            let ledger = to_usize(PAGES) + page % to_usize(THREADS);
            let at = ENTRIES_AT + page / to_usize(THREADS) * ENTRY + 8;
            self.memory[ledger][at..at + 8].copy_from_slice(&n.to_le_bytes());
        }

        fn read(&mut self, n: u64) {
            self.land(n, PAGE);
            self.note(n);
        }

        /// All reads up to this one.
        fn after(n: u64) -> Self {
            let mut model = Self::new();
            (u64::from(PAGES)..=n).for_each(|n| model.read(n));
            model
        }

        fn scan(&self) -> Scan {
            let mut scan = Scan::default();
            for (at, page) in (0..).step_by(PAGE).zip(&self.memory) {
                scan.piece(at, page);
            }
            scan
        }

        fn verdict(&self) -> Verdict {
            self.scan().verdict().expect("a sound image")
        }

        fn flaws(&self) -> Flaws {
            assert!(self.scan().verdict().is_err());
            self.scan().judge().1
        }
    }

    #[test]
    fn every_instant_is_one() {
        for n in 5..200 {
            let mut model = Model::after(n);
            let whole = Verdict { pages: 6, ..Verdict::default() };
            assert_eq!(model.verdict(), whole, "after {n}");
            // The other thread's read is under way too.
            for (part, landing) in [(16, 1), (2048, 1), (PAGE, 1)] {
                model.land(n + 1, part);
                assert_eq!(model.verdict(), Verdict { landing, ..whole }, "{part} of {n} + 1");
                let mut both = model.clone();
                both.land(n + 2, part);
                assert_eq!(both.verdict(), Verdict { landing: 2, ..whole });
            }
        }
    }

    #[test]
    fn a_page_that_the_device_wrote_after_it_was_copied_is_stale() {
        for n in 12..200u64 {
            for lost in 1..=4 {
                let now = Model::after(n);
                // Copied before the last reads into it, all of it or the end.
                let page = usize::try_from(n % 6).expect("small");
                let then = Model::after(n.saturating_sub(6 * lost));
                for kept in [0, 2048] {
                    let mut image = now.clone();
                    image.memory[page][kept..].copy_from_slice(&then.memory[page][kept..]);
                    let verdict = image.verdict();
                    let lost = lost.min((n - n % 6) / 6);
                    let expected = (1, lost, 0, false);
                    let Verdict { stale, oldest, ahead, .. } = verdict;
                    assert_eq!((stale, oldest, ahead, verdict.is_one_instant()), expected, "{n}");
                }
            }
        }
    }

    #[test]
    fn a_ledger_that_is_older_than_its_pages_is_seen() {
        let mut image = Model::after(40);
        // Its thread went on for one read, for two, for a lap.
        let then = Model::after(38).memory[6];
        image.memory[6].copy_from_slice(&then);
        assert_eq!((image.verdict().ahead, image.verdict().landing), (0, 1), "still under way");
        image.memory[6].copy_from_slice(&Model::after(36).memory[6]);
        assert_eq!((image.verdict().ahead, image.verdict().landing), (1, 1));
        image.memory[6].copy_from_slice(&Model::after(28).memory[6]);
        assert_eq!((image.verdict().ahead, image.verdict().stale), (3, 0));
    }

    #[test]
    fn an_image_without_its_pages_as_they_were_is_not_judged() {
        let none = Flaws::default;
        assert!(Scan::default().verdict().is_err(), "an empty image");
        let with = |change: &dyn Fn(&mut Model)| {
            let mut model = Model::after(20);
            change(&mut model);
            model.flaws()
        };
        let ledger = with(&|model| model.memory[7].fill(0));
        assert_eq!(ledger, Flaws { missing_ledgers: vec![1], ..none() });
        let moved = with(&|model| model.memory.swap(6, 7));
        assert_eq!(moved.misplaced, [6 * 4096, 7 * 4096]);
        let copied = with(&|model| model.memory.push(model.memory[6]));
        assert_eq!(copied, Flaws { misplaced: vec![8 * 4096], ..none() });
        let page = with(&|model| model.memory[3].fill(0));
        assert_eq!(page, Flaws { missing: vec![3 * 4096], ..none() });
        let other = with(&|model| model.memory.swap(2, 3));
        assert_eq!(other.foreign.len(), 2);
        let spoilt = with(&|model| model.memory[2][4000] ^= 1);
        assert_eq!(spoilt, Flaws { foreign: vec![2 * 4096], ..none() });
        let beyond = with(&|model| diskpage::block(62, &mut model.memory[2]));
        assert_eq!(beyond, Flaws { foreign: vec![2 * 4096], ..none() });
    }

    #[test]
    fn runs_are_added_up() {
        let mut runs = Runs::default();
        runs.count(&Model::after(20).verdict());
        let mut stale = Model::after(20);
        stale.memory[2] = Model::after(8).memory[2];
        runs.count(&stale.verdict());
        assert_eq!((runs.images, runs.stale, runs.torn), (2, 1, 1));
        assert_eq!(
            runs.to_string(),
            "1/2 stale, 1 of 12 pages, by 2 reads at most, 0 being written"
        );
    }
}
