//! The QMP client against peers that lie, hang and leave. The peers are threads at the other end
//! of a socket; each wait is bounded, so a client that hangs fails the test by its time.
#![forbid(unsafe_code)]
// Helpers of tests are tests: a panic is their verdict.
#![allow(clippy::unwrap_used)]

use qemu::facts::Facts;
use qemu::qmp::{Change, Command, Hmp, MAX_EVENTS, MAX_MESSAGE, Outcome, peer_of};
use qemu::{Qmp, QmpError};
use serde::Deserialize as _;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}, "capabilities": ["oob"]}}"#;
const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(20);

/// The other end: what it reads are whole lines, what it writes is anything.
struct Peer {
    reader: BufReader<UnixStream>,
    stream: UnixStream,
}

impl Peer {
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // The client may have hung up: then the script just goes on.
        let _ = self.stream.write_all(bytes.as_ref());
        let _ = self.stream.write_all(b"\r\n");
    }

    /// The next command.
    fn command(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or(Value::Null)
    }

    /// Answers the next command with `value`.
    fn answer(&mut self, value: Value) -> Value {
        let command = self.command();
        self.send(json!({ "return": value, "id": command["id"] }).to_string());
        command
    }

    fn greet(&mut self) {
        self.send(GREETING);
        let command = self.answer(json!({}));
        assert_eq!(command["execute"], "qmp_capabilities");
    }

    /// Waits until the client hangs up.
    fn wait(&mut self) {
        let _ = self.reader.read_to_end(&mut Vec::new());
    }
}

fn connect(
    script: impl FnOnce(&mut Peer) + Send + 'static,
    deadline: Duration,
) -> Result<Qmp, QmpError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let reader = BufReader::new(theirs.try_clone().unwrap());
        script(&mut Peer { reader, stream: theirs });
    });
    Qmp::over(ours, Path::new("/run/test.sock"), deadline, None)
}

/// A connection to a peer that greets well and then follows `script`.
fn greeted(script: impl FnOnce(&mut Peer) + Send + 'static) -> Qmp {
    let whole = |peer: &mut Peer| {
        peer.greet();
        script(peer);
    };
    connect(whole, LONG).unwrap()
}

fn status(qmp: &mut Qmp, timeout: Duration) -> Result<Value, QmpError> {
    qmp.execute(Command::QueryStatus, json!({}), timeout)
}

fn protocol_breach(error: &QmpError, what: &str) {
    assert!(matches!(error, QmpError::Protocol { .. }), "{error:?}");
    assert!(error.to_string().contains(what), "{error}");
}

