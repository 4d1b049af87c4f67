//! What the tool leaves behind, read with nothing of the tool's: the image by the lab's own small
//! readers of raw, ELF and LiME, manifest and block records as plain JSON.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lab::{Doing, Guest, Lab, Result, failed, runner};
use serde_json::Value;

use super::run::{Ended, is_slow, too_slow, unless_slow};

/// The formats of the image.
pub(super) const FORMATS: [&str; 3] = ["elf", "raw", "lime"];
/// The stores.
pub(super) const STORES: [&str; 2] = ["ram", "disk"];

/// Name of a raw image.
const RAW: &str = "memory.raw";

/// A complete exhibit.
#[derive(Debug)]
pub(super) struct Exhibit {
    /// Its directory.
    pub(super) dir: PathBuf,
    /// `manifest.json`.
    pub(super) manifest: Value,
}

/// Acquires a guest by `live` into a new directory of the scratch one. It must be a complete
/// exhibit: by its exit code, by its name, by `verify`, by `sha256sum`, by its own map check.
pub(super) fn take(lab: &Lab, guest: &Guest, flags: &[&str]) -> Result<Exhibit> {
    let exhibit = acquire(lab, guest, "live", flags)?;
    lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0)?;
    exhibit.assert_sums()?;
    exhibit.assert_sound()?;
    Ok(exhibit)
}

/// Acquires a guest by a method into a new directory of the scratch one; complete by its exit code
/// and by its name.
pub(super) fn acquire(lab: &Lab, guest: &Guest, method: &str, flags: &[&str]) -> Result<Exhibit> {
    acquire_at_best(lab, guest, method, flags, &[0])
}

/// The same by an acquisition that may end with any of these codes. One that a busy machine was too slow for
/// shows nothing, and is made again.
pub(super) fn acquire_at_best(
    lab: &Lab,
    guest: &Guest,
    method: &str,
    flags: &[&str],
    codes: &[i32],
) -> Result<Exhibit> {
    let out = lab.scratch().join("exhibits");
    fs::create_dir_all(&out)?;
    let vm = guest.pid().to_string();
    let mut args = vec!["acquire", &vm, "--method", method, "--json", "-o"];
    args.push(out.to_str().unwrap_or_default());
    args.extend(flags);
    let (run, done) = unless_slow(|| {
        let run = lab.tool(&args)?;
        // Who says nothing in the end is told by how he ended.
        let last = run.stdout.lines().last().unwrap_or_default();
        let done: Value = serde_json::from_str(last).unwrap_or_default();
        void_if_slow(&done)?;
        Ok((run, done))
    })?;
    let code = run.status.code().filter(|code| codes.contains(code)).unwrap_or(0);
    run.expect_code(code)?;
    let dir = done["exhibit"].as_str().ok_or_else(|| failed(format_args!("done is {done}")))?;
    let exhibit = Exhibit::open(Path::new(dir))?;
    assert_eq!((&done["event"], exhibit.dir.parent()), (&Value::from("done"), Some(&*out)));
    Ok(exhibit)
}

/// Fails where the machine was too slow for a run that ended with this last event; what the run left is taken
/// away.
fn void_if_slow(done: &Value) -> Result<()> {
    if !is_slow(done) {
        return Ok(());
    }
    if let Some(dir) = done["exhibit"].as_str() {
        fs::remove_dir_all(dir).doing("removing a void exhibit")?;
    }
    Err(too_slow(&done["reason"]))
}

/// The end of a `run` that the machine was not too slow for.
pub(super) fn at_best(mut run: impl FnMut() -> Result<Ended>) -> Result<Ended> {
    unless_slow(|| {
        let ended = run()?;
        void_if_slow(ended.events.last().unwrap_or(&Value::Null))?;
        Ok(ended)
    })
}

/// An image of a running guest by `live`, which must be torn: the control of those that must not be. A tool
/// that stood reads on at full speed, and may be done before the guest writes again: so it is taken anew,
/// twice at most.
pub(super) fn control<T>(
    mut take: impl FnMut() -> Result<T>,
    is_torn: impl Fn(&T) -> bool,
) -> Result<T> {
    for _ in 0..2 {
        let taken = take()?;
        if is_torn(&taken) {
            return Ok(taken);
        }
        println!("         void: live shows one instant, and is taken anew");
    }
    take()
}

