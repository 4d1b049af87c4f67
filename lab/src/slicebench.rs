//! What a guest feels of QEMU's `pmemsave`, against the size of a slice: a program in it notes when it
//! did not run, while memory is copied slice after slice, by QMP and by the tool.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Doing, Result, failed};
use crate::guest::Guest;
use crate::kit::Version;
use crate::runner::{Lab, finish};
use crate::tearbench::{Options, Tearbench};

/// Slices that QEMU is asked for by QMP; the tool has none above a MiB.
const BY_QMP: [u64; 7] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];

/// Slices of the tool's: smaller ones take it minutes on a busy host.
const BY_TOOL: [u64; 3] = [64 << 10, 256 << 10, 1 << 20];

/// How long slices of one size are copied.
const COPYING: Duration = Duration::from_secs(2);

/// Pause between two looks at the gaps: the guest's log holds a hundred, of a millisecond or more.
const LOOK: Duration = Duration::from_millis(20);

/// The guest's memory, and what of it is incompressible.
const GUEST_MIB: u64 = 192;
const NOISE_MIB: u64 = 64;

/// Measures, each size `runs` times in turn, in one guest of one CPU.
pub fn measure(lab: &Lab, runs: u32) -> Result<Value> {
    let guest = lab.guest().version(Version::V10_0).memory_mib(GUEST_MIB).name("slices");
    let mut guest = guest.boot()?;
    guest.plant_noise(NOISE_MIB, 7)?;
    let clock = guest.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let program = Tearbench::start(&mut guest, &Options { mib: 16, ..Options::default() })?;
    let mut rows = Vec::new();
    for run in 0..runs {
        let mut row = |way: &str, slice: Option<u64>, figures: Value| {
            let row = json!({ "run": run, "way": way, "slice_bytes": slice, "figures": figures });
            eprintln!("{row}");
            rows.push(row);
        };
        // What the guest misses without any slice: questions to QEMU that copy nothing.
        row("qmp", None, by_qmp(&mut guest, &program, None)?);
        for slice in BY_QMP {
            row("qmp", Some(slice), by_qmp(&mut guest, &program, Some(slice))?);
        }
        row("tool", None, by_tool(lab, &guest, &program, None)?);
        for slice in BY_TOOL {
            row("tool", Some(slice), by_tool(lab, &guest, &program, Some(slice))?);
        }
    }
    program.end(&mut guest)?;
    guest.finish()?;
    Ok(json!({
        "guest_mib": GUEST_MIB, "noise_mib": NOISE_MIB, "clocksource": clock.trim(),
        "copying_s": COPYING.as_secs_f64(), "medians": medians(&rows), "rows": rows,
    }))
}

/// What of the guest's time was missed since it was made. It looks often enough to see every gap.
struct Watch<'a> {
    program: &'a Tearbench,
    from: u64,
    gaps: BTreeMap<u64, Duration>,
    looked: Instant,
}

impl<'a> Watch<'a> {
    fn new(program: &'a Tearbench) -> Result<Self> {
        let (from, looked) = (program.tsc()?, Instant::now());
        Ok(Self { program, from, gaps: BTreeMap::new(), looked })
    }

    /// Looks, if it is time.
    fn look(&mut self) -> Result<()> {
        if self.looked.elapsed() >= LOOK { self.look_now() } else { Ok(()) }
    }

    fn look_now(&mut self) -> Result<()> {
        self.looked = Instant::now();
        let gaps = self.program.gaps()?.into_iter().filter(|gap| gap.tsc >= self.from);
        self.gaps.extend(gaps.map(|gap| (gap.tsc, gap.length)));
        Ok(())
    }

    /// The gaps so far. One that just ends is noted a little later.
    fn figures(mut self) -> Result<Value> {
        std::thread::sleep(LOOK);
        self.look_now()?;
        let longest = self.gaps.values().max().copied().unwrap_or_default();
        let all: Duration = self.gaps.values().sum();
        Ok(json!({
            "gaps": self.gaps.len(),
            "longest_gap_ms": milliseconds(longest),
            "all_gaps_ms": milliseconds(all),
        }))
    }
}

