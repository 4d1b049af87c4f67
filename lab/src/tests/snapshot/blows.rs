//! The tool interrupted, killed and stopped while QEMU sends its snapshot: the guest goes on in
//! time, QEMU gets its settings back, and nothing that is left passes for what it is not.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::{Doing, Lab, Result, Ring, Version, failed, here, proc, runner};
use rustix::process::Signal;

use super::super::faults::share;
use super::super::run::{Running, await_dead, new_dir, recover, signal};
use super::pulse::{Pulse, Stalls};
use super::{BUDGET, Left, PROMISED, RESTORED, SOON, Subject, in_time};

pub(crate) const TESTS: &[runner::Test] = here![
    sigint_meanwhile,
    sigkill_of_capture,
    sigkill_of_guardian,
    sigkill_of_both,
    sigkill_of_reader,
    sigstop_of_capture,
    sigstop_of_guardian,
    sigstop_of_reader,
];

/// Whom it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Capture,
    Guardian,
    Both,
    Reader,
}

/// One blow.
#[derive(Clone, Copy, Debug)]
struct Blow {
    signal: Signal,
    victim: Victim,
    /// Into the stream, or anywhere.
    aimed: bool,
    /// Which part of that is over.
    part: f64,
    /// What was stopped is let go on in the end, not killed.
    goes_on: bool,
}

impl Blow {
    /// Moment `number` of `count`, tried for the `n`th time in all. Every other one is aimed.
    fn new(signal: Signal, victim: Victim, number: u32, count: u32, n: u32) -> Self {
        let aimed = number.is_multiple_of(2);
        let share = share(n + 1);
        let spread = (f64::from(number) + share) / f64::from(count);
        let part = if aimed || n > number { share } else { spread };
        Self { signal, victim, aimed, part, goes_on: number / 2 % 2 == 1 }
    }
}

/// What one blow showed.
#[derive(Clone, Copy, Debug)]
struct Moment {
    /// It fell while much of the stream was still to come.
    midway: bool,
    /// While somebody hung, QEMU had its settings back without them.
    alone: bool,
    stalls: Stalls,
    left: Left,
}

