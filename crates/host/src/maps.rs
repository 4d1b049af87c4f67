//! `/proc/PID/maps` and `/proc/PID/smaps`: what lies where in a process.
//!
//! The form is that of the kernel's fs/proc/task_mmu.c (`show_map_vma`, `show_smap`). Both
//! parsers are pure and take any bytes: a line that the kernel would not write is an error.

use std::fmt;
use std::io::{BufRead, Read};

/// Mappings that one process may have here. The kernel's own limit is 65,530 unless raised.
pub const MAX_VMAS: usize = 1 << 18;

/// Longest line: addresses, and a path of 4,096 bytes whose every byte is escaped.
const MAX_LINE: u64 = 4 * 4096 + 256;

/// One mapping: a line of `maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First host virtual address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// `rwxs` or `rwxp`, `-` where a right is missing.
    pub perms: [u8; 4],
    /// Offset of `start` in the file, in bytes; 0 when there is no file.
    pub offset: u64,
    /// Device of the file as major and minor number.
    pub dev: (u32, u32),
    /// Inode of the file; 0 when there is none.
    pub inode: u64,
    /// Path, `[heap]`, `[anon:..]`, or empty. As the kernel writes it: newlines as `\012`, and
    /// ` (deleted)` behind the paths of unlinked files.
    pub path: Vec<u8>,
}

impl Vma {
    /// Whether it may be read.
    pub fn readable(&self) -> bool {
        self.perms[0] == b'r'
    }

    /// Whether writes reach the file and other processes that map it.
    pub fn shared(&self) -> bool {
        self.perms[3] == b's'
    }

    /// Whether it has no file behind it.
    pub fn anonymous(&self) -> bool {
        self.inode == 0 && self.dev == (0, 0) && !self.path.starts_with(b"/")
    }

    /// Whether all of `len` bytes at `hva` lie in it.
    pub fn covers(&self, hva: u64, len: u64) -> bool {
        hva >= self.start && hva.checked_add(len).is_some_and(|end| end <= self.end)
    }

    /// The offset in the file of host virtual address `hva`.
    pub fn file_off(&self, hva: u64) -> Option<u64> {
        self.offset.checked_add(hva.checked_sub(self.start)?)
    }
}

impl fmt::Display for Vma {
    /// As in `maps`, without the padding.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Vma { start, end, offset, dev: (major, minor), inode, .. } = self;
        let perms = String::from_utf8_lossy(&self.perms);
        write!(f, "{start:x}-{end:x} {perms} {offset:08x} {major:02x}:{minor:02x} {inode}")?;
        if !self.path.is_empty() {
            write!(f, " {}", String::from_utf8_lossy(&self.path))?;
        }
        Ok(())
    }
}

/// Why the text is not what the kernel writes.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    /// A line breaks the form.
    #[error("line {line} has no valid {what}: {text:?}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// The field.
        what: &'static str,
        /// The line's first 120 bytes.
        text: String,
    },
    /// A mapping begins before the one above it ends: the process changed its mappings while
    /// they were listed, or the text is not the kernel's.
    #[error("line {line}: mapping at {start:#x} begins before the one above it ends ({end:#x})")]
    Order {
        /// Its number, from 1.
        line: usize,
        /// Where it begins.
        start: u64,
        /// Where the mapping above it ends.
        end: u64,
    },
    /// More than [`MAX_VMAS`] mappings.
    #[error("more than {MAX_VMAS} mappings")]
    TooMany,
    /// Reading failed.
    #[error("reading failed")]
    Read(#[from] std::io::Error),
}

/// The `hex` number before `until`, and what follows it. Lower case only, at most 16 digits.
fn hex(text: &[u8], until: u8) -> Option<(u64, &[u8])> {
    let end = text.iter().position(|b| *b == until)?;
    let (digits, rest) = text.split_at_checked(end)?;
    let valid = digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !valid || digits.is_empty() {
        return None;
    }
    let value = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    Some((value, rest.get(1..)?))
}

