//! `verify` against every case of the testkit, and against random damage.
#![allow(missing_docs, clippy::unwrap_used)]

use evidence::exhibit::{self, Entry, ExhibitFile, MemoryExhibit};
use evidence::verify::{Options, Outcome, Progress, Verdict, VerifyError, verify};
use evidence::{ExhibitDir, GuestRange};
use std::collections::BTreeSet;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Mutex;
use testkit::cases::{self, Expected};
use testkit::random::SplitMix;
use testkit::synth::{Recipe, build, manifest, map};

fn files(verdict: &Verdict) -> Vec<String> {
    let names: BTreeSet<_> = verdict.findings.iter().map(|f| f.place.file().to_string()).collect();
    names.into_iter().collect()
}

fn blocks(verdict: &Verdict) -> Vec<GuestRange> {
    let blocks: BTreeSet<_> = verdict.findings.iter().filter_map(|f| f.place.block()).collect();
    blocks.into_iter().collect()
}

fn got(verdict: Result<Verdict, VerifyError>) -> Expected {
    match verdict {
        Ok(verdict) => Expected {
            exit: verdict.exit_code(),
            files: files(&verdict),
            blocks: blocks(&verdict).iter().map(|b| format!("{:#x}", b.start())).collect(),
        },
        Err(_) => Expected { exit: 1, files: vec![], blocks: vec![] },
    }
}

#[test]
fn every_case_gets_its_verdict() {
    let mut wrong = Vec::new();
    for case in cases::all().unwrap() {
        let mut expected = case.expected.clone();
        expected.files.sort();
        for threads in [1, 3] {
            let verdict = verify(&case.exhibit, &Options { threads, progress: None });
            let text = match &verdict {
                Ok(verdict) => verdict.findings.iter().map(|f| format!("\n    {f}")).collect(),
                Err(error) => error.to_string(),
            };
            if got(verdict) != expected {
                wrong.push(format!("{} ({}): want {expected:?}, got {text}", case.name, case.why));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// 1,000 random bits of any file but report and custody: each time "altered", the file named, and
/// in the image the block, no other.
#[test]
fn every_random_bit_is_found_and_placed() {
    let good = build(Recipe { added_later: true, ..Recipe::default() }).unwrap();
    let names: Vec<String> = good
        .files
        .keys()
        .filter(|name| !exhibit::ADDED_LATER.contains(&name.as_str()))
        .cloned()
        .collect();
    assert_eq!(names.len(), 8);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (mut exhibit, names) = (good.clone(), &names);
            scope.spawn(move || {
                let mut random = SplitMix(seed);
                for _ in 0..250 {
                    let name = &names[random.below(names.len())];
                    let byte = random.below(exhibit.files[name].len());
                    let bit = 1 << random.below(8);
                    flip_and_check(&mut exhibit, name, byte, bit);
                }
            });
        }
    });
}

fn flip_and_check(exhibit: &mut MemoryExhibit, name: &str, byte: usize, bit: u8) {
    exhibit.get_mut(name).unwrap()[byte] ^= bit;
    let verdict = verify(exhibit, &Options::default())
        .unwrap_or_else(|error| panic!("{name} byte {byte} bit {bit:#x}: {error}"));
    exhibit.get_mut(name).unwrap()[byte] ^= bit;
    let found: String = verdict.findings.iter().map(|f| format!("\n    {f}")).collect();
    let at = format!("{name} byte {byte} bit {bit:#x}: {found}");
    assert_eq!(verdict.outcome, Outcome::Altered, "{at}");
    let named = files(&verdict);
    assert!(named.iter().any(|file| file == name), "{at}");
    // Only the manifest and its own line in SHA256SUMS have no third witness.
    let pair = [exhibit::MANIFEST, exhibit::SUMS];
    let allowed =
        |file: &String| file == name || (pair.contains(&name) && pair.contains(&file.as_str()));
    assert!(named.iter().all(allowed), "{at}");
    let wanted = if name == cases::default_image() { block_of(exhibit, byte) } else { None };
    if name != exhibit::BLOCKS {
        assert_eq!(blocks(&verdict), wanted.into_iter().collect::<Vec<_>>(), "{at}");
    }
}

/// The block of guest memory at `offset` of the image.
fn block_of(exhibit: &MemoryExhibit, offset: usize) -> Option<GuestRange> {
    let manifest = manifest(exhibit).unwrap();
    evidence::block::cut(&map().unwrap()).unwrap().into_iter().find(|block| {
        let start = cases::offset_of(&manifest, block.start()).unwrap();
        (start..start + usize::try_from(block.len()).unwrap()).contains(&offset)
    })
}

/// Without a digest of the whole image the blocks, headers and gaps still cover each of its bits.
#[test]
fn every_random_bit_is_found_without_a_file_digest() {
    let mut exhibit = build(Recipe { file_digest: false, ..Recipe::default() }).unwrap();
    let image = cases::default_image();
    let mut random = SplitMix(99);
    for round in 0..60 {
        let len = exhibit.files[&image].len();
        // Half of them among headers, notes and the gap behind them.
        let byte = random.below(if round % 2 == 0 { len } else { 0x4000 });
        flip_and_check(&mut exhibit, &image, byte, 1 << random.below(8));
    }
}

/// A directory whose files know nothing of holes gets the same verdicts.
#[test]
fn holes_are_only_a_hint() {
    struct Plain<'a>(&'a MemoryExhibit);
    struct File(Box<dyn ExhibitFile>);
    impl ExhibitDir for Plain<'_> {
        fn list(&self) -> io::Result<Vec<Entry>> {
            self.0.list()
        }
        fn open(&self, name: &str) -> io::Result<Box<dyn ExhibitFile>> {
            Ok(Box::new(File(self.0.open(name)?)))
        }
    }
    impl Read for File {
        /// Short reads, as a pipe or a network filesystem gives them.
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let short = buf.len().min(70_001);
            self.0.read(&mut buf[..short])
        }
    }
    impl Seek for File {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }
    impl ExhibitFile for File {}
    for case in cases::all().unwrap() {
        if case.name.starts_with("image") || case.name.starts_with("good") {
            let hinted = verify(&case.exhibit, &Options::default()).unwrap();
            let plain = verify(&Plain(&case.exhibit), &Options::default()).unwrap();
            assert_eq!(got(Ok(plain)), got(Ok(hinted)), "{}", case.name);
        }
    }
}

