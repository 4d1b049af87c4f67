//! How a lab test ends when it does not pass.

use std::fmt;
use std::time::Duration;

/// Why a test did not pass. A skip is an outcome of its own and is never counted as passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Something was not as it must be.
    Failed(String),
    /// The test could not be run here; the text says why.
    Skipped(String),
}

/// What every fallible function of the lab returns.
pub type Result<T> = std::result::Result<T, Failure>;

/// A failure with this text.
pub fn failed(why: impl fmt::Display) -> Failure {
    Failure::Failed(why.to_string())
}

/// A skip with this reason: `return Err(skipped("no swap here"))`.
pub fn skipped(why: impl fmt::Display) -> Failure {
    Failure::Skipped(why.to_string())
}

/// A failure that says what was waited for and for how long.
pub(crate) fn timed_out(what: impl fmt::Display, after: Duration) -> Failure {
    Failure::Failed(format!("{what}: nothing within {:.0} s", after.as_secs_f64()))
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(why) => f.write_str(why),
            Self::Skipped(why) => write!(f, "skipped: {why}"),
        }
    }
}

// `Failure` is deliberately no `std::error::Error`: so `?` takes every error there is.
impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Self {
        let mut text = e.to_string();
        let mut cause = e.source();
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        Self::Failed(text)
    }
}

/// Adds what was being done to an error.
pub trait Doing<T> {
    /// The error, led by `what`. `what` is a phrase such as "opening /proc/7/mem".
    fn doing(self, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<Failure>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| match e.into() {
            Failure::Failed(why) => Failure::Failed(format!("{what}: {why}")),
            skip @ Failure::Skipped(_) => skip,
        })
    }
}
