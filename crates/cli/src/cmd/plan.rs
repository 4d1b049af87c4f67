//! `stillframe plan`: what would be done, and why not otherwise.

use crate::args;
use crate::cmd;
use crate::exit::Exit;
use crate::output::{self, safe, size, time};
use ::acquire::look::Probe;
use ::acquire::plan::Plan;
use ::acquire::{Request, Surveyed};
use evidence::manifest::{Decided, Taken};

/// Looks, decides, prints; changes nothing, unless it is to probe.
pub(crate) fn run(args: &args::Plan) -> Exit {
    let request = Request {
        vm: args.how.vm.clone(),
        output: args.output.clone(),
        wish: cmd::wish(&args.how),
        max_ram: args.how.max_ram,
        max_rate: args.max_rate,
        probe: args.probe,
        ..Request::default()
    };
    cmd::say_taint(&request.vm);
    let surveyed = match ::acquire::survey(&request) {
        Ok(surveyed) => surveyed,
        Err(failure) => return cmd::acquire::failed(&failure),
    };
    if args.how.json {
        output::json(&surveyed.summary());
    }
    match &surveyed.decision {
        Ok(plan) => {
            if !args.how.json {
                print(&surveyed, plan);
            }
            Exit::Complete
        }
        Err(refusal) => cmd::refused(refusal),
    }
}

fn print(surveyed: &Surveyed, plan: &Plan) {
    let facts = &surveyed.facts;
    let mut lines = vec![
        format!("VM       {} (PID {})", safe(&surveyed.row.name), surveyed.row.pid),
        format!("method   {}: {}", plan.method.word(), plan.why),
        format!("class    {}", plan.class.word()),
        match &plan.hold {
            None if plan.snapshot.is_some() => {
                "hold     none by us: QEMU stops the guest".to_owned()
            }
            None if plan.dump.is_some() => {
                "hold     by QEMU, which stops the guest for its dump".to_owned()
            }
            None if plan.slices.is_some() => {
                "hold     none: the guest waits for QEMU where it needs it, slice by slice"
                    .to_owned()
            }
            None => "hold     none: the guest is never stopped".to_owned(),
            Some(hold) => format!(
                "hold     by {}, {} expected, {} at most",
                hold.kind.word(),
                time(hold.expected_ns),
                time(hold.at_most_ns)
            ),
        },
        match &plan.tracking {
            None => "tracking none: no mark of the kernel's is touched".to_owned(),
            Some(tracking) => format!(
                "tracking clearing marks takes {} as expected; nothing is read sooner than {} after it \
                 was seen written; at most {} are read in the last hold",
                time(tracking.clear_expected_ns),
                time(tracking.io_horizon_ns),
                size(tracking.buffer_bytes)
            ),
        },
        match &plan.snapshot {
            None => "snapshot none: no setting of QEMU's is changed".to_owned(),
            Some(snapshot) => format!(
                "snapshot the guest stands for {} as expected, until its memory is protected; QEMU waits \
                 for us {} at most",
                time(snapshot.expected_ns),
                time(snapshot.at_most_ns)
            ),
        },
        match &plan.slices {
            None => "slices   none: QEMU copies nothing".to_owned(),
            Some(slices) => format!(
                "slices   QEMU copies {} at a time, and less if that takes longer than {}",
                size(slices.slice_bytes),
                time(slices.at_most_ns)
            ),
        },
        match &plan.dump {
            None => "dump     none".to_owned(),
            Some(dump) => format!(
                "dump     the guest stands for {} as expected, until QEMU has written its memory, and {} at \
                 most",
                time(dump.expected_ns),
                time(dump.at_most_ns)
            ),
        },
        format!(
            "memory   {} in the image, {} resident, {} swapped out",
            size(facts.image_bytes),
            size(facts.resident_bytes),
            size(facts.swapped_bytes)
        ),
        format!("store    {}: {}", plan.store.word(), plan.store_why),
        format!("rights   {}", plan.rights),
        format!("output   {} as {}", size(plan.output_bytes), plan.format.extension()),
    ];
    lines.extend(surveyed.decisions.iter().filter_map(beside));
    lines.extend(surveyed.probe.iter().map(probed));
    lines.extend(plan.changes.iter().map(|text| format!("changes  {text}")));
    lines.extend(plan.warnings.iter().map(|text| format!("warning  {text}")));
    lines.extend(
        plan.rejected.iter().map(|r| format!("not      {}: {}", r.method.word(), r.reason)),
    );
    for line in lines {
        // Reasons may hold what QEMU says.
        if !output::line(&safe(&line)) {
            break;
        }
    }
}

/// What is not simply in the image.
fn beside(decided: &Decided) -> Option<String> {
    let last = decided.gpa.saturating_add(decided.len.saturating_sub(1));
    let what = format!("{} {} at {:#x}-{last:#x}", decided.kind, decided.name, decided.gpa);
    Some(match decided.taken {
        Taken::Image => return None,
        Taken::Excluded => format!("left out {what}: zeros in the image, {}", decided.why),
        Taken::File => format!("beside   {what}, {}: {}", size(decided.len), decided.why),
        Taken::Nowhere => format!("not      {what}: {}", decided.why),
    })
}

/// What the head of QEMU's dump told.
fn probed(probe: &Probe) -> String {
    let map = match &probe.map_difference {
        None => "QEMU's dump names the memory of the map".to_owned(),
        Some(difference) => format!("the map is not that of QEMU's dump: {difference}"),
    };
    format!(
        "probe    {map}; {} vCPUs, {}; the guest stood some time of {}",
        probe.cpus.len(),
        probe.machine,
        time(probe.stood.t1_ns.saturating_sub(probe.stood.t0_ns))
    )
}
