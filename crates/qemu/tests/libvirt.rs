//! The libvirt client against peers that lie, hang and leave, and QMP through it. The peers are threads
//! at the other end of a socket that write packets by hand, or those that a real libvirtd wrote once
//! (`tests/libvirtd.rs`).
#![forbid(unsafe_code)]
// Helpers of tests are tests: a panic is their verdict.
#![allow(clippy::unwrap_used)]

mod conversation;

use qemu::libvirt::{
    ControlState, Domain, DumpFormat, Feature, Libvirt, LibvirtError, Lifecycle, MAX_EVENTS,
    RunState, SYSTEM, State,
};
use qemu::qmp::{Change, Command};
use qemu::{Qmp, QmpError};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::json;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(150);

const REMOTE: u32 = 0x2000_8086;
const QEMU: u32 = 0x2000_8087;

/// What the client sent: program, procedure, type, serial, payload.
#[derive(Debug)]
struct Call {
    program: u32,
    procedure: u32,
    kind: u32,
    serial: u32,
    payload: Vec<u8>,
}

/// The other end.
struct Peer(UnixStream);

fn numbers(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|n| n.to_be_bytes()).collect()
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = numbers(&[u32::try_from(text.len()).unwrap()]);
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn domain(name: &str, id: u32) -> Vec<u8> {
    [string(name), vec![7; 16], numbers(&[id])].concat()
}

impl Peer {
    fn call(&mut self) -> Call {
        let mut head = [0; 28];
        self.0.read_exact(&mut head).unwrap();
        let at = |n: usize| u32::from_be_bytes(head[n * 4..n * 4 + 4].try_into().unwrap());
        let mut payload = vec![0; usize::try_from(at(0)).unwrap() - 28];
        self.0.read_exact(&mut payload).unwrap();
        Call { program: at(1), procedure: at(3), kind: at(4), serial: at(5), payload }
    }

    fn send(&mut self, head: [u32; 6], payload: &[u8]) {
        let len = u32::try_from(28 + payload.len()).unwrap();
        // The client may have hung up: then the script just goes on.
        let _ = self.0.write_all(&[numbers(&[len]), numbers(&head), payload.to_vec()].concat());
    }

    fn reply(&mut self, call: &Call, payload: &[u8]) {
        self.send([call.program, 1, call.procedure, 1, call.serial, 0], payload);
    }

    fn answer(&mut self, payload: &[u8]) -> Call {
        let call = self.call();
        self.reply(&call, payload);
        call
    }

    /// Lets the client in.
    fn open(&mut self) {
        let auth = self.answer(&numbers(&[1, 0]));
        assert_eq!((auth.program, auth.procedure, auth.kind, auth.serial), (REMOTE, 66, 0, 1));
        let open = self.answer(&[]);
        assert_eq!((open.program, open.procedure, open.serial), (REMOTE, 1, 2));
        assert!(open.payload.starts_with(&[numbers(&[1]), string(SYSTEM)].concat()));
    }

    /// Lets QMP through: events are registered, the version is asked for.
    fn let_through(&mut self) {
        let listen = self.answer(&numbers(&[3]));
        assert_eq!((listen.program, listen.procedure), (QEMU, 4));
        self.json(r#"{"return":{"qemu":{"micro":2,"minor":0,"major":10},"package":"x"},"id":"libvirt-9"}"#);
    }

    /// Answers the next monitor command with this JSON; gives back the command.
    fn json(&mut self, text: &str) -> String {
        let call = self.answer(&string(text));
        assert_eq!((call.program, call.procedure), (QEMU, 1));
        let at = call.payload.windows(9).position(|w| w == b"{\"argumen").unwrap();
        String::from_utf8_lossy(&call.payload[at..]).into_owned()
    }

    fn event(&mut self, name: &str, data: Option<&str>) {
        let mut payload = [numbers(&[3]), domain("a b", 4), string(name)].concat();
        payload.extend([5u64.to_be_bytes().to_vec(), numbers(&[6])].concat());
        payload.extend(numbers(&[u32::from(data.is_some())]));
        payload.extend(data.map_or(Vec::new(), string));
        self.send([QEMU, 1, 6, 2, 0, 0], &payload);
    }
}

/// A client whose peer follows `script` once it has let it in.
fn client(script: impl FnOnce(&mut Peer) + Send + 'static) -> Libvirt {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let mut peer = Peer(theirs);
        peer.open();
        script(&mut peer);
        let _ = peer.0.read_to_end(&mut Vec::new());
    });
    Libvirt::over(ours, Path::new("/peer"), SYSTEM, LONG).unwrap()
}

