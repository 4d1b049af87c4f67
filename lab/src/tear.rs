//! The checker of the tear benchmark: whether an image of a ring guest shows one instant.
//!
//! The writer's stores are numbered, and store k put the value k into word k mod L. So the memory
//! after store n is a function of n, and a word that holds v does so from store v up to v + L - 1.
//! An image shows one instant if and only if one n lies in all these intervals:
//! `max v <= min v + L - 1`. Words are read in whatever order: every word is written in each lap.
//!
//! A store is one of 64 bits, a copy need not be: where `rep movsb` goes byte by byte (a translated
//! CPU does) it can find the low bytes of one store and the high bytes of a later one. Such a word
//! shows two stores, and so no instant: it is torn by itself ([`Word::halves`]).

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Result, failed};
use crate::ring::Ring;

const PAGE: usize = 4096;
/// At the start of a ring page; the boot sector holds it inverted.
const MAGIC: &[u8; 16] = b"stillframe ring!";

/// What the words of one ring in one image say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// L, the number of words; one more for each that shows two stores.
    pub words: u64,
    /// The least value.
    pub min: u64,
    /// The greatest value.
    pub max: u64,
    /// The cut that most words agree with: an n of theirs, the least if there are several.
    pub cut: u64,
    /// Words that do not agree with it. Divided by L this is the torn fraction.
    pub off_cut: u64,
    /// Causal violations: pairs of words of which the second proves that the first was overwritten
    /// before.
    pub violations: u64,
    /// How many stores the image spans beyond what one instant can show.
    pub smear_writes: u64,
}

impl Verdict {
    /// Whether no instant of the guest looked like this.
    pub fn is_torn(&self) -> bool {
        self.smear_writes > 0
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { words, off_cut, violations, smear_writes, .. } = self;
        write!(f, "{off_cut} of {words} words off, {violations} violations, {smear_writes} writes")
    }
}

/// A word of a writer that numbers its stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// The number of the last store into it.
    pub value: u64,
    /// How many stores later the next one goes there: L in a ring, where all words take turns.
    pub lap: u64,
}

/// Within how many laps a copy has gone on within one word. Each more makes it likelier that a word
/// that was spoilt otherwise passes for one: with these, some one in a hundred random numbers does.
const HALVES_WITHIN: u64 = 16;

impl Word {
    /// What a value says of a word into which the stores `residue`, `residue + lap`, ... go, of which
    /// the first is `first` at least: the store that it shows; or two, if it can be the low bytes of
    /// one and the high bytes of a later one; or none.
    pub fn found(value: u64, lap: u64, residue: u64, first: u64) -> Vec<Self> {
        let word = |value| Self { value, lap };
        if value >= first && value.checked_rem(lap) == Some(residue) {
            return vec![word(value)];
        }
        let halves = Self::halves(value, lap, residue).filter(|[early, _]| *early >= first);
        halves.map_or(vec![], |halves| halves.map(word).to_vec())
    }

    /// Two stores of which a copy that goes upwards byte by byte makes this value, if there are any.
    fn halves(value: u64, lap: u64, residue: u64) -> Option<[u64; 2]> {
        (1..8).find_map(|bytes| {
            let low = u64::MAX >> (64 - 8 * bytes);
            let high = value & !low;
            // The last store before the high bytes became these, and the first after.
            let before = high.checked_sub(1)?;
            let before = before.checked_sub((before % lap + lap - residue) % lap)?;
            let late = before.checked_add(lap)?;
            let early = (0..HALVES_WITHIN)
                .map_while(|n| before.checked_sub(n * lap))
                .find(|early| early & low == value & low)?;
            (late & !low == high).then_some([early, late])
        })
    }

    /// The last store after which the word is what it is.
    fn last(&self) -> u64 {
        self.value.saturating_add(self.lap.saturating_sub(1))
    }
}

