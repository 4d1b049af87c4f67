//! The unit tests that a host must be prepared for: huge pages, KSM, a libvirtd of our own. They are
//! ignored by `cargo test`; here, as root, the host is prepared and given back as it was.

use std::fs;

use crate::Outcome;

/// Settings of the kernel, put back when dropped.
struct Settings {
    found: Vec<(&'static str, String)>,
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
const KSM_RUN: &str = "/sys/kernel/mm/ksm/run";
const KSM_PAGES: &str = "/sys/kernel/mm/ksm/pages_to_scan";

/// As many huge pages of 2 MiB as the tests take.
const WANTED: u64 = 8;

impl Settings {
    fn set(&mut self, file: &'static str, value: &str) -> Outcome<()> {
        let found = fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
        fs::write(file, value).map_err(|e| format!("{file}: {e}"))?;
        self.found.push((file, found.trim().to_owned()));
        Ok(())
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (file, value) in self.found.iter().rev() {
            let _ = fs::write(file, value);
        }
    }
}

/// A host on which they run, until dropped.
///
/// # Errors
/// Why it cannot be had: without root, without memory in one piece, or with KSM in use.
pub(crate) fn host() -> Outcome<impl Drop> {
    let mut settings = Settings { found: Vec::new() };
    if fs::read_to_string(KSM_RUN)?.trim() != "0" {
        return Err("this machine uses KSM: it is left alone".into());
    }
    let more = fs::read_to_string(HUGE_PAGES)?.trim().parse::<u64>()? + WANTED;
    settings.set(HUGE_PAGES, &more.to_string())?;
    let got = fs::read_to_string(HUGE_PAGES)?.trim().parse::<u64>()?;
    if got < more {
        return Err(format!("of {more} huge pages the kernel has {got}").into());
    }
    settings.set(KSM_PAGES, "10000")?;
    settings.set(KSM_RUN, "1")?;
    Ok(settings)
}
