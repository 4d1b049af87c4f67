//! Who is killed first when the host runs out of memory: we, never the guest.

use crate::HostError;

const PATH: &str = "/proc/self/oom_score_adj";

/// Makes this process the first that the kernel kills (`oom_score_adj` 1000). Raising it needs
/// no privilege; children inherit it.
///
/// # Errors
/// `/proc` is not writable.
pub fn die_first() -> Result<(), HostError> {
    std::fs::write(PATH, "1000").map_err(|e| HostError::file(PATH, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written() {
        die_first().unwrap();
        assert_eq!(std::fs::read_to_string(PATH).unwrap().trim(), "1000");
    }
}
