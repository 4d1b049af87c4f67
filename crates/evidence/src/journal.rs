//! The journal: every action of an acquisition, as hash-chained JSON lines.
//!
//! Each line names the SHA-256 of the line before it, so a line cannot be changed, dropped, added
//! or moved without breaking the chain behind it. The last line's digest (the *head*) is in the
//! manifest. `custody.jsonl` is a journal too, whose first line follows the journal's head.

use crate::digest::{Digest, sha256};
use crate::lines::{LineError, next_line};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Write};

/// Greatest length of one line in bytes: a transcript line of `info mtree` fits.
pub const MAX_LINE: usize = 1 << 20;

/// Greatest number of lines.
pub const MAX_LINES: u64 = 10_000_000;

/// One line of `journal.jsonl` or `custody.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "JournalLine")]
pub struct Line {
    /// Number of the line, from 0.
    pub seq: u64,
    /// Monotonic nanoseconds since the start of the acquisition.
    pub mono_ns: u64,
    /// The same instant in UTC, RFC 3339 with `Z`.
    #[schemars(regex(pattern = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z$"))]
    pub utc: String,
    /// What was done or seen, one short word in kebab case: `map-taken`.
    #[schemars(regex(pattern = r"^[a-z0-9]+(-[a-z0-9]+)*$"), length(max = 64))]
    pub what: String,
    /// The particulars.
    pub data: serde_json::Map<String, serde_json::Value>,
    /// SHA-256 of the line before this one, without its newline. In the first line of a journal 64
    /// zeros; in the first line of a custody log the journal's head.
    pub prev: Digest,
}

/// The JSON Schema of one line.
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(Line)
}

/// Whether `text` is `YYYY-MM-DDThh:mm:ss[.fraction]Z` with digits in their places.
pub fn is_utc(text: &str) -> bool {
    let Some((date, fraction)) = text.strip_suffix('Z').and_then(|t| t.split_at_checked(19)) else {
        return false;
    };
    let shape = date.bytes().zip("dddd-dd-ddTdd:dd:dd".bytes()).all(|(byte, place)| match place {
        b'd' => byte.is_ascii_digit(),
        _ => byte == place,
    });
    let fraction_ok = match fraction.strip_prefix('.') {
        Some(digits) => {
            (1..=9).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
        }
        None => fraction.is_empty(),
    };
    shape && fraction_ok
}

/// Whether `word` is kebab case of at most 64 bytes.
fn is_word(word: &str) -> bool {
    let part =
        |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    word.len() <= 64 && word.split('-').all(part)
}

/// Why a line could not be appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// `what` is not a short kebab-case word.
    #[error("not a word for a journal line: {0:?}")]
    Word(String),
    /// `utc` is not UTC in RFC 3339.
    #[error("not a UTC time: {0:?}")]
    Utc(String),
    /// The line would be longer than [`MAX_LINE`].
    #[error("the journal line {0:?} is longer than {MAX_LINE} bytes")]
    TooLong(String),
    /// The writer beneath.
    #[error("journal")]
    Io(#[from] io::Error),
}

/// Appends lines to a journal. Each line reaches the writer in one `write_all` and is flushed.
pub struct Journal<W: Write> {
    out: W,
    head: Digest,
    lines: u64,
}

impl<W: Write> Journal<W> {
    /// A new journal.
    pub fn new(out: W) -> Self {
        Self::following(out, Digest::ZERO)
    }

    /// A new journal whose first line follows `head`: a custody log follows the journal's head.
    pub fn following(out: W, head: Digest) -> Self {
        Self::resume(out, head, 0)
    }

    /// Goes on with a journal that has `lines` lines and ends in `head`, as [`check`] found it.
    pub fn resume(out: W, head: Digest, lines: u64) -> Self {
        Self { out, head, lines }
    }

