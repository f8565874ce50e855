//! Setting memory to zero and reading it back.
//!
//! [`scrub`] and [`scrub_raw`] are for memory that vm-scrub did not allocate. A pool scrubs its own memory with the same
//! engine, in parallel, and asks the kernel first which pages there are.

mod direct;
mod engine;
mod plan;
mod policy;
#[cfg(feature = "vm-memory")]
mod residency;
mod workers;

#[cfg(any(test, feature = "test-support"))]
pub use engine::Sabotage;
#[cfg(feature = "vm-memory")]
pub(crate) use engine::{Engine, HostPtr, Verdict, Zeroed};
#[cfg(feature = "vm-memory")]
pub(crate) use residency::Residency;
#[cfg(feature = "vm-memory")]
pub(crate) use workers::{StartError, Workers};

pub use direct::{ScrubError, Scrubbed, scrub, scrub_raw};
pub use policy::{Policy, Verify};
