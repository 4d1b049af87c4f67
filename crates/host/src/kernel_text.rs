//! Bounded reading of the small text files that the kernel writes.

use crate::HostError;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

/// Everything that `file` gives, at most `limit` bytes; `path` is for the error.
pub(crate) fn read_all(file: &File, path: &str, limit: u64) -> Result<Vec<u8>, HostError> {
    let mut out = Vec::new();
    let got = file
        .take(limit.saturating_add(1))
        .read_to_end(&mut out)
        .map_err(|e| HostError::file(path, e))?;
    if got as u64 > limit {
        return Err(HostError::TooLong { path: path.into(), limit });
    }
    Ok(out)
}

/// The file at `path`, as text; bytes that are no UTF-8 are replaced.
pub(crate) fn read_text(path: &str, limit: u64) -> Result<String, HostError> {
    let file = File::open(path).map_err(|e| HostError::file(path, e))?;
    Ok(String::from_utf8_lossy(&read_all(&file, path, limit)?).into_owned())
}

/// Opens `name` under `dir` for reading.
pub(crate) fn open_under(dir: impl AsFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?))
}

/// Opens `name` under `dir` for writing: a command to the kernel.
pub(crate) fn open_for_commands(dir: impl AsFd, name: &str) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?))
}

/// What stands behind `Name:` in the first such line of `text`.
pub(crate) fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    Some(text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?.trim())
}

/// The number in a line `Name:   123 kB` of `text`, in bytes.
pub(crate) fn kib_field(text: &str, name: &str) -> Option<u64> {
    let number = field(text, name)?.strip_suffix("kB")?.trim_end();
    number.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "VmRSS:\t    1234 kB\nRssAnon:\t 7 kB\nBad: x kB\n";
        assert_eq!(kib_field(text, "VmRSS"), Some(1234 * 1024));
        assert_eq!(kib_field(text, "Rss"), None);
        assert_eq!(kib_field(text, "Bad"), None);
        assert_eq!(field(text, "Bad"), Some("x kB"));
        assert_eq!(field(text, "Ba"), None);
    }

    #[test]
    fn a_long_file_is_refused() {
        let error = read_text("/proc/self/status", 10).unwrap_err();
        assert!(matches!(error, HostError::TooLong { limit: 10, .. }), "{error}");
    }
}