    /// Appends one line; gives back its digest, the new head.
    ///
    /// # Errors
    /// [`AppendError`]; the chain has not moved then, but an I/O error may leave part of a line.
    pub fn append(
        &mut self,
        mono_ns: u64,
        utc: &str,
        what: &str,
        data: serde_json::Map<String, serde_json::Value>,
    ) -> Result<Digest, AppendError> {
        if !is_word(what) {
            return Err(AppendError::Word(what.into()));
        }
        if !is_utc(utc) {
            return Err(AppendError::Utc(utc.into()));
        }
        let line = Line {
            seq: self.lines,
            mono_ns,
            utc: utc.into(),
            what: what.into(),
            data,
            prev: self.head,
        };
        let mut text = serde_json::to_vec(&line).map_err(io::Error::from)?;
        if text.len() > MAX_LINE {
            return Err(AppendError::TooLong(what.into()));
        }
        let head = sha256(&text);
        text.push(b'\n');
        self.out.write_all(&text)?;
        self.out.flush()?;
        self.head = head;
        self.lines += 1;
        Ok(head)
    }

    /// Digest of the last line; before the first line, what that will follow.
    pub fn head(&self) -> Digest {
        self.head
    }

    /// Number of lines.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// The writer beneath, to sync it.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.out
    }

    /// Gives back the writer.
    pub fn into_inner(self) -> W {
        self.out
    }
}

/// A whole journal, as [`check`] found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Digest of the last line; of an empty journal, what its first line should follow.
    pub head: Digest,
    /// Number of lines.
    pub lines: u64,
}

