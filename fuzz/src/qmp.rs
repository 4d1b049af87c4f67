//! QMP: a peer that says anything, to the whole client over a real socket.
//!
//! Everything that the peer will ever say lies in the socket before the client looks, and behind it
//! the stream ends: so nothing waits, and a wait all the same shows as a timeout of the fuzzer.

use crate::take;
use qemu::Qmp;
use qemu::facts::Facts;
use qemu::qmp::Hmp;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longer than the fuzzer's own limit.
const WAIT: Duration = Duration::from_secs(300);

/// What all pieces together may have, so that they fit into the socket.
const MOST: usize = 60_000;

/// Holds the same conversation twice: said at once, and in pieces that the first bytes cut.
pub fn talk(data: &[u8]) {
    let mut text = data;
    let cuts: [u8; 8] = take(&mut text);
    let text = text.get(..MOST).unwrap_or(text);
    let (ours, peer) = UnixStream::pair().expect("a pair of sockets");
    let whole = conversation(ours, peer, &[text]);
    let kind = SocketType::SEQPACKET;
    let (ours, peer) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .expect("a pair of sockets");
    assert_eq!(whole, conversation(ours.into(), peer.into(), &cut(text, cuts)));
}

/// Pieces of `text`, none of them empty: that would be the end of the stream.
fn cut(text: &[u8], cuts: [u8; 8]) -> Vec<&[u8]> {
    let mut rest = text;
    let mut out = Vec::new();
    for len in cuts {
        let (piece, behind) = rest.split_at(usize::from(len).min(rest.len()));
        out.push(piece);
        rest = behind;
    }
    out.push(rest);
    out.retain(|piece| !piece.is_empty());
    out
}

/// What the client made of it.
fn conversation(ours: UnixStream, mut peer: UnixStream, pieces: &[&[u8]]) -> Vec<String> {
    for piece in pieces {
        peer.write_all(piece).expect("room in the socket");
    }
    peer.shutdown(Shutdown::Write).expect("a socket that can be shut down");
    let mut told = Vec::new();
    match Qmp::over(ours, Path::new("peer"), WAIT, None) {
        Ok(mut qmp) => {
            told.push(format!("{:?}", qmp.version()));
            ask(&mut qmp, &mut told);
        }
        Err(error) => told.push(error.to_string()),
    }
    check_commands(&mut peer);
    // Of what is not JSON, an error shows as much as has come.
    let shown = |line: &String| line.split("not JSON").next().map(str::to_owned);
    told.iter().filter_map(shown).collect()
}

fn ask(qmp: &mut Qmp, told: &mut Vec<String>) {
    let mut tell = |answer: &dyn std::fmt::Debug| told.push(format!("{answer:?}"));
    let mut facts = Facts::of(qmp, WAIT);
    tell(&facts.version());
    tell(&facts.name());
    tell(&facts.uuid());
    tell(&facts.arch());
    tell(&facts.cpus());
    tell(&facts.status());
    tell(&facts.kvm());
    tell(&facts.machine_type());
    tell(&facts.memory_backend());
    tell(&facts.memory_size());
    tell(&facts.memory_devices());
    tell(&facts.confidential());
    tell(&facts.migration());
    tell(&qemu::balloon::take(&mut facts));
    tell(&facts.memory_regions_of("/machine/x"));
    tell(&qmp.hmp(Hmp::Gpa2Hva(4096), WAIT));
    tell(&qmp.poll_events(WAIT));
    for event in qmp.take_events() {
        tell(&(event.name, event.data, event.seconds, event.microseconds));
    }
}

/// Whatever the peer says, only whole commands with ascending ids are sent to it.
fn check_commands(peer: &mut UnixStream) {
    // A stream is read to its end, packets one by one.
    let mut sent = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(len @ 1..) = peer.read(&mut chunk) {
        sent.extend_from_slice(&chunk[..len]);
    }
    for (line, id) in sent.split_inclusive(|&byte| byte == b'\n').zip(1u64..) {
        let line: Value = serde_json::from_slice(line).expect("a command is one line of JSON");
        assert_eq!(line["id"], id);
        let word = line["execute"].as_str().expect("a command has a name");
        let query = word.starts_with("query-") || word.starts_with("qom-");
        let other = ["qmp_capabilities", "human-monitor-command"].contains(&word);
        assert!(query || other, "{word} is no query");
    }
}

/// A conversation that goes well, one with refusals and events, one that ends in the greeting.
pub fn seeds() -> Vec<Vec<u8>> {
    let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}, "capabilities": ["oob"]}}"#;
    let good = [
        r#""return": {}"#,
        r#""return": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}"#,
        r#""return": {"name": "web-07"}"#,
        r#""return": {"UUID": "00000000-0000-0000-0000-000000000000"}"#,
        r#""return": {"arch": "x86_64"}"#,
        r#""return": [{"cpu-index": 0}]"#,
        r#""return": {"status": "running", "running": true}"#,
        r#""return": {"enabled": false, "present": true}"#,
        r#""return": "pc-q35-10.0-machine""#,
        r#""return": "/objects/pc.ram""#,
        r#""return": {"base-memory": 134217728, "plugged-memory": 0}"#,
        r#""return": [{"type": "dimm", "data": {"memdev": "/objects/m", "hotplugged": true, "addr": 4294967296, "size": 134217728, "slot": 0, "node": 0, "id": "d"}}]"#,
        r#""return": """#,
        r#""return": {"enabled": false}"#,
        r#""return": {"status": "completed"}"#,
        r#""return": {"actual": 134217728}"#,
        r#""return": [{"name": "x", "type": "child<memory-region>"}]"#,
        r#""return": "Host virtual address for 0x1000 (pc.ram) is 0x7f0000001000\r\n""#,
    ];
    let event = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP", "data": {"a": "}\"{"}}"#;
    let not = r#""error": {"class": "DeviceNotActive", "desc": "SEV is not available"}"#;
    let said = |answers: &[&str]| -> String {
        let with_ids = answers.iter().zip(1..);
        with_ids.map(|(answer, id)| format!("{{\"id\": {id}, {answer}}}\r\n")).collect()
    };
    let texts = [
        format!("{greeting}\r\n{}{event}\r\n", said(&good)),
        format!("{greeting}\r\n{event}\r\n{}", said(&[&good[..1], &[not; 16]].concat())),
        format!("{greeting} 220 mail ready\r\n"),
    ];
    texts
        .iter()
        .map(|text| [b"\x01\x02\x40\x81\x03\x01\x00\x07", text.as_bytes()].concat())
        .collect()
}
