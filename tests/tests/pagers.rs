//! A VMM that pages its guest's memory in by userfaultfd, and follows where it goes (`UFFD_FEATURE_EVENT_REMAP`): its pager must not
//! supply the next guest with pages.

use std::os::fd::RawFd;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::{BLOCK_SIZE, PageSize, Revocation, RevokeBy};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::maps::has_uffdio_move;
use vm_scrub_tests::{first_nonzero, pools, regions, skipped, teardown};

const PAGE: usize = 4096;
const SECRET: u8 = 0x5e;
const EVENT_REMAP: u64 = 1 << 2;
const PAGEFAULT: u8 = 0x12;

/// `_IOWR(0xAA, number, size)`.
const fn request(number: u64, size: u64) -> u64 {
    3 << 30 | size << 16 | 0xaa << 8 | number
}

/// What the kernel says through the descriptor.
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    rest: u64,
}

#[repr(C, align(4096))]
struct Page([u8; PAGE]);

static PAGE_OF_SECRETS: Page = Page([SECRET; PAGE]);

/// A pager that follows where memory goes. Of none, until it is told.
fn pager() -> RawFd {
    let mut api = [0xaa, EVENT_REMAP, 0];
    // SAFETY: the structure is live and as large as the request says.
    unsafe {
        let pager = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as RawFd;
        assert!(pager >= 0);
        let agreed = libc::ioctl(pager, request(0x3f, 24) as _, api.as_mut_ptr());
        assert_eq!(agreed, 0);
        pager
    }
}

/// Supplies whatever the pager is told of with secrets, until the process ends.
fn supply(pager: RawFd) {
    std::thread::spawn(move || {
        loop {
            let mut message = Message::default();
            // SAFETY: a message is 32 bytes, and so is the structure.
            let bytes = unsafe { libc::read(pager, (&raw mut message).cast(), 32) };
            assert_eq!(bytes, 32);
            if message.event == PAGEFAULT {
                let to = message.address / PAGE as u64 * PAGE as u64;
                let from = PAGE_OF_SECRETS.0.as_ptr().addr() as u64;
                let mut copy = [to, from, PAGE as u64, 0, 0];
                // SAFETY: the structure is live, and the page is static. Where it goes is for the kernel to check.
                unsafe { libc::ioctl(pager, request(3, 40) as _, copy.as_mut_ptr()) };
            }
        }
    });
}

fn the_next_guest_is_not_supplied(page_size: PageSize) {
    if !has_uffdio_move() {
        return skipped(&"this kernel has no UFFDIO_MOVE");
    }
    let builder = pools::builder(page_size, 2).revoke_by(RevokeBy::Move);
    let pool = builder.build().unwrap();
    let all = regions(&[(0, 2 * BLOCK_SIZE)]);
    let lease = pool.lease(&all).unwrap();
    let pager = pager();
    let window = lease.host_addresses()[0].1.addr() as u64;
    let mut register = [window, 2 * BLOCK_SIZE, 1, 0];
    // SAFETY: the structure is live and as large as the request says; the range is the window of a guest that waits for pages.
    let registered = unsafe { libc::ioctl(pager, request(0, 32) as _, register.as_mut_ptr()) };
    assert_eq!(registered, 0);
    supply(pager);
    let memory = lease.memory();
    let byte: u8 = memory.read_obj(GuestAddress(PAGE as u64)).unwrap();
    assert_eq!(byte, SECRET);
    drop(memory);
    let _ = teardown(lease);
    // It may be that there is nothing left to lease.
    if let Ok(next) = pool.lease(&all) {
        assert_eq!(first_nonzero(&next), None, "the last guest's pager");
    }
}

/// The VMM has closed one descriptor too many, the pool's, and its number is that of a pager now: the pool's memory must not be
/// registered with that.
fn a_pager_by_the_pools_number(page_size: PageSize) {
    if !has_uffdio_move() {
        return skipped(&"this kernel has no UFFDIO_MOVE");
    }
    let builder = pools::builder(page_size, 2).revoke_by(RevokeBy::Move);
    let pool = builder.build().unwrap();
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    let fds = fds.map(|entry| entry.unwrap().path());
    let pools: Vec<_> = fds
        .filter(|fd| {
            let file = std::fs::read_link(fd).unwrap_or_default();
            file.to_string_lossy().contains("userfaultfd")
        })
        .collect();
    let [pools] = &pools[..] else {
        panic!("which is it? {pools:?}");
    };
    let pools: RawFd = pools
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let pager = pager();
    // SAFETY: what it was is the pool's, which has to cope; the pool is forgotten below, and closes it no more.
    assert_eq!(unsafe { libc::dup2(pager, pools) }, pools);
    supply(pager);
    for _ in 0..2 {
        let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
        // Between what is populated as well as behind it.
        assert_eq!(first_nonzero(&lease), None, "another pager");
        for page in [0, 8] {
            let memory = lease.memory();
            memory
                .write_obj(1_u8, GuestAddress(page * PAGE as u64))
                .unwrap();
        }
        let receipt = teardown(lease);
        assert_eq!(receipt.revocation, Revocation::Mremap, "{receipt:?}");
    }
    std::mem::forget(pool);
}

#[test]
fn by_number_base_4k() {
    alone("by_number_base_4k", || {
        a_pager_by_the_pools_number(PageSize::Base4K)
    });
}

#[test]
fn by_number_transparent() {
    alone("by_number_transparent", || {
        a_pager_by_the_pools_number(PageSize::Transparent)
    });
}

#[test]
fn base_4k() {
    alone("base_4k", || {
        the_next_guest_is_not_supplied(PageSize::Base4K)
    });
}

#[test]
fn transparent() {
    alone("transparent", || {
        the_next_guest_is_not_supplied(PageSize::Transparent)
    });
}