#[test]
fn a_conversation() {
    let mut qmp = greeted(|peer| {
        peer.send(r#"{"event": "STOP", "timestamp": {"seconds": 5, "microseconds": 7}}"#);
        let command = peer.answer(json!({ "running": true, "status": "running" }));
        assert_eq!(command["execute"], "query-status");
        let command = peer.answer(json!("a\r\nb\r\n"));
        assert_eq!(command["arguments"]["command-line"], "gpa2hva 0x1000");
        peer.send(r#"{"event": "RESUME", "data": {"a": 1}, "timestamp": {"seconds": -1, "microseconds": -1}}"#);
    });
    assert_eq!(qmp.version().qemu.major, 10);
    assert!(Facts::of(&mut qmp, LONG).status().unwrap().running);
    assert_eq!(qmp.hmp(Hmp::Gpa2Hva(0x1000), LONG).unwrap(), "a\nb\n");
    let events = qmp.take_events();
    assert_eq!(
        (events[0].name.as_str(), events[0].seconds, events[0].microseconds),
        ("STOP", 5, 7)
    );
    qmp.poll_events(LONG).unwrap();
    let events = qmp.take_events();
    assert_eq!((events[0].name.as_str(), &events[0].data), ("RESUME", &json!({ "a": 1 })));
    assert!(matches!(qmp.poll_events(LONG), Err(QmpError::Closed { .. })));
}

#[test]
fn a_pretty_monitor_is_understood() {
    let script = |peer: &mut Peer| {
        let greeting: Value = serde_json::from_str(GREETING).unwrap();
        peer.send(serde_json::to_string_pretty(&greeting).unwrap());
        let id = peer.command()["id"].clone();
        peer.send(serde_json::to_string_pretty(&json!({ "return": {}, "id": id })).unwrap());
    };
    connect(script, LONG).unwrap();
}

#[test]
fn refusals_are_told_and_the_conversation_goes_on() {
    let mut qmp = greeted(|peer| {
        let id = peer.command()["id"].clone();
        let error = json!({ "class": "CommandNotFound", "desc": "no \u{1b}[2J such" });
        peer.send(json!({ "error": error, "id": id }).to_string());
        peer.answer(json!(1));
    });
    let error = status(&mut qmp, LONG).unwrap_err();
    assert!(error.is_unknown_command());
    assert!(!error.to_string().contains('\u{1b}'), "{error:?}");
    assert_eq!(status(&mut qmp, LONG).unwrap(), json!(1));
}

#[test]
fn an_answer_in_another_shape() {
    let mut qmp = greeted(|peer| {
        peer.answer(json!({ "status": 7 }));
        peer.answer(json!(7));
    });
    let error = Facts::of(&mut qmp, LONG).status().unwrap_err();
    assert!(matches!(error, QmpError::Shape { command: "query-status", .. }), "{error}");
    assert!(matches!(qmp.hmp(Hmp::InfoMtreeFlat, LONG), Err(QmpError::Shape { .. })));
}

#[test]
fn a_busy_monitor_is_named_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let began = Instant::now();
    // Connected by the kernel, never accepted: so a second client of QEMU is treated.
    let error = Qmp::connect(&path, SHORT).unwrap_err();
    assert!(matches!(&error, QmpError::Busy { path: p, .. } if *p == path), "{error:?}");
    assert!(error.to_string().contains("qmp.sock"), "{error}");
    assert!(began.elapsed() >= SHORT && began.elapsed() < LONG);
    drop(listener);
    assert!(matches!(Qmp::connect(&path, SHORT), Err(QmpError::Connect { .. })));
    assert!(matches!(Qmp::connect(&dir.path().join("gone"), SHORT), Err(QmpError::Connect { .. })));
    assert!(matches!(
        Qmp::connect(Path::new(&"x".repeat(200)), SHORT),
        Err(QmpError::Connect { .. })
    ));
}

#[test]
fn a_full_listen_queue_does_not_hang_the_connect() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    // The queue of 0 holds one; later ones must wait.
    let _first = UnixStream::connect(&path).unwrap();
    let began = Instant::now();
    let error = Qmp::connect(&path, SHORT).unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error:?}");
    assert!(began.elapsed() < LONG);
    assert!(matches!(peer_of(&path, SHORT), Err(QmpError::Busy { .. })));
}

#[test]
fn the_peer_is_who_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let peer = peer_of(&path, LONG).unwrap();
    assert_eq!(peer.pid, Some(std::process::id()));
    assert_eq!(peer.uid, rustix::process::getuid().as_raw());
}

