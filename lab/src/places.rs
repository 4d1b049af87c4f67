//! Where a guest's memory lies on the host: asked of QEMU once, then read without it, also while it
//! stands still.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::error::{Doing, Result, failed};
use crate::guest::Guest;

/// A line of QEMU's map and where its bytes are.
#[derive(Debug)]
pub struct Place {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    file: File,
    offset: u64,
}

/// All of a guest's memory: the lines of kind `ram` and `rom`.
#[derive(Debug)]
pub struct Places(Vec<Place>);

impl Places {
    /// Asks QEMU and looks into its process.
    pub fn of(guest: &mut Guest) -> Result<Self> {
        let is_memory = |kind: &str| matches!(kind, "ram" | "rom");
        let lines = guest.flat_view()?.into_iter().filter(|range| is_memory(&range.kind));
        let lines: Vec<_> = lines.collect();
        let place = |line: &crate::Range| {
            let hva = guest.hva(line.gpa)?;
            let (file, offset) = locate(guest.pid(), hva, line.len)?;
            Ok(Place { gpa: line.gpa, len: line.len, file, offset })
        };
        Ok(Self(lines.iter().map(place).collect::<Result<_>>()?))
    }

    /// Every place.
    pub fn iter(&self) -> impl Iterator<Item = &Place> {
        self.0.iter()
    }

    /// Buffers for [`Places::read`], faulted in, so that reading takes no longer than it must.
    pub fn buffers(&self) -> Result<Vec<Vec<u8>>> {
        self.iter().map(|place| Ok(vec![0xff; usize::try_from(place.len)?])).collect()
    }

    /// Reads everything as it is now.
    pub fn read(&self, buffers: &mut [Vec<u8>]) -> Result<()> {
        for (place, buffer) in self.iter().zip(buffers) {
            let doing = format_args!("reading guest memory {:#x}", place.gpa);
            place.file.read_exact_at(buffer, place.offset).doing(doing)?;
        }
        Ok(())
    }
}

/// What to read for an address in a process. Private memory: the process's own; shared memory: the
/// file behind it, for reading it through the process would allocate what nobody has touched, which
/// is more for the tool to read and was not there when it planned.
fn locate(pid: u32, hva: u64, len: u64) -> Result<(File, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).doing("reading maps")?;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let Some((first, end)) = range.split_once('-') else { continue };
        let [start, end] = [first, end].map(|hex| u64::from_str_radix(hex, 16).unwrap_or(0));
        if !(start..end).contains(&hva) || !rights.ends_with('s') {
            continue;
        }
        if hva + len > end {
            return Err(failed(format_args!("{hva:#x} is shared, and ends in another mapping")));
        }
        let offset = u64::from_str_radix(words.next().unwrap_or(""), 16)?;
        let name = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
        let file = File::open(&name).doing(name)?;
        return Ok((file, offset + (hva - start)));
    }
    Ok((File::open(format!("/proc/{pid}/mem")).doing("opening its memory")?, hva))
}
