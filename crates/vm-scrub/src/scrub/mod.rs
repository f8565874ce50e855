//! Setting memory to zero and reading it back.
//!
//! [`scrub`] and [`scrub_raw`] are for memory that vm-scrub did not allocate. A pool scrubs its own memory with the same
//! engine, in parallel, and asks the kernel first which pages there are.

mod batches;
mod broken;
mod calibrate;
mod direct;
mod engine;
mod job;
mod pass;
mod plan;
mod policy;
mod residency;
mod sample;
mod workers;

#[cfg(feature = "vm-memory")]
pub(crate) use batches::{Answers, Ask, Batches};
pub(crate) use broken::Broken;
#[cfg(feature = "vm-memory")]
pub(crate) use broken::{bytes_in, joined};
pub use calibrate::{Calibration, Operation, Rate, calibration};
pub use direct::{ScrubError, Scrubbed, scrub, scrub_raw};
pub(crate) use engine::{Engine, variable};
pub(crate) use job::{Job, Verdict, Watch, Zeroed};
#[cfg(any(test, feature = "test-support"))]
pub use pass::Sabotage;
pub(crate) use pass::{HostPtr, Work};
#[cfg(all(test, loom))]
pub(crate) use plan::PIECE;
pub(crate) use plan::{beyond, intersections, pieces, push_joined, union};
pub use policy::{Policy, Verify};
pub(crate) use residency::{Residency, get_ready, pagemap};
pub(crate) use sample::fresh_seed;
pub(crate) use workers::{StartError, Workers};