/// Judges words, in any order; they need not all come round after the same number of stores. `None` without
/// any.
pub fn judge_words(words: &[Word]) -> Option<Verdict> {
    let (mut values, mut lasts): (Vec<u64>, Vec<u64>) =
        words.iter().map(|word| (word.value, word.last())).unzip();
    values.sort_unstable();
    lasts.sort_unstable();
    let (min, max, soonest) = (*values.first()?, *values.last()?, *lasts.first()?);
    // Words that no longer were what they are when `n` was stored, and those that were already.
    let gone = |n: u64| count(lasts.partition_point(|&last| last < n));
    let there = |n: u64| count(values.partition_point(|&value| value <= n));
    // The number of words that agree rises only where an interval begins.
    let agree = |n: u64| there(n) - gone(n);
    let cut = values.iter().copied().rev().max_by_key(|&n| agree(n))?;
    Some(Verdict {
        words: count(words.len()),
        min,
        max,
        cut,
        off_cut: count(words.len()) - agree(cut),
        violations: values.iter().map(|&value| gone(value)).sum(),
        smear_writes: max.saturating_sub(soonest),
    })
}

fn count(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// What is wrong with an image besides tearing. Such an image is not judged.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Flaws {
    /// Pages of the ring that the image has not.
    pub missing: Vec<u32>,
    /// Pages that it has more than once: stale copies.
    pub duplicate: Vec<u32>,
    /// Addresses in the image of pages that carry another frame's number, or are no page of this
    /// ring.
    pub misplaced: Vec<u64>,
    /// Words (0 to L - 1) with a value that was never stored there, and the value.
    pub foreign: Vec<(u64, u64)>,
}

/// One pass over an image, a piece at a time in any order. Pages are found by what is in them.
#[derive(Debug)]
pub struct Scan {
    run: u64,
    pages: u32,
    found: BTreeMap<u32, Vec<Vec<Word>>>,
    flaws: Flaws,
}

impl Scan {
    /// A scan for this ring, of which it knows the run and the number of pages.
    pub fn new(ring: &Ring) -> Self {
        Self { run: ring.run, pages: ring.pages, found: BTreeMap::new(), flaws: Flaws::default() }
    }

    /// Looks at the pages of a piece that lies at `gpa`, a page's address, in the image.
    pub fn piece(&mut self, gpa: u64, bytes: &[u8]) {
        for (at, page) in (gpa..).step_by(PAGE).zip(bytes.chunks_exact(PAGE)) {
            if page.starts_with(MAGIC) && u64_at(page, 0x10) == self.run {
                self.page(at, page);
            }
        }
    }

    fn page(&mut self, at: u64, page: &[u8]) {
        let (index, of) = (u32_at(page, 0x18), u32_at(page, 0x1c));
        if u64_at(page, 0x20).checked_mul(4096) != Some(at) || of != self.pages || index >= of {
            self.flaws.misplaced.push(at);
            return;
        }
        let (first, lap) = (u64::from(index) * 3, self.words());
        let values = Ring::OFFSETS.map(|offset| u64_at(page, offset));
        let found: Vec<_> =
            (first..).zip(values).map(|(word, value)| Word::found(value, lap, word, lap)).collect();
        let foreign = (first..).zip(values).zip(&found).filter(|(_, words)| words.is_empty());
        self.flaws.foreign.extend(foreign.map(|(pair, _)| pair));
        if self.found.insert(index, found).is_some() {
            self.flaws.duplicate.push(index);
        }
    }

    fn words(&self) -> u64 {
        u64::from(self.pages) * 3
    }

    /// What was wrong with the image, all of it having been looked at.
    pub fn flaws(&self) -> Flaws {
        let missing = (0..self.pages).filter(|page| !self.found.contains_key(page)).collect();
        Flaws { missing, ..self.flaws.clone() }
    }