/// The first line that breaks a journal.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A line is no journal line, or does not follow the one before it.
    #[error("line {line}: {why}")]
    Line {
        /// Number of the line, from 1.
        line: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The text could not be read.
    #[error("journal")]
    Io(#[source] io::Error),
}

/// Checks a journal of unknown origin line by line: `start` is what its first line must follow
/// ([`Digest::ZERO`] for a journal).
///
/// # Errors
/// [`ChainError`] names the first bad line.
pub fn check(input: &mut impl BufRead, start: Digest) -> Result<Chain, ChainError> {
    let mut chain = Chain { head: start, lines: 0 };
    let mut text = Vec::new();
    loop {
        let number = chain.lines + 1;
        let bad = |why: String| ChainError::Line { line: number, why };
        match next_line(input, &mut text, MAX_LINE) {
            Ok(true) => {}
            Ok(false) => return Ok(chain),
            Err(LineError::Io(error)) => return Err(ChainError::Io(error)),
            Err(error) => return Err(bad(error.to_string())),
        }
        if chain.lines == MAX_LINES {
            return Err(bad(format!("more than the {MAX_LINES} lines that a journal may have")));
        }
        let line: Line = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        check_line(&line, &chain).map_err(bad)?;
        chain = Chain { head: sha256(&text), lines: number };
    }
}

fn check_line(line: &Line, before: &Chain) -> Result<(), String> {
    if line.seq != before.lines {
        return Err(format!("its number is {}, not {}", line.seq, before.lines));
    }
    if line.prev != before.head {
        return Err("it does not name the digest of the line before it".into());
    }
    if !is_word(&line.what) {
        return Err(format!("not a word for a journal line: {:?}", line.what));
    }
    if !is_utc(&line.utc) {
        return Err(format!("not a UTC time: {:?}", line.utc));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UTC: &str = "2026-11-22T21:30:00.5Z";

    fn journal(words: &[&str]) -> (String, Digest) {
        let mut journal = Journal::new(Vec::new());
        for (at, word) in words.iter().enumerate() {
            let data = serde_json::from_str(r#"{"pid":17}"#).unwrap();
            journal.append(at as u64, UTC, word, data).unwrap();
        }
        let head = journal.head();
        (String::from_utf8(journal.into_inner()).unwrap(), head)
    }

    fn bad_line(text: &str) -> Option<u64> {
        match check(&mut text.as_bytes(), Digest::ZERO) {
            Ok(_) => None,
            Err(ChainError::Line { line, .. }) => Some(line),
            Err(error) => panic!("{error}"),
        }
    }

    /// The second `prev` was computed with sha256sum over the first line.
    #[test]
    fn lines_are_chained_by_the_digest_of_their_bytes() {
        let (text, head) = journal(&["found", "map-taken"]);
        let zeros = "0".repeat(64);
        let first = format!(
            r#"{{"seq":0,"mono_ns":0,"utc":"2026-11-22T21:30:00.5Z","what":"found","data":{{"pid":17}},"prev":"{zeros}"}}"#
        );
        let second = format!(
            r#"{{"seq":1,"mono_ns":1,"utc":"2026-11-22T21:30:00.5Z","what":"map-taken","data":{{"pid":17}},"prev":"{}"}}"#,
            "caadc1299d5b240993741044901b08ff7a597e4772542fb73ad95508cdd20e79"
        );
        assert_eq!(text, format!("{first}\n{second}\n"));
        let chain = check(&mut text.as_bytes(), Digest::ZERO).unwrap();
        assert_eq!(chain, Chain { head, lines: 2 });
        assert_eq!(head, sha256(second.as_bytes()));
    }

    #[test]
    fn the_first_bad_line_is_named() {
        let (text, _) = journal(&["a", "b", "c", "d"]);
        let lines: Vec<&str> = text.lines().collect();
        let join = |order: &[usize]| -> String {
            order.iter().map(|&n| format!("{}\n", lines[n])).collect()
        };
        assert_eq!(bad_line(&text), None);
        assert_eq!(bad_line(""), None);
        assert_eq!(bad_line(&join(&[1, 2, 3])), Some(1));
        assert_eq!(bad_line(&join(&[0, 2, 3])), Some(2));
        assert_eq!(bad_line(&join(&[0, 2, 1, 3])), Some(2));
        assert_eq!(bad_line(&join(&[0, 1, 1, 2, 3])), Some(3));
        // A changed line shows in the one that follows it: its own form is still right.
        assert_eq!(bad_line(&text.replacen(r#"what":"b"#, r#"what":"x"#, 1)), Some(3));
        assert_eq!(bad_line(text.trim_end()), Some(4));
        assert_eq!(bad_line(&text.replacen(r#""pid""#, r#""p\id""#, 1)), Some(1));
        assert_eq!(bad_line(&"x".repeat(MAX_LINE + 1)), Some(1));
    }

    #[test]
    fn a_custody_log_follows_the_journal() {
        let (_, head) = journal(&["a"]);
        let mut custody = Journal::following(Vec::new(), head);
        custody.append(9, UTC, "verified", serde_json::Map::new()).unwrap();
        let text = custody.into_inner();
        let chain = check(&mut text.as_slice(), head).unwrap();
        assert!(check(&mut text.as_slice(), Digest::ZERO).is_err());
        let mut custody = Journal::resume(text, chain.head, chain.lines);
        custody.append(12, UTC, "exported", serde_json::Map::new()).unwrap();
        assert_eq!(check(&mut custody.into_inner().as_slice(), head).unwrap().lines, 2);
    }

    #[test]
    fn words_and_times_have_one_form() {
        let mut journal = Journal::new(Vec::new());
        for what in ["", "Found", "map taken", "-a", "a-", "a--b", &"a".repeat(65)] {
            let got = journal.append(0, UTC, what, serde_json::Map::new());
            assert!(matches!(got, Err(AppendError::Word(_))), "{what:?}");
        }
        for utc in [
            "",
            "now",
            "2026-11-22 21:30:00Z",
            "2026-11-22T21:30:00+01:00",
            "2026-11-22T21:30:00.Z",
            "2026-11-22T21:30:00.0123456789Z",
            "2026-11-2éT21:30:00Z",
        ] {
            let got = journal.append(0, utc, "a", serde_json::Map::new());
            assert!(matches!(got, Err(AppendError::Utc(_))), "{utc:?}");
        }
        assert_eq!(journal.lines(), 0);
        assert!(is_utc("2026-11-22T21:30:00Z") && is_utc("2026-11-22T21:30:00.123456789Z"));
    }
}
