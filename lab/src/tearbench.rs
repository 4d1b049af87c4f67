//! The tear benchmark's program in a Linux guest (`guest/tearbench.rs`): started, asked, ended, and
//! its clock compared with the host's.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::error::{Doing, Result, failed};
use crate::guest::Guest;
use crate::program;
use crate::tearcheck::{Entry, Offset, RunId, beat_in};
use crate::tearpage;

/// Longest wait for the program to be ready: it writes all its memory under TCG.
const ARMING: Duration = Duration::from_secs(120);
/// How long the clocks are compared.
const COMPARING: Duration = Duration::from_millis(150);
/// Longest wait for the guest's clock to go on at all.
const STANDING: Duration = Duration::from_secs(20);

/// The program's name.
const NAME: &str = "tearbench";

/// What the program is told; the defaults suit a guest of 256 MiB and two CPUs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Memory of the program. With RAM on both sides of the 4 GiB line it must be more than there
    /// is above, which Linux takes first.
    pub mib: u64,
    /// K of each thread's spread ring.
    pub spread: u32,
    /// Stores from one ledger entry to the next, and pages of a thread's ledger.
    pub ledger: u64,
    /// Pages of a thread's ledger; 99 entries each.
    pub ledger_pages: u32,
    /// Stores a second of each thread; 0 for as many as there can be.
    pub rate: u64,
    /// Huge pages are wanted.
    pub thp: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { mib: 128, spread: 128, ledger: 1 << 16, ledger_pages: 32, rate: 0, thp: false }
    }
}

/// Bytes of a gap in the log of gaps.
const GAP: usize = 32;

/// A time in which the guest's program did not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The guest's TSC before it.
    pub tsc: u64,
    /// How long it was, by the guest's TSC.
    pub length: Duration,
}

/// The program, running in a guest.
#[derive(Debug)]
pub struct Tearbench {
    /// What tells its pages from any other's.
    pub run: RunId,
    /// What it said when it was ready: `threads`, `pages`, `below_4g`, `canaries`, `huge_kib`, ...
    pub armed: Value,
    heartbeat: (File, u64),
}

