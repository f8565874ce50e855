//! A pool on a NUMA node: its memory is bound there whoever touches it first, its threads run there, and a node that cannot be
//! had is an error that says what can.
//!
//! On a host with one node memory could not be elsewhere; so here the kernel is asked for the policy as well as for the
//! pages, and nodes that the host does not have are made up.

use log::Level;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, PoolBuilder, PoolError};
use vm_scrub_tests::child::{alone, with_huge_pages};
use vm_scrub_tests::numa::{self, cpus_of_threads, nodes_of_pages, policies_of, policy};
use vm_scrub_tests::{
    assert_nothing_dirty_left, fill, huge_pages, logs, maps, on_small_page_sizes, pools, quiesce,
    regions, smear, teardown,
};

on_small_page_sizes!(a_guests_memory_is_bound_whoever_touches_it_first);

const BOUND: libc::c_int = libc::MPOL_BIND | libc::MPOL_F_STATIC_NODES;

fn on_node(node: u32, page_size: PageSize, blocks: u64) -> PoolBuilder {
    pools::builder(page_size, blocks).numa_node(node)
}

fn windows(lease: &Lease) -> Vec<std::ops::Range<usize>> {
    let addresses = lease.host_addresses().into_iter();
    addresses
        .map(|(region, start)| start.addr()..start.addr() + region.bytes as usize)
        .collect()
}

fn a_guests_memory_is_bound_whoever_touches_it_first(page_size: PageSize) {
    let Some(node) = numa::node() else { return };
    let bound = (BOUND, BTreeSet::from([node]));
    let layout = regions(&[(0, 2 * BLOCK_SIZE + 4096), (1 << 32, 2 * BLOCK_SIZE)]);
    for populate in [false, true] {
        let pool = on_node(node, page_size, 6)
            .populate(populate)
            .build()
            .unwrap();
        assert_eq!(pool.numa_node(), Some(node));
        for generation in 1..4 {
            let lease = pool.lease(&layout).unwrap();
            // The first generation's pages come from the pool or from the guest's first touch, those of the next from the one
            // before; what `smear` leaves out is touched first in the third.
            if generation == 3 {
                fill(&lease, generation);
            } else {
                smear(&lease, generation);
            }
            for window in windows(&lease) {
                for page in window.clone().step_by(4096) {
                    assert_eq!(policy(page), bound, "generation {generation}");
                }
                let nodes = nodes_of_pages(window.start, window.len());
                assert!(nodes.iter().flatten().all(|on| *on == node));
                assert!(nodes.contains(&Some(node)));
            }
            assert!(teardown(lease).is_proven());
        }
        assert_nothing_dirty_left(&pool);
    }
}

#[test]
fn without_a_node_the_kernel_chooses() {
    if numa::node().is_none() {
        return;
    }
    let pool = pools::pool(PageSize::Base4K, 2);
    assert_eq!(pool.numa_node(), None);
    let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    assert_eq!(policy(windows(&lease)[0].start), (0, BTreeSet::new()));
}

#[test]
fn hugetlb_pages_come_from_the_node_when_the_pool_is_built() {
    let test = "hugetlb_pages_come_from_the_node_when_the_pool_is_built";
    let Some(node) = numa::node() else { return };
    with_huge_pages(test, numa::huge_pages_for(4), || {
        let pool = on_node(node, PageSize::Huge2M, 4).build().unwrap();
        assert_eq!(
            policies_of("memfd:vm-scrub"),
            [format!("bind=static:{node}")]
        );
        for generation in 1..3 {
            let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
            let window = windows(&lease).remove(0);
            // Before anybody has touched them.
            let nodes = nodes_of_pages(window.start, window.len());
            assert!(nodes.iter().all(|on| *on == Some(node)), "{nodes:?}");
            fill(&lease, generation);
            assert!(teardown(lease).is_proven());
        }
        assert_nothing_dirty_left(&pool);
    });
}