impl Subject<'_> {
    /// The processes to be hit; none when they are not there (yet or any more).
    fn victims(&self, victim: Victim, run: &Running) -> Vec<u32> {
        let capture = Some(run.pid()).filter(|pid| !proc::command_line(*pid).is_empty());
        let guardian = self.family.with("@guardian");
        let one = |pid: Option<u32>| pid.into_iter().collect();
        match victim {
            Victim::Capture => one(capture),
            Victim::Guardian => one(guardian),
            Victim::Reader => one(self.family.with("@reader")),
            Victim::Both => match (capture, guardian) {
                (Some(capture), Some(guardian)) => vec![capture, guardian],
                _ => Vec::new(),
            },
        }
    }

    /// A run, and a blow at some moment of it; `None` when it hit nobody, or there was none. `lives` is for
    /// how long there is somebody to be hit.
    fn moment(&mut self, blow: Blow, lives: Duration) -> Result<Option<Moment>> {
        let out = new_dir(self.lab, "out")?;
        let pulse = Pulse::start(&mut self.guest, &self.ring)?;
        let mut run = self.start(&out)?;
        if blow.aimed {
            self.await_stream(&mut run, blow.part * 0.6)?;
        } else {
            sleep(lives.mul_f64(blow.part));
        }
        let victims = self.victims(blow.victim, &run);
        // A stream that is broken off is over as soon as it is asked for: so before.
        let midway_until = self.midway_until()?;
        let mut hit = !victims.is_empty();
        for pid in &victims {
            hit &= signal(*pid, blow.signal).is_ok();
        }
        let midway = midway_until.is_some_and(|until| Instant::now() < until);
        let alone = match blow.signal {
            Signal::STOP => self.outwait(blow, &mut run, &victims)?,
            _ => false,
        };
        if blow.victim == Victim::Both && hit {
            await_dead(&victims)?;
            recover(self.lab, &self.guest)?;
            assert_eq!(recover(self.lab, &self.guest)?, "", "recover is not idempotent");
        }
        self.goes_on()?;
        let ended = run.end()?;
        self.await_as_found(RESTORED)?;
        self.family.await_gone()?;
        let stalls = pulse.end()?;
        in_time(stalls)?;
        let left = self.judge(&out, &ended)?;
        let code = ended.status.code();
        let refused = ended.is_refused() && left == Left::Nothing;
        if !refused && !allowed(blow, hit && midway, code, left) {
            return Err(failed(format_args!(
                "an end that is none, {left:?}, midway {midway}: {}; {:?}; {}",
                ended.status, ended.events, ended.stderr
            )));
        }
        self.assert_clean()?;
        fs::remove_dir_all(&out)?;
        Ok((hit && !refused).then_some(Moment { midway, alone, stalls, left }))
    }

    /// The guest runs, by its own word and by QEMU's.
    fn goes_on(&mut self) -> Result<()> {
        let until = Instant::now() + SOON;
        self.writer.goes_on(SOON)?;
        loop {
            match self.guest.status()? {
                state if state == "running" => return Ok(()),
                state if Instant::now() > until => {
                    return Err(failed(format_args!("after {SOON:?} the guest is {state}")));
                }
                _ => sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Processes were stopped: the guest goes on all the same. Then they go on too, or are ended,
    /// if they still hang. Whether QEMU had its settings back before.
    fn outwait(&mut self, blow: Blow, run: &mut Running, victims: &[u32]) -> Result<bool> {
        let alone = Instant::now() + BUDGET + PROMISED * 2;
        while Instant::now() < alone && run.runs()? {
            sleep(Duration::from_millis(5));
        }
        self.goes_on().doing("while somebody hangs")?;
        // The promise of settings is not that of the guest: whoever gives them back has to notice
        // first, and there may be nobody.
        let restored = self.await_as_found(RESTORED.min(BUDGET * 3)).is_ok();
        let then = if blow.goes_on { Signal::CONT } else { Signal::KILL };
        for pid in victims {
            // Gone is as well.
            let _ = signal(*pid, then);
        }
        Ok(restored)
    }
}

/// Whether a run may end so.
fn allowed(blow: Blow, midway: bool, code: Option<i32>, left: Left) -> bool {
    let whole = matches!(code, Some(0 | 3)) && left == Left::Whole;
    let failed = code == Some(1) && left == Left::Partial;
    let interrupted = code == Some(130) && left != Left::Whole;
    // Nobody was left to say anything; what lies there was judged.
    let killed = code.is_none();
    match (blow.victim, blow.signal) {
        (Victim::Capture, Signal::INT) => interrupted || whole && !midway,
        // It finds another world when it goes on, if it was not ended; or it has missed nothing.
        (Victim::Capture, Signal::STOP) => killed || failed || whole,
        (Victim::Capture | Victim::Both, _) => killed || whole && !midway,
        // A stream that broke off cannot be read again.
        (Victim::Reader, _) => failed || whole && !midway,
        // Another one does its work, if there was anything to be done yet.
        (Victim::Guardian, _) => {
            whole || failed || matches!(code, Some(1 | 4)) && left == Left::Nothing
        }
    }
}

/// Blows of one kind at `count` moments; prints what they showed.
fn blows(lab: &Lab, signal: Signal, victim: Victim, count: u32) -> Result<()> {
    // So the writer always comes to pages that are still protected.
    let mut subject = Subject::boot(lab, Ring::wide(256), Version::V10_0)?;
    let (exhibit, [took, streamed]) = subject.whole().doing("undisturbed")?;
    exhibit.remove()?;
    // Guardian and reader are gone long before the disk has the exhibit.
    let lives = if victim == Victim::Capture { took } else { streamed };
    let mut moments: Vec<Moment> = Vec::new();
    // A blow into the void is none.
    for n in 0..count * 8 {
        let number = u32::try_from(moments.len())?;
        if number >= count && moments.iter().any(|moment| moment.midway) {
            break;
        }
        // While none fell midway, more are aimed.
        let number = if number < count { number } else { count & !1 };
        let blow = Blow::new(signal, victim, number, count, n);
        moments.extend(subject.moment(blow, lives).doing(format_args!("{blow:?}"))?);
    }
    assert!(moments.len() >= usize::try_from(count)?, "too many blows hit nobody");
    let midway = moments.iter().filter(|moment| moment.midway).count();
    let left = |what| moments.iter().filter(|moment| moment.left == what).count();
    let worst = moments.iter().map(|moment| moment.stalls.longest).max().unwrap_or_default();
    let late = moments.iter().map(|moment| moment.stalls.late).max().unwrap_or_default();
    println!(
        "         {signal:?} {victim:?}: {} moments, {midway} midway through the stream; the \
         guest stood for {:.0} ms at most (machine late by {:.0}); whole {}, partial {}, none {}{}",
        moments.len(),
        worst.as_secs_f64() * 1e3,
        late.as_secs_f64() * 1e3,
        left(Left::Whole),
        left(Left::Partial),
        left(Left::Nothing),
        match signal {
            Signal::STOP => {
                let alone = moments.iter().filter(|moment| moment.alone).count();
                format!("; settings back before the end of the hang: {alone}")
            }
            _ => String::new(),
        }
    );
    assert!(midway > 0, "void: no blow fell midway");
    subject.guest.finish()
}

fn sigint_meanwhile(lab: &Lab) -> Result<()> {
    blows(lab, Signal::INT, Victim::Capture, lab.scale(2, 300))
}

fn sigkill_of_capture(lab: &Lab) -> Result<()> {
    blows(lab, Signal::KILL, Victim::Capture, lab.scale(2, 300))
}

fn sigkill_of_guardian(lab: &Lab) -> Result<()> {
    blows(lab, Signal::KILL, Victim::Guardian, lab.scale(2, 300))
}

fn sigkill_of_both(lab: &Lab) -> Result<()> {
    blows(lab, Signal::KILL, Victim::Both, lab.scale(2, 300))
}

fn sigkill_of_reader(lab: &Lab) -> Result<()> {
    blows(lab, Signal::KILL, Victim::Reader, lab.scale(2, 300))
}

fn sigstop_of_capture(lab: &Lab) -> Result<()> {
    blows(lab, Signal::STOP, Victim::Capture, lab.scale(2, 300))
}

fn sigstop_of_guardian(lab: &Lab) -> Result<()> {
    blows(lab, Signal::STOP, Victim::Guardian, lab.scale(2, 300))
}

fn sigstop_of_reader(lab: &Lab) -> Result<()> {
    blows(lab, Signal::STOP, Victim::Reader, lab.scale(2, 300))
}
