//! The lab's tests. A suite is a module with a list `TESTS`; a test is a function of five lines.

mod exhibit;
mod footprint;
mod harness;
mod live;
mod outer;

use lab::runner::Test;

/// Every test of every suite, in the order in which they run.
pub(crate) fn all() -> Vec<Test> {
    [harness::TESTS, live::TESTS, footprint::TESTS, outer::TESTS, live::OUTER, footprint::OUTER]
        .concat()
}
