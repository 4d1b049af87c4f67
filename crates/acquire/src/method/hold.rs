//! A hold by ptrace as the methods want it: announced to the guardian, tried again while some
//! thread does not stop in time.

use super::process::Work;
use crate::guardian::{GRACE, Guardian, GuardianError};
use crate::log::Log;
use host::Process;
use host::hold::{self, HoldError, Limits};
use serde_json::json;
use std::thread;
use std::time::{Duration, Instant};

/// How often a hold is tried: a thread in uninterruptible I/O lets all others go again.
const TRIES: u32 = 5;

/// How long the guest runs undisturbed between two tries.
const PAUSE: Duration = Duration::from_millis(200);

/// Why there was no hold. Nothing was read, and the guest runs as before.
#[derive(Debug, thiserror::Error)]
pub enum NotHeld {
    /// The guardian would not, or QEMU would not.
    #[error("the guest could not be held")]
    Guardian(#[from] GuardianError),
    /// The kernel or the process would not.
    #[error("the guest could not be held")]
    Ptrace(#[from] HoldError),
    /// Each time some thread did not stop in time, and all were let go again.
    #[error("the guest could not be held in {tries} tries")]
    Stragglers {
        /// How often it was tried.
        tries: u32,
        /// The last try.
        #[source]
        last: HoldError,
    },
    /// The host's side of the map is no longer what it was.
    #[error("the process's mappings changed")]
    Mappings(#[source] host::HostError),
    /// A thread ran while the guest was believed to be held.
    #[error("the hold did not last")]
    NotLasted,
}

/// A hold by ptrace that is over. Times are nanoseconds since the acquisition began.
pub struct Once<T> {
    /// What was done in it.
    pub value: T,
    /// Threads that were stopped.
    pub threads: u32,
    /// Whether all of them stood still from the first to the last moment.
    pub lasted: bool,
    /// When the first thread was told to stop.
    pub began_ns: u64,
    /// When the last one had been let go.
    pub ended_ns: u64,
    /// Tries that it took.
    pub tries: u32,
    /// What became of the guardian meanwhile, if it was lost.
    pub doubt: Option<String>,
}

/// What is said of a guardian that was lost in a hold.
pub fn doubt(error: GuardianError) -> String {
    format!("while the guest was held {error}")
}

/// Holds the guest by ptrace for `at_most_ns` and does `inside(threads, until)`; tries again while
/// some thread does not stop in time. How long tries that were given up stalled the guest goes into
/// `stalls_ns`.
///
/// # Errors
/// [`NotHeld`]; `inside` was not called.
pub fn by_ptrace<T: Send>(
    work: &Work<'_>,
    process: &Process,
    guardian: &mut Guardian,
    at_most_ns: u64,
    stalls_ns: &mut Vec<u64>,
    mut inside: impl FnMut(u32, Instant) -> T + Send,
) -> Result<Once<T>, NotHeld> {
    let mut tries = 1;
    loop {
        let last = tries == TRIES || work.stop.asked();
        match try_ptrace(work.log, process, guardian, at_most_ns, &mut inside) {
            Ok(once) => return Ok(Once { tries, ..once }),
            // Its successor is asked.
            Err(NotHeld::Guardian(GuardianError::Lost(_))) if !last => {}
            Err(NotHeld::Ptrace(error @ HoldError::NotStopped { stall, .. })) => {
                let stall = stall.map(|stall| nanos(stall.released - stall.began));
                let data = json!({ "try": tries, "why": error.to_string(), "stall_ns": stall });
                work.log.add("hold-given-up", data);
                stalls_ns.extend(stall);
                if last {
                    return Err(NotHeld::Stragglers { tries, last: error });
                }
                thread::sleep(PAUSE);
            }
            Err(error) => return Err(error),
        }
        tries += 1;
    }
}

/// One try, of which the guardian is told.
fn try_ptrace<T: Send>(
    log: &Log,
    process: &Process,
    guardian: &mut Guardian,
    at_most_ns: u64,
    inside: &mut (impl FnMut(u32, Instant) -> T + Send),
) -> Result<Once<T>, NotHeld> {
    let at_most = Duration::from_nanos(at_most_ns);
    let limits = Limits {
        stop_within: (at_most / 2).clamp(Duration::from_millis(5), Duration::from_millis(250)),
        hold_at_most: at_most + GRACE,
    };
    let force = host::clock::monotonic_ns() + at_most_ns;
    guardian.arm(force + 2 * nanos(GRACE))?;
    let until = Instant::now() + at_most;
    let held = hold::during(process, &limits, |hold| {
        let threads = u32::try_from(hold.threads()).unwrap_or(u32::MAX);
        (inside(threads, until), threads, hold.lasted())
    });
    // The guest goes on: whatever the guardian says now changes nothing of that.
    let disarmed = guardian.disarm();
    let ((value, threads, lasted), held) = held?;
    let at = |instant: Instant| nanos(instant.saturating_duration_since(log.origin()));
    Ok(Once {
        value,
        threads,
        lasted: lasted && held.lasted,
        began_ns: at(held.began),
        ended_ns: at(held.released),
        tries: 1,
        doubt: disarmed.err().map(doubt),
    })
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
