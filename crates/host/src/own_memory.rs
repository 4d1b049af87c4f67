//! Memory of our own that is there before it is needed.

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;

/// A page of 4 KiB.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Private memory that begins with a page, and all of which the kernel has given.
#[derive(Debug)]
pub struct OwnMemory {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `OwnMemory` owns it alone.
unsafe impl Send for OwnMemory {}

impl OwnMemory {
    /// Takes `len` bytes, at least one page, in pages of whatever size the kernel likes.
    ///
    /// # Errors
    /// No memory.
    pub fn new(len: usize) -> io::Result<Self> {
        let own = Self::mapped(len)?;
        own.advise(Advice::LinuxPopulateWrite)?;
        Ok(own)
    }

    /// The same in pages of 4 KiB.
    ///
    /// # Errors
    /// No memory.
    pub fn in_small_pages(len: usize) -> io::Result<Self> {
        let own = Self::mapped(len)?;
        match own.advise(Advice::LinuxNoHugepage) {
            // So says a kernel that has no others.
            Err(Errno::INVAL) => {}
            result => result?,
        }
        own.advise(Advice::LinuxPopulateWrite)?;
        Ok(own)
    }

    /// Keeps it from being swapped out.
    ///
    /// # Errors
    /// RLIMIT_MEMLOCK without CAP_IPC_LOCK.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: exactly our own mapping; locking changes no byte.
        Ok(unsafe { rustix::mm::mlock(self.start.as_ptr(), self.len) }?)
    }

    /// The address of the first byte.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// The memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is ours alone, readable and writable for `len` bytes that are
        // initialised (the kernel gives zeros), and lives as long as `self`, which is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len) }
    }

    fn mapped(len: usize) -> io::Result<Self> {
        let (len, prot) = (len.max(PAGE_BYTES), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping at an address that the kernel chooses: no memory of ours changes.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE)
        }?;
        Ok(Self { start: NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?, len })
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        loop {
            // SAFETY: exactly our own mapping; the advices used here change no byte.
            match unsafe { rustix::mm::madvise(self.start.as_ptr(), self.len, advice) } {
                Err(Errno::INTR | Errno::AGAIN) => {}
                result => return result,
            }
        }
    }
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        // SAFETY: exactly our own mapping, of which no reference is left. It fails for none.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Process;
    use crate::pagemap::Pagemap;

    #[test]
    fn all_of_it_is_there() {
        for make in [OwnMemory::new, OwnMemory::in_small_pages] {
            let mut own = make(5 << 20).unwrap();
            own.lock().unwrap();
            assert!(own.bytes().len() == 5 << 20 && own.bytes().iter().all(|byte| *byte == 0));
            let me = Process::open(std::process::id()).unwrap();
            let count = Pagemap::open(&me).unwrap().count(own.address(), 5 << 8).unwrap();
            assert_eq!(count.present, 5 << 8);
            own.bytes()[5 << 19] = 7;
        }
    }
}
