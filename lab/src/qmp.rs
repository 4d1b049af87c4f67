//! The lab's own QMP client: a greeting, commands, answers, events put aside.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Doing, Result, failed};

/// Longest wait for one answer. `dump-guest-memory` of a large guest is the slowest.
const DEADLINE: Duration = Duration::from_secs(120);

/// A negotiated QMP connection.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
    /// Events that arrived while an answer was awaited, oldest first.
    pub events: Vec<Value>,
}

impl Qmp {
    /// Connects, waiting up to `patience` for the socket to appear and the monitor to be free.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let until = Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > until => {
                    return Err(e).doing(format_args!("connecting to {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        stream.set_read_timeout(Some(patience.max(Duration::from_secs(1))))?;
        let mut qmp = Self { lines: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.line().doing("waiting for QMP's greeting")?;
        if greeting.get("QMP").is_none() {
            return Err(failed(format_args!("no QMP greeting but {greeting}")));
        }
        qmp.lines.get_ref().set_read_timeout(Some(DEADLINE))?;
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command; `Value::Null` or `{}` for no arguments. Returns what stands in `return`.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if arguments.as_object().is_some_and(|a| !a.is_empty()) {
            request["arguments"] = arguments;
        }
        let mut bytes = serde_json::to_vec(&request)?;
        bytes.push(b'\n');
        self.lines.get_mut().write_all(&bytes).doing(format_args!("sending QMP {command}"))?;
        loop {
            let mut answer = self.line().doing(format_args!("waiting for QMP {command}"))?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(failed(format_args!("QMP {command}: {error}")));
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Runs a command of the human monitor and returns what it prints.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let answer = self.run("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Sends a command whose answer need not come, such as `quit`.
    pub(crate) fn send_only(&mut self, command: &str) {
        let request = json!({ "execute": command });
        let _ = self.lines.get_mut().write_all(format!("{request}\n").as_bytes());
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err(failed("QEMU closed the monitor"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
