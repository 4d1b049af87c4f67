//! A hold by ptrace as the methods want it: announced to the guardian, tried again while some
//! thread does not stop in time.

use super::process::Work;
use crate::guardian::{GRACE, Guardian, GuardianError};
use crate::holder::{Holder, HolderError};
use crate::log::Log;
use crate::undo::Who;
use host::Process;
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
    Ptrace(#[from] HolderError),
    /// Each time some thread did not stop in time, and all were let go again.
    #[error("the guest could not be held in {tries} tries")]
    Stragglers {
        /// How often it was tried.
        tries: u32,
        /// The last try.
        #[source]
        last: HolderError,
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
    /// What became of the guardian or the holder meanwhile, if one was lost.
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
pub fn by_ptrace<T>(
    work: &Work<'_>,
    process: &Process,
    guardian: &mut Guardian,
    at_most_ns: u64,
    stalls_ns: &mut Vec<u64>,
    mut inside: impl FnMut(u32, Instant) -> T,
) -> Result<Once<T>, NotHeld> {
    let mut tries = 1;
    loop {
        let last = tries == TRIES || work.stop.asked();
        let began = Instant::now();
        match try_ptrace(work.log, process, guardian, at_most_ns, &mut inside) {
            Ok(once) => return Ok(Once { tries, ..once }),
            // Its successor is asked.
            Err(NotHeld::Guardian(GuardianError::Lost(_))) if !last => {}
            Err(NotHeld::Ptrace(HolderError::Lost(why))) if !last => {
                // Perhaps it held by then, and not longer than it lived.
                let stall_ns = nanos(began.elapsed());
                let data = json!({ "try": tries, "why": why.to_string(), "stall_ns": stall_ns });
                work.log.add("holder-lost", data);
                stalls_ns.push(stall_ns);
            }
            Err(NotHeld::Ptrace(HolderError::Refused(why))) if why.stragglers => {
                let data = json!({ "try": tries, "why": why.text, "stall_ns": why.stall_ns });
                work.log.add("hold-given-up", data);
                stalls_ns.extend(why.stall_ns);
                if last {
                    return Err(NotHeld::Stragglers { tries, last: HolderError::Refused(why) });
                }
                thread::sleep(PAUSE);
            }
            Err(error) => return Err(error),
        }
        tries += 1;
    }
}

/// One try, of which the guardian is told.
fn try_ptrace<T>(
    log: &Log,
    process: &Process,
    guardian: &mut Guardian,
    at_most_ns: u64,
    inside: &mut impl FnMut(u32, Instant) -> T,
) -> Result<Once<T>, NotHeld> {
    let at_most = Duration::from_nanos(at_most_ns);
    let stop_within = (at_most / 2).clamp(Duration::from_millis(5), Duration::from_millis(250));
    let mut holder = Holder::start(Who::of(process))?;
    guardian.rights.push(holder.rights.clone());
    let force = host::clock::monotonic_ns() + at_most_ns;
    guardian.arm(force + 2 * nanos(GRACE), holder.who)?;
    let (until, asked_ns) = (Instant::now() + at_most, log.now_ns());
    let threads = match holder.hold(stop_within, at_most, GRACE) {
        Ok(threads) => threads,
        Err(error) => {
            note_not_freed(&error, guardian);
            guardian.disarm()?;
            return Err(error.into());
        }
    };
    let value = inside(threads, until);
    let released = holder.release();
    // The guest goes on: whatever the guardian says now changes nothing of that.
    let disarmed = guardian.disarm().err().map(doubt);
    let (began_ns, ended_ns, lasted, lost) = match released {
        Ok(held) => (log.since_ns(held.began_ns), log.since_ns(held.ended_ns), held.lasted, None),
        // It went on when its holder ended, nobody can say when.
        Err(error) => {
            note_not_freed(&error, guardian);
            let lost = format!("while the guest was held {error}");
            (asked_ns, log.now_ns(), false, Some(lost))
        }
    };
    let doubt = disarmed.or(lost);
    Ok(Once { value, threads, lasted, began_ns, ended_ns, tries: 1, doubt })
}

/// A thread that the kernel did not let go is no longer as it was found.
fn note_not_freed(error: &HolderError, guardian: &mut Guardian) {
    if let HolderError::Refused(why) = error
        && why.not_freed
    {
        guardian.not_as_found.get_or_insert(why.text.clone());
    }
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