/// Has QEMU copy slice after slice of the guest's largest region, for [`COPYING`], each into the same
/// file in memory; without a size, asks it as often for nothing.
fn by_qmp(guest: &mut Guest, program: &Tearbench, slice: Option<u64>) -> Result<Value> {
    let regions = guest.ram()?.into_iter();
    let region = regions.max_by_key(|range| range.len).ok_or_else(|| failed("no RAM"))?;
    let file = PathBuf::from("/dev/shm").join(format!("stillframe-bench-{}.slice", guest.pid()));
    let (mut took, mut at) = (Vec::new(), 0);
    let mut watch = Watch::new(program)?;
    let begun = Instant::now();
    while begun.elapsed() < COPYING {
        let asked = Instant::now();
        let answer = match slice {
            Some(len) => {
                at = if at + 2 * len <= region.len { at + len } else { 0 };
                let arguments = json!({ "val": region.gpa + at, "size": len, "filename": file });
                guest.qmp("pmemsave", arguments)
            }
            None => guest.qmp("query-status", json!({})),
        };
        took.push(asked.elapsed());
        answer.and_then(|_| watch.look()).inspect_err(|_| drop(std::fs::remove_file(&file)))?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let mut figures = watch.figures()?;
    if slice.is_some() {
        std::fs::remove_file(&file)?;
    }
    took.sort();
    figures["slices"] = json!(took.len());
    figures["seconds"] = json!(seconds);
    figures["median_ms"] = json!(took.get(took.len() / 2).copied().map(milliseconds));
    figures["longest_ms"] = json!(took.last().copied().map(milliseconds));
    figures["mb_per_s"] = json!(megabytes(slice.unwrap_or(0), took.len()) / seconds);
    Ok(figures)
}

/// The tool's whole run with slices of this size; without a size, by `live`, which has none.
fn by_tool(lab: &Lab, guest: &Guest, program: &Tearbench, slice: Option<u64>) -> Result<Value> {
    let dir = PathBuf::from("/dev/shm").join(format!("stillframe-bench-{}", guest.pid()));
    std::fs::create_dir_all(&dir)?;
    let vm = guest.pid().to_string();
    let mut tool = lab.tool_command(["acquire", &vm, "--store", "ram", "--force-output"])?;
    match slice {
        Some(len) => tool.args(["--method", "pmemsave", "--slice", &len.to_string()]),
        None => tool.args(["--method", "live"]),
    };
    tool.arg("-o").arg(&dir);
    let mut watch = Watch::new(program)?;
    let run = std::thread::spawn(|| finish(tool, Duration::from_secs(120)));
    while !run.is_finished() {
        std::thread::sleep(LOOK);
        watch.look_now()?;
    }
    let figures = watch.figures()?;
    let ended = run.join().unwrap_or_else(|_| Err(failed("the tool's thread panicked")));
    let read = ended.and_then(|done| done.expect_code(0)).and_then(|done| told(&done.stdout));
    std::fs::remove_dir_all(&dir)?;
    let mut all = read.doing("a run of the tool")?;
    if let (Some(all), Value::Object(figures)) = (all.as_object_mut(), figures) {
        all.extend(figures);
    }
    Ok(all)
}

/// What the exhibit says of its slices and its window.
fn told(stdout: &str) -> Result<Value> {
    let text = std::fs::read_to_string(PathBuf::from(stdout.trim()).join("manifest.json"))?;
    let manifest: Value = serde_json::from_str(&text)?;
    let number = |path: &str| manifest.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let of = |path: &str| Duration::from_nanos(number(path));
    let seconds = (of("/window/t1_ns").saturating_sub(of("/window/t0_ns"))).as_secs_f64();
    let count = number("/slices/count");
    let mean = u32::try_from(count).ok().and_then(|n| of("/slices/total_ns").checked_div(n));
    Ok(json!({
        "slices": count,
        "seconds": seconds,
        "mean_ms": mean.map(milliseconds),
        "longest_ms": milliseconds(of("/slices/longest_ns")),
        "mb_per_s": megabytes(number("/states/data"), 1) / seconds,
    }))
}

/// Of each way and size the median of its runs, and the longest gap of all.
fn medians(rows: &[Value]) -> Value {
    let mut cases: Vec<(&Value, &Value)> = Vec::new();
    for row in rows {
        let case = (&row["way"], &row["slice_bytes"]);
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    let medians = cases.into_iter().map(|(way, slice)| {
        let of_it = rows.iter().filter(|row| row["way"] == *way && row["slice_bytes"] == *slice);
        let of_it: Vec<&Value> = of_it.map(|row| &row["figures"]).collect();
        let sorted = |field: &str| {
            let mut all: Vec<f64> = of_it.iter().filter_map(|row| row[field].as_f64()).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        let mut median = json!({ "way": way, "slice_bytes": slice, "runs": of_it.len() });
        for field in FIELDS {
            let all = sorted(field);
            median[field] = json!(all.get(all.len() / 2));
        }
        median["longest_gap_of_all_ms"] = json!(sorted("longest_gap_ms").last());
        median
    });
    Value::Array(medians.collect())
}

/// The figures of a row.
const FIELDS: [&str; 9] = [
    "slices",
    "seconds",
    "median_ms",
    "mean_ms",
    "longest_ms",
    "mb_per_s",
    "gaps",
    "longest_gap_ms",
    "all_gaps_ms",
];

/// Prints what [`measure`] gave.
pub fn print_table(measured: &Value) {
    println!(
        "| slice | by | slices | median or mean | longest | MB/s | gaps >= 1 ms | longest gap |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in measured["medians"].as_array().into_iter().flatten() {
        let get = |field: &str| row[field].as_f64();
        let slice = row["slice_bytes"]
            .as_u64()
            .map_or("none".to_owned(), |bytes| format!("{} KiB", bytes >> 10));
        // What a way does not have, such as slices of `live`, stays empty.
        let shown = |value: Option<f64>, places: usize, unit: &str| {
            value.map_or(String::new(), |value| format!("{value:.places$}{unit}"))
        };
        println!(
            "| {slice} | {} | {} | {} | {} | {} | {} | {} ({} at most) |",
            row["way"].as_str().unwrap_or("?"),
            shown(get("slices"), 0, ""),
            shown(get("median_ms").or(get("mean_ms")), 2, " ms"),
            shown(get("longest_ms"), 1, " ms"),
            shown(get("mb_per_s"), 0, ""),
            shown(get("gaps"), 0, ""),
            shown(get("longest_gap_ms"), 1, " ms"),
            shown(get("longest_gap_of_all_ms"), 1, " ms"),
        );
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "bytes of some seconds")]
fn megabytes(bytes: u64, times: usize) -> f64 {
    bytes as f64 * times as f64 / 1e6
}
