//! A wait that began and when it ends.

use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    pub(crate) began: Instant,
    pub(crate) length: Duration,
}

impl Deadline {
    pub(crate) fn new(length: Duration) -> Self {
        Self { began: Instant::now(), length }
    }

    /// What is left of it; `None` when it is over.
    pub(crate) fn left(self) -> Option<Duration> {
        self.length.checked_sub(self.began.elapsed()).filter(|left| !left.is_zero())
    }
}
