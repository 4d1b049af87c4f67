//! Signals that would stop this process while others depend on it.

use nix::sys::signal::{SigSet, Signal};
use std::io;

/// Blocks SIGTSTP (Ctrl-Z), SIGTTOU and SIGTTIN (the terminal is another's) in this thread and in
/// those that it starts: to be called before there are any. Children that are started by
/// `std::process` begin with nothing blocked.
///
/// # Errors
/// The kernel's.
pub fn block_stops() -> io::Result<()> {
    let stops: SigSet = [Signal::SIGTSTP, Signal::SIGTTOU, Signal::SIGTTIN].into_iter().collect();
    Ok(stops.thread_block()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_blocked_in_this_thread() {
        let blocked = std::thread::spawn(|| {
            block_stops().unwrap();
            SigSet::thread_get_mask().unwrap()
        });
        let blocked = blocked.join().unwrap();
        assert!(blocked.contains(Signal::SIGTSTP) && blocked.contains(Signal::SIGTTOU));
        assert!(!blocked.contains(Signal::SIGINT) && !blocked.contains(Signal::SIGHUP));
    }
}
