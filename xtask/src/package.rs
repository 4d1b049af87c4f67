//! `cargo xtask package`: the static binary as a tarball with its SHA-256, and as a `.deb`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::steps::{ok, root};
use crate::{Outcome, build};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Documents that go with the binary.
const DOCUMENTS: [&str; 4] = ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"];

/// Builds both into `target/package` and prints their paths on stdout.
pub(crate) fn run() -> Outcome<()> {
    let binary = build::release(&["stillframe"])?.join("stillframe");
    let to = build::target()?.join("package");
    fs::create_dir_all(&to)?;
    for package in [tarball(&binary, &to)?, debian(&binary, &to)?] {
        sum(&package)?;
        println!("{}", package.display());
    }
    Ok(())
}

/// `stillframe-VERSION-x86_64-linux.tar.gz`, with one directory inside.
fn tarball(binary: &Path, to: &Path) -> Outcome<PathBuf> {
    let name = format!("stillframe-{VERSION}-x86_64-linux");
    let directory = fresh(&to.join(&name))?;
    install(binary, &directory.join("stillframe"), 0o755)?;
    for document in DOCUMENTS {
        install(&root()?.join(document), &directory.join(document), 0o644)?;
    }
    let archive = to.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.args(["--owner=0", "--group=0", "--numeric-owner", "--sort=name", "-czf"]).arg(&archive);
    ok(tar.arg("-C").arg(to).arg(&name))?;
    fs::remove_dir_all(directory)?;
    Ok(archive)
}

/// `stillframe_VERSION_amd64.deb`. The binary is static: it depends on nothing.
fn debian(binary: &Path, to: &Path) -> Outcome<PathBuf> {
    let name = format!("stillframe_{VERSION}_amd64");
    let tree = fresh(&to.join(&name))?;
    let (programs, documents) = (tree.join("usr/bin"), tree.join("usr/share/doc/stillframe"));
    for directory in [&programs, &documents, &tree.join("DEBIAN")] {
        fs::create_dir_all(directory)?;
    }
    install(binary, &programs.join("stillframe"), 0o755)?;
    for document in DOCUMENTS {
        install(&root()?.join(document), &documents.join(document), 0o644)?;
    }
    let kib = fs::metadata(binary)?.len().div_ceil(1024);
    let description = env!("CARGO_PKG_DESCRIPTION");
    let control = format!(
        "Package: stillframe\nVersion: {VERSION}\nArchitecture: amd64\nMaintainer: stillframe \
         developers <stillframe@localhost>\nInstalled-Size: {kib}\nSection: admin\n\
         Priority: optional\nDescription: {description}\n"
    );
    fs::write(tree.join("DEBIAN/control"), control)?;
    let package = to.join(format!("{name}.deb"));
    let mut build = Command::new("dpkg-deb");
    build.args(["--build", "--root-owner-group"]).arg(&tree).arg(&package);
    ok(&mut build)?;
    fs::remove_dir_all(tree)?;
    Ok(package)
}

/// `FILE.sha256`, in the form that `sha256sum -c` takes.
fn sum(file: &Path) -> Outcome<()> {
    let (Some(directory), Some(name)) = (file.parent(), file.file_name()) else {
        return Err(format!("{} is no file", file.display()).into());
    };
    let out = Command::new("sha256sum").arg(name).current_dir(directory).output()?;
    if !out.status.success() {
        return Err(format!("sha256sum {} ended with {}", file.display(), out.status).into());
    }
    let mut beside = file.as_os_str().to_owned();
    beside.push(".sha256");
    Ok(fs::write(beside, out.stdout)?)
}

fn install(from: &Path, to: &Path, mode: u32) -> Outcome<()> {
    fs::copy(from, to).map_err(|e| format!("{}: {e}", from.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

/// An empty directory at `path`.
fn fresh(path: &Path) -> Outcome<PathBuf> {
    if path.exists() {
        fs::remove_dir_all(path)?;
    }
    fs::create_dir_all(path)?;
    Ok(path.to_owned())
}