/// The kernel promises pages without asking where they are. On a host with one node they are always there.
#[test]
fn hugetlb_pages_of_another_node_do_not_count() {
    let test = "hugetlb_pages_of_another_node_do_not_count";
    let Some(node) = numa::node() else { return };
    with_huge_pages(test, numa::huge_pages_for(4), || {
        let (here, everywhere) = (numa::free_huge_pages(node), huge_pages::free());
        if here >= everywhere {
            return vm_scrub_tests::skipped(&"no free hugetlb pages on another node");
        }
        let error = on_node(node, PageSize::Huge2M, here + 1)
            .build()
            .unwrap_err();
        assert!(
            matches!(error, PoolError::NoHugePagesOnNode { asked, free, node: on }
                if (asked, free, on) == (here + 1, Some(here), node)),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(
            text.contains(&format!("on NUMA node {node} and {here} are free"))
                && text.contains(&format!(
                    "/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages`"
                )),
            "{text}"
        );
        // What was taken until it failed has been given back.
        assert_eq!(huge_pages::free(), everywhere);
        drop(on_node(node, PageSize::Huge2M, here).build().unwrap());
    });
}

#[test]
fn a_process_that_locks_its_memory_has_it_bound_too() {
    let test = "a_process_that_locks_its_memory_has_it_bound_too";
    let Some(node) = numa::node() else { return };
    alone(test, || {
        // SAFETY: locking changes nothing of what memory contains.
        if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
            return vm_scrub_tests::skipped(&"this process may not lock its memory");
        }
        let pool = on_node(node, PageSize::Base4K, 2)
            .threads(1)
            .build()
            .unwrap();
        let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
        let window = windows(&lease).remove(0);
        assert_eq!(policy(window.start).0, BOUND);
        let nodes = nodes_of_pages(window.start, window.len());
        assert!(nodes.iter().all(|on| *on == Some(node)), "{nodes:?}");
    });
}

#[test]
fn bound_mappings_do_not_pile_up() {
    let Some(node) = numa::node() else { return };
    alone("bound_mappings_do_not_pile_up", || {
        let pool = on_node(node, PageSize::Base4K, 16).build().unwrap();
        let count = || maps::mappings(0..usize::MAX).len();
        let before = count();
        for round in 0..4 {
            let leases: Vec<_> = (0..16)
                .map(|_| pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap())
                .collect();
            leases.iter().for_each(|lease| smear(lease, round));
            for lease in leases {
                assert!(teardown(lease).is_proven());
            }
        }
        let after = count();
        assert!(after <= before + 8, "{before} mappings became {after}");
    });
}

#[test]
fn a_node_that_is_not_there_is_refused_by_naming_those_that_are() {
    let Some(node) = numa::node() else { return };
    for absent in [1023, 4096, u32::MAX] {
        let error = on_node(absent, PageSize::Base4K, 2).build().unwrap_err();
        let PoolError::NoSuchNode { node: asked, nodes } = &error else {
            panic!("{error}");
        };
        assert_eq!(*asked, absent);
        assert!(nodes.contains(&node));
        let text = error.to_string();
        let these: Vec<_> = nodes.iter().map(u32::to_string).collect();
        assert!(
            text.contains(&format!("node {absent} "))
                && text.ends_with(&format!("these have: {}", these.join(", "))),
            "{text}"
        );
    }
}

#[test]
fn a_kernel_that_cannot_bind_is_an_error_only_to_who_asked() {
    let Some(node) = numa::node() else { return };
    for (call, errno) in [
        // No CONFIG_NUMA: there are no nodes, and no such call.
        (Call::NodeRead, libc::ENOENT),
        (Call::Mbind, libc::ENOSYS),
        // A seccomp filter.
        (Call::Mbind, libc::EPERM),
    ] {
        let fault = inject(call, 0, u32::MAX, errno);
        let pool = pools::pool(PageSize::Base4K, 2);
        assert_eq!(fault.hits(), 0);
        drop(pool);
        let error = on_node(node, PageSize::Base4K, 2).build().unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, PoolError::NumaBind { .. }), "{text}");
        assert!(
            text.contains(&format!("node {node} ({}: ", call.name()))
                && text.contains("CONFIG_NUMA")
                && text.contains("CAP_SYS_NICE"),
            "{text}"
        );
    }
}

#[test]
fn threads_that_cannot_be_pinned_scrub_all_the_same() {
    let Some(node) = numa::node() else { return };
    logs::listen();
    let fault = inject(Call::SchedSetaffinity, 0, u32::MAX, libc::EPERM);
    let pool = on_node(node, PageSize::Base4K, 2)
        .threads(3)
        .build()
        .unwrap();
    assert_eq!(fault.hits(), 3, "one call for each thread");
    drop(fault);
    assert!(logs::heard(
        Level::Warn,
        "is not kept on its NUMA node: sched_setaffinity"
    ));
    let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    smear(&lease, 1);
    assert!(teardown(lease).is_proven());
}

/// The two first processors of this thread; says that the test is skipped where there is one.
fn two_cpus() -> Option<[u32; 2]> {
    let mut cpus = numa::cpus().into_iter();
    let two = cpus.next().zip(cpus.next());
    if two.is_none() {
        vm_scrub_tests::skipped(&"this thread has one processor");
    }
    two.map(|(first, second)| [first, second])
}