/// The fields of one `maps` line, without its newline; the error is the field's name.
fn vma_line(line: &[u8]) -> Result<Vma, &'static str> {
    let (start, rest) = hex(line, b'-').ok_or("start address")?;
    let (end, rest) = hex(rest, b' ').ok_or("end address")?;
    if start >= end {
        return Err("range");
    }
    let (perms, rest) = rest.split_first_chunk::<4>().ok_or("permissions")?;
    let allowed = [b"r-", b"w-", b"x-", b"sp"];
    if !perms.iter().zip(allowed).all(|(p, set)| set.contains(p)) {
        return Err("permissions");
    }
    let rest = rest.strip_prefix(b" ").ok_or("permissions")?;
    let (offset, rest) = hex(rest, b' ').ok_or("offset")?;
    let (major, rest) = hex(rest, b':').ok_or("device")?;
    let (minor, rest) = hex(rest, b' ').ok_or("device")?;
    let number = |n: u64| u32::try_from(n).map_err(|_| "device");
    let dev = (number(major)?, number(minor)?);
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    let (inode, rest) = rest.split_at(digits);
    let inode = std::str::from_utf8(inode).ok().and_then(|t| t.parse().ok()).ok_or("inode")?;
    let path = match rest {
        [] => rest,
        [b' ', ..] => rest.trim_ascii_start(),
        _ => return Err("inode"),
    };
    Ok(Vma { start, end, perms: *perms, offset, dev, inode, path: path.to_vec() })
}

/// Reads lines with a bound on each, and numbers them.
struct Lines<R> {
    reader: R,
    number: usize,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    fn new(reader: R) -> Self {
        Self { reader, number: 0, line: Vec::new() }
    }

    /// The next line without its newline; `None` at the end.
    fn next(&mut self) -> Result<Option<&[u8]>, MapsError> {
        self.line.clear();
        self.number += 1;
        let got = (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut self.line)?;
        if got == 0 {
            return Ok(None);
        }
        if self.line.pop() != Some(b'\n') {
            return Err(self.error("end"));
        }
        Ok(Some(&self.line))
    }

    fn error(&self, what: &'static str) -> MapsError {
        let text = self.line.get(..120).unwrap_or(&self.line);
        let text = String::from_utf8_lossy(text).into_owned();
        MapsError::Line { line: self.number, what, text }
    }
}

/// Checks that mappings ascend and are not too many.
#[derive(Default)]
struct Order {
    end: u64,
    count: usize,
}

impl Order {
    fn check(&mut self, line: usize, vma: &Vma) -> Result<(), MapsError> {
        if vma.start < self.end {
            return Err(MapsError::Order { line, start: vma.start, end: self.end });
        }
        self.end = vma.end;
        self.count += 1;
        if self.count > MAX_VMAS { Err(MapsError::TooMany) } else { Ok(()) }
    }
}

/// The mappings that a `maps` text lists, ascending and disjoint.
///
/// # Errors
/// [`MapsError`] names the first line that breaks the form.
pub fn parse_maps(text: impl BufRead) -> Result<Vec<Vma>, MapsError> {
    let mut lines = Lines::new(text);
    let mut order = Order::default();
    let mut out = Vec::new();
    while let Some(line) = lines.next()? {
        let vma = vma_line(line).map_err(|what| lines.error(what))?;
        order.check(lines.number, &vma)?;
        out.push(vma);
    }
    Ok(out)
}

/// One mapping's entry of `smaps`; sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Smap {
    /// The mapping.
    pub vma: Vma,
    /// Page size of the mapping.
    pub page_size: u64,
    /// Resident in the process.
    pub rss: u64,
    /// Swapped out; for shared memory of tmpfs the object's swapped pages in this range.
    pub swap: u64,
    /// Two-letter flags, each followed by a space: `rd wr mr mg `.
    pub flags: String,
}

impl Smap {
    /// Whether `flag` is set, e.g. `mg` (may be merged by KSM) or `ht` (hugetlbfs).
    pub fn has(&self, flag: &str) -> bool {
        self.flags.split(' ').any(|f| f == flag)
    }
}

/// An entry of `smaps` that is not complete yet.
struct Open {
    vma: Vma,
    page_size: Option<u64>,
    rss: Option<u64>,
    swap: Option<u64>,
    flags: Option<String>,
}

impl Open {
    fn new(vma: Vma) -> Self {
        Self { vma, page_size: None, rss: None, swap: None, flags: None }
    }

    /// Takes the line in, if it is one of the fields kept. The kernel adds fields over time:
    /// others are passed over.
    fn field(&mut self, line: &[u8]) -> Result<(), &'static str> {
        let text = std::str::from_utf8(line).map_err(|_| "field")?;
        let (name, value) = text.split_once(':').ok_or("field")?;
        if name == "VmFlags" {
            self.flags = Some(value.trim_start().to_owned());
            return Ok(());
        }
        let slot = match name {
            "KernelPageSize" => &mut self.page_size,
            "Rss" => &mut self.rss,
            "Swap" => &mut self.swap,
            _ => return Ok(()),
        };
        let number = value.trim().strip_suffix(" kB").ok_or("size in kB")?;
        let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1024));
        *slot = Some(bytes.ok_or("size in kB")?);
        Ok(())
    }

    fn close(self) -> Result<Smap, &'static str> {
        Ok(Smap {
            vma: self.vma,
            page_size: self.page_size.filter(|s| s.is_power_of_two()).ok_or("KernelPageSize")?,
            rss: self.rss.ok_or("Rss")?,
            swap: self.swap.ok_or("Swap")?,
            flags: self.flags.ok_or("VmFlags")?,
        })
    }
}

