//! The operator's wish to end a run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// How often the operator asked the run to end: once ends the reading of the guest, twice the
/// writing of what was read.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    asked: Arc<AtomicU32>,
    /// How many askings were already heard.
    heard: u32,
}

impl Stop {
    /// Nobody has asked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the run to end.
    pub fn ask(&self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the run shall end.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed) > self.heard
    }

    /// The same wish, what was asked so far not counted: for the work that follows a stop.
    pub fn next(&self) -> Self {
        Self { asked: Arc::clone(&self.asked), heard: self.asked.load(Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_wish_is_a_wish_of_its_own() {
        let stop = Stop::new();
        assert!(!stop.asked());
        stop.ask();
        assert!(stop.asked());
        let after = stop.next();
        assert!(!after.asked());
        stop.ask();
        assert!(after.asked() && stop.asked());
    }
}
