//! Memory that a device may write to behind everybody's back: pinned, as for DMA, by the kernel's io_uring.

use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct io_uring_params` of `linux/io_uring.h`, of which nothing is needed: 120 bytes.
type Params = [u64; 15];

const IORING_REGISTER_BUFFERS: libc::c_uint = 0;
const IORING_OP_READ_FIXED: u8 = 4;
const IORING_OFF_SQES: i64 = 0x1000_0000;
const IORING_ENTER_GETEVENTS: libc::c_uint = 1;

/// A ring with one registered buffer: the buffer's pages stay pinned for as long as this lives, and a moment longer.
#[derive(Debug)]
pub struct Pinned {
    ring: OwnedFd,
    /// The submission ring, and the entries.
    queue: [*mut u8; 2],
    params: Params,
    address: usize,
}

const QUEUE_BYTES: usize = 4096;

fn check(status: libc::c_long, what: &str) -> libc::c_long {
    assert!(status >= 0, "{what}: {}", Error::last_os_error());
    status
}

impl Pinned {
    /// Pins `[start, start + len)`. `None`, said loudly, where there is no io_uring for this process.
    pub fn new(start: *mut u8, len: usize) -> Option<Self> {
        let mut params: Params = [0; 15];
        // SAFETY: the structure is as large as the kernel's.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
        if fd < 0 {
            crate::skipped(&format!("io_uring: {}", Error::last_os_error()));
            return None;
        }
        // SAFETY: the descriptor is new and nobody else's.
        let ring = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
        let map = |offset: i64| {
            // SAFETY: a mapping at a place of the kernel's choice.
            let mapped = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    QUEUE_BYTES,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    ring.as_raw_fd(),
                    offset,
                )
            };
            assert_ne!(mapped, libc::MAP_FAILED, "{}", Error::last_os_error());
            mapped.cast::<u8>()
        };
        let queue = [map(0), map(IORING_OFF_SQES)];
        let buffer = libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        };
        // SAFETY: the kernel reads one iovec, and pins what is mapped there.
        let status = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                IORING_REGISTER_BUFFERS,
                &raw const buffer,
                1,
            )
        };
        check(status, "registering a buffer");
        Some(Self {
            ring,
            queue,
            params,
            address: start.addr(),
        })
    }

    /// Has the kernel write the first `len` bytes of `file` to the start of the buffer: to the pages that were pinned, wherever
    /// they are mapped now.
    pub fn write_from(&self, file: &impl AsRawFd, len: u32) {
        let [ring, entries] = self.queue;
        // `sq_off` of the parameters: head, tail, ring_mask, ring_entries, flags, dropped, array.
        let offset = |index: usize| {
            let word = self.params[5 + index / 2];
            (if index.is_multiple_of(2) {
                word & 0xffff_ffff
            } else {
                word >> 32
            }) as usize
        };
        let mut entry = [0_u64; 8];
        entry[0] = u64::from(IORING_OP_READ_FIXED) | (file.as_raw_fd() as u64) << 32;
        entry[2] = self.address as u64;
        entry[3] = u64::from(len);
        // SAFETY: the ring has one entry; its parts are where the kernel has said that they are, and nobody else uses it.
        unsafe {
            entries.cast::<[u64; 8]>().write_volatile(entry);
            ring.add(offset(6)).cast::<u32>().write_volatile(0);
            let tail = ring.add(offset(1)).cast::<u32>();
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            tail.write_volatile(tail.read_volatile().wrapping_add(1));
            let fd = self.ring.as_raw_fd();
            let none = std::ptr::null::<u8>();
            let status = libc::syscall(
                libc::SYS_io_uring_enter,
                fd,
                1,
                1,
                IORING_ENTER_GETEVENTS,
                none,
                0,
            );
            assert_eq!(check(status, "io_uring_enter"), 1);
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for mapping in self.queue {
            // SAFETY: mapped by `new`, and no longer used.
            unsafe { libc::munmap(mapping.cast(), QUEUE_BYTES) };
        }
    }
}
