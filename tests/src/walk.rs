//! Every system call fails, at every place where it is made.

use crate::maps::{has_pagemap_scan, has_uffdio_move};
use std::collections::HashSet;
use vm_scrub::test_support::{Call, FaultGuard, inject};

/// `EINVAL` comes last: as the answer to `PAGEMAP_SCAN` it means that the kernel has no such thing, for ever.
const ERRNOS: [i32; 5] = [
    libc::ENOMEM,
    libc::EFAULT,
    libc::EINTR,
    libc::EAGAIN,
    libc::EINVAL,
];

/// Calls `run` with every call, error, first occurrence and whether it is once or for good; it says whether the fault was met
/// at all. Those that are met must be the `expected` ones: a call that is new wants a look at what its failure does.
pub fn walk_calls(
    expected: &[Call],
    mut run: impl FnMut(&dyn Fn() -> FaultGuard, Call, i32, bool) -> bool,
) {
    let mut met = HashSet::new();
    for errno in ERRNOS {
        for call in Call::ALL.iter().copied() {
            for times in [1, u32::MAX] {
                // For good, two are enough: one that the code retries on somewhere, and one that it does not.
                if times > 1 && ![libc::ENOMEM, libc::EINVAL].contains(&errno) {
                    continue;
                }
                // The next occurrence, until there is none.
                for skip in 0.. {
                    let faults = || inject(call, skip, times, errno);
                    if !run(&faults, call, errno, times == 1) {
                        break;
                    }
                    met.insert(call);
                }
            }
        }
    }
    let expected = expected.iter().copied();
    let here = |call: &Call| match call {
        Call::PagemapScan => has_pagemap_scan(),
        Call::UffdApi | Call::UffdRegister | Call::UffdMove | Call::Munlock => has_uffdio_move(),
        _ => true,
    };
    let expected = expected.filter(here);
    assert_eq!(met, expected.collect());
}