/// Waits until the background thread, which pins itself, has come so far.
#[track_caller]
fn assert_background_runs_on(cpus: &BTreeSet<u32>) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while cpus_of_threads("vm-scrub-back") != [cpus.clone()] {
        assert!(
            Instant::now() < deadline,
            "{:?}",
            cpus_of_threads("vm-scrub-")
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn all_threads_run_on_the_node() {
    let Some(node) = numa::node() else { return };
    alone("all_threads_run_on_the_node", || {
        let Some([first, second]) = two_cpus() else {
            return;
        };
        // A node with half of the processors, and another one with the rest.
        let nodes = [(node, second.to_string()), (node + 1, first.to_string())];
        if !numa::pretend(&nodes) {
            return;
        }
        let here = BTreeSet::from([second]);
        for (threads, expected) in [(None, 1), (Some(1), 1), (Some(3), 3)] {
            let mut builder = Pool::builder().capacity(2 * BLOCK_SIZE).numa_node(node);
            if let Some(threads) = threads {
                builder = builder.threads(threads);
            }
            let pool = builder.build().unwrap();
            assert_eq!(pool.threads(), expected);
            assert_background_runs_on(&here);
            let mut of_all = cpus_of_threads("vm-scrub-");
            assert_eq!(of_all.len(), expected + 1);
            of_all.retain(|cpus| *cpus != here);
            assert!(of_all.is_empty(), "{of_all:?}");
        }
        // Who builds pools is not to notice.
        assert!(numa::cpus().len() > 1);
    });
}

#[test]
fn a_node_without_processors_of_ours_is_scrubbed_from_elsewhere() {
    let Some(node) = numa::node() else { return };
    alone(
        "a_node_without_processors_of_ours_is_scrubbed_from_elsewhere",
        || {
            let Some([first, second]) = two_cpus() else {
                return;
            };
            if !numa::pretend(&[(node, second.to_string()), (node + 1, String::new())]) {
                return;
            }
            logs::listen();
            numa::run_on(&BTreeSet::from([first]));
            let pool = on_node(node, PageSize::Base4K, 2).build().unwrap();
            assert!(logs::heard(
                Level::Warn,
                "has no processor on which this thread may run"
            ));
            assert_eq!(pool.threads(), 2);
            assert_background_runs_on(&BTreeSet::from([first]));
            let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
            assert_eq!(policy(windows(&lease)[0].start).0, BOUND);
            smear(&lease, 1);
            assert!(teardown(lease).is_proven());
        },
    );
}

#[test]
fn a_node_that_is_not_this_processs_to_use_is_not_offered() {
    let Some(node) = numa::node() else { return };
    let test = "a_node_that_is_not_this_processs_to_use_is_not_offered";
    alone(test, || {
        // No control group allows a node that no kernel has.
        let other = 1024;
        if !numa::pretend(&[(node, "0".into()), (other, "0".into())]) {
            return;
        }
        let error = on_node(other, PageSize::Base4K, 2).build().unwrap_err();
        assert!(
            matches!(&error, PoolError::NoSuchNode { node: 1024, nodes } if *nodes == [node]),
            "{error:?}"
        );
    });
}

/// What the kernel writes is read with care.
#[test]
fn a_list_that_is_none_is_an_error() {
    let Some(node) = numa::node() else { return };
    alone("a_list_that_is_none_is_an_error", || {
        if !numa::pretend(&[(node, "0-4294967295".into())]) {
            return;
        }
        let error = on_node(node, PageSize::Base4K, 2).build().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("not a list of numbers"), "{text}");
    });
}

/// What an embedder does whose guest has memory on two nodes.
#[test]
fn a_guest_can_have_memory_of_two_pools() {
    let Some(node) = numa::node() else { return };
    let build = || on_node(node, PageSize::Transparent, 2).build().unwrap();
    let (near, far) = (build(), build());
    let low = near.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
    let high = far.lease(&regions(&[(1 << 32, 2 * BLOCK_SIZE)])).unwrap();
    let zones = [low.regions(|_| ()), high.regions(|_| ())];
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_regions(zones.into_iter().flatten().collect()).unwrap();
    for address in [0, 1 << 32] {
        memory
            .write_slice(&[7; 4096], GuestAddress(address))
            .unwrap();
    }

    // Each lease sees the handle that holds both.
    let statement = quiesce(&low);
    let refused = low.retire(statement).unwrap_err();
    assert!(refused.to_string().contains("still has"), "{refused}");
    let low = refused.into_lease().unwrap();
    drop(memory);
    let tickets = [low, high].map(|lease| {
        let quiesced = quiesce(&lease);
        lease.retire(quiesced).unwrap()
    });
    for ticket in tickets {
        assert!(ticket.wait().unwrap().is_proven());
    }
    assert_nothing_dirty_left(&near);
    assert_nothing_dirty_left(&far);
}