impl Exhibit {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let text = fs::read(dir.join("manifest.json")).doing("reading the manifest")?;
        Ok(Self { dir: dir.to_owned(), manifest: serde_json::from_slice(&text)? })
    }

    /// `sha256sum -c` finds every file as SHA256SUMS says, and no file is missing there. A raw image
    /// is 4 GiB of holes, half a minute each: but for [`Exhibit::assert_raw_sum`] its digest is left
    /// to `verify`. An image whose digest was not asked for is not named.
    pub(super) fn assert_sums(&self) -> Result<()> {
        let sums = fs::read_to_string(self.dir.join("SHA256SUMS"))?;
        let named: BTreeSet<&str> =
            sums.lines().filter_map(|line| Some(line.split_once("  ")?.1)).collect();
        let listed = fs::read_dir(&self.dir)?.flatten().map(|entry| entry.file_name());
        let image = &self.manifest["image"];
        let unasked = image["file"].as_str().filter(|_| image["sha256"].is_null());
        let unnamed = |name: &str| name == "SHA256SUMS" || Some(name) == unasked;
        let missing: Vec<_> = listed
            .filter(|name| {
                unnamed(&name.to_string_lossy()) == named.contains(&*name.to_string_lossy())
            })
            .collect();
        if !missing.is_empty() {
            return Err(failed(format_args!("SHA256SUMS does not name {missing:?}")));
        }
        self.sha256sum(sums.lines().filter(|line| !line.ends_with(RAW)))
    }

    /// `sha256sum -c` finds the raw image as SHA256SUMS says.
    pub(super) fn assert_raw_sum(&self) -> Result<()> {
        let sums = fs::read_to_string(self.dir.join("SHA256SUMS"))?;
        self.sha256sum(sums.lines().filter(|line| line.ends_with(RAW)))
    }

    /// Somebody else's program on these lines; without a line it fails.
    fn sha256sum<'a>(&self, lines: impl Iterator<Item = &'a str>) -> Result<()> {
        let list = self.dir.with_extension("sums");
        fs::write(&list, lines.map(|line| format!("{line}\n")).collect::<String>())?;
        let mut sums = Command::new("sha256sum");
        sums.arg("-c").arg(&list).current_dir(&self.dir);
        runner::finish(sums, Duration::from_secs(300))?.expect_code(0)?;
        Ok(fs::remove_file(list)?)
    }

    /// What holds of every exhibit taken by `live` without losses.
    fn assert_sound(&self) -> Result<()> {
        let m = &self.manifest;
        let said = [&m["status"], &m["class"], &m["method"], &m["map_check"]["equal"]];
        assert_eq!(said, [&"complete".into(), &"none".into(), &"live".into(), &Value::from(true)]);
        assert_eq!(m["losses"], Value::Array(Vec::new()));
        let [before, after] = ["map-before.txt", "map-after.txt"].map(|f| self.dir.join(f));
        assert_eq!(fs::read_to_string(before)?, fs::read_to_string(after)?);
        Ok(())
    }

    /// The image, whatever its format.
    pub(super) fn image(&self) -> Result<Image> {
        for format in FORMATS {
            let path = self.dir.join(format!("memory.{format}"));
            if path.exists() {
                return Image::open(&path, format).doing(path.display());
            }
        }
        Err(failed("the exhibit has no image"))
    }

    /// Frame numbers of the pages that differed between the two reads, by the block records.
    pub(super) fn changed_frames(&self) -> Result<BTreeSet<u64>> {
        let lines = zstd::decode_all(File::open(self.dir.join("blocks.jsonl.zst"))?)?;
        let mut frames = BTreeSet::new();
        for line in String::from_utf8_lossy(&lines).lines() {
            let block: Value = serde_json::from_str(line)?;
            let gpa = block["gpa"].as_str().and_then(|text| text.strip_prefix("0x"));
            let gpa = u64::from_str_radix(gpa.ok_or_else(|| failed("block without gpa"))?, 16)?;
            for run in block["changed"].as_array().into_iter().flatten() {
                let [first, count] = [0, 1].map(|i| run[i].as_u64().unwrap_or_default());
                frames.extend(gpa / 4096 + first..gpa / 4096 + first + count);
            }
        }
        Ok(frames)
    }

    /// Pages that were equal in both reads, and pages that were not, by the manifest.
    pub(super) fn stable(&self) -> (u64, u64) {
        let pages = |field: &str| self.manifest["stable"][field].as_u64().unwrap_or(u64::MAX);
        (pages("pages_equal"), pages("pages_changed"))
    }

    /// Takes the exhibit away, for tests that make many.
    pub(super) fn remove(self) -> Result<()> {
        Ok(fs::remove_dir_all(&self.dir)?)
    }
}

