//! `verify`: whether an exhibit is what was sealed, and where it is not.
//!
//! Nothing is taken on trust, and a finding does not end the work: all of them are reported.
//! Most facts have more than one witness: a file's digest stands in the manifest and in
//! `SHA256SUMS`, a block's bytes are in the image and their digest in the block records. When two
//! witnesses disagree, the third says which of them was changed.

mod blocks;
mod findings;
mod witness;

pub use findings::{Finding, MAX_FINDINGS, Place};

use crate::digest::{Digest, Hasher, sha256};
use crate::exhibit::{self, EntryKind, ExhibitDir, ExhibitFile, is_file_name};
use crate::journal::{self, ChainError};
use crate::manifest::{self, Manifest, ManifestError, Status};
use crate::sums;
use findings::Findings;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use witness::Witnesses;

/// How the verification is run.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// Threads that read the image; 0 and 1 are one.
    pub threads: usize,
    /// Called from any of them after each piece of work.
    pub progress: Option<&'a (dyn Fn(Progress) + Sync)>,
}

/// How far the verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes looked at.
    pub done: u64,
    /// Bytes that there are to look at. The image counts twice when its file digest is checked.
    pub total: u64,
}

/// The verdict in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As sealed, and complete.
    Intact,
    /// As sealed, but partial or with losses.
    Losses,
    /// Not as sealed, or contradicting itself.
    Altered,
}

/// Bytes of imaged memory that are not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LostBytes {
    /// The host could not read them.
    pub unreadable: u64,
    /// Left out on request.
    pub excluded: u64,
    /// The acquisition ended before.
    pub not_reached: u64,
}

/// What `verify` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// In one word.
    pub outcome: Outcome,
    /// Everything that is not as sealed: at most [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
    /// Number of findings beyond those.
    pub more_findings: u64,
    /// Which record was verified; `None` when it cannot be read.
    pub record_id: Option<String>,
    /// SHA-256 of `manifest.json`, what a signature covers; `None` when it is missing.
    pub manifest_sha256: Option<Digest>,
    /// What the record says of its completeness.
    pub status: Option<Status>,
    /// What is lost, by the block records.
    pub lost: LostBytes,
    /// The record says that the memory map afterwards was not the one before: the image is of a
    /// machine that changed, and counts as one with losses.
    pub map_changed: bool,
    /// What the record says happened to the machine meanwhile, such as a reset; counts as losses.
    pub disturbances: Vec<String>,
    /// Blocks whose bytes were compared with their digest.
    pub blocks_checked: u64,
}

impl Verdict {
    /// The program's exit code: 0 intact and complete, 3 intact but partial or with losses, 5
    /// altered.
    pub fn exit_code(&self) -> u8 {
        match self.outcome {
            Outcome::Intact => 0,
            Outcome::Losses => 3,
            Outcome::Altered => 5,
        }
    }
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The directory could not be listed.
    #[error("the exhibit's directory cannot be listed")]
    List(#[source] io::Error),
    /// A file could not be read.
    #[error("{file} cannot be read")]
    Read {
        /// The file.
        file: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Neither manifest nor sums: not an exhibit, or one whose acquisition was cut off.
    #[error(
        "there is no {} and no {}: not an exhibit, or one that was never sealed",
        exhibit::MANIFEST,
        exhibit::SUMS
    )]
    NotAnExhibit,
    /// The record is of a version that this program does not know.
    #[error(
        "{}: its version is {version:?}, this program knows {:?}",
        exhibit::MANIFEST,
        manifest::SCHEMA
    )]
    UnknownVersion {
        /// The version that it names.
        version: String,
    },
}

