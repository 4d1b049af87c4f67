//! Who is right when two parts of an exhibit disagree on a file.

use super::findings::Findings;
use crate::digest::Digest;
use crate::exhibit;
use crate::manifest::Manifest;
use std::collections::BTreeMap;

/// The files that an exhibit with this manifest has, and whether `SHA256SUMS` has a line for each.
pub(super) fn named_files(manifest: &Manifest) -> BTreeMap<String, bool> {
    let mut named: BTreeMap<String, bool> =
        manifest.files().map(|file| (file.file.clone(), true)).collect();
    named.insert(exhibit::MANIFEST.into(), true);
    named.insert(exhibit::JOURNAL.into(), true);
    if manifest.blocks.is_some() {
        named.insert(exhibit::BLOCKS.into(), true);
    }
    if let Some(image) = &manifest.image {
        named.insert(exhibit::image_name(image.format), image.sha256.is_some());
    }
    named
}

/// The two lists that name the files' digests, and what became of them.
pub(super) struct Witnesses {
    /// `SHA256SUMS`; `None` when it is missing or not as we write it.
    sums: Option<BTreeMap<String, Digest>>,
    manifest: Option<Digest>,
    manifest_ok: bool,
}

impl Witnesses {
    pub(super) fn new(
        sums: Option<BTreeMap<String, Digest>>,
        manifest: Option<Digest>,
        manifest_ok: bool,
    ) -> Self {
        Self { sums, manifest, manifest_ok }
    }

    /// Whether the manifest is the one that `SHA256SUMS` names.
    pub(super) fn manifest_ok(&self) -> bool {
        self.manifest_ok
    }

    /// The names in `SHA256SUMS`.
    pub(super) fn names(&self) -> Vec<String> {
        self.sums.iter().flatten().map(|(name, _)| name.clone()).collect()
    }

    /// Whether `SHA256SUMS` has a line for `name`; `None` when it cannot be read.
    pub(super) fn lists(&self, name: &str) -> Option<bool> {
        self.sums.as_ref().map(|sums| sums.contains_key(name))
    }

    /// Holds a file against what both witnesses say; names the odd one out. Returns whether a
    /// witness confirms the file.
    ///
    /// `manifest_says` is whether the manifest agrees with the file, and the field where it speaks
    /// of it.
    pub(super) fn judge(
        &self,
        name: &str,
        found: Digest,
        manifest_says: Option<(bool, &str)>,
        findings: &mut Findings,
    ) -> bool {
        let sum = self.sums.as_ref().and_then(|sums| sums.get(name));
        match (sum.map(|sum| *sum == found), manifest_says) {
            (Some(true), Some((false, field))) => {
                let text = format!("does not fit {name}, which {} confirms", exhibit::SUMS);
                findings.field(field, text);
                true
            }
            (Some(false), Some((true, _))) => {
                let text = format!("its line for {name} does not fit the file and the manifest");
                findings.file(exhibit::SUMS, text);
                true
            }
            (Some(false), _) | (None, Some((false, _))) => {
                findings.file(name, format!("was changed: its SHA-256 is now {found}"));
                false
            }
            (Some(true), _) | (None, Some((true, _))) => true,
            (None, None) => false,
        }
    }

    /// Says what is left to say of the manifest's own digest, whose only witness is `SHA256SUMS`.
    pub(super) fn settle(&self, findings: &mut Findings) {
        let (Some(sums), Some(found)) = (&self.sums, self.manifest) else { return };
        let Some(sum) = sums.get(exhibit::MANIFEST) else { return };
        if *sum == found {
            return;
        }
        let settled = findings.name(exhibit::MANIFEST);
        let which = if settled { "it was changed" } else { "one of the two was changed" };
        let text = format!("its SHA-256 is {found}, {} says {sum}: {which}", exhibit::SUMS);
        findings.file(exhibit::MANIFEST, text);
        if !settled {
            let text = format!("its line for {} does not fit: {which}", exhibit::MANIFEST);
            findings.file(exhibit::SUMS, text);
        }
    }
}
