//! The NUMA node on which a pool lives.
//!
//! One pool is on one node, or on none that it knows of. That keeps a node's memory, its books and the threads that scrub it
//! together, with nothing to decide at run time: a host with several nodes has several pools.

use super::PoolError;
use crate::sys::numa::{self, Numbers};

/// The processors of `node` for a pool's threads, if its memory is this process's to use. `None` if it has memory alone, or if
/// the thread that builds the pool is kept off its processors.
pub(super) fn processors(node: u32) -> Result<Option<Numbers>, PoolError> {
    let unknown = |source| PoolError::NumaBind { node, source };
    let nodes = numa::nodes().map_err(unknown)?;
    if !nodes.contains(&node) {
        return Err(PoolError::NoSuchNode {
            node,
            nodes: nodes.into_iter().collect(),
        });
    }
    let cpus = numa::cpus(node).map_err(unknown)?;
    if cpus.is_empty() {
        log::warn!(
            "NUMA node {node} has no processor on which this thread may run: its memory is scrubbed from wherever this thread may"
        );
        return Ok(None);
    }
    Ok(Some(cpus))
}
