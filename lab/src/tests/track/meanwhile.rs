//! What others do to the VM while `track` follows it, between its first hold and its last: the record
//! says so, and what changed the machine costs the class.

use std::fs;
use std::time::Duration;

use lab::{Builder, Doing, Guest, Lab, Result, failed, outer};
use serde_json::{Value, json};

use super::super::kills::settle;
use super::super::run::{
    Ended, Running, await_dead, begin, kill, new_dir, recover, undo_files, verify,
};

pub(crate) const OUTER: &[lab::runner::Test] = outer![others_change_the_machine_meanwhile];

/// What is done, and what must come of it.
struct Act {
    name: &'static str,
    act: fn(&mut Guest) -> Result<()>,
    /// The code that the run ends with.
    code: i32,
    /// Whether the image still shows one instant.
    instant: bool,
    /// What the journal knows of.
    event: Option<&'static str>,
}

fn reset(guest: &mut Guest) -> Result<()> {
    guest.qmp("system_reset", json!({})).map(drop)
}

fn stop_and_cont(guest: &mut Guest) -> Result<()> {
    guest.stop()?;
    guest.cont()
}

fn plug(guest: &mut Guest) -> Result<()> {
    let memory = json!({ "qom-type": "memory-backend-ram", "id": "d0", "size": 64 << 20 });
    guest.qmp("object-add", memory)?;
    guest.qmp("device_add", json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "d0" })).map(drop)
}

/// So slow that it does not end.
fn migrate(guest: &mut Guest) -> Result<()> {
    guest.qmp("migrate-set-parameters", json!({ "max-bandwidth": 1000 }))?;
    guest.qmp("migrate", json!({ "uri": "exec:cat > /dev/null" })).map(drop)
}

fn murder(guest: &mut Guest) -> Result<()> {
    kill(guest)?;
    await_dead(&[guest.pid()])
}

fn quit(guest: &mut Guest) -> Result<()> {
    // The answer, or the end of the connection.
    let _ = guest.qmp("quit", json!({}));
    await_dead(&[guest.pid()])
}

const ACTS: [Act; 6] = [
    Act {
        name: "stop and cont",
        act: stop_and_cont,
        code: 0,
        instant: true,
        event: Some("RESUME"),
    },
    Act { name: "a reset", act: reset, code: 3, instant: false, event: Some("RESET") },
    Act { name: "a DIMM", act: plug, code: 3, instant: false, event: None },
    Act { name: "SIGKILL", act: murder, code: 1, instant: false, event: None },
    Act { name: "quit", act: quit, code: 1, instant: false, event: None },
    // QEMU says that it runs, and its memory is here still.
    Act { name: "a migration", act: migrate, code: 0, instant: true, event: None },
];

fn boot(lab: &Lab) -> Result<Guest> {
    let with_slots = |guest: Builder| guest.args(&["-m", "slots=2,maxmem=1G"]);
    with_slots(lab.guest().blank().memory_mib(32)).boot()
}

/// A run in the middle of which `act` is done.
fn meanwhile(lab: &Lab, guest: &mut Guest, act: &Act) -> Result<Ended> {
    let out = new_dir(lab, &act.name.replace(' ', "-"))?;
    let run = begin(|| {
        let mut command = lab.tool_command(["acquire", "--method", "track", "--json"])?;
        // The horizon is the time that there is, also for a lab that is late itself.
        command.args(["--stall-budget", "950ms", "--io-horizon", "3s", "--file-digest", "no"]);
        command.arg("-o").arg(&out).arg(guest.pid().to_string());
        Running::start(command)
    })?;
    std::thread::sleep(Duration::from_millis(400));
    (act.act)(guest)?;
    run.end()
}

fn judge(lab: &Lab, guest: &mut Guest, act: &Act, ended: Ended) -> Result<()> {
    let ended = ended.expect(act.code)?;
    let (dir, manifest) = ended.exhibit()?;
    let verdict = verify(lab, &dir)?;
    let wanted = if act.code == 0 { 0 } else { 3 };
    println!(
        "         {}: ended with {}, verify with {verdict:?}, class {}, {} {}",
        act.name, ended.status, manifest["class"], manifest["disturbances"], manifest["end_reason"]
    );
    assert_eq!(verdict, Some(wanted), "{}", dir.display());
    assert_eq!(manifest["class"] != "none", act.instant, "{}", manifest["disturbances"]);
    assert_eq!(dir.to_string_lossy().ends_with(".partial"), act.code == 1);
    if let Some(event) = act.event {
        let journal = fs::read_to_string(dir.join("journal.jsonl")).doing("the journal")?;
        assert!(journal.contains(&format!("\"{event}\"")), "the journal knows of no {event}");
    }
    recover(lab, guest)?;
    assert_eq!(undo_files(guest), [""; 0]);
    fs::remove_dir_all(dir.parent().ok_or_else(|| failed("no parent"))?)?;
    Ok(())
}

fn others_change_the_machine_meanwhile(lab: &Lab) -> Result<()> {
    // A guest for all that it survives.
    let mut guest = boot(lab)?;
    for act in &ACTS[..lab.scale(4, 6)] {
        settle(&mut guest)?;
        let ended = meanwhile(lab, &mut guest, act).doing(act.name)?;
        judge(lab, &mut guest, act, ended).doing(act.name)?;
        if act.code == 1 {
            guest = boot(lab)?;
        }
    }
    // A migration that goes on is ended for the lab's own look at the guest.
    let _: Result<Value> = guest.qmp("migrate_cancel", json!({}));
    drop(guest);
    Ok(())
}
