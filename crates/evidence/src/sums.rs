//! `SHA256SUMS`: what `sha256sum -c` checks without us.

use crate::digest::Digest;
use crate::exhibit::{self, is_file_name};

/// Greatest length of `SHA256SUMS` in bytes.
pub const MAX_LEN: u64 = 1 << 20;

/// Whether a file of an exhibit has a line in `SHA256SUMS`: every one but `SHA256SUMS` itself and
/// those that may be added or written anew later.
pub fn covers(name: &str) -> bool {
    name != exhibit::SUMS && !exhibit::ADDED_LATER.contains(&name)
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sum {
    /// The file's name.
    pub name: String,
    /// SHA-256 of its bytes.
    pub sha256: Digest,
}

/// The text of `SHA256SUMS`: `<64 hex>  <name>\n` a line, sorted by name in byte order.
pub fn write(mut sums: Vec<Sum>) -> String {
    sums.sort();
    sums.iter().map(|sum| format!("{}  {}\n", sum.sha256, sum.name)).collect()
}

/// The first line that is not as [`write()`] writes it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: {why}")]
pub struct SumsError {
    /// Number of the line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub why: &'static str,
}

/// Reads the text of `SHA256SUMS`; accepts exactly what [`write()`] writes.
///
/// # Errors
/// [`SumsError`] names the first wrong line.
pub fn parse(text: &[u8]) -> Result<Vec<Sum>, SumsError> {
    let mut sums: Vec<Sum> = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let line = sums.len() + 1;
        let bad = |why| SumsError { line, why };
        let end = rest.iter().position(|&b| b == b'\n').ok_or(bad("it has no newline"))?;
        let (whole, behind) = rest.split_at(end);
        rest = behind.get(1..).unwrap_or_default();
        let whole = str::from_utf8(whole).map_err(|_| bad("it is not text"))?;
        let (hex, name) = whole.split_once("  ").ok_or(bad("it is not `digest  name`"))?;
        let sha256 = hex.parse().map_err(|_| bad("its digest is not 64 lower-case hex digits"))?;
        if !is_file_name(name) || !covers(name) {
            return Err(bad("its name is none that may stand here"));
        }
        if sums.last().is_some_and(|before| before.name.as_str() >= name) {
            return Err(bad("it is out of order or stands twice"));
        }
        sums.push(Sum { name: name.into(), sha256 });
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::sha256;

    fn sum(name: &str) -> Sum {
        Sum { name: name.into(), sha256: sha256(name.as_bytes()) }
    }

    #[test]
    fn the_text_is_that_of_sha256sum() {
        let text = write(vec![sum("memory.elf"), sum("blocks.jsonl.zst")]);
        // printf blocks.jsonl.zst | sha256sum; printf memory.elf | sha256sum
        let want = "6e6bb445661459211744365b6c5b13d0c38b460723e4b991a5590a53c87a21ce  blocks.jsonl.zst\n4a5d6af55524b512ea0c1adf47feff6058bd017608473e787421a6c1baf72099  memory.elf\n";
        assert_eq!(text, want);
        assert_eq!(parse(text.as_bytes()).unwrap(), [sum("blocks.jsonl.zst"), sum("memory.elf")]);
        assert_eq!(parse(b""), Ok(vec![]));
    }

    #[test]
    fn nothing_but_what_we_write_is_read() {
        let good = write(vec![sum("a"), sum("b")]);
        let line = write(vec![sum("a")]);
        let name = |name: &str| line.replace("  a\n", &format!("  {name}\n"));
        for (bad, at) in [
            (good.trim_end().to_string(), 2),
            (good.to_uppercase(), 1),
            (format!("{line}{line}"), 2),
            (format!("{}{line}", write(vec![sum("b")])), 2),
            (line.replace("  ", " "), 1),
            (line.replace("  ", " *"), 1),
            (line.replace('\n', "\r\n"), 1),
            (format!("{good}\n"), 3),
            (name("../a"), 1),
            (name(""), 1),
            (name("SHA256SUMS"), 1),
            (name("custody.jsonl"), 1),
        ] {
            assert_eq!(parse(bad.as_bytes()).unwrap_err().line, at, "{bad:?}");
        }
        assert!(parse(b"\xff\n").is_err());
    }
}