fn ab() -> Domain {
    Domain { name: "a b".into(), uuid: [7; 16], id: 4 }
}

fn through(script: impl FnOnce(&mut Peer) + Send + 'static) -> Qmp {
    let libvirt = client(|peer| {
        peer.let_through();
        script(peer);
    });
    Qmp::through(libvirt, SYSTEM, ab(), LONG, None).unwrap()
}

/// The other side of the conversation that was kept: each call must be the one that was made then.
fn repeat(mut stream: UnixStream) {
    let kept = std::fs::read_to_string(conversation::KEPT).unwrap();
    for (number, line) in kept.lines().enumerate() {
        let (mark, hex) = line.split_at(2);
        let digits = hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
        let packet: Vec<u8> = digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect();
        if mark == "< " {
            stream.write_all(&packet).unwrap();
            continue;
        }
        let mut call = vec![0; packet.len()];
        stream.read_exact(&mut call).unwrap();
        assert_eq!(call, packet, "packet {number}");
    }
}

#[test]
fn what_libvirt_9_said_is_understood() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let libvirt = std::thread::spawn(move || repeat(theirs));
    let said = conversation::hold(ours);
    libvirt.join().unwrap();
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn domains_are_listed_and_described() {
    let mut libvirt = client(|peer| {
        let list = [numbers(&[2]), domain("a b", 4), domain("веб", 5), numbers(&[2])].concat();
        assert_eq!(peer.answer(&list).payload, numbers(&[1, 1]));
        peer.answer(&9_000_123u64.to_be_bytes());
        assert_eq!(
            peer.answer(&numbers(&[3, 1])).payload,
            [domain("a b", 4), numbers(&[0])].concat()
        );
        peer.answer(&string("<domain/>"));
    });
    let domains = libvirt.domains(LONG).unwrap();
    assert_eq!(domains[0], ab());
    assert_eq!(domains[1].uuid_text(), "07070707-0707-0707-0707-070707070707");
    assert_eq!(libvirt.version(LONG).unwrap(), (9, 0, 123));
    assert_eq!(libvirt.state(&ab(), LONG).unwrap(), State { state: RunState::Paused, reason: 1 });
    assert_eq!(libvirt.xml(&ab(), LONG).unwrap(), "<domain/>");
}

#[test]
fn what_needs_no_monitor_is_asked_of_libvirt() {
    let mut libvirt = client(|peer| {
        assert_eq!(peer.answer(&domain("a b", 4)).payload, string("a b"));
        assert_eq!(peer.answer(&domain("a b", 4)).payload, numbers(&[4]));
        let wide = |n: u64| n.to_be_bytes().to_vec();
        let info = [numbers(&[1]), wide(2048), wide(1024), numbers(&[3]), wide(5_000_000_000)];
        assert_eq!(peer.answer(&info.concat()).payload, domain("a b", 4));
        peer.answer(&[numbers(&[2, 0]), wide(1500)].concat());
        peer.answer(&7_002_022u64.to_be_bytes());
        assert_eq!(peer.answer(&numbers(&[1])).payload, numbers(&[8]));
    });
    assert_eq!(libvirt.domain_named("a b", LONG).unwrap(), ab());
    assert_eq!(libvirt.domain_numbered(4, LONG).unwrap(), ab());
    let info = libvirt.info(&ab(), LONG).unwrap();
    assert_eq!((info.state, info.cpus), (RunState::Running, 3));
    assert_eq!((info.max_memory_kib, info.memory_kib), (2048, 1024));
    assert_eq!(info.cpu_time, Duration::from_secs(5));
    let control = libvirt.control(&ab(), LONG).unwrap();
    assert_eq!(
        (control.state, control.since),
        (ControlState::Occupied, Duration::from_millis(1500))
    );
    assert_eq!(libvirt.hypervisor_version(LONG).unwrap(), (7, 2, 22));
    assert!(libvirt.supports(Feature::FdPassing, LONG).unwrap());
}