impl Tearbench {
    /// Starts the program and waits until every page is written. The guest's kernel is asked to
    /// leave the pages where they are.
    pub fn start(guest: &mut Guest, options: &Options) -> Result<Self> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let run: RunId = (since.as_nanos() << 32 | u128::from(guest.pid())).to_be_bytes();
        let Options { mib, spread, ledger, ledger_pages, rate, thp } = options;
        let (thp, huge) = if *thp { (1, "madvise") } else { (0, "never") };
        let id = run.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let before = format!(
            "quiet 0 /proc/sys/kernel/numa_balancing
            quiet {huge} /sys/kernel/mm/transparent_hugepage/enabled"
        );
        let args = format!(
            "run={id} mib={mib} spread={spread} ledger={ledger} rate={rate} thp={thp} \
             ledger_pages={ledger_pages}"
        );
        let armed = program::start(guest, NAME, &args, &before, ARMING)?;
        if armed["run"] != *id {
            return Err(failed(format_args!("{NAME} said {armed}")));
        }
        let pfn = armed["heartbeats"][0].as_u64().ok_or_else(|| failed("no heartbeat"))?;
        let hva = guest.hva(pfn * 4096)? + u64::try_from(tearpage::BEAT_AT)?;
        let memory = File::open(format!("/proc/{}/mem", guest.pid())).doing("its memory")?;
        Ok(Self { run, armed, heartbeat: (memory, hva) })
    }

    /// What the program says of itself: `stores`, `gaps`, `canary_ok`, `moved_pages`, ... It goes on.
    pub fn report(&self, guest: &mut Guest) -> Result<Value> {
        program::ask(guest, NAME, "report")
    }

    /// The same, and it ends.
    pub fn end(self, guest: &mut Guest) -> Result<Value> {
        program::ask(guest, NAME, "end")
    }

    /// Compares the guest's clock with the host's: the host looks at the guest's heartbeat for a
    /// while. A clock that is seen in beat n was read after beat n - 1, so after the host last looked
    /// and saw none later than beat n - 2; and before the host saw it.
    pub fn offset(&self) -> Result<Offset> {
        let start = Instant::now();
        let (mut low_ns, mut high_ns) = (i64::MIN, i64::MAX);
        let mut older: Option<(u64, i64)> = None;
        let mut known = false;
        while start.elapsed() < COMPARING || !known {
            if start.elapsed() > STANDING {
                return Err(failed("the guest's clock stands still"));
            }
            let before = now_ns()?;
            let Some((beat, Entry { realtime_ns, .. })) = self.beat()? else { continue };
            let after = now_ns()?;
            match older {
                Some((seen, at)) if beat >= seen + 2 => {
                    low_ns = low_ns.max(realtime_ns - after);
                    high_ns = high_ns.min(realtime_ns - at);
                    known = true;
                    older = Some((beat, before));
                }
                Some((seen, _)) if beat > seen => {}
                _ => older = Some((beat, before)),
            }
        }
        if low_ns > high_ns {
            return Err(failed(format_args!("no offset fits: {low_ns} to {high_ns}")));
        }
        Ok(Offset { low_ns, high_ns })
    }

    /// The guest's TSC, as the heartbeat shows it.
    pub fn tsc(&self) -> Result<u64> {
        let begun = Instant::now();
        while begun.elapsed() < STANDING {
            if let Some((_, entry)) = self.beat()? {
                return Ok(entry.tsc);
            }
        }
        Err(failed("no heartbeat is whole"))
    }

    /// The last times that the first thread did not run for more than a millisecond, as it noted them:
    /// whoever wants all looks again before [`GAP_LOG`] more can have come.
    ///
    /// [`GAP_LOG`]: tearpage::GAP_LOG
    pub fn gaps(&self) -> Result<Vec<Gap>> {
        let khz = self.armed["tsc_khz"].as_u64().filter(|khz| *khz > 0);
        let khz = khz.ok_or_else(|| failed("no TSC"))?;
        let mut looks = [[0; tearpage::GAP_LOG * GAP]; 2];
        let (memory, hva) = &self.heartbeat;
        let at = hva - u64::try_from(tearpage::BEAT_AT)? + u64::try_from(tearpage::GAP_LOG_AT)?;
        for look in &mut looks {
            memory.read_exact_at(look, at).doing("reading the gaps that the guest noted")?;
        }
        let [first, second] = &looks;
        // One that is just being written differs.
        let whole = first.chunks_exact(GAP).zip(second.chunks_exact(GAP)).filter(|(a, b)| a == b);
        let gaps = whole.filter_map(|(gap, _)| {
            let (tsc, rest) = gap.split_first_chunk()?;
            let (ticks, _) = rest.split_first_chunk()?;
            let (tsc, ticks) = (u64::from_le_bytes(*tsc), u64::from_le_bytes(*ticks));
            (tsc > 0).then(|| Gap { tsc, length: Duration::from_micros(ticks * 1000 / khz) })
        });
        Ok(gaps.collect())
    }

    /// Number and clocks of the heartbeat that stands there. Two looks with the same bytes:
    /// between them it was whole.
    fn beat(&self) -> Result<Option<(u64, Entry)>> {
        let mut looks = [[0; tearpage::BEAT]; 2];
        let (memory, hva) = &self.heartbeat;
        for look in &mut looks {
            memory.read_exact_at(look, *hva).doing("reading the guest's heartbeat")?;
        }
        let beat = beat_in(&looks[0]).filter(|_| looks[0] == looks[1]);
        Ok(beat.map(|(number, _, entry)| (number, entry)))
    }
}

fn now_ns() -> Result<i64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(i64::try_from(since.as_nanos())?)
}
