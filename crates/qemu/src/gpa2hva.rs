//! The answer of HMP `gpa2hva ADDR`.
//!
//! `Host virtual address for 0x1000 (pc.ram) is 0x7f0123456000`
//! (`monitor/hmp-cmds-target.c:hmp_gpa2hva`; `monitor/misc.c` in 7.2). Errors come as ordinary
//! text in a successful answer, so only this sentence is an address and everything else is not.

use crate::text::{Excerpt, hex_0x};

/// What QEMU says about one guest-physical address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gpa2Hva {
    /// The byte lies in plain memory.
    At {
        /// QEMU's name of the MemoryRegion there.
        name: String,
        /// Address in QEMU's process.
        hva: u64,
    },
    /// A device answers reads there (`Memory at address .. is not RAM`).
    NotRam,
    /// Nothing is there (`No memory is mapped at address ..`).
    Unmapped,
}

/// The text is none of the sentences that `gpa2hva` prints, or speaks of another address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("gpa2hva {gpa:#x} was answered with {text:?}")]
pub struct NotAnAnswer {
    /// The address that was asked for.
    pub gpa: u64,
    /// What came.
    pub text: Excerpt,
}

/// Reads the answer to `gpa2hva` for `gpa`.
///
/// # Errors
/// [`NotAnAnswer`] for every text but the three that name `gpa`.
pub fn parse(gpa: u64, text: &str) -> Result<Gpa2Hva, NotAnAnswer> {
    let line = text.trim_end_matches(['\r', '\n']);
    parse_line(gpa, line).ok_or_else(|| NotAnAnswer { gpa, text: Excerpt::new(text) })
}

fn parse_line(gpa: u64, line: &str) -> Option<Gpa2Hva> {
    if line.contains('\n') {
        return None;
    }
    let same = |address: &str| hex_0x(address) == Some(gpa);
    if let Some(rest) = line.strip_prefix("Host virtual address for ") {
        let (address, rest) = rest.split_once(" (")?;
        let (name, hva) = rest.rsplit_once(") is ")?;
        let hva = hex_0x(hva).filter(|&hva| hva != 0)?;
        return same(address).then(|| Gpa2Hva::At { name: name.into(), hva });
    }
    if let Some(rest) = line.strip_prefix("Memory at address ") {
        return same(rest.strip_suffix(" is not RAM")?).then_some(Gpa2Hva::NotRam);
    }
    let address = line.strip_prefix("No memory is mapped at address ")?;
    same(address).then_some(Gpa2Hva::Unmapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_sentences() {
        let at = |name: &str, hva| Gpa2Hva::At { name: name.into(), hva };
        assert_eq!(
            parse(0, "Host virtual address for 0x0 (m0) is 0x7f1f67e00000\r\n"),
            Ok(at("m0", 0x7f1f_67e0_0000))
        );
        assert_eq!(
            parse(0x10, "Host virtual address for 0x10 (a (b) is c) is 0x1000\n"),
            Ok(at("a (b) is c", 0x1000))
        );
        assert_eq!(
            parse(0xa_0000, "Memory at address 0xa0000 is not RAM\r\n"),
            Ok(Gpa2Hva::NotRam)
        );
        assert_eq!(
            parse(1 << 44, "No memory is mapped at address 0x100000000000\r\n"),
            Ok(Gpa2Hva::Unmapped)
        );
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "unknown command: 'gpa2hva'\r\n",
            "Host virtual address for 0x2000 (pc.ram) is 0x7f1f67e00000\r\n",
            "Host virtual address for 0x1000 (pc.ram) is (nil)\r\n",
            "Host virtual address for 0x1000 (pc.ram) is 0x0\r\n",
            "Host virtual address for 0x1000 (pc.ram) is 0x7f1f67e00000\r\nmore\r\n",
            "Host virtual address for 0x1000 pc.ram is 0x7f1f67e00000\r\n",
            "Memory at address 0x2000 is not RAM\r\n",
            "Error: Memory at address 0x1000 is not RAM\r\n",
        ] {
            assert!(parse(0x1000, text).is_err(), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in ".{0,120}") {
            let _ = parse(0x1000, &text);
        }
    }
}