#[test]
fn a_connection_that_looks_sends_nothing_else() {
    let (_dir, path) = listening(vec![Box::new(|peer| {
        // What came after the opening is the goodbye.
        assert_eq!(peer.answer(&[]).procedure, 2);
    })]);
    let mut libvirt = Libvirt::connect_to_look(&path, SYSTEM, LONG).unwrap();
    assert!(libvirt.is_read_only());
    assert_eq!(libvirt.peer().unwrap().pid, Some(std::process::id()));
    let refused = [
        libvirt.peek(&ab(), 0, 8, LONG).map(drop),
        libvirt.suspend(&ab(), LONG),
        libvirt.resume(&ab(), LONG),
        libvirt.abort_job(&ab(), LONG),
        libvirt.listen(&ab(), LONG).map(drop),
        libvirt.core_dump(&ab(), Path::new("/x"), DumpFormat::Elf, false, LONG),
    ];
    for error in refused.map(Result::unwrap_err) {
        assert!(matches!(error, LibvirtError::ReadOnly { .. }) && error.is_unsent(), "{error}");
    }
}

#[test]
fn a_dump_is_of_memory_only_and_goes_to_a_whole_path() {
    let mut libvirt = client(|peer| {
        let plain = peer.answer(&[]);
        assert_eq!(plain.payload, [domain("a b", 4), string("/run/x"), numbers(&[0, 16])].concat());
        assert!(peer.answer(&[]).payload.ends_with(&numbers(&[1, 20])));
        drop(peer.answer(&[]));
    });
    let dump = |libvirt: &mut Libvirt, to: &str, format, bypass| {
        libvirt.core_dump(&ab(), Path::new(to), format, bypass, LONG)
    };
    dump(&mut libvirt, "/run/x", DumpFormat::Elf, false).unwrap();
    let error = dump(&mut libvirt, "x", DumpFormat::Elf, false).unwrap_err();
    assert!(matches!(error, LibvirtError::Relative { .. }), "{error}");
    dump(&mut libvirt, "/run/x", DumpFormat::KdumpZlib, true).unwrap();
    libvirt.abort_job(&ab(), LONG).unwrap();
}

#[test]
fn lives_of_domains_are_told() {
    let mut libvirt = client(|peer| {
        assert_eq!(
            peer.answer(&numbers(&[5])).payload,
            [numbers(&[0, 1]), domain("a b", 4)].concat()
        );
        for (what, detail) in [(3, 0), (4, 1), (77, 2)] {
            let event = [numbers(&[5]), domain("a b", 4), numbers(&[what, detail])].concat();
            peer.send([REMOTE, 1, 318, 2, 0, 0], &event);
        }
        assert_eq!(peer.answer(&[]).payload, numbers(&[5]));
    });
    let watch = libvirt.watch(Some(&ab()), LONG).unwrap();
    libvirt.poll_events(LONG).unwrap();
    libvirt.unwatch(&watch, LONG).unwrap();
    let told = libvirt.take_lifecycle();
    let what: Vec<_> = told.iter().map(|event| (event.what, event.detail)).collect();
    assert_eq!(
        what,
        [(Lifecycle::Suspended, 0), (Lifecycle::Resumed, 1), (Lifecycle::Other(77), 2)]
    );
    assert_eq!(told[0].domain, ab());
    assert!(libvirt.take_events().is_empty());
}

#[test]
fn few_long_events_are_too_much_too() {
    let mut libvirt = client(|peer| {
        peer.call();
        let data = format!("\"{}\"", "x".repeat(3 << 20));
        for _ in 0..8 {
            peer.event("X", Some(&data));
        }
    });
    let error = libvirt.domain([7; 16], LONG).unwrap_err();
    assert!(matches!(error, LibvirtError::Protocol { .. }), "{error}");
    assert!(error.to_string().contains("16777216 bytes of them"), "{error}");
}