/// The entries of an `smaps` text for which `wanted` says yes, ascending.
///
/// # Errors
/// [`MapsError`] names the first line that breaks the form, also in entries not asked for.
pub fn parse_smaps(
    text: impl BufRead,
    wanted: impl Fn(&Vma) -> bool,
) -> Result<Vec<Smap>, MapsError> {
    let mut lines = Lines::new(text);
    let mut order = Order::default();
    let mut open: Option<Open> = None;
    let mut started = false;
    let mut out = Vec::new();
    while let Some(line) = lines.next()? {
        // A field's line begins with a capital, a mapping's with a lower-case digit.
        if line.first().is_some_and(u8::is_ascii_uppercase) {
            let done = match &mut open {
                Some(entry) => entry.field(line),
                None if started => Ok(()),
                None => Err("mapping above it"),
            };
            done.map_err(|what| lines.error(what))?;
            continue;
        }
        let vma = vma_line(line).map_err(|what| lines.error(what))?;
        if let Some(entry) = open.take() {
            out.push(entry.close().map_err(|what| lines.error(what))?);
        }
        order.check(lines.number, &vma)?;
        started = true;
        if wanted(&vma) {
            open = Some(Open::new(vma));
        }
    }
    if let Some(entry) = open {
        out.push(entry.close().map_err(|what| lines.error(what))?);
    }
    Ok(out)
}

/// The one mapping of `vmas` (ascending) that holds all of `len` bytes at `hva`.
pub fn covering(vmas: &[Vma], hva: u64, len: u64) -> Option<&Vma> {
    let vma = vmas.get(vmas.partition_point(|v| v.end <= hva))?;
    vma.covers(hva, len).then_some(vma)
}

