//! Lines of hostile text, one at a time, with a limit on each.

use std::io::{self, BufRead};

/// Why a line could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LineError {
    /// More bytes than the limit before a newline came.
    #[error("longer than the {0} bytes that a line may have")]
    TooLong(usize),
    /// The text ends inside a line.
    #[error("cut off: the text ends without a newline")]
    CutOff,
    /// The bytes beneath could not be read or decompressed.
    #[error("cannot be read")]
    Io(#[from] io::Error),
}

/// Reads the next line into `line`, without its newline; `false` at the end of the text.
///
/// Never holds more than `limit` bytes of a line.
pub(crate) fn next_line(
    input: &mut impl BufRead,
    line: &mut Vec<u8>,
    limit: usize,
) -> Result<bool, LineError> {
    line.clear();
    loop {
        let chunk = match input.fill_buf() {
            Ok(chunk) => chunk,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        if chunk.is_empty() {
            return if line.is_empty() { Ok(false) } else { Err(LineError::CutOff) };
        }
        let newline = chunk.iter().position(|&byte| byte == b'\n');
        let text = chunk.get(..newline.unwrap_or(chunk.len())).unwrap_or(chunk);
        if line.len().saturating_add(text.len()) > limit {
            return Err(LineError::TooLong(limit));
        }
        line.extend_from_slice(text);
        let used = text.len() + usize::from(newline.is_some());
        input.consume(used);
        if newline.is_some() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    fn lines(text: &str, limit: usize) -> Result<Vec<String>, LineError> {
        // A buffer of two bytes: lines cross its end.
        let mut input = BufReader::with_capacity(2, text.as_bytes());
        let (mut line, mut out) = (Vec::new(), Vec::new());
        while next_line(&mut input, &mut line, limit)? {
            out.push(String::from_utf8_lossy(&line).into_owned());
        }
        Ok(out)
    }

    #[test]
    fn lines_are_whole_and_bounded() {
        assert_eq!(lines("", 4).unwrap(), Vec::<String>::new());
        assert_eq!(lines("abcd\n\nx\n", 4).unwrap(), ["abcd", "", "x"]);
        assert!(matches!(lines("abcde\n", 4), Err(LineError::TooLong(4))));
        assert!(matches!(lines("abc\nx", 4), Err(LineError::CutOff)));
    }
}
