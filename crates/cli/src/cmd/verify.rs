//! `stillframe verify`: is the exhibit what was sealed, and where is it not.

use crate::args::Verify;
use crate::exit::Exit;
use crate::output::{self, Show, safe, size};
use acquire::event::{Event, Observer, Phase};
use evidence::verify::{Options, Outcome, Progress, Verdict, VerifyError, verify};
use host::exhibit_dir::ExhibitFiles;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Reads everything, writes nothing.
pub(crate) fn run(args: &Verify) -> Exit {
    let dir = match ExhibitFiles::open(&args.exhibit) {
        Ok(dir) => dir,
        Err(error) => {
            output::error(&error);
            output::hint("give the exhibit's directory itself, not a link to it");
            return Exit::Failed;
        }
    };
    // The verdict alone is stdout's; progress is for people.
    let show = match Show::new(false) {
        Ok(show) => show,
        Err(error) => {
            output::error(&error);
            return Exit::Failed;
        }
    };
    let last = Mutex::new(Instant::now());
    let progress = |at: Progress| {
        let Ok(mut last) = last.try_lock() else { return };
        if last.elapsed() >= Duration::from_millis(200) {
            *last = Instant::now();
            show.event(Event::Progress {
                phase: Phase::Verify,
                pass: None,
                done_bytes: at.done,
                total_bytes: at.total,
            });
        }
    };
    let threads = args.threads.unwrap_or_else(acquire::cpus);
    let result = verify(&dir, &Options { threads, progress: Some(&progress) });
    show.end();
    match result {
        Ok(mut verdict) => {
            if verdict.outcome == Outcome::Intact && is_partial(&args.exhibit) {
                output::say("the directory is called .partial: its acquisition did not end");
                verdict.outcome = Outcome::Losses;
            }
            if args.json {
                output::json(&verdict);
            } else {
                print(&verdict);
            }
            exit(verdict.outcome)
        }
        Err(error) => {
            output::error(&error);
            if matches!(error, VerifyError::NotAnExhibit) {
                output::hint(
                    "a directory that ends in .partial and has no manifest is what a killed run \
                     left: nothing in it is evidence",
                );
            }
            Exit::Failed
        }
    }
}

/// A run that was killed between its manifest and its exhibit's name left all but the name.
fn is_partial(exhibit: &Path) -> bool {
    exhibit.canonicalize().is_ok_and(|path| path.extension().is_some_and(|end| end == "partial"))
}

fn exit(outcome: Outcome) -> Exit {
    match outcome {
        Outcome::Intact => Exit::Complete,
        Outcome::Losses => Exit::Losses,
        Outcome::Altered => Exit::Altered,
    }
}

fn print(verdict: &Verdict) {
    let word = match verdict.outcome {
        Outcome::Intact => "intact and complete",
        Outcome::Losses => "intact, but partial or with losses",
        Outcome::Altered => "ALTERED",
    };
    let mut lines = vec![word.to_owned()];
    if let Some(id) = &verdict.record_id {
        lines.push(format!("record    {}", safe(id)));
    }
    if let Some(digest) = &verdict.manifest_sha256 {
        lines.push(format!("manifest  sha256 {digest}"));
    }
    lines.push(format!("blocks    {} compared with their digests", verdict.blocks_checked));
    let lost = verdict.lost;
    for (what, bytes) in [
        ("unreadable", lost.unreadable),
        ("excluded", lost.excluded),
        ("not reached", lost.not_reached),
    ] {
        if bytes > 0 {
            lines.push(format!("lost      {} {what}", size(bytes)));
        }
    }
    lines.extend(verdict.disturbances.iter().map(|text| format!("meanwhile {}", safe(text))));
    if verdict.map_changed {
        lines.push(
            "map       changed during the acquisition, see the manifest's caveats".to_owned(),
        );
    }
    lines.extend(verdict.findings.iter().map(|f| format!("finding   {}", safe(&f.to_string()))));
    if verdict.more_findings > 0 {
        lines.push(format!("finding   and {} more", verdict.more_findings));
    }
    for line in lines {
        if !output::line(&line) {
            break;
        }
    }
}