#[test]
fn other_services_are_not_taken_for_qemu() {
    let not_json = connect(|peer| peer.send("SSH-2.0-OpenSSH_9.2"), LONG).unwrap_err();
    protocol_breach(&not_json, "SSH-2.0");
    let other_json = connect(|peer| peer.send(r#"{"hello": 1}"#), LONG).unwrap_err();
    protocol_breach(&other_json, "no greeting");
    let closed = connect(|_| (), LONG).unwrap_err();
    assert!(matches!(closed, QmpError::Closed { .. }), "{closed:?}");
    // Bytes came, so it is not a monitor that someone else holds.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(br#"{"QMP": "#).unwrap();
    let half = Qmp::over(ours, Path::new("x"), Duration::from_secs(1), None).unwrap_err();
    assert!(matches!(half, QmpError::Timeout { .. }), "{half:?}");
    let refused = connect(
        |peer| {
            peer.send(GREETING);
            let id = peer.command()["id"].clone();
            let error = json!({ "class": "GenericError", "desc": "no" });
            peer.send(json!({ "error": error, "id": id }).to_string());
        },
        LONG,
    );
    assert!(matches!(refused, Err(QmpError::Refused { .. })));
}

#[test]
fn garbage_ends_the_conversation() {
    for (garbage, what) in [
        ("%", "not JSON"),
        ("{]", "not JSON"),
        ("{\"return\": 1}", "id is \"none\""),
        ("{\"return\": 1, \"id\": 77}", "id is \"77\""),
        ("{\"return\": 1, \"id\": \"2\"}", "id is"),
        ("{\"id\": 2}", "neither answer nor event"),
        ("{\"error\": {\"class\": \"GenericError\"}, \"id\": 2}", "neither answer nor event"),
        ("{\"event\": \"STOP\"}", "odd event"),
        ("{\"return\": \"\\ud800\", \"id\": 2}", "not JSON"),
    ] {
        let mut qmp = greeted(move |peer| {
            peer.command();
            peer.send(garbage);
            peer.wait();
        });
        protocol_breach(&status(&mut qmp, LONG).unwrap_err(), what);
        // What came later could be the answer to another question.
        assert!(matches!(status(&mut qmp, LONG), Err(QmpError::Broken)));
        assert!(matches!(qmp.poll_events(SHORT), Err(QmpError::Broken)));
    }
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    let mut qmp = greeted(|peer| {
        peer.command();
        let deep = 1 << 20;
        peer.send(format!("{{\"return\": {}{}, \"id\": 2}}", "[".repeat(deep), "]".repeat(deep)));
        peer.wait();
    });
    protocol_breach(&status(&mut qmp, LONG).unwrap_err(), "recursion");
}

#[test]
fn a_hundred_megabytes_without_an_end_are_refused() {
    let mut qmp = greeted(|peer| {
        peer.command();
        let _ = peer.stream.write_all(b"{\"return\": \"");
        let mebibyte = vec![b'x'; 1 << 20];
        for _ in 0..100 {
            if peer.stream.write_all(&mebibyte).is_err() {
                break;
            }
        }
        peer.wait();
    });
    protocol_breach(&status(&mut qmp, LONG).unwrap_err(), &MAX_MESSAGE.to_string());
}

#[test]
fn white_space_without_end_ends_in_time() {
    let mut qmp = greeted(|peer| {
        peer.command();
        while peer.stream.write_all(&[b'\n'; 4096]).is_ok() {}
    });
    let began = Instant::now();
    assert!(matches!(status(&mut qmp, SHORT), Err(QmpError::Timeout { .. })));
    assert!(began.elapsed() < LONG);
}

#[test]
fn a_flood_of_events_is_refused() {
    let mut qmp = greeted(|peer| {
        peer.command();
        let event = b"{\"event\": \"X\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 1}}\n";
        while peer.stream.write_all(event).is_ok() {}
    });
    protocol_breach(&status(&mut qmp, LONG).unwrap_err(), &MAX_EVENTS.to_string());
}

#[test]
fn a_late_answer_is_not_taken_for_the_next() {
    let mut qmp = greeted(|peer| {
        let late = peer.command()["id"].clone();
        let next = peer.command()["id"].clone();
        peer.send(json!({ "return": "late", "id": late }).to_string());
        peer.send(json!({ "return": "next", "id": next }).to_string());
        // A second answer to the first is no longer expected.
        peer.command();
        peer.send(json!({ "return": "again", "id": late }).to_string());
        peer.wait();
    });
    let error = status(&mut qmp, SHORT).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { doing: "query-status", .. }), "{error:?}");
    assert_eq!(status(&mut qmp, LONG).unwrap(), json!("next"));
    protocol_breach(&status(&mut qmp, LONG).unwrap_err(), "id is");
}

#[test]
fn a_peer_that_leaves_is_noticed() {
    let mut qmp = greeted(|peer| {
        peer.command();
    });
    let error = status(&mut qmp, LONG).unwrap_err();
    assert!(matches!(error, QmpError::Closed { doing: "query-status" }), "{error:?}");
    assert!(matches!(status(&mut qmp, LONG), Err(QmpError::Broken)));
}

#[test]
fn lines_of_the_human_monitor_have_one_door() {
    let mut qmp = greeted(Peer::wait);
    let arguments = json!({ "command-line": "system_reset" });
    let error = qmp.execute(Command::HumanMonitorCommand, arguments, SHORT).unwrap_err();
    protocol_breach(&error, "hmp()");
}

