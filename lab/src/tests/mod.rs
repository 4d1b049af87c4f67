//! The lab's tests. A suite is a module with a list `TESTS`; a test is a function of five lines.

mod cli;
mod disk;
mod dump;
mod exhibit;
mod faults;
mod footprint;
mod harness;
mod holds;
mod kills;
mod kinds;
mod layouts;
mod libvirt;
mod live;
mod managers;
mod map;
mod moving;
mod outer;
mod pmemsave;
mod rights;
mod run;
mod session;
mod snapshot;
mod tear;
mod tearbench;
mod track;

use lab::runner::Test;

/// Every test of every suite, in the order in which they run.
pub(crate) fn all() -> Vec<Test> {
    [
        harness::TESTS,
        live::TESTS,
        map::TESTS,
        kinds::TESTS,
        layouts::TESTS,
        moving::TESTS,
        footprint::TESTS,
        cli::TESTS,
        faults::TESTS,
        kills::TESTS,
        kills::AROUND,
        tear::TESTS,
        track::TESTS,
        snapshot::TESTS,
        snapshot::BLOWS,
        snapshot::MEANWHILE,
        tearbench::TESTS,
        disk::TESTS,
        pmemsave::TESTS,
        dump::TESTS,
        rights::TESTS,
        libvirt::TESTS,
        managers::TESTS,
        session::TESTS,
        holds::TESTS,
        outer::TESTS,
        live::OUTER,
        footprint::OUTER,
        faults::OUTER,
        kills::OUTER,
        tear::OUTER,
        track::OUTER,
        track::MEANWHILE,
        moving::OUTER,
        kinds::OUTER,
        snapshot::OUTER,
        tearbench::OUTER,
        disk::OUTER,
        holds::OUTER,
    ]
    .concat()
}
