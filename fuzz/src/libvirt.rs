//! libvirt: a peer that says anything, to the whole client over a real socket, and QMP through it.
//!
//! As with QMP, everything that the peer will ever say lies in the socket before the client looks.

use qemu::Qmp;
use qemu::facts::Facts;
use qemu::libvirt::{Domain, Feature, Libvirt, MAX_EVENTS, SYSTEM};
use qemu::qmp::Change;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longer than the fuzzer's own limit.
const WAIT: Duration = Duration::from_secs(300);

/// What it may say in all, so that it fits into the socket.
const MOST: usize = 60_000;

/// Asks everything that can be asked, and through what it can.
pub fn talk(data: &[u8]) {
    for through in [false, true] {
        let (ours, mut peer) = UnixStream::pair().expect("a pair of sockets");
        peer.write_all(data.get(..MOST).unwrap_or(data)).expect("room in the socket");
        peer.shutdown(Shutdown::Write).expect("a socket that can be shut down");
        if let Ok(libvirt) = Libvirt::over(ours, Path::new("/nonexistent/peer"), SYSTEM, WAIT) {
            ask(libvirt, through);
        }
        check_calls(&mut peer);
    }
}

fn ask(mut libvirt: Libvirt, through: bool) {
    let domain = Domain { name: "a".to_owned(), uuid: [7; 16], id: 4 };
    if through {
        // A libvirt that is lost is looked for until the time is up: none is left.
        let wait = Duration::from_millis(5);
        let Ok(mut qmp) = Qmp::through(libvirt, SYSTEM, domain, wait, None) else { return };
        let mut facts = Facts::of(&mut qmp, wait);
        let _ = (facts.status(), facts.name(), facts.migration());
        let _ = (qmp.change(&Change::Stop, wait), qmp.change(&Change::Cont, wait));
        assert!(qmp.take_events().len() <= MAX_EVENTS);
        return;
    }
    let _ = (libvirt.version(WAIT), libvirt.domain([7; 16], WAIT), libvirt.state(&domain, WAIT));
    if let Ok(domains) = libvirt.domains(WAIT) {
        assert!(domains.len() <= 16_384);
    }
    if let Ok(bytes) = libvirt.peek(&domain, 0, 8, WAIT) {
        assert_eq!(bytes.len(), 8);
    }
    let _ = libvirt.xml(&domain, WAIT);
    let _ = (libvirt.info(&domain, WAIT), libvirt.control(&domain, WAIT));
    let _ = libvirt.supports(Feature::FdPassing, WAIT);
    if let Ok(watch) = libvirt.watch(Some(&domain), WAIT) {
        let _ = (libvirt.poll_events(WAIT), libvirt.unwatch(&watch, WAIT));
    }
    let _ = libvirt.poll_events(WAIT);
    assert!(libvirt.take_events().len() <= MAX_EVENTS);
    assert!(libvirt.take_lifecycle().len() <= MAX_EVENTS);
}

/// Whatever the peer says, only whole calls with ascending serials are sent to it.
fn check_calls(peer: &mut UnixStream) {
    let mut sent = Vec::new();
    // A client that left unread what was said has the rest of its calls lost.
    let _ = peer.read_to_end(&mut sent);
    let (mut rest, mut serial) = (sent.as_slice(), 0);
    while !rest.is_empty() {
        let number = |at: usize| rest.get(at * 4..).and_then(|bytes| bytes.first_chunk().copied());
        let number = |at| number(at).map(u32::from_be_bytes).expect("a whole head");
        assert!([0x2000_8086, 0x2000_8087].contains(&number(1)) && number(2) == 1);
        serial += 1;
        assert_eq!((number(4), number(5), number(6)), (0, serial, 0));
        let len = usize::try_from(number(0)).expect("a length");
        rest = rest.get(len..).expect("a whole call");
    }
}

/// Conversations that go well, one of each kind, and one with a refusal.
pub fn seeds() -> Vec<Vec<u8>> {
    let numbers = |list: &[u32]| -> Vec<u8> { list.iter().flat_map(|n| n.to_be_bytes()).collect() };
    let string = |text: &str| {
        let mut bytes = numbers(&[u32::try_from(text.len()).expect("short")]);
        bytes.extend(text.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let packet = |head: [u32; 6], payload: &[u8]| {
        let len = u32::try_from(28 + payload.len()).expect("short");
        [numbers(&[len]), numbers(&head), payload.to_vec()].concat()
    };
    let (remote, qemu) = (0x2000_8086, 0x2000_8087);
    let domain = [string("a"), vec![7; 16], numbers(&[4])].concat();
    let reply = |program, procedure, serial, payload: &[u8]| {
        packet([program, 1, procedure, 1, serial, 0], payload)
    };
    let open = [reply(remote, 66, 1, &numbers(&[1, 0])), reply(remote, 1, 2, &[])].concat();
    let event = [numbers(&[3]), domain.clone(), string("STOP"), vec![0; 8], numbers(&[6, 0])];
    let event = packet([qemu, 1, 6, 2, 0, 0], &event.concat());
    let life = [numbers(&[5]), domain.clone(), numbers(&[3, 0])].concat();
    let life = packet([remote, 1, 318, 2, 0, 0], &life);
    let info = [numbers(&[1]), vec![0; 16], numbers(&[1]), vec![0; 8]].concat();
    let direct = [
        open.clone(),
        reply(remote, 157, 3, &9_000_000u64.to_be_bytes()),
        reply(remote, 24, 4, &domain),
        reply(remote, 212, 5, &numbers(&[1, 1])),
        reply(remote, 273, 6, &[numbers(&[1]), domain.clone(), numbers(&[1])].concat()),
        reply(remote, 104, 7, &string("abcdefgh")),
        reply(remote, 14, 8, &string("<domain/>")),
        reply(remote, 16, 9, &info),
        reply(remote, 229, 10, &[numbers(&[0, 0]), vec![0; 8]].concat()),
        reply(remote, 60, 11, &numbers(&[1])),
        reply(remote, 316, 12, &numbers(&[5])),
        life,
        reply(remote, 317, 13, &[]),
        event.clone(),
        reply(remote, 2, 14, &[]),
    ];
    let version = r#"{"return":{"qemu":{"micro":2,"minor":0,"major":10},"package":"x"}}"#;
    let through = [
        open.clone(),
        reply(qemu, 4, 3, &numbers(&[1])),
        reply(qemu, 1, 4, &string(version)),
        event,
        reply(qemu, 1, 5, &string(r#"{"return":{"status":"running"}}"#)),
        reply(qemu, 1, 6, &string(r#"{"error":{"class":"GenericError","desc":"no"}}"#)),
        reply(qemu, 1, 7, &string(r#"{"return":{}}"#)),
        reply(remote, 34, 8, &[]),
        reply(remote, 28, 9, &[]),
        reply(remote, 2, 10, &[]),
    ];
    let refusal =
        [numbers(&[42, 10, 1]), string("no"), numbers(&[2, 0, 0, 0, 0, 1, 2, 0])].concat();
    let refused = [open, packet([remote, 1, 157, 1, 3, 1], &refusal)];
    vec![direct.concat(), through.concat(), refused.concat()]
}