/// A stretch of guest memory in the image's file.
#[derive(Debug, Clone, Copy)]
struct Part {
    gpa: u64,
    len: u64,
    offset: u64,
}

/// An image, open for reading by guest-physical address.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    parts: Vec<Part>,
}

impl Image {
    fn open(path: &Path, format: &str) -> Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let parts = match format {
            "elf" => elf_parts(&file)?,
            "lime" => lime_parts(&file, len)?,
            _ => vec![Part { gpa: 0, len, offset: 0 }],
        };
        Ok(Self { file, parts })
    }

    /// Bytes of guest-physical space in the image; for `raw` with everything between the regions.
    pub(super) fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.len).sum()
    }

    /// The whole image, a piece at a time in the order of the file: its address and its bytes.
    pub(super) fn each(&self, mut piece: impl FnMut(u64, &[u8])) -> Result<()> {
        let mut buffer = vec![0; 1 << 20];
        for part in &self.parts {
            for at in (0..part.len).step_by(buffer.len()) {
                let len = usize::try_from(part.len - at)?.min(buffer.len());
                self.file.read_exact_at(&mut buffer[..len], part.offset + at)?;
                piece(part.gpa + at, &buffer[..len]);
            }
        }
        Ok(())
    }

    /// `len` bytes at `gpa`; a failure when the image has not all of them.
    pub(super) fn read(&self, gpa: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len)?];
        let mut at = gpa;
        while at < gpa + len {
            let part = self.parts.iter().find(|p| p.gpa <= at && at < p.gpa + p.len);
            let part = part.ok_or_else(|| failed(format_args!("the image has not {at:#x}")))?;
            let end = (part.gpa + part.len).min(gpa + len);
            let window = usize::try_from(at - gpa)?..usize::try_from(end - gpa)?;
            self.file.read_exact_at(&mut bytes[window], part.offset + (at - part.gpa))?;
            at = end;
        }
        Ok(bytes)
    }
}

/// PT_LOADs: type at 0, offset at 8, physical address at 24, lengths in file and memory behind it.
fn elf_parts(file: &File) -> Result<Vec<Part>> {
    let header = bytes_at::<64>(file, 0)?;
    let (table, size, count) = (u64_in(&header, 32), u16_in(&header, 54), u16_in(&header, 56));
    let mut parts = Vec::new();
    for number in 0..u64::from(count) {
        let entry = bytes_at::<56>(file, table + number * u64::from(size))?;
        if entry[..4] != [1, 0, 0, 0] {
            continue;
        }
        let [offset, gpa, len, memory] = [8, 24, 32, 40].map(|at| u64_in(&entry, at));
        assert_eq!(len, memory, "a short PT_LOAD at {gpa:#x}");
        parts.push(Part { gpa, len, offset });
    }
    Ok(parts)
}

/// Records: magic and version, first and last address, 8 reserved bytes, then the memory.
fn lime_parts(file: &File, file_len: u64) -> Result<Vec<Part>> {
    let (mut parts, mut at) = (Vec::new(), 0);
    while at < file_len {
        let header = bytes_at::<32>(file, at)?;
        assert_eq!(&header[..8], b"EMiL\x01\0\0\0", "header at {at:#x}");
        let (first, last) = (u64_in(&header, 8), u64_in(&header, 16));
        let part = Part { gpa: first, len: last - first + 1, offset: at + 32 };
        parts.push(part);
        at = part.offset + part.len;
    }
    assert_eq!(at, file_len);
    Ok(parts)
}

fn bytes_at<const N: usize>(file: &File, offset: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, offset).doing(format_args!("reading at {offset:#x}"))?;
    Ok(bytes)
}

fn u64_in(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn u16_in(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
