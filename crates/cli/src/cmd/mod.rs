//! One verb a file.

pub(crate) mod acquire;
pub(crate) mod doctor;
pub(crate) mod list;
pub(crate) mod map;
pub(crate) mod plan;
pub(crate) mod recover;
pub(crate) mod verify;

use crate::args::How;
use crate::exit::Exit;
use crate::output;
use ::acquire::find::FindError;
use ::acquire::plan::{Refusal, SwapWish, TAINT, Wish};

/// The wish that the shared flags express.
pub(crate) fn wish(how: &How) -> Wish {
    Wish {
        method: how.method.map(Into::into),
        consistency: how.consistency.into(),
        stall_budget: how.stall_budget,
        hold: how.hold.into(),
        io_horizon: how.io_horizon,
        slice_bytes: how.slice,
        registers: how.registers,
        rounds_unheld: 0,
        format: how.format.into(),
        store: how.store.map(Into::into),
        swap: match how.swap {
            Some(swap) => swap.into(),
            None if how.swap_in => SwapWish::In,
            None => SwapWish::default(),
        },
        accept_ciphertext: how.accept_ciphertext,
        force_output: how.force_output,
        include: how.include.iter().copied().map(Into::into).collect(),
        exclude: how.exclude.iter().copied().map(Into::into).collect(),
    }
}

/// Says why nothing was done and what would be.
pub(crate) fn refused(refusal: &Refusal) -> Exit {
    output::say(&format!("refused: {}", refusal.reason));
    for rejected in &refusal.rejected {
        output::say(&format!("not {}: {}", rejected.method.word(), rejected.reason));
    }
    for remedy in &refusal.remedies {
        output::hint(remedy);
    }
    Exit::Refused
}

/// Says why no VM was found.
pub(crate) fn not_found(error: &FindError) -> Exit {
    output::error(error);
    match error {
        FindError::Nobody { running, .. } if running.is_empty() => {
            output::hint("no VM runs here, or its process cannot be looked at: run as root");
        }
        FindError::Nobody { running, .. } => {
            output::hint(&format!("running here: {}", running.join(", ")));
        }
        FindError::Several { candidates, .. } => {
            output::hint(&format!("give the PID or UUID of one: {}", candidates.join(", ")));
        }
        _ => output::hint("run as root; `stillframe doctor` shows what stands in the way"),
    }
    Exit::Refused
}

/// Says that to ask the VM marks it, where it does: before it is asked.
pub(crate) fn say_taint(vm: &str) {
    if ::acquire::find::one(vm).is_ok_and(|target| target.through.is_some()) {
        output::say(&format!("warning: {TAINT}"));
    }
}
