//! Exit codes: one place where each is chosen from.

use std::process::ExitCode;

/// What the process says when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Complete; for `verify`: intact and complete.
    Complete,
    /// Failed, the guest as found, the record partial.
    Failed,
    /// The command line made no sense.
    Usage,
    /// Complete with losses; for `verify`: intact but partial or with losses.
    Losses,
    /// Refused; nothing was done.
    Refused,
    /// `verify`: altered.
    Altered,
    /// The guest is not as it was found. Beats all others.
    NotAsFound,
    /// Ended by a signal; the record is partial.
    Interrupted,
}

impl Exit {
    /// The number.
    pub(crate) fn code(self) -> u8 {
        match self {
            Exit::Complete => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Losses => 3,
            Exit::Refused => 4,
            Exit::Altered => 5,
            Exit::NotAsFound => 6,
            Exit::Interrupted => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}