#[test]
fn a_refusal_has_libvirts_words_and_the_next_call_works() {
    let mut libvirt = client(|peer| {
        let call = peer.call();
        let text =
            [numbers(&[42, 10, 1]), string("no \u{1b}[2J domain"), numbers(&[2, 0])].concat();
        let rest = [numbers(&[1]), string("x"), numbers(&[0, 0, 1, 2, 0])].concat();
        let head = [call.program, 1, call.procedure, 1, call.serial, 1];
        peer.send(head, &[text, rest].concat());
        peer.answer(&domain("a b", 4));
    });
    let error = libvirt.domain([7; 16], LONG).unwrap_err();
    assert_eq!(error.code(), Some(42));
    assert!(error.to_string().contains(r"no \u{1b}[2J domain"), "{error}");
    assert_eq!(libvirt.domain([7; 16], LONG).unwrap(), ab());
}

/// Connects to a peer that asks for these ways to prove who one is, and goes on with `script`.
fn asked_for(
    methods: &'static [u32],
    script: impl FnOnce(&mut Peer) + Send + 'static,
) -> Result<Libvirt, LibvirtError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let mut peer = Peer(theirs);
        let count = u32::try_from(methods.len()).unwrap();
        peer.answer(&[numbers(&[count]), numbers(methods)].concat());
        script(&mut peer);
        let _ = peer.0.read_to_end(&mut Vec::new());
    });
    Libvirt::over(ours, Path::new("/peer"), SYSTEM, LONG)
}

#[test]
fn whoever_wants_a_password_is_told_from_who_asks_polkit() {
    let methods = |result: Result<Libvirt, LibvirtError>| match result.unwrap_err() {
        LibvirtError::Authentication { methods, .. } => methods,
        other => panic!("{other}"),
    };
    assert_eq!(methods(asked_for(&[1, 7], |_| ())), "SASL, 7");
    assert_eq!(methods(asked_for(&[2], |peer| drop(peer.answer(&numbers(&[0]))))), "polkit");
    let denied = asked_for(&[2], |peer| assert_eq!(refuse(peer, 94).procedure, 70));
    assert_eq!(denied.unwrap_err().code(), Some(94));
    let allowed = asked_for(&[2], |peer| {
        peer.answer(&numbers(&[1]));
        assert_eq!(peer.answer(&[]).procedure, 1);
    });
    allowed.unwrap();
}

#[test]
fn a_peek_gives_what_was_asked_for_or_nothing() {
    let mut libvirt = client(|peer| {
        let call = peer.answer(&string("abcdefgh"));
        assert!(
            call.payload.ends_with(&[4096u64.to_be_bytes().to_vec(), numbers(&[8, 2])].concat())
        );
        peer.answer(&string("abc"));
    });
    assert_eq!(libvirt.peek(&ab(), 4096, 8, LONG).unwrap(), b"abcdefgh");
    let error = libvirt.peek(&ab(), 4096, 8, LONG).unwrap_err();
    assert!(error.to_string().contains("8 bytes were asked for, 3 came"), "{error}");
}

#[test]
fn garbage_is_a_breach_and_ends_the_connection() {
    type Script = fn(&mut Peer);
    let scripts: [(&str, Script); 9] = [
        ("left over", |peer| drop(peer.answer(&[domain("a b", 4), numbers(&[1])].concat()))),
        ("too soon", |peer| drop(peer.answer(&numbers(&[3])))),
        ("16777216", |peer| drop(peer.0.write_all(&[1, 0, 0, 0]))),
        ("answer to call 99", |peer| peer.send([REMOTE, 1, 24, 1, 99, 0], &[])),
        ("calls us", |peer| peer.send([REMOTE, 1, 24, 0, 1, 0], &[])),
        ("kind 9", |peer| peer.send([REMOTE, 1, 24, 9, 1, 0], &[])),
        ("bytes of", |peer| drop(peer.answer(&numbers(&[u32::MAX])))),
        ("too soon", |peer| {
            let call = peer.call();
            peer.send([call.program, 1, call.procedure, 1, call.serial, 1], &[9; 7]);
        }),
        ("an event", |peer| peer.send([QEMU, 1, 6, 2, 0, 0], &[1])),
    ];
    for (words, script) in scripts {
        let mut libvirt = client(script);
        let error = libvirt.domain([7; 16], LONG).unwrap_err();
        assert!(matches!(error, LibvirtError::Protocol { .. }), "{words}: {error}");
        assert!(error.to_string().contains(words), "{words}: {error}");
        assert!(matches!(libvirt.domains(LONG), Err(LibvirtError::Broken)), "{words}");
    }
}

