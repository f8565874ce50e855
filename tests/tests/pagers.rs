//! A VMM that pages its guest's memory in by userfaultfd, and follows where it goes (`UFFD_FEATURE_EVENT_REMAP`): its pager must not
//! supply the next guest with pages.

use std::os::fd::RawFd;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::{BLOCK_SIZE, PageSize, RevokeBy};
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

/// Supplies `[start, start + len)` with secrets, wherever it goes, until the process ends.
fn supply(start: u64, len: u64) {
    let mut api = [0xaa, EVENT_REMAP, 0];
    let mut register = [start, len, 1, 0];
    // SAFETY: the structures are live and as large as the requests say; the range is a lease's window, whose guest waits for pages.
    let pager: RawFd = unsafe {
        let pager = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as RawFd;
        assert!(pager >= 0);
        assert_eq!(
            libc::ioctl(pager, request(0x3f, 24) as _, api.as_mut_ptr()),
            0
        );
        assert_eq!(
            libc::ioctl(pager, request(0, 32) as _, register.as_mut_ptr()),
            0
        );
        pager
    };
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
    let window = lease.host_addresses()[0].1.addr() as u64;
    supply(window, 2 * BLOCK_SIZE);
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