    /// The verdict, all of the image having been looked at. A failure when it has flaws.
    pub fn verdict(&self) -> Result<Verdict> {
        let flaws = self.flaws();
        if flaws != Flaws::default() {
            return Err(failed(format_args!("the image has not the ring as it was: {flaws:x?}")));
        }
        let words: Vec<Word> = self.found.values().flatten().flatten().copied().collect();
        judge_words(&words).ok_or_else(|| failed("a ring without words"))
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// How many of so many images were torn.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Runs {
    /// Torn images.
    pub torn: u32,
    /// All images.
    pub of: u32,
    /// Words of all images together.
    pub words: u64,
    /// Those of them that are off their image's best cut.
    pub off_cut: u64,
}

impl Runs {
    /// Counts an image.
    pub fn count(&mut self, verdict: &Verdict) {
        self.count_all(verdict.is_torn(), std::slice::from_ref(verdict));
    }

    /// Counts an image of several writers.
    pub fn count_all(&mut self, torn: bool, verdicts: &[Verdict]) {
        self.torn += u32::from(torn);
        self.of += 1;
        self.words += verdicts.iter().map(|verdict| verdict.words).sum::<u64>();
        self.off_cut += verdicts.iter().map(|verdict| verdict.off_cut).sum::<u64>();
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { torn, of, words, off_cut } = self;
        write!(f, "{torn}/{of} torn")?;
        match torn {
            0 => Ok(()),
            _ => write!(f, " ({} % of the words)", off_cut * 100 / words.max(&1)),
        }
    }
}

/// What tells a good result from a benchmark that cannot see: images of the same guest in the same
/// run that must be torn, and some that cannot be.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Controls {
    /// Copies of the running guest.
    pub live: Runs,
    /// The same copies of the stopped guest.
    pub stopped: Runs,
}

impl Controls {
    /// Fails unless every live image was torn and no other: whatever else the run showed is void.
    pub fn hold(&self) -> Result<()> {
        let Self { live, stopped } = self;
        match live.of > 0 && live.torn == live.of && stopped.of > 0 && stopped.torn == 0 {
            true => Ok(()),
            false => Err(failed(format_args!("void: {self}"))),
        }
    }
}

