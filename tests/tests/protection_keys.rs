//! A VMM that keeps its own threads from its guest's memory by a protection key (`pkeys(7)`). Threads that have no access by that key,
//! as most threads have not, must be able to scrub the memory, and to use what the next guest gets.

use std::io;
use vm_scrub::{BLOCK_SIZE, PageSize, RevokeBy};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, on_every_page_size, pools, regions, skipped,
    teardown,
};

on_every_page_size!(a_key_stays_behind: 8);

fn a_key_stays_behind(page_size: PageSize) {
    const DISABLE_ACCESS: libc::c_int = 1;
    let (name, ways): (_, &[_]) = match page_size {
        PageSize::Base4K => ("base_4k", &[RevokeBy::Automatic, RevokeBy::Mremap]),
        PageSize::Huge2M => ("huge_2m", &[RevokeBy::Automatic]),
        _ => ("transparent", &[RevokeBy::Automatic, RevokeBy::Mremap]),
    };
    // Without access, where it is needed, the process ends.
    alone(&format!("a_key_stays_behind::{name}"), || {
        // SAFETY: takes no memory. The calling thread has no access from now on to what has the key, and no other ever had.
        let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, DISABLE_ACCESS) };
        if key < 0 {
            let error = io::Error::last_os_error();
            return skipped(&format!("no protection key is to be had: {error}"));
        }
        for (&by, threads) in ways.iter().flat_map(|by| [(by, 1), (by, 2)]) {
            let builder = pools::builder(page_size, 8).threads(threads).revoke_by(by);
            let pool = builder.build().unwrap();
            let all = regions(&[(0, 8 * BLOCK_SIZE)]);
            let lease = pool.lease(&all).unwrap();
            fill(&lease, 1);
            let (_, start) = lease.host_addresses().remove(0);
            let block = BLOCK_SIZE as usize;
            let (middle, len) = (start.wrapping_add(2 * block), 4 * block);
            let writable = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the range lies in the lease's window, to which nobody holds a reference.
            let status =
                unsafe { libc::syscall(libc::SYS_pkey_mprotect, middle, len, writable, key) };
            assert_eq!(status, 0, "{}", io::Error::last_os_error());
            let receipt = teardown(lease);
            assert!(receipt.is_proven() && receipt.bytes_scrubbed == 8 * BLOCK_SIZE);
            let next = pool.lease(&all).unwrap();
            assert_all_zero(&next);
            fill(&next, 2);
            assert!(teardown(next).is_proven());
            assert_nothing_dirty_left(&pool);
        }
    });
}
