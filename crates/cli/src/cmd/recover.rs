//! `stillframe recover`: puts right what killed runs left behind. Idempotent; fit for cron.

use crate::args;
use crate::exit::Exit;
use crate::output::{self, safe};

/// Looks at every VM that a run worked on, and puts right what is left.
pub(crate) fn run(args: &args::Recover) -> Exit {
    let found = match ::acquire::recover::recover(args.vm.as_deref(), args.force) {
        Ok(found) => found,
        Err(error) => {
            output::error(&error);
            output::hint("run as root, or as the user that ran the acquisition");
            return Exit::Failed;
        }
    };
    for one in &found {
        if args.json {
            output::json(one);
            continue;
        }
        let name = one.name.as_deref().map_or_else(|| one.file.clone(), safe);
        let pid = one.pid.map(|pid| format!(" (PID {pid})")).unwrap_or_default();
        output::line(&format!("{name}{pid}: {}", one.text));
    }
    // Cron mails whatever is said: nothing to do is nothing said.
    if found.iter().all(|one| one.right) { Exit::Complete } else { Exit::NotAsFound }
}
