//! Every system call fails once, at every place where it is made, and from there on for good: nothing panics, the books add
//! up, nobody gets a dirty byte, and whoever asked is told which call it was.
//!
//! Faults belong to a thread, so the pools here scrub on the calling one. What the kernel cannot do is remembered by the
//! whole process, so each walk runs in a child.

use vm_scrub::test_support::Call;
use vm_scrub::{BLOCK_SIZE, PageSize, Pool, PoolBuilder, PoolError};
use vm_scrub_tests::walk::{self, BLOCKS, close_views, of_teardown, walk};
use vm_scrub_tests::{assert_nothing_dirty_left, numa, pools, walks};

fn builder(page_size: PageSize) -> PoolBuilder {
    pools::builder(page_size, BLOCKS)
}

fn built(page_size: PageSize, populate: bool) -> Result<Pool, PoolError> {
    builder(page_size).threads(1).populate(populate).build()
}

/// The same on a NUMA node. Its threads, which have no faults planned, populate it.
fn built_on(node: u32, page_size: PageSize) -> Result<Pool, PoolError> {
    builder(page_size).numa_node(node).build()
}

fn a_pool_is_built(page_size: PageSize) {
    let without = [false, true].map(|populate| (None, populate));
    let on_node = numa::node().map(|node| (Some(node), false));
    for (node, populate) in without.into_iter().chain(on_node) {
        let mut calls = vec![Call::WipeOnFork, Call::Mmap, Call::Madvise];
        if page_size == PageSize::Huge2M {
            calls.extend([
                Call::MemfdCreate,
                Call::Ftruncate,
                Call::Fstat,
                Call::Mprotect,
            ]);
        } else {
            // What finds pins. Without it there is a pool nevertheless.
            calls.extend([
                Call::UffdOpen,
                Call::UffdApi,
                Call::UffdRegister,
                Call::Fstat,
                Call::PagemapOpen,
                Call::PagemapScan,
            ]);
        }
        if populate {
            calls.push(Call::Populate);
        }
        if node.is_some() {
            calls.extend([
                Call::NodeRead,
                Call::StatusRead,
                Call::Mbind,
                Call::SchedSetaffinity,
            ]);
        }
        walk(&calls, |faults, call, errno, _| {
            let guard = faults();
            let result = match node {
                Some(node) => built_on(node, page_size),
                None => built(page_size, populate),
            };
            let hits = guard.hits();
            drop(guard);
            match result {
                Err(error) => {
                    assert!(hits > 0, "{error}");
                    assert_ne!(call, Call::SchedSetaffinity, "{error}");
                    let text = error.to_string();
                    let pages = matches!(error, PoolError::NoHugePages { asked: BLOCKS, .. })
                        && text.contains("vm.nr_hugepages");
                    assert!(
                        pages || text.contains(call.name()),
                        "{call:?} {errno}: {text}"
                    );
                    assert_eq!(close_views(), 0, "{call:?} {errno}: memory is left behind");
                }
                Ok(pool) => {
                    let asked = [Call::NodeRead, Call::StatusRead, Call::Mbind].contains(&call);
                    assert!(
                        hits == 0 || !asked,
                        "{call:?} {errno}: a promise is not kept"
                    );
                    assert_eq!(pool.accounts().clean, BLOCKS * BLOCK_SIZE);
                    assert_nothing_dirty_left(&pool);
                }
            }
            hits > 0
        });
    }
}

fn a_guest_is_leased(page_size: PageSize) {
    // Only a view of a file is populated when it is granted.
    let populated = page_size == PageSize::Huge2M;
    for populate in [false].into_iter().chain(populated.then_some(true)) {
        let calls: &[Call] = match (page_size, populate) {
            (PageSize::Huge2M, true) => &[
                Call::Fstat,
                Call::Mmap,
                Call::Mprotect,
                Call::Madvise,
                Call::Populate,
            ],
            (PageSize::Huge2M, false) => &[Call::Fstat, Call::Mmap, Call::Mprotect, Call::Madvise],
            // The window is cut from what was reserved for the neighbour.
            _ => &[Call::Getrlimit, Call::Munlock, Call::Mremap],
        };
        walk::a_guest_is_leased(calls, || builder(page_size).populate(populate));
    }
}

fn a_guest_is_torn_down(page_size: PageSize) {
    walk::a_guest_is_torn_down(of_teardown(page_size), || builder(page_size));
}

fn a_guest_is_dropped(page_size: PageSize) {
    walk::a_guest_is_dropped(of_teardown(page_size), || builder(page_size));
}

walks! {
    numa::huge_pages_for(BLOCKS);
    a_pool_is_built: build_4k Base4K, build_thp Transparent, build_2m Huge2M;
    a_guest_is_leased: lease_4k Base4K, lease_thp Transparent, lease_2m Huge2M;
    a_guest_is_torn_down: teardown_4k Base4K, teardown_thp Transparent, teardown_2m Huge2M;
    a_guest_is_dropped: drop_4k Base4K, drop_thp Transparent, drop_2m Huge2M;
}