/// Verifies the exhibit in `dir`. Reads every file, writes nothing.
///
/// # Errors
/// [`VerifyError`] when there can be no verdict: something cannot be read, there is no exhibit, or
/// its version is not known.
pub fn verify(dir: &dyn ExhibitDir, options: &Options<'_>) -> Result<Verdict, VerifyError> {
    let mut run = Run::start(dir, options)?;
    let sums = run.read_sums()?;
    let bytes = run.read_manifest()?;
    let digest = bytes.as_deref().map(sha256);
    let manifest_ok = match (&sums, digest) {
        (Some(sums), Some(digest)) => sums.get(exhibit::MANIFEST) == Some(&digest),
        _ => false,
    };
    let manifest = match bytes.as_deref().map(Manifest::parse) {
        Some(Ok(manifest)) => Some(manifest),
        // A flipped bit in the version is an alteration, a version that was sealed is a refusal.
        Some(Err(ManifestError::UnknownVersion(version))) if manifest_ok || sums.is_none() => {
            return Err(VerifyError::UnknownVersion { version });
        }
        Some(Err(error)) => {
            run.findings.file(exhibit::MANIFEST, error.to_string());
            None
        }
        None => None,
    };
    let mut verdict = Verdict {
        outcome: Outcome::Intact,
        findings: Vec::new(),
        more_findings: 0,
        record_id: manifest.as_ref().map(|m| m.record_id.clone()),
        manifest_sha256: digest,
        status: manifest.as_ref().map(|m| m.status),
        lost: LostBytes::default(),
        map_changed: manifest.as_ref().is_some_and(|m| m.map_check.equal == Some(false)),
        disturbances: manifest.as_ref().map(|m| m.disturbances.clone()).unwrap_or_default(),
        blocks_checked: 0,
    };
    let mut witnesses = Witnesses::new(sums, digest, manifest_ok);
    match &manifest {
        Some(manifest) => run.check_record(manifest, &mut witnesses, &mut verdict)?,
        None => run.check_sums_alone(&mut witnesses)?,
    }
    witnesses.settle(&mut run.findings);
    run.work.finish();
    let (findings, more) = run.findings.finish();
    let lossy = verdict.status != Some(Status::Complete)
        || verdict.lost != LostBytes::default()
        || verdict.map_changed
        || !verdict.disturbances.is_empty();
    verdict.outcome = match (findings.is_empty(), lossy) {
        (false, _) => Outcome::Altered,
        (true, true) => Outcome::Losses,
        (true, false) => Outcome::Intact,
    };
    (verdict.findings, verdict.more_findings) = (findings, more);
    Ok(verdict)
}

/// The state of one verification.
struct Run<'a> {
    dir: &'a dyn ExhibitDir,
    options: Options<'a>,
    /// Regular files and their lengths.
    files: BTreeMap<String, u64>,
    findings: Findings,
    work: Work<'a>,
}

/// Counts bytes of work, from any thread.
struct Work<'a> {
    progress: Option<&'a (dyn Fn(Progress) + Sync)>,
    done: AtomicU64,
    total: u64,
}

impl Work<'_> {
    fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if let Some(progress) = self.progress {
            progress(Progress { done, total: self.total.max(done) });
        }
    }

    /// Says that nothing is left, whatever was skipped.
    fn finish(&self) {
        if let Some(progress) = self.progress {
            let total = self.total.max(self.done.load(Ordering::Relaxed));
            progress(Progress { done: total, total });
        }
    }
}

impl<'a> Run<'a> {
    fn start(dir: &'a dyn ExhibitDir, options: &Options<'a>) -> Result<Self, VerifyError> {
        let mut findings = Findings::default();
        let mut files = BTreeMap::new();
        for entry in dir.list().map_err(VerifyError::List)? {
            if entry.kind == EntryKind::Other {
                findings.file(&entry.name, "is not a regular file");
            } else if is_file_name(&entry.name) {
                files.insert(entry.name, entry.len);
            } else {
                findings.file(&entry.name, "no file of an exhibit is called so");
            }
        }
        if !files.contains_key(exhibit::MANIFEST) && !files.contains_key(exhibit::SUMS) {
            return Err(VerifyError::NotAnExhibit);
        }
        let read = |name: &str| !exhibit::ADDED_LATER.contains(&name);
        let lens = files.iter().filter(|(name, _)| read(name)).map(|(_, len)| *len);
        let total = lens.fold(0u64, u64::saturating_add);
        let work = Work { progress: options.progress, done: AtomicU64::new(0), total };
        Ok(Self { dir, options: *options, files, findings, work })
    }