/// The mappings of `vmas` that touch `len` bytes at `hva`, as text for an error: at most four.
pub(crate) fn touching(vmas: &[Vma], hva: u64, len: u64) -> String {
    let end = hva.saturating_add(len);
    let hits: Vec<_> = vmas.iter().filter(|v| v.start < end && hva < v.end).collect();
    match hits.len() {
        0 => "nothing".into(),
        n => {
            let mut text: Vec<_> = hits.iter().take(4).map(|v| v.to_string()).collect();
            if n > 4 {
                text.push(format!("{} more", n - 4));
            }
            text.join("; ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::BufReader;

    const MAPS: &str = "\
55d0c8a00000-55d0c8a02000 r--p 00000000 fe:00 247030                     /usr/bin/a b (deleted)
7f0000000000-7f0080000000 rw-p 00000000 00:00 0 
7f0080000000-7f00c0000000 rw-s 40000000 00:01 1031                       /memfd:pc.ram (deleted)
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn every_field_is_read() {
        let vmas = parse_maps(MAPS.as_bytes()).unwrap();
        assert_eq!(vmas.len(), 4);
        assert_eq!(vmas[0].path, b"/usr/bin/a b (deleted)");
        assert_eq!(vmas[0].dev, (0xfe, 0));
        assert!(vmas[1].anonymous() && !vmas[1].shared() && vmas[1].path.is_empty());
        assert!(vmas[2].shared() && !vmas[2].anonymous());
        assert_eq!(vmas[2].file_off(0x7f00_8000_1000), Some(0x4000_1000));
        assert!(!vmas[3].readable());
        assert_eq!(
            vmas[2].to_string(),
            "7f0080000000-7f00c0000000 rw-s 40000000 00:01 1031 /memfd:pc.ram (deleted)"
        );
    }

    #[test]
    fn one_mapping_covers_or_none() {
        let vmas = parse_maps(MAPS.as_bytes()).unwrap();
        let at = |hva, len| covering(&vmas, hva, len).map(|v| v.start);
        assert_eq!(at(0x7f00_0000_0000, 0x8000_0000), Some(0x7f00_0000_0000));
        assert_eq!(at(0x7f00_0000_0000, 0x8000_0001), None);
        assert_eq!(at(0x7f00_bfff_f000, 0x1000), Some(0x7f00_8000_0000));
        assert_eq!(at(0x7f00_c000_0000, 1), None);
        assert_eq!(at(u64::MAX, u64::MAX), None);
        let text = touching(&vmas, 0x7f00_7fff_f000, 0x2000);
        assert!(text.contains("00:00 0; ") && text.contains("memfd"), "{text}");
        assert_eq!(touching(&vmas, 0, 1), "nothing");
    }

    #[test]
    fn lines_that_the_kernel_would_not_write_are_refused() {
        let bad = [
            ("1000-2000 rw-p 0 0:0 0", "end"),
            ("1000-1000 rw-p 0 0:0 0\n", "range"),
            ("-1000 rw-p 0 0:0 0\n", "start"),
            ("1000-20000000000000000 rw-p 0 0:0 0\n", "end"),
            ("A000-b000 rw-p 0 0:0 0\n", "start"),
            ("1000-2000 rwp 0 0:0 0\n", "permissions"),
            ("1000-2000 wr-p 0 0:0 0\n", "permissions"),
            ("1000-2000 rw-p  0:0 0\n", "offset"),
            ("1000-2000 rw-p 0 0 0\n", "device"),
            ("1000-2000 rw-p 0 1ffffffff:0 0\n", "device"),
            ("1000-2000 rw-p 0 0:0 \n", "inode"),
            ("1000-2000 rw-p 0 0:0 12x /a\n", "inode"),
            ("\n", "start"),
        ];
        for (text, what) in bad {
            let error = parse_maps(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(what), "{text:?}: {error}");
        }
        let text = "1000-3000 rw-p 0 0:0 0\n2000-4000 rw-p 0 0:0 0\n";
        assert!(matches!(parse_maps(text.as_bytes()), Err(MapsError::Order { line: 2, .. })));
        let long = [b'1'].repeat(100_000);
        assert!(parse_maps(&long[..]).is_err());
    }

    const SMAPS: &str = "\
1000-3000 rw-p 00000000 00:00 0 
Size:                  8 kB
KernelPageSize:        4 kB
Rss:                   4 kB
Swap:                 12 kB
NewInSomeKernel:  what ever
VmFlags: rd wr mr mg 
200000-400000 rw-s 00000000 00:0f 7   /dev/hugepages/x
KernelPageSize:     2048 kB
Rss:                   0 kB
Swap:                  0 kB
VmFlags: rd wr sh ht 
";

    #[test]
    fn smaps_of_the_asked_ones() {
        let all = parse_smaps(SMAPS.as_bytes(), |_| true).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].page_size, all[0].rss, all[0].swap), (4096, 4096, 12288));
        assert!(all[0].has("mg") && !all[0].has("m") && !all[0].has("ht"));
        assert!(all[1].has("ht") && all[1].page_size == 2 << 20);
        let one = parse_smaps(SMAPS.as_bytes(), |v| v.covers(0x20_0000, 1)).unwrap();
        assert_eq!(one, all[1..]);
    }

    #[test]
    fn an_smaps_entry_without_its_fields_is_refused() {
        for gone in ["KernelPageSize", "Rss", "Swap", "VmFlags"] {
            let text: String =
                SMAPS.lines().filter(|l| !l.starts_with(gone)).flat_map(|l| [l, "\n"]).collect();
            let error = parse_smaps(text.as_bytes(), |_| true).unwrap_err().to_string();
            assert!(error.contains(gone), "{error}");
            assert!(parse_smaps(text.as_bytes(), |_| false).unwrap().is_empty());
        }
        assert!(parse_smaps(&b"Rss: 4 kB\n"[..], |_| true).is_err());
        let odd = SMAPS.replace("2048 kB", "2047 kB");
        assert!(parse_smaps(odd.as_bytes(), |_| true).is_err());
    }

    #[test]
    fn our_own_mappings_are_read() {
        let open = |name| BufReader::new(std::fs::File::open(name).unwrap());
        let vmas = parse_maps(open("/proc/self/maps")).unwrap();
        let here = vmas.as_ptr().addr() as u64;
        assert!(covering(&vmas, here, 1).unwrap().readable());
        let smaps = parse_smaps(open("/proc/self/smaps"), |v| v.covers(here, 1)).unwrap();
        assert_eq!(smaps.len(), 1);
        assert!(smaps[0].has("rd") && smaps[0].rss > 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_maps(&bytes[..]);
            let _ = parse_smaps(&bytes[..], |_| true);
        }

        #[test]
        fn what_is_printed_is_read_back(
            start in 0u64..1 << 40, len in 1u64..1 << 40, inode in 1u64.., offset: u64,
            dev: (u32, u32), shared: bool, name in "/[ -~]{0,40}[!-~]",
        ) {
            let perms = if shared { *b"rw-s" } else { *b"r-xp" };
            let path = name.into_bytes();
            let vma = Vma { start, end: start + len, perms, offset, dev, inode, path };
            let text = format!("{vma}\n");
            prop_assert_eq!(parse_maps(text.as_bytes()).unwrap(), [vma]);
        }
    }
}