#[test]
fn progress_ends_at_its_total() {
    let exhibit = build(Recipe::default()).unwrap();
    let seen = Mutex::new(Vec::new());
    let progress = |progress: Progress| seen.lock().unwrap().push(progress);
    verify(&exhibit, &Options { threads: 2, progress: Some(&progress) }).unwrap();
    let seen = seen.into_inner().unwrap();
    let last = seen.last().unwrap();
    assert_eq!(last.done, last.total);
    let image = u64::try_from(exhibit.files[&cases::default_image()].len()).unwrap();
    assert!(last.total > image + (16 << 20), "file digest and blocks both count: {last:?}");
    let before_last = seen.iter().rev().nth(1).unwrap();
    assert_eq!(before_last.done, last.total, "the estimate was exact");
}

#[test]
fn a_directory_of_something_else_has_no_verdict() {
    let mut exhibit = MemoryExhibit::default();
    exhibit.put("memory.elf", "x");
    assert!(matches!(verify(&exhibit, &Options::default()), Err(VerifyError::NotAnExhibit)));
}

/// A file that is listed but cannot be read is no verdict on it.
#[test]
fn an_unreadable_file_is_an_error() {
    struct Broken(MemoryExhibit);
    impl ExhibitDir for Broken {
        fn list(&self) -> io::Result<Vec<Entry>> {
            self.0.list()
        }
        fn open(&self, name: &str) -> io::Result<Box<dyn ExhibitFile>> {
            if name == exhibit::JOURNAL {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            self.0.open(name)
        }
    }
    let broken = Broken(build(Recipe::default()).unwrap());
    let error = verify(&broken, &Options { threads: 2, progress: None }).unwrap_err();
    assert!(matches!(error, VerifyError::Read { file, .. } if file == exhibit::JOURNAL));
}

#[test]
fn hostile_names_do_not_reach_the_terminal() {
    let mut exhibit = build(Recipe::default()).unwrap();
    exhibit.put("x\u{1b}[2J", "");
    exhibit.put("../escape", "");
    let verdict = verify(&exhibit, &Options::default()).unwrap();
    assert_eq!(verdict.findings.len(), 2);
    for finding in verdict.findings {
        assert!(!finding.to_string().contains('\u{1b}'), "{finding}");
    }
}