#[test]
fn the_transcript_holds_every_command() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = std::thread::spawn(move || {
        let reader = BufReader::new(theirs.try_clone().unwrap());
        let mut peer = Peer { reader, stream: theirs };
        peer.greet();
        peer.answer(json!(""));
        let id = peer.command()["id"].clone();
        let error = json!({ "class": "GenericError", "desc": "no" });
        peer.send(json!({ "error": error, "id": id }).to_string());
        peer.command();
    });
    let sink = Arc::clone(&told);
    let transcript = Box::new(move |exchange: &qemu::qmp::Exchange<'_>| {
        assert!(exchange.started <= exchange.finished);
        sink.lock().unwrap().push((
            exchange.command,
            exchange.arguments.clone(),
            exchange.outcome,
            exchange.error.map(ToString::to_string),
        ));
    });
    let mut qmp = Qmp::over(ours, Path::new("x"), LONG, Some(transcript)).unwrap();
    qmp.hmp(Hmp::InfoRegisters, LONG).unwrap();
    status(&mut qmp, LONG).unwrap_err();
    status(&mut qmp, LONG).unwrap_err();
    status(&mut qmp, LONG).unwrap_err();
    script.join().unwrap();
    let told: Vec<_> = told.lock().unwrap().drain(..).collect();
    let short: Vec<_> = told.iter().map(|(command, _, outcome, _)| (*command, *outcome)).collect();
    assert_eq!(
        short,
        [
            ("qmp_capabilities", Outcome::Answered),
            ("human-monitor-command", Outcome::Answered),
            ("query-status", Outcome::Refused),
            ("query-status", Outcome::Lost),
            ("query-status", Outcome::Breach),
        ]
    );
    assert_eq!(told[1].1, json!({ "command-line": "info registers -a" }));
    assert!(told[2].3.as_deref().unwrap().contains("GenericError"));
}

#[test]
fn a_dump_goes_to_a_descriptor_that_was_passed() {
    let (tell, told) = std::sync::mpsc::channel();
    let mut qmp = greeted(move |peer| {
        for _ in 0..2 {
            let command = peer.answer(json!({}));
            tell.send(command).unwrap();
        }
        let id = peer.command()["id"].clone();
        let desc = "dump: failed to save memory: Broken pipe";
        let result = json!({ "total": 5_000_000_000u64, "status": "failed", "completed": 61440 });
        let data = json!({ "result": result, "error": desc });
        let time = json!({ "seconds": 1, "microseconds": 2 });
        peer.send(
            json!({ "event": "DUMP_COMPLETED", "data": data, "timestamp": time }).to_string(),
        );
        let error = json!({ "class": "GenericError", "desc": desc });
        peer.send(json!({ "error": error, "id": id }).to_string());
        tell.send(peer.answer(result)).unwrap();
    });
    let (reader, writer) = std::io::pipe().unwrap();
    qmp.pass("dump", writer.as_fd(), LONG).unwrap();
    drop((reader, writer));
    assert_eq!(told.recv().unwrap()["execute"], "getfd");
    let dump = |detach, range| Change::DumpToFd { name: "dump".into(), detach, range };
    qmp.change(&dump(true, None), LONG).unwrap();
    let command = told.recv().unwrap();
    assert_eq!(command["execute"], "dump-guest-memory");
    let arguments = json!({ "paging": false, "protocol": "fd:dump", "detach": true });
    assert_eq!(command["arguments"], arguments);

    let error = qmp.change(&dump(false, Some((0x1000, 1))), LONG).unwrap_err();
    assert!(error.to_string().contains("Broken pipe"), "{error}");
    let event = qmp.take_events().remove(0);
    assert_eq!(event.name, "DUMP_COMPLETED");
    let last = Facts::of(&mut qmp, LONG).dump().unwrap();
    assert_eq!(last, qemu::facts::Dump::deserialize(&event.data["result"]).unwrap());
    assert_eq!((last.status.as_str(), last.total), ("failed", 5_000_000_000));
    assert_eq!(told.recv().unwrap()["execute"], "query-dump");
}

#[test]
fn a_dump_of_a_range_says_so() {
    let (tell, told) = std::sync::mpsc::channel();
    let mut qmp = greeted(move |peer| tell.send(peer.answer(json!({}))).unwrap());
    let range = Some((1 << 32, 1));
    let change = Change::DumpToFd { name: "d".into(), detach: false, range };
    qmp.change(&change, LONG).unwrap();
    let arguments = json!({ "paging": false, "protocol": "fd:d", "detach": false,
        "begin": 4_294_967_296u64, "length": 1 });
    assert_eq!(told.recv().unwrap()["arguments"], arguments);
}

/// A command of which a part was sent would run into the next one.
#[test]
fn after_a_command_that_was_not_sent_whole_the_connection_is_not_used_again() {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let mut qmp = greeted(move |_| {
        // It reads nothing until the client has given up.
        let _ = wait.recv();
    });
    let tiny = Duration::from_millis(1);
    let ends = (0..50_000).find_map(|_| match qmp.execute(Command::QueryStatus, json!({}), tiny) {
        Err(QmpError::Timeout { .. }) => None,
        other => Some(other),
    });
    assert!(matches!(ends, Some(Err(QmpError::Broken))), "{ends:?}");
    drop(done);
}
