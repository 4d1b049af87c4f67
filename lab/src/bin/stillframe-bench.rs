//! The bench: the window of `live` and the hold of `freeze` against QEMU's own `pmemsave` and
//! `dump-guest-memory` on the same idle guest in the same run, against what the host allows, and the
//! tool's memory beside its store. QEMU's dump has the guest stopped from its first to its last byte.
//!
//! And what a guest feels of `pmemsave` against the size of its slices (lab/src/slicebench.rs).
//!
//! `stillframe-bench OUT.json [RUNS [slices]]`; `slices` measures these alone. `STILLFRAME_TOOL` names
//! the tool. Times are of whole processes or commands; only ratios within one run mean anything.
#![forbid(unsafe_code)]

use lab::bare::Bare;
use lab::{Lab, Result, Version, failed, slicebench};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// The guest's memory and the part of it that is incompressible.
const GUEST_MIB: u64 = 4096;
const NOISE_MIB: u64 = 3072;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("stillframe-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let out = PathBuf::from(args.next().ok_or_else(|| failed("say where the figures go"))?);
    let runs: u32 = args.next().and_then(|n| n.parse().ok()).unwrap_or(5);
    let only_slices = match args.next().as_deref() {
        None => false,
        Some("slices") => true,
        Some(other) => return Err(failed(format_args!("not a part of the bench: {other:?}"))),
    };
    let lab = Lab::open()?;
    let mut rows = Vec::new();
    let of_methods = if only_slices { 0 } else { runs };
    for run in 0..of_methods {
        // A new one each time: QEMU's own commands leave zero pages where holes were.
        let mut guest =
            lab.guest().version(Version::V10_0).memory_mib(GUEST_MIB).name("bench").boot()?;
        guest.plant_noise(NOISE_MIB, 7)?;
        let row = json!({
            "run": run,
            "load": std::fs::read_to_string("/proc/loadavg")?.trim(),
            "live": acquire(&lab, guest.pid(), &["live", "--store", "ram"])?,
            "live_to_disk_store": acquire(&lab, guest.pid(), &["live", "--store", "disk"])?,
            "freeze": acquire(&lab, guest.pid(), &["freeze", "--stall-budget", "60s"])?,
            "freeze_by_stop":
                acquire(&lab, guest.pid(), &["freeze", "--stall-budget", "60s", "--hold", "stop"])?,
            "bare": bare(&mut guest)?,
            "pmemsave_s": pmemsave(&mut guest)?,
            "dump_guest_memory_s": dump(&mut guest)?,
        });
        eprintln!("run {run}: {row}");
        rows.push(row);
        guest.finish()?;
    }
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let slices = slicebench::measure(&lab, runs)?;
    let mut result = json!({
        "qemu": lab.kit.qemu_version(Version::V10_0)?,
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "cpu": cpu_model()?, "cpus": std::thread::available_parallelism()?.get(),
        "slices": slices, "load_before_slices": load.trim(),
    });
    if !only_slices {
        result["guest_mib"] = json!(GUEST_MIB);
        result["noise_mib"] = json!(NOISE_MIB);
        result["medians"] = medians(&rows);
        result["runs"] = json!(rows);
    }
    std::fs::write(
        &out,
        format!("{}\n", serde_json::to_string_pretty(&result).unwrap_or_default()),
    )?;
    if !only_slices {
        print_table(&result["medians"]);
    }
    slicebench::print_table(&result["slices"]);
    Ok(())
}

/// One acquisition on tmpfs: window, hold, whole run, memory beside the store.
fn acquire(lab: &Lab, pid: u32, method: &[&str]) -> Result<Value> {
    let dir = PathBuf::from("/dev/shm").join(format!("stillframe-bench-{pid}"));
    std::fs::create_dir_all(&dir)?;
    let mut tool = lab.tool_command(["acquire", &pid.to_string(), "--force-output", "-o"])?;
    tool.arg(&dir).arg("--method").args(method);
    let taken = lab::runner::finish(tool, std::time::Duration::from_secs(300))
        .and_then(|done| done.expect_code(0));
    let read = taken.and_then(|done| {
        let exhibit = PathBuf::from(done.stdout.trim());
        let text = std::fs::read_to_string(exhibit.join("manifest.json"))?;
        let manifest: Value =
            serde_json::from_str(&text).map_err(|e| failed(format_args!("manifest: {e}")))?;
        let number = |path: &str| manifest.pointer(path).and_then(Value::as_u64).unwrap_or(0);
        Ok(json!({
            "window_s": seconds(number("/window/t1_ns") - number("/window/t0_ns")),
            "stall_s": seconds(number("/hold/ended_ns") - number("/hold/began_ns")),
            "expected_s": seconds(number("/hold/expected_ns")),
            "hold": manifest["hold"],
            "whole_s": done.took.as_secs_f64(),
            "beside_store_bytes": number("/footprint/tool_peak_rss"),
            "data_bytes": number("/states/data"),
            "passes": manifest["passes"],
        }))
    });
    std::fs::remove_dir_all(&dir)?;
    read
}

/// The lab's own loop over the same memory: what the host allows.
fn bare(guest: &mut lab::Guest) -> Result<Value> {
    let mut bare = Bare::new(guest)?;
    let times = bare.times()?;
    Ok(json!({
        "bytes": bare.len_bytes(),
        "read_s": times.read,
        "keep_s": times.keep,
        "compare_s": times.compare,
        "window_s": times.keep + times.compare,
    }))
}

