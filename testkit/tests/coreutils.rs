//! The exhibits as `sha256sum -c` and `zstd`-free tools see them.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::process::Command;
use testkit::synth::{Recipe, build};

/// V5: an exhibit can be checked without us.
#[test]
fn sha256sum_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let exhibit = build(Recipe::default()).unwrap();
    for (name, bytes) in &exhibit.files {
        fs::write(dir.path().join(name), bytes.as_slice()).unwrap();
    }
    let check = || {
        let mut command = Command::new("sha256sum");
        command.args(["--check", "--strict", "--quiet", "SHA256SUMS"]);
        command.current_dir(dir.path()).output().unwrap().status.success()
    };
    assert!(check());
    fs::write(dir.path().join("journal.jsonl"), "x").unwrap();
    assert!(!check());
}
