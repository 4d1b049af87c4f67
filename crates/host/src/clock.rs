//! Time: monotonic for intervals, UTC for people, and how far UTC may be trusted.

use nix::libc;
use rustix::time::{ClockId, clock_gettime};
use std::io;

/// Nanoseconds of CLOCK_MONOTONIC: never set back, does not count suspend, starts near boot.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The clock starts at 0 and reaches 2^64 ns after 584 years.
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// UTC by the host's clock as RFC 3339, to the nanosecond: `2026-11-22T21:30:00.123456789Z`.
pub fn utc() -> String {
    // Always nine digits, so that texts sort as times do.
    format!("{:.9}", jiff::Timestamp::now())
}

/// One moment by both clocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// As [`monotonic_ns`], halfway between a look before and one after `utc` was taken.
    pub monotonic_ns: u64,
    /// As [`utc`].
    pub utc: String,
    /// The two looks lie so far apart: `utc` is known to half of it.
    pub width_ns: u64,
}

/// Now, by both clocks.
pub fn now() -> Moment {
    let before = monotonic_ns();
    let utc = utc();
    let width_ns = monotonic_ns().saturating_sub(before);
    Moment { monotonic_ns: before.saturating_add(width_ns / 2), utc, width_ns }
}

/// UTC `ns` nanoseconds after `moment`, as far as the clock was not stepped; `None` when its text is
/// no time.
pub fn later(moment: &Moment, ns: u64) -> Option<String> {
    let utc: jiff::Timestamp = moment.utc.parse().ok()?;
    let later = utc.checked_add(jiff::SignedDuration::from_nanos(i64::try_from(ns).ok()?)).ok()?;
    Some(format!("{later:.9}"))
}

/// The same as [`later`], in microseconds since 1970.
pub fn later_us(moment: &Moment, ns: u64) -> Option<i64> {
    let utc: jiff::Timestamp = moment.utc.parse().ok()?;
    utc.as_microsecond().checked_add(i64::try_from(ns / 1000).ok()?)
}

/// The way back from [`later_us`]: CLOCK_MONOTONIC in nanoseconds when UTC was `utc_us`
/// microseconds since 1970, as far as the clock was not stepped; `None` for a time before the boot.
pub fn monotonic_at(moment: &Moment, utc_us: i64) -> Option<u64> {
    let utc: jiff::Timestamp = moment.utc.parse().ok()?;
    let later_us = i128::from(utc_us) - i128::from(utc.as_microsecond());
    u64::try_from(i128::from(moment.monotonic_ns) + later_us * 1000).ok()
}

/// The host's local time minus UTC in seconds, by its own time zone file.
pub fn local_offset_s() -> i32 {
    jiff::ZonedDateTime::now().offset().seconds()
}

/// How much more UTC advanced than monotonic time between two moments, in microseconds: not near 0
/// when the clock was stepped. `None` when a moment's text is no time.
pub fn step_us(earlier: &Moment, later: &Moment) -> Option<i64> {
    let utc = |moment: &Moment| moment.utc.parse::<jiff::Timestamp>().ok();
    let by_utc = utc(later)?.as_nanosecond() - utc(earlier)?.as_nanosecond();
    let by_monotonic = i128::from(later.monotonic_ns) - i128::from(earlier.monotonic_ns);
    i64::try_from((by_utc - by_monotonic) / 1000).ok()
}

/// What the kernel's clock discipline says of UTC (`adjtimex`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sync {
    /// A time service keeps the clock: STA_UNSYNC is not set.
    pub synchronised: bool,
    /// Greatest possible error in microseconds, as the time service claims.
    pub max_error_us: u64,
    /// Estimated error in microseconds, as the time service claims.
    pub estimated_error_us: u64,
}

/// Asks the kernel how well the host's clock is kept; changes nothing.
///
/// # Errors
/// The kernel's.
pub fn sync() -> io::Result<Sync> {
    // SAFETY: `timex` is a struct of integers, for which all zeros are valid values.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `timex` is valid for reads and writes and outlives the call. `modes` is 0, so the
    // kernel only fills it in and sets nothing.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Sync {
        synchronised: timex.status & libc::STA_UNSYNC == 0,
        max_error_us: u64::try_from(timex.maxerror).unwrap_or(0),
        estimated_error_us: u64::try_from(timex.esterror).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_shows() {
        let at = |monotonic_ns, utc: &str| Moment { monotonic_ns, utc: utc.into(), width_ns: 0 };
        let start = at(5_000_000_000, "2026-11-22T21:30:00.000000000Z");
        let later = at(6_000_000_000, "2026-11-22T21:30:03.000000000Z");
        assert_eq!(step_us(&start, &later), Some(2_000_000));
        assert_eq!(step_us(&later, &start), Some(-2_000_000));
        assert_eq!(step_us(&at(0, "yesterday"), &later), None);
    }

    #[test]
    fn there_and_back() {
        let start = Moment {
            monotonic_ns: 5_000_000_000,
            utc: "2026-11-22T21:30:00.000000000Z".into(),
            width_ns: 0,
        };
        let later = later_us(&start, 1_500_000).unwrap();
        assert_eq!(monotonic_at(&start, later), Some(5_001_500_000));
        assert_eq!(monotonic_at(&start, later - 3_000_000), Some(2_001_500_000));
        assert_eq!(monotonic_at(&start, 0), None);
    }

    #[test]
    fn both_clocks_go_forward() {
        let (a, b) = (now(), now());
        assert!(b.monotonic_ns >= a.monotonic_ns && a.monotonic_ns > 0);
        assert_eq!(a.utc.len(), "2026-11-22T21:30:00.123456789Z".len());
        assert!(a.utc.ends_with('Z') && b.utc >= a.utc, "{} {}", a.utc, b.utc);
        assert!(a.utc.parse::<jiff::Timestamp>().is_ok());
    }

    #[test]
    fn the_kernel_tells_of_its_clock() {
        let sync = sync().unwrap();
        assert!(!sync.synchronised || sync.max_error_us > 0);
    }
}