/// QMP `pmemsave` of every RAM region to tmpfs, one command each.
fn pmemsave(guest: &mut lab::Guest) -> Result<f64> {
    let file = PathBuf::from("/dev/shm").join(format!("stillframe-bench-{}.raw", guest.pid()));
    let mut took = 0.0;
    for range in guest.ram()? {
        let begin = Instant::now();
        let arguments = json!({ "val": range.gpa, "size": range.len, "filename": file });
        let done = guest.qmp("pmemsave", arguments);
        took += begin.elapsed().as_secs_f64();
        std::fs::remove_file(&file)?;
        done?;
    }
    Ok(took)
}

/// QMP `dump-guest-memory` as ELF to tmpfs.
fn dump(guest: &mut lab::Guest) -> Result<f64> {
    let file = PathBuf::from("/dev/shm").join(format!("stillframe-bench-{}.elf", guest.pid()));
    let begin = Instant::now();
    let protocol = format!("file:{}", file.display());
    let done = guest.qmp("dump-guest-memory", json!({ "paging": false, "protocol": protocol }));
    let took = begin.elapsed().as_secs_f64();
    std::fs::remove_file(&file)?;
    done?;
    Ok(took)
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of a run of minutes")]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn median(rows: &[Value], path: &str) -> f64 {
    let mut values: Vec<f64> =
        rows.iter().filter_map(|row| row.pointer(path).and_then(Value::as_f64)).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn medians(rows: &[Value]) -> Value {
    let window = median(rows, "/live/window_s");
    let pmemsave = median(rows, "/pmemsave_s");
    let dump = median(rows, "/dump_guest_memory_s");
    let bare_keep = median(rows, "/bare/keep_s");
    let bare_window = median(rows, "/bare/window_s");
    json!({
        "bare_read_s": median(rows, "/bare/read_s"),
        "bare_keep_s": bare_keep,
        "bare_window_s": bare_window,
        "pmemsave_over_bare_window": pmemsave / bare_window,
        "dump_over_bare_window": dump / bare_window,
        "dump_over_bare_keep": dump / bare_keep,
        "window_over_bare_window": window / bare_window,
        "live_window_s": window,
        "live_whole_s": median(rows, "/live/whole_s"),
        "live_disk_store_window_s": median(rows, "/live_to_disk_store/window_s"),
        "freeze_stall_s": median(rows, "/freeze/stall_s"),
        "freeze_expected_s": median(rows, "/freeze/expected_s"),
        "freeze_by_stop_stall_s": median(rows, "/freeze_by_stop/stall_s"),
        "dump_over_freeze": dump / median(rows, "/freeze/stall_s"),
        "pmemsave_s": pmemsave,
        "dump_guest_memory_s": dump,
        "pmemsave_over_window": pmemsave / window,
        "dump_over_window": dump / window,
        "beside_store_mib": median(rows, "/live/beside_store_bytes") / f64::from(1 << 20),
    })
}

fn cpu_model() -> Result<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    Ok(line.unwrap_or("?").trim_start_matches([' ', '\t', ':']).to_owned())
}

fn print_table(medians: &Value) {
    let get = |name: &str| medians[name].as_f64().unwrap_or(f64::NAN);
    println!("| figure (median) | value | target |");
    println!("| --- | --- | --- |");
    println!("| window of live, RAM store | {:.2} s | |", get("live_window_s"));
    println!("| window of live, disk store (tmpfs) | {:.2} s | |", get("live_disk_store_window_s"));
    println!("| live, whole run with sealing and file digest | {:.2} s | |", get("live_whole_s"));
    println!("| freeze, stall (ptrace) | {:.2} s | |", get("freeze_stall_s"));
    println!("| freeze, stall expected by the plan | {:.2} s | |", get("freeze_expected_s"));
    println!("| freeze, stall (stop and cont) | {:.2} s | |", get("freeze_by_stop_stall_s"));
    println!("| dump-guest-memory / stall of freeze | {:.1} | >= 10 |", get("dump_over_freeze"));
    println!("| pmemsave of all RAM | {:.2} s | |", get("pmemsave_s"));
    println!("| dump-guest-memory, ELF | {:.2} s | |", get("dump_guest_memory_s"));
    println!("| pmemsave / window | {:.1} | >= 20 |", get("pmemsave_over_window"));
    println!("| dump-guest-memory / window | {:.1} | >= 4 |", get("dump_over_window"));
    println!("| bare loop, reading only | {:.2} s | |", get("bare_read_s"));
    println!("| bare loop, into memory | {:.2} s | |", get("bare_keep_s"));
    println!(
        "| bare loop, into memory, then read and compared | {:.2} s | |",
        get("bare_window_s")
    );
    println!("| pmemsave / that | {:.1} | >= 20 for `live` |", get("pmemsave_over_bare_window"));
    println!(
        "| dump-guest-memory / that | {:.1} | >= 4 for `live` |",
        get("dump_over_bare_window")
    );
    println!(
        "| dump-guest-memory / bare loop into memory | {:.1} | >= 10 for a hold |",
        get("dump_over_bare_keep")
    );
    println!("| window / bare loop's | {:.2} | |", get("window_over_bare_window"));
    println!("| memory beside the store | {:.1} MiB | <= 66 MiB |", get("beside_store_mib"));
}