#[test]
fn events_without_end_are_refused_and_others_end_in_time() {
    let mut libvirt = client(|peer| {
        peer.call();
        for _ in 0..=MAX_EVENTS {
            peer.event("X", None);
        }
    });
    let error = libvirt.domain([7; 16], LONG).unwrap_err();
    assert!(error.to_string().contains(&MAX_EVENTS.to_string()), "{error}");
    // What nobody asked for is not kept.
    let mut libvirt = client(|peer| {
        peer.call();
        let packet = [numbers(&[28]), numbers(&[REMOTE, 1, 999, 2, 0, 0])].concat();
        while peer.0.write_all(&packet).is_ok() {}
    });
    let began = Instant::now();
    let error = libvirt.domain([7; 16], SHORT).unwrap_err();
    assert!(matches!(error, LibvirtError::Timeout { .. }) && began.elapsed() < LONG, "{error}");
}

#[test]
fn a_late_answer_is_dropped() {
    let mut libvirt = client(|peer| {
        let late = peer.call();
        // The client has given up once it asks again.
        let next = peer.call();
        peer.reply(&late, &domain("late", 1));
        peer.reply(&next, &domain("a b", 4));
    });
    let began = Instant::now();
    let error = libvirt.domain([7; 16], SHORT).unwrap_err();
    assert!(matches!(error, LibvirtError::Timeout { .. }) && began.elapsed() < LONG / 4, "{error}");
    assert_eq!(libvirt.domain([7; 16], LONG).unwrap(), ab());
}