    /// The digests of `SHA256SUMS` by name; `None` with a finding when it is missing or wrong.
    fn read_sums(&mut self) -> Result<Option<BTreeMap<String, Digest>>, VerifyError> {
        let Some(text) = self.read_small(exhibit::SUMS, sums::MAX_LEN)? else { return Ok(None) };
        match sums::parse(&text) {
            Ok(sums) => Ok(Some(sums.into_iter().map(|sum| (sum.name, sum.sha256)).collect())),
            Err(error) => {
                let line = u64::try_from(error.line).unwrap_or(u64::MAX);
                self.findings.line(exhibit::SUMS, line, error.why);
                Ok(None)
            }
        }
    }

    fn read_manifest(&mut self) -> Result<Option<Vec<u8>>, VerifyError> {
        self.read_small(exhibit::MANIFEST, manifest::MAX_LEN)
    }

    /// A whole file of at most `limit` bytes; `None` with a finding when it is missing or longer.
    fn read_small(&mut self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, VerifyError> {
        if !self.files.contains_key(name) {
            self.findings.file(name, "is missing");
            return Ok(None);
        }
        let mut bytes = Vec::new();
        let read = self.open(name)?.take(limit.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|source| read_error(name, source))?;
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.work.add(len);
        if len > limit {
            self.findings.file(name, format!("is longer than the {limit} bytes that it may have"));
            return Ok(None);
        }
        Ok(Some(bytes))
    }

    fn open(&self, name: &str) -> Result<Box<dyn ExhibitFile>, VerifyError> {
        self.dir.open(name).map_err(|source| read_error(name, source))
    }

    /// SHA-256 and length of a file that is in the directory.
    fn digest(&self, name: &str) -> Result<(Digest, u64), VerifyError> {
        let mut file = self.open(name)?;
        let (mut hasher, mut len) = (Hasher::default(), 0u64);
        let mut chunk = vec![0; 1 << 16];
        loop {
            let read = match file.read(&mut chunk) {
                Ok(0) => return Ok((hasher.finish(), len)),
                Ok(read) => chunk.get(..read).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(read_error(name, source)),
            };
            hasher.update(read);
            let count = u64::try_from(read.len()).unwrap_or(u64::MAX);
            len = len.saturating_add(count);
            self.work.add(count);
        }
    }

    /// Without a manifest, `SHA256SUMS` can still name the files that are not as it says.
    fn check_sums_alone(&mut self, witnesses: &mut Witnesses) -> Result<(), VerifyError> {
        for name in witnesses.names() {
            if name == exhibit::MANIFEST {
                continue;
            }
            if self.files.contains_key(&name) {
                let (found, _) = self.digest(&name)?;
                witnesses.judge(&name, found, None, &mut self.findings);
            } else {
                self.findings.file(&name, "is missing");
            }
        }
        Ok(())
    }

    /// Everything that the manifest says, held against the files.
    fn check_record(
        &mut self,
        manifest: &Manifest,
        witnesses: &mut Witnesses,
        verdict: &mut Verdict,
    ) -> Result<(), VerifyError> {
        for wrong in manifest.contradictions() {
            self.findings.field(wrong.field, wrong.text);
        }
        self.check_names(manifest, witnesses);
        for (file, field) in manifest.files().zip(file_fields(manifest)) {
            if !self.files.contains_key(&file.file) {
                continue;
            }
            let (found, len) = self.digest(&file.file)?;
            let says = Some((found == file.sha256 && len == file.len, field.as_str()));
            witnesses.judge(&file.file, found, says, &mut self.findings);
        }
        self.check_journal(manifest, witnesses)?;
        let checked = self.check_image(manifest, witnesses)?;
        (verdict.lost, verdict.blocks_checked) = (checked.lost, checked.blocks);
        Ok(())
    }

    /// Whether the directory, `SHA256SUMS` and the manifest name the same files.
    fn check_names(&mut self, manifest: &Manifest, witnesses: &mut Witnesses) {
        let named = witness::named_files(manifest);
        for (name, in_sums) in &named {
            let listed = witnesses.lists(name);
            if *in_sums && listed == Some(false) {
                self.findings.file(exhibit::SUMS, format!("has no line for {name}"));
            }
            if self.files.contains_key(name) {
                continue;
            }
            // A name that only a changed manifest knows says nothing of the directory.
            if listed == Some(false) && !witnesses.manifest_ok() {
                let text = format!("names {name:?}, which is not there");
                self.findings.file(exhibit::MANIFEST, text);
            } else {
                self.findings.file(name, "is missing");
            }
        }
        for name in witnesses.names() {
            let line = named.get(&name);
            if line == Some(&true) {
                continue;
            }
            if self.files.contains_key(&name) && line.is_none() && !witnesses.manifest_ok() {
                let text = format!("does not name {name}, which is there");
                self.findings.file(exhibit::MANIFEST, text);
            } else {
                self.findings.file(exhibit::SUMS, format!("should have no line for {name}"));
            }
        }
        for name in self.files.keys() {
            let ours = named.contains_key(name)
                || name == exhibit::SUMS
                || exhibit::ADDED_LATER.contains(&name.as_str());
            let blamed = witnesses.lists(name) == Some(true) && !witnesses.manifest_ok();
            if !ours && !blamed {
                self.findings.file(name, "was not in the exhibit when it was sealed");
            }
        }
    }

    /// The journal's chain and head, and the custody log that follows it.
    fn check_journal(
        &mut self,
        manifest: &Manifest,
        witnesses: &mut Witnesses,
    ) -> Result<(), VerifyError> {
        let mut head = manifest.journal.head;
        if self.files.contains_key(exhibit::JOURNAL) {
            let (found, _) = self.digest(exhibit::JOURNAL)?;
            let chain = self.check_chain(exhibit::JOURNAL, Digest::ZERO)?;
            let says = chain.map(|chain| {
                let same =
                    chain.head == manifest.journal.head && chain.lines == manifest.journal.lines;
                (same, "journal")
            });
            let confirmed = witnesses.judge(exhibit::JOURNAL, found, says, &mut self.findings);
            // The custody log follows the journal that was sealed, not what became of it.
            if let Some(chain) = chain.filter(|_| confirmed) {
                head = chain.head;
            }
        }
        if self.files.contains_key(exhibit::CUSTODY) {
            self.check_chain(exhibit::CUSTODY, head)?;
        }
        Ok(())
    }

    /// `None` with a finding when the chain is broken.
    fn check_chain(
        &mut self,
        name: &str,
        start: Digest,
    ) -> Result<Option<journal::Chain>, VerifyError> {
        match journal::check(&mut BufReader::new(self.open(name)?), start) {
            Ok(chain) => Ok(Some(chain)),
            Err(ChainError::Line { line, why }) => {
                self.findings.line(name, line, why);
                Ok(None)
            }
            Err(ChainError::Io(source)) => Err(read_error(name, source)),
        }
    }
}

/// Where each of [`Manifest::files`] stands in the manifest.
fn file_fields(manifest: &Manifest) -> impl Iterator<Item = String> {
    let before = manifest.map_check.before.iter().map(|_| "map_check.before".to_string());
    let after = manifest.map_check.after.iter().map(|_| "map_check.after".to_string());
    let attachments = (0..manifest.attachments.len()).map(|at| format!("attachments[{at}]"));
    before.chain(after).chain(attachments)
}

fn read_error(file: &str, source: io::Error) -> VerifyError {
    VerifyError::Read { file: file.into(), source }
}
