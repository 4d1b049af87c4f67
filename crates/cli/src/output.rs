//! The voice: all that the binary says goes through here.
//!
//! stdout is data: tables for people who asked for them, JSON lines with `--json`. stderr is for
//! people: `stillframe: ` and a sentence without capital or full stop, then `hint: ` lines that say
//! what to do. Colour carries no meaning; there is none.

use acquire::event::{Event, Observer, Phase};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes for people: `3.4 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("B");
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {name}") }
}

/// Nanoseconds for people: `1.23 s`, `45 ms`.
pub(crate) fn time(ns: u64) -> String {
    let duration = Duration::from_nanos(ns);
    if duration >= Duration::from_secs(1) {
        format!("{:.2} s", duration.as_secs_f64())
    } else {
        format!("{:.1} ms", duration.as_secs_f64() * 1e3)
    }
}

/// Control characters as escapes, so that a VM's name cannot write to the terminal.
pub(crate) fn safe(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escape = c.is_control() || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            let escaped: Vec<char> = if escape { c.escape_unicode().collect() } else { vec![c] };
            escaped
        })
        .collect()
}

/// Rows as aligned lines, safe to show; the last column is as long as it is.
pub(crate) fn columns(rows: &[Vec<String>]) -> Vec<String> {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| safe(cell)).collect()).collect();
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count.saturating_sub(1)).map(width).collect();
    let aligned = |row: &Vec<String>| {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            line.push_str(cell);
            if let Some(width) = widths.get(column) {
                let pad = width.saturating_sub(cell.chars().count()) + 2;
                line.extend(std::iter::repeat_n(' ', pad));
            }
        }
        line
    };
    rows.iter().map(aligned).collect()
}

/// A sentence to stderr.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "stillframe: {}", safe(text));
}

/// What to do about it.
pub(crate) fn hint(text: &str) {
    let _ = writeln!(io::stderr().lock(), "hint: {}", safe(text));
}

/// An error with its causes on one line.
pub(crate) fn error(error: &dyn Error) {
    say(&chain(error));
}

/// `what: cause: cause`.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// A line of data. `false` when nobody reads stdout any more.
pub(crate) fn line(text: &str) -> bool {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).is_ok()
}

/// An object as one JSON line.
pub(crate) fn json(value: &impl Serialize) -> bool {
    match serde_json::to_string(value) {
        Ok(text) => line(&text),
        Err(error) => {
            say(&format!("cannot write JSON: {error}"));
            false
        }
    }
}

/// Shows events: JSON lines on stdout, sentences and a bar on stderr.
///
/// On a thread of its own: a terminal that was stopped (Ctrl-S) or a pipe that nobody reads blocks
/// whoever writes, and that must never be the one who holds the guest.
pub(crate) struct Show {
    sender: Mutex<Option<Sender<Event>>>,
    /// Progress that was not shown yet: more is left out.
    waiting: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Progress events that may wait.
const PROGRESS_WAITING: usize = 64;

impl Show {
    /// `json`: events as JSON lines on stdout; sentences still go to stderr.
    ///
    /// # Errors
    /// No thread to be had.
    pub(crate) fn new(json: bool) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel::<Event>();
        let waiting = Arc::new(AtomicUsize::new(0));
        let shown = Arc::clone(&waiting);
        let thread = thread::Builder::new().name("show".to_owned()).spawn(move || {
            let mut screen = Screen::new(json);
            for event in receiver {
                if matches!(event, Event::Progress { .. }) {
                    shown.fetch_sub(1, Ordering::Relaxed);
                }
                screen.show(event);
            }
            screen.bar.bar.finish_and_clear();
        })?;
        Ok(Self { sender: Mutex::new(Some(sender)), waiting, thread: Mutex::new(Some(thread)) })
    }

    /// Waits until everything is shown.
    pub(crate) fn end(&self) {
        drop(self.sender.lock().unwrap_or_else(PoisonError::into_inner).take());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

impl Observer for Show {
    fn event(&self, event: Event) {
        if matches!(event, Event::Progress { .. }) {
            if self.waiting.load(Ordering::Relaxed) >= PROGRESS_WAITING {
                return;
            }
            self.waiting.fetch_add(1, Ordering::Relaxed);
        }
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = sender.as_ref() {
            // Nobody is left to show it to.
            let _ = sender.send(event);
        }
    }
}

/// What the thread has: the terminal.
struct Screen {
    json: bool,
    bar: Bar,
}

struct Bar {
    bar: ProgressBar,
    on: Option<(Phase, Option<u32>)>,
    terminal: bool,
    last_line: Instant,
}

impl Screen {
    fn new(json: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let target =
            if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        Self { json, bar: Bar { bar, on: None, terminal, last_line: Instant::now() } }
    }

    /// A sentence that does not tear the bar.
    fn sentence(&self, text: &str) {
        self.bar.bar.suspend(|| say(text));
    }
}

fn phase_word(phase: Phase, pass: Option<u32>) -> String {
    match (phase, pass) {
        (Phase::Reserve, _) => "reserving".to_owned(),
        (Phase::Capture, Some(pass)) => format!("pass {pass}"),
        (Phase::Capture, None) => "reading".to_owned(),
        (Phase::Seal, _) => "sealing".to_owned(),
        (Phase::FileDigest, _) => "file digest".to_owned(),
        (Phase::Verify, _) => "verifying".to_owned(),
    }
}

impl Bar {
    fn progress(&mut self, phase: Phase, pass: Option<u32>, done: u64, total: u64) {
        if self.on != Some((phase, pass)) {
            self.on = Some((phase, pass));
            self.last_line = Instant::now();
            self.bar.reset();
            if let Ok(style) = ProgressStyle::with_template(
                "{msg:>11} [{bar:30}] {bytes:>10}/{total_bytes} {bytes_per_sec:>12} ETA {eta}",
            ) {
                self.bar.set_style(style.progress_chars("=> "));
            }
            self.bar.set_message(phase_word(phase, pass));
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        // Without a terminal a log wants a sign of life, not a bar.
        if !self.terminal && done < total && self.last_line.elapsed() >= Duration::from_secs(10) {
            self.last_line = Instant::now();
            say(&format!("{}: {} of {}", phase_word(phase, pass), size(done), size(total)));
        }
    }
}

impl Screen {
    fn show(&mut self, event: Event) {
        if self.json {
            json(&event);
        }
        match event {
            Event::Progress { phase, pass, done_bytes, total_bytes } => {
                self.bar.progress(phase, pass, done_bytes, total_bytes);
            }
            Event::Found { name, pid, monitor, .. } => {
                self.sentence(&format!("found {name:?}, PID {pid}, by {monitor}"));
            }
            Event::Plan { method, store, format, image_bytes, resident_bytes, .. } => {
                self.sentence(&format!(
                    "method {method}, store {store}, format {format}: {} of memory, {} resident",
                    size(image_bytes),
                    size(resident_bytes)
                ));
            }
            Event::Warning { text } => self.sentence(&format!("warning: {text}")),
            Event::Held { threads: 0 } => self.sentence("held: QEMU has stopped the guest"),
            Event::Held { threads } => self.sentence(&format!("held: {threads} threads")),
            Event::Released { held_ns } => {
                self.sentence(&format!("released after {}", time(held_ns)));
            }
            Event::Pass { pass, bytes, took_ns, changed_pages } => {
                let changed = changed_pages
                    .map(|pages| format!(", {pages} pages changed since the pass before"))
                    .unwrap_or_default();
                self.sentence(&format!(
                    "pass {pass}: {} in {}{changed}",
                    size(bytes),
                    time(took_ns)
                ));
            }
            Event::MapChanged { difference } => {
                self.sentence(&format!("warning: the memory map changed: {difference}"));
            }
            Event::Sealed { memory_root, data_bytes, .. } => {
                self.sentence(&format!(
                    "sealed: {} of data, memory root {memory_root}",
                    size(data_bytes)
                ));
            }
            Event::Done { .. } => self.bar.bar.finish_and_clear(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(512), "512 B");
        assert_eq!(size(3_650_722_202), "3.4 GiB");
        assert_eq!(time(1_230_000_000), "1.23 s");
        assert_eq!(time(45_000_000), "45.0 ms");
    }

    #[test]
    fn columns_align_and_are_safe() {
        let rows = [["A", "B", "C"], ["lo\u{1b}ng", "x", "the last"]];
        let rows = rows.map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(columns(&rows), ["A           B  C", "lo\\u{1b}ng  x  the last"]);
    }

    #[test]
    fn a_name_cannot_write_to_the_terminal() {
        assert_eq!(safe("web\u{1b}[2J\n07"), "web\\u{1b}[2J\\u{a}07");
        assert_eq!(safe("\u{202e}gnp"), "\\u{202e}gnp");
        assert_eq!(safe("веб-07"), "веб-07");
    }
}