impl fmt::Display for Controls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "live {}, stopped {}", self.live, self.stopped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of all words of a ring.
    fn judge(values: &[u64]) -> Option<Verdict> {
        let lap = count(values.len());
        judge_words(&values.iter().map(|&value| Word { value, lap }).collect::<Vec<_>>())
    }

    /// Word `word` of a ring of `words` after store `n`, by doing the stores.
    fn stored(word: u64, words: u64, n: u64) -> u64 {
        (0..=n).filter(|k| k % words == word).max().expect("stored in the first lap")
    }

    /// All images of a ring of `words` whose words were read at any time in `times`, in any order.
    fn images(words: u64, times: std::ops::Range<u64>) -> Vec<Vec<u64>> {
        (0..words).fold(vec![Vec::new()], |images, word| {
            let longer = |image: &Vec<u64>| {
                let values = times.clone().map(|n| stored(word, words, n));
                values.map(|value| [&image[..], &[value]].concat()).collect::<Vec<_>>()
            };
            images.iter().flat_map(longer).collect()
        })
    }

    /// The verdict by trying every instant and every pair.
    fn oracle(image: &[u64], instants: std::ops::Range<u64>) -> Verdict {
        let words = count(image.len());
        let is_at = |word: u64, value: u64, n: u64| stored(word, words, n) == value;
        let agree = |n: u64| count((0..).zip(image).filter(|(w, v)| is_at(*w, **v, n)).count());
        let cut = instants.clone().min_by_key(|&n| (words - agree(n), n)).expect("an instant");
        // The first word's value was gone when the second's was stored.
        let gone = |word: u64, value: u64, n: u64| n > value && !is_at(word, value, n);
        let before = |n: u64| count((0..).zip(image).filter(|(w, v)| gone(*w, **v, n)).count());
        let (min, max) = (image.iter().min().copied(), image.iter().max().copied());
        let (min, max) = (min.expect("a word"), max.expect("a word"));
        let gone_at = instants.clone().find(|&n| n > min && !is_at(min % words, min, n));
        Verdict {
            words,
            min,
            max,
            cut,
            off_cut: words - agree(cut),
            violations: image.iter().map(|&value| before(value)).sum(),
            smear_writes: (max + 1).saturating_sub(gone_at.expect("rewritten in the next lap")),
        }
    }

    #[test]
    fn every_image_of_a_small_ring_is_judged_as_by_trying_all_instants() {
        for (words, laps) in [(1, 5), (2, 5), (3, 4), (4, 3)] {
            let (first, end) = (2 * words, (2 + laps) * words);
            let mut torn = 0;
            for image in images(words, first..end) {
                let verdict = judge(&image).expect("there are words");
                assert_eq!(verdict, oracle(&image, words..end + words), "{image:?}");
                let instant = (words..end).find(|&n| {
                    (0..words).zip(&image).all(|(word, value)| stored(word, words, n) == *value)
                });
                assert_eq!(verdict.is_torn(), instant.is_none(), "{image:?}");
                torn += u64::from(verdict.is_torn());
            }
            assert_eq!(torn > 0, words > 1, "a ring of one word cannot be torn");
        }
    }

    #[test]
    fn every_instant_of_a_large_ring_is_whole() {
        for n in 720..2880 {
            let image: Vec<u64> = (0..720).map(|word| n - (n - word) % 720).collect();
            let verdict = judge(&image).expect("there are words");
            assert!(!verdict.is_torn() && verdict.off_cut == 0 && verdict.violations == 0, "{n}");
            assert_eq!(verdict.cut, n);
        }
    }

    #[test]
    fn two_l_less_one_stores_between_two_words_are_always_seen() {
        // Word 0 is read after store `n`, the last word `late` stores later, the others between.
        let is_seen = |words: u64, n: u64, late: u64| {
            let time = |word| if word == words - 1 { n + late } else { n + late.min(words - 1) };
            let rest = (1..words).map(|word| stored(word, words, time(word)));
            let image: Vec<u64> = [stored(0, words, n)].into_iter().chain(rest).collect();
            judge(&image).expect("there are words").is_torn()
        };
        for words in 2..8 {
            let bound = 2 * words - 1;
            for late in bound..3 * bound {
                assert!((words..4 * words).all(|n| is_seen(words, n, late)), "{words}, {late}");
            }
            // The bound is no larger than it must be.
            assert!((words..4 * words).any(|n| !is_seen(words, n, bound - 1)), "{words} words");
        }
    }

    /// The formulas one by one, where a slip of one would show.
    #[test]
    fn each_figure_at_its_boundary() {
        let figures = |values: &[u64]| {
            judge(values).map(|v| (v.is_torn(), v.cut, v.off_cut, v.violations, v.smear_writes))
        };
        let cases: [(&[u64], _); 9] = [
            (&[6, 7, 8], Some((false, 8, 0, 0, 0))),
            (&[6, 4, 5], Some((false, 6, 0, 0, 0))),
            (&[9, 7, 8], Some((false, 9, 0, 0, 0))), // max = min + L - 1
            (&[9, 10, 8], Some((false, 10, 0, 0, 0))),
            (&[6, 9, 8], Some((true, 8, 1, 1, 1))), // one more
            (&[6, 10, 8], Some((true, 8, 1, 1, 2))),
            (&[9, 4, 5], Some((true, 5, 1, 2, 3))),
            (&[6, 10, 14], Some((true, 6, 2, 3, 6))),
            (&[], None),
        ];
        for (values, expected) in cases {
            assert_eq!(figures(values), expected, "{values:?}");
        }
        assert_eq!(figures(&[6, u64::MAX]), Some((true, 6, 1, 1, u64::MAX - 7)));
    }

    /// A writer whose even stores go to one word, and whose odd ones to two others in turn: each of
    /// its images is judged as by trying all instants.
    #[test]
    fn words_that_come_round_at_different_times_are_judged_as_by_trying() {
        let laps = [2, 4, 4];
        let holds = |word: usize, n: u64| {
            let here = |k: &u64| k % laps[word] == [0, 1, 3][word];
            (0..=n).rev().find(here).expect("stored in the first lap")
        };
        let mut torn = 0;
        for times in (0..12u64.pow(3)).map(|n| [n % 12, n / 12 % 12, n / 144].map(|n| n + 8)) {
            let values: Vec<u64> = (0..3).map(|word| holds(word, times[word])).collect();
            let words: Vec<Word> =
                values.iter().zip(laps).map(|(&value, lap)| Word { value, lap }).collect();
            let verdict = judge_words(&words).expect("there are words");
            let is_at = |word: usize, n: u64| holds(word, n) == values[word];
            let agree = |n: u64| count((0..3).filter(|&word| is_at(word, n)).count());
            let most = (4..40).map(agree).max().expect("an instant");
            assert_eq!((verdict.words, verdict.off_cut), (3, 3 - most), "{times:?}");
            assert_eq!(agree(verdict.cut), most, "{times:?}");
            assert_eq!(verdict.is_torn(), most < 3, "{times:?}");
            let gone = |word: usize| (4..60).rev().find(|&n| is_at(word, n)).expect("an n") + 1;
            let first = (0..3).map(gone).min().expect("a word");
            assert_eq!(verdict.smear_writes, (verdict.max + 1).saturating_sub(first), "{times:?}");
            let pairs = (0..9).filter(|pair| values[pair / 3] >= gone(pair % 3)).count();
            assert_eq!(verdict.violations, count(pairs), "{times:?}");
            torn += u32::from(verdict.is_torn());
        }
        assert!((100..1600).contains(&torn), "{torn}");
    }

    fn ring() -> Ring {
        Ring { run: 7, pages: 2, ..Ring::pair(64) }
    }

    /// A page of [`ring`] as the guest writes it, and where it lies.
    fn page(index: u32, words: [u64; 3]) -> (u64, Vec<u8>) {
        let gpa = ring().gpa(index);
        let mut page = vec![0xa5; PAGE];
        page[..16].copy_from_slice(MAGIC);
        let parts = [7, u64::from(index) | 2 << 32, gpa / 4096];
        for (at, part) in [0x10, 0x18, 0x20].into_iter().zip(parts) {
            page[at..at + 8].copy_from_slice(&part.to_le_bytes());
        }
        for (at, word) in Ring::OFFSETS.into_iter().zip(words) {
            page[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        (gpa, page)
    }

    fn scan(pages: &[(u64, Vec<u8>)]) -> Scan {
        let mut scan = Scan::new(&ring());
        pages.iter().for_each(|(gpa, bytes)| scan.piece(*gpa, bytes));
        scan
    }

    #[test]
    fn whole_and_torn_images_are_told_apart() {
        let whole = [page(0, [12, 13, 8]), page(1, [9, 10, 11])];
        let verdict = scan(&whole).verdict().expect("a whole ring");
        assert_eq!((verdict.is_torn(), verdict.words, verdict.cut), (false, 6, 13));
        let half = [page(0, [18, 13, 8]), page(1, [9, 10, 11])];
        assert!(scan(&half).verdict().expect("a whole ring").is_torn());
    }

    #[test]
    fn an_image_without_its_ring_as_it_was_is_not_judged() {
        let (first, second) = (page(0, [12, 13, 8]), page(1, [9, 10, 11]));
        let flaws = |pages: &[(u64, Vec<u8>)]| {
            let scan = scan(pages);
            assert!(scan.verdict().is_err(), "{scan:?}");
            scan.flaws()
        };
        let none = Flaws::default;
        assert_eq!(flaws(&[]), Flaws { missing: vec![0, 1], ..none() });
        assert_eq!(flaws(std::slice::from_ref(&first)), Flaws { missing: vec![1], ..none() });
        let twice = flaws(&[first.clone(), second.clone(), first.clone()]);
        assert_eq!(twice, Flaws { duplicate: vec![0], ..none() });
        let elsewhere = (first.0 + 4096, first.1.clone());
        let misplaced = flaws(&[elsewhere, second.clone()]);
        let at = vec![first.0 + 4096];
        assert_eq!(misplaced, Flaws { missing: vec![0], misplaced: at, ..none() });
        for values in [[12, 14, 8], [0, 13, 8], [6, 1, 8]] {
            let foreign = flaws(&[page(0, values), second.clone()]).foreign;
            assert_eq!(foreign.len(), 1, "{values:?}");
        }
        let mut stranger = first.clone();
        stranger.1[0x10] = 8; // another run's
        assert_eq!(flaws(&[stranger, second.clone()]), Flaws { missing: vec![0], ..none() });
        let mut nothing = first.clone();
        nothing.1[0] = 0; // no magic
        assert_eq!(flaws(&[nothing, second.clone()]), Flaws { missing: vec![0], ..none() });
        for (at, value) in [(0x1c, 3), (0x18, 2)] {
            let mut strange = first.clone();
            strange.1[at] = value; // of a ring of another size, beyond the last page
            assert_eq!(flaws(&[strange, second.clone()]).misplaced, [first.0], "{at:#x}");
        }
    }

    /// The word that showed it: the low byte of one lap and the rest of the next.
    #[test]
    fn a_word_of_two_stores_is_torn_and_not_foreign() {
        let found = |value| {
            let words = Word::found(value, 720, 614, 720);
            words.iter().map(|word| word.value).collect::<Vec<_>>()
        };
        assert_eq!(found(0x4f68_aee6), [0x4f68_abe6, 0x4f68_aeb6]);
        assert_eq!(found(0x4f68_abe6), [0x4f68_abe6]);
        assert!(found(614).is_empty(), "before the first store");
        let (whole, split) = (page(0, [0x102, 0xfd, 0xfe]), page(0, [0xfc | 0x100, 0xfd, 0xfe]));
        let second = page(1, [0xff, 0x100, 0x101]);
        assert!(!scan(&[whole, second.clone()]).verdict().expect("a whole ring").is_torn());
        let verdict = scan(&[split, second]).verdict().expect("a whole ring");
        assert!(verdict.is_torn() && verdict.words == 7, "{verdict:?}");
    }

    /// What a copy byte by byte makes of any two stores that are not far apart is known, and of other
    /// numbers few pass.
    #[test]
    fn words_of_two_stores_are_told_from_others() {
        let lap = 720u64;
        for (bytes, laps) in (1..8).flat_map(|bytes| (1..16).map(move |laps| (bytes, laps))) {
            let low = u64::MAX >> (64 - 8 * bytes);
            // A little after the high bytes changed, and the store so many laps before.
            let late = ((3u64 << (8 * bytes)) / lap + 2) * lap + 614;
            let Some(early) = late.checked_sub(laps * lap).filter(|early| *early > lap) else {
                continue;
            };
            let value = early & low | late & !low;
            let words = Word::found(value, lap, 614, lap);
            assert!(!words.is_empty(), "{bytes} bytes, {laps} laps: {value:#x}");
            let torn = judge_words(&words).expect("there are words").is_torn();
            assert_eq!(torn, value % lap != 614, "{bytes} bytes, {laps} laps: {value:#x}");
        }
        let others = (0..100_000u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24);
        let pass = others.filter(|&n| !Word::found(n, lap, 614, lap).is_empty()).count();
        assert!(pass < 3_000, "{pass} of 100000");
    }

    #[test]
    fn runs_are_counted() {
        let mut runs = Runs::default();
        for image in [[6, 7, 8], [6, 10, 8], [6, 10, 14]] {
            runs.count(&judge(&image).expect("there are words"));
        }
        assert_eq!(runs, Runs { torn: 2, of: 3, words: 9, off_cut: 3 });
        assert_eq!(runs.to_string(), "2/3 torn (33 % of the words)");
    }

    #[test]
    fn a_run_without_its_controls_is_void() {
        let runs = |torn, of| Runs { torn, of, ..Runs::default() };
        let hold = |live, stopped| Controls { live, stopped }.hold().is_ok();
        assert!(hold(runs(3, 3), runs(0, 3)));
        assert!(!hold(runs(2, 3), runs(0, 3)), "a live image that is not torn");
        assert!(!hold(runs(3, 3), runs(1, 3)), "a stopped guest that is torn");
        assert!(!hold(runs(0, 0), runs(0, 3)) && !hold(runs(3, 3), runs(0, 0)), "no control");
    }
}
