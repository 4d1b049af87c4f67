//! `/proc/PID/pagemap`: which pages of a process the host has memory behind.
//!
//! One 64-bit entry per 4 KiB of host virtual address space, also under huge pages
//! (kernel: Documentation/admin-guide/mm/pagemap.rst). Reading it touches no page.

use crate::HostError;
use crate::kernel_text::open_under;
use crate::process::Process;
use evidence::PAGE;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// One page's entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    /// Bit 63: the page is in memory and in the process's page table.
    pub fn present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// Bit 62: the page is swapped out, or its entry says something else that is no hole: it is
    /// being migrated, is poisoned, or carries a marker.
    pub fn swapped(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    /// In one of the host's swap areas: bits 0-4 name it. The kernel's own kinds of entries (a page that is being
    /// moved, one that the memory controller has given up, a marker) have the last of the 32 numbers, nine of them
    /// at most (include/linux/swap.h). Whoever is shown no frame numbers is shown none of these either.
    pub fn in_swap_area(self) -> bool {
        self.swapped() && self.0 & 31 < 23
    }

    /// Bit 61: the page belongs to a file or is shared anonymous memory.
    pub fn of_file(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    /// Bit 55: written since the bits were last cleared ([`crate::soft_dirty`]), or new since then.
    pub fn soft_dirty(self) -> bool {
        self.0 >> 55 & 1 == 1
    }

    /// Bit 57: write-protected by userfaultfd: whoever writes it first waits until it is let go.
    pub fn write_protected(self) -> bool {
        self.0 >> 57 & 1 == 1
    }

    /// The same entry with the mark cleared.
    #[must_use]
    pub fn without_mark(self) -> Self {
        Self(self.0 & !(1 << 55))
    }

    /// Bits 0-54 of a present page: its frame number; 0 to whoever lacks CAP_SYS_ADMIN.
    pub fn frame(self) -> u64 {
        if self.present() { self.0 & ((1 << 55) - 1) } else { 0 }
    }

    /// Whether a private anonymous page holds now what it held when `before` was read, if the
    /// soft-dirty bits were cleared before that.
    ///
    /// The bit alone is not enough: merging by KSM loses it, and so does giving memory back and
    /// reading it again, which both bring another frame. What is in swap counts as changed. Absent
    /// means zeros.
    pub fn is_as(self, before: Self) -> bool {
        match (before.kept(), self.kept()) {
            (false, false) => true,
            (true, true) => {
                let same_frame = self.frame() == before.frame() && self.frame() != 0;
                self.present() && before.present() && same_frame && !self.soft_dirty()
            }
            _ => false,
        }
    }

    /// Whether the process has content of its own here, in memory or in swap.
    pub fn kept(self) -> bool {
        self.present() || self.swapped()
    }
}

/// Entries read at a time.
const CHUNK: usize = 512;

/// The open pagemap of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the pagemap of `process`. Needs the right to read it as a debugger would.
    ///
    /// # Errors
    /// [`HostError::Refused`] without that right.
    pub fn open(process: &Process) -> Result<Self, HostError> {
        let file = open_under(process.dir(), "pagemap").map_err(|e| process.error("pagemap", e))?;
        Ok(Self { file })
    }

    /// Fills `entries` with those of the pages from `hva`, which need not be aligned, on.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::UnexpectedEof`] when the process is gone or the range
    /// leaves its address space.
    pub fn read(&self, hva: u64, entries: &mut [Entry]) -> io::Result<()> {
        let mut at = (hva / PAGE).checked_mul(8).ok_or(io::ErrorKind::InvalidInput)?;
        let mut bytes = [0u8; CHUNK * 8];
        for chunk in entries.chunks_mut(CHUNK) {
            let bytes = &mut bytes[..chunk.len() * 8];
            self.file.read_exact_at(bytes, at)?;
            for (entry, raw) in chunk.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *entry = Entry(u64::from_ne_bytes(*raw));
            }
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Counts the present and the swapped pages of `pages` pages from `hva` on.
    ///
    /// # Errors
    /// As [`Pagemap::read`].
    pub fn count(&self, hva: u64, pages: u64) -> io::Result<Count> {
        let mut count = Count::default();
        let mut entries = [Entry::default(); CHUNK];
        let mut done = 0u64;
        while done < pages {
            let step = usize::try_from(pages - done).map_or(CHUNK, |left| left.min(CHUNK));
            let entries = &mut entries[..step];
            let skipped = done.checked_mul(PAGE).and_then(|skip| hva.checked_add(skip));
            self.read(skipped.ok_or(io::ErrorKind::InvalidInput)?, entries)?;
            for entry in entries {
                count.present += u64::from(entry.present());
                count.swapped += u64::from(entry.swapped());
            }
            done += step as u64;
        }
        Ok(count)
    }
}

/// Pages by what the host has behind them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// In memory.
    pub present: u64,
    /// In swap.
    pub swapped: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_memory::tests::Area;

    #[test]
    fn written_pages_are_present_and_others_are_not() {
        let area = Area::anonymous(1100);
        for page in [0, 3, 600, 1099] {
            area.write(page, 7);
        }
        let me = Process::open(std::process::id()).unwrap();
        let pagemap = Pagemap::open(&me).unwrap();
        let mut entries = vec![Entry::default(); 1100];
        pagemap.read(area.hva() + 5, &mut entries).unwrap();
        let present: Vec<_> = (0..1100).filter(|p| entries[*p].present()).collect();
        assert_eq!(present, [0, 3, 600, 1099]);
        assert!(entries.iter().all(|e| !e.swapped() && !e.of_file()));
        let count = pagemap.count(area.hva(), 1100).unwrap();
        assert_eq!(count, Count { present: 4, swapped: 0 });
    }

    #[test]
    fn what_is_moved_or_given_up_is_in_no_swap_area() {
        let swapped = |kind: u64| Entry(1 << 62 | 77 << 5 | kind);
        assert!(swapped(0).in_swap_area() && swapped(3).in_swap_area());
        // The last numbers are the kernel's own.
        assert!(!swapped(30).in_swap_area() && !swapped(31).in_swap_area());
        assert!(swapped(31).kept(), "it is read all the same");
        assert!(!Entry(1 << 63 | 77).in_swap_area(), "it is in memory");
    }

    #[test]
    fn only_a_page_of_the_same_frame_that_was_not_written_is_as_before() {
        let present = |frame: u64, dirty: u64| Entry(1 << 63 | dirty << 55 | frame);
        let (absent, swapped) = (Entry(0), Entry(1 << 62 | 77));
        // What it was before, written or not, is nothing: the bits were cleared since then.
        for before in [present(7, 0), present(7, 1)] {
            assert!(present(7, 0).is_as(before));
            assert!(!present(7, 1).is_as(before), "written");
            assert!(!present(8, 0).is_as(before), "merged, or new");
            assert!(!absent.is_as(before) && !swapped.is_as(before));
        }
        assert!(absent.is_as(absent));
        assert!(!present(7, 0).is_as(absent) && !swapped.is_as(absent));
        assert!(!swapped.is_as(swapped) && !absent.is_as(swapped) && !present(7, 0).is_as(swapped));
        // Frames that are hidden tell nothing.
        assert!(!present(0, 0).is_as(present(0, 0)));
        assert_eq!((present(7, 1).frame(), swapped.frame()), (7, 0));
    }

    #[test]
    fn behind_the_address_space_is_an_error() {
        let me = Process::open(std::process::id()).unwrap();
        let pagemap = Pagemap::open(&me).unwrap();
        assert!(pagemap.read(u64::MAX, &mut [Entry::default(); 2]).is_err());
    }
}