#[test]
fn qmp_goes_through_libvirt() {
    let mut qmp = through(|peer| {
        peer.event("STOP", None);
        peer.event("X", Some(r#"{"a":1}"#));
        let command = peer.json(r#"{"return":{"status":"paused"},"id":"libvirt-10"}"#);
        assert!(command.contains(r#""execute":"query-status""#), "{command}");
        peer.json(r#"{"error":{"class":"GenericError","desc":"no"},"id":"libvirt-11"}"#);
        peer.json("[]");
    });
    assert_eq!((qmp.version().qemu.major, qmp.domain().unwrap().id), (10, 4));
    assert!(qmp.peer().unwrap().is_none());
    let status = qmp.execute(Command::QueryStatus, json!({}), LONG).unwrap();
    assert_eq!(status["status"], "paused");
    let events = qmp.take_events();
    assert_eq!(
        (events[0].name.as_str(), events[0].seconds, events[0].microseconds),
        ("STOP", 5, 6)
    );
    assert_eq!(events[1].data, json!({ "a": 1 }));
    let error = qmp.change(&Change::CloseFd("x".into()), LONG).unwrap_err();
    assert!(matches!(error, QmpError::Refused { .. }), "{error}");
    let error = qmp.execute(Command::QueryStatus, json!({}), LONG).unwrap_err();
    assert!(matches!(error, QmpError::Protocol { .. }), "{error}");
    assert!(matches!(qmp.hmp(qemu::qmp::Hmp::InfoRamblock, LONG), Err(QmpError::Broken)));
}

/// Refuses the next call with this code.
fn refuse(peer: &mut Peer, code: u32) -> Call {
    let call = peer.call();
    let text = [numbers(&[code, 10, 1]), string("no"), numbers(&[2, 0, 0, 0, 0, 1, 2, 0])].concat();
    peer.send([call.program, 1, call.procedure, 1, call.serial, 1], &text);
    call
}

#[test]
fn a_domain_is_stopped_by_libvirts_own_call_and_goes_on_by_it_or_qemus() {
    let mut qmp = through(|peer| {
        assert_eq!(peer.answer(&[]).procedure, 34);
        assert_eq!(peer.answer(&[]).procedure, 28);
        // Another job has the domain.
        assert_eq!(refuse(peer, 68).procedure, 28);
        assert!(peer.json(r#"{"return":{}}"#).contains(r#""execute":"cont""#));
        // libvirt does not answer in time.
        let late = peer.call();
        assert!(peer.json(r#"{"return":{}}"#).contains(r#""execute":"cont""#));
        peer.reply(&late, &[]);
        // The lease of a disk is another host's now.
        assert_eq!(refuse(peer, 87).procedure, 28);
        assert_eq!(refuse(peer, 55).procedure, 34);
    });
    qmp.change(&Change::Stop, LONG).unwrap();
    qmp.change(&Change::Cont, LONG).unwrap();
    qmp.change(&Change::Cont, LONG).unwrap();
    // Half of it is for libvirt.
    qmp.change(&Change::Cont, Duration::from_secs(6)).unwrap();
    for change in [Change::Cont, Change::Stop] {
        let error = qmp.change(&change, LONG).unwrap_err();
        assert!(
            matches!(&error, QmpError::Libvirt { cause: LibvirtError::Refused { .. }, .. }),
            "{error}"
        );
    }
}

#[test]
fn a_descriptor_follows_its_command() {
    let mut qmp = through(|peer| {
        let call = peer.call();
        assert_eq!((call.program, call.procedure, call.kind), (QEMU, 7, 4));
        assert!(call.payload.starts_with(&[numbers(&[1]), domain("a b", 4)].concat()));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [9; 4];
        let pieces = &mut [IoSliceMut::new(&mut byte)];
        let got = rustix::net::recvmsg(&peer.0, pieces, &mut control, RecvFlags::empty()).unwrap();
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds.count()),
            _ => None,
        });
        assert_eq!((got.bytes, fds.sum::<usize>(), byte[0]), (1, 1, 0));
        peer.reply(&call, &string(r#"{"return":{}}"#));
    });
    qmp.pass("x", File::open("/dev/null").unwrap().as_fd(), LONG).unwrap();
}

/// What a peer does on one connection.
type Script = Box<dyn FnOnce(&mut Peer) + Send>;

/// A libvirt that can be lost: each connection follows the next script.
fn listening(scripts: Vec<Script>) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for script in scripts {
            let mut peer = Peer(listener.accept().unwrap().0);
            peer.open();
            script(&mut peer);
        }
    });
    (dir, path)
}

#[test]
fn a_libvirt_that_starts_anew_is_found_again_for_queries() {
    let (_dir, path) = listening(vec![
        Box::new(|peer| {
            peer.let_through();
            drop(peer.call());
        }),
        Box::new(|peer| {
            let lookup = peer.answer(&domain("a b", 4));
            assert_eq!((lookup.program, lookup.procedure), (REMOTE, 24));
            peer.answer(&numbers(&[1]));
            peer.json(r#"{"return":{"status":"running"}}"#);
            drop(peer.call());
        }),
    ]);
    let libvirt = Libvirt::connect(&path, SYSTEM, LONG).unwrap();
    let mut qmp = Qmp::through(libvirt, SYSTEM, ab(), LONG, None).unwrap();
    let status = qmp.execute(Command::QueryStatus, json!({}), LONG).unwrap();
    assert_eq!((&status["status"], qmp.reconnects()), (&json!("running"), 1));
    // What may have been done is not done twice.
    let error = qmp.change(&Change::Stop, LONG).unwrap_err();
    assert!(matches!(error, QmpError::Libvirt { .. }), "{error}");
    assert!(matches!(qmp.change(&Change::Cont, LONG), Err(QmpError::Broken)));
}

#[test]
fn a_domain_that_was_started_anew_is_another_one() {
    let (_dir, path) = listening(vec![
        Box::new(Peer::let_through),
        Box::new(|peer| {
            peer.answer(&domain("a b", 5));
            peer.answer(&numbers(&[1]));
        }),
    ]);
    let libvirt = Libvirt::connect(&path, SYSTEM, LONG).unwrap();
    let mut qmp = Qmp::through(libvirt, SYSTEM, ab(), LONG, None).unwrap();
    let error = qmp.execute(Command::QueryStatus, json!({}), LONG).unwrap_err();
    assert!(error.to_string().contains("started anew"), "{error}");
}

#[test]
fn a_socket_that_is_not_there_is_a_libvirt_that_is_lost() {
    let nobody = Libvirt::connect(Path::new("/nonexistent"), SYSTEM, SHORT).unwrap_err();
    assert!(nobody.is_lost(), "{nobody}");
}
