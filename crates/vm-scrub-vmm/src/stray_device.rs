//! A device that does not behave: it keeps raw host pointers into guest memory and delivers data through them after
//! the guest is gone.
//!
//! Real ones do that: a virtio backend thread that nobody stopped, an I/O request that was still queued. Like those,
//! it has the kernel write for it, with `pread(2)` from a disk image straight into the guest's buffer. That is what
//! makes it fit for tests: a write to an address that was revoked fails with `EFAULT`, where a store would end the
//! process.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::error::Error;
use crate::ranges::WORD;
use crate::running::deadline;

/// Rest between two rounds: lets others have the processor, and the state's lock.
const REST: Duration = Duration::from_micros(100);

/// What became of a device's writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Deliveries {
    /// Writes of which at least one byte reached memory.
    pub landed: u64,
    /// Writes that were refused with `EFAULT`.
    pub refused: u64,
}

/// A thread that goes on writing through host pointers it once took. Dropping it stops it.
#[derive(Debug)]
pub struct StrayDevice {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    counts: Deliveries,
    /// Rounds over all buffers that were finished.
    rounds: u64,
    stop: bool,
    failure: Option<io::Error>,
}

/// A buffer of the guest, as an address on the host.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    address: usize,
    bytes: usize,
}

impl StrayDevice {
    /// Takes host pointers to `buffers`, given as (guest-physical address, length) in bytes, and starts to write
    /// `secret` to them, over and over. It keeps no clone of `memory`: nobody can see that it is still there.
    ///
    /// # Errors
    ///
    /// [`Error::GuestMemory`] if a buffer is not within one region of `memory`; [`Error::Device`] and [`Error::Thread`]
    /// if the host is short of something.
    ///
    /// # Safety
    ///
    /// Until the device is stopped, nothing but guest memory may be mapped where the buffers are now: the addresses
    /// must stay reserved (as a lease's window is, or with a `PROT_NONE` mapping) after the guest memory was taken
    /// away.
    pub unsafe fn start<B: Bitmap>(
        memory: &GuestMemoryMmap<B>,
        buffers: &[(u64, u64)],
        secret: u64,
    ) -> Result<Self, Error> {
        let buffers = buffers
            .iter()
            .map(|&(gpa, bytes)| Buffer::find(memory, gpa, bytes as usize))
            .collect::<Result<Vec<_>, _>>()?;
        let longest = buffers.iter().map(|buffer| buffer.bytes).max().unwrap_or(0);
        let image = disk_image(secret, longest).map_err(|source| Error::Device {
            doing: "create its disk image",
            source,
        })?;
        let shared = Arc::new(Shared::default());
        let device = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("stray-device".into())
            .spawn(move || device.deliver(&image, &buffers))
            .map_err(|source| Error::Thread {
                doing: "start a stray device",
                source,
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The counters at a moment when no write is under way: what is counted later was written later.
    pub fn snapshot(&self) -> Deliveries {
        self.shared.lock().counts
    }

    /// Waits until the device has been to all its buffers once more, and says what became of the writes that were begun
    /// since the call.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`]; [`Error::Device`] if the device met an error other than `EFAULT`, and stopped.
    pub fn round(&self, limit: Duration) -> Result<Deliveries, Error> {
        let deadline = deadline(limit);
        let mut state = self.shared.lock();
        let before = state.counts;
        // The first round to end may have begun before the call.
        let target = state.rounds + 2;
        while state.rounds < target {
            if let Some(source) = state.failure.take() {
                return Err(Error::Device {
                    doing: "deliver",
                    source,
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::TimedOut {
                    what: "waiting for the stray device",
                    limit,
                });
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.counts.since(before))
    }

    /// Stops the device and returns all it counted.
    pub fn stop(mut self) -> Deliveries {
        self.end();
        self.snapshot()
    }

    fn end(&mut self) {
        self.shared.lock().stop = true;
        if let Some(thread) = self.thread.take() {
            // It never blocks, so it ends within a round. A panic was printed by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Drop for StrayDevice {
    fn drop(&mut self) {
        self.end();
    }
}

impl Deliveries {
    /// What was counted after `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            landed: self.landed.saturating_sub(earlier.landed),
            refused: self.refused.saturating_sub(earlier.refused),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's thread. Each write is made and counted under the lock, see [`StrayDevice::snapshot`].
    fn deliver(&self, image: &File, buffers: &[Buffer]) {
        loop {
            for buffer in buffers {
                let mut state = self.lock();
                if state.stop {
                    return;
                }
                match buffer.write_from(image) {
                    Ok(()) => state.counts.landed += 1,
                    Err(Errno::EFAULT) => state.counts.refused += 1,
                    Err(errno) => {
                        state.failure = Some(errno.into());
                        self.changed.notify_all();
                        return;
                    }
                }
            }
            let mut state = self.lock();
            state.rounds += 1;
            if state.stop {
                return;
            }
            drop(state);
            self.changed.notify_all();
            thread::sleep(REST);
        }
    }
}

impl Buffer {
    fn find<B: Bitmap>(memory: &GuestMemoryMmap<B>, gpa: u64, bytes: usize) -> Result<Self, Error> {
        let error = |source| Error::GuestMemory {
            doing: "find",
            gpa,
            source,
        };
        let mut slices = memory
            .get_slices(GuestAddress(gpa), bytes, Permissions::Write)
            .map_err(error)?;
        match slices.next().transpose().map_err(error)? {
            Some(slice) if slice.len() == bytes => Ok(Self {
                address: slice.ptr_guard_mut().as_ptr().expose_provenance(),
                bytes,
            }),
            _ => Err(error(vm_memory::GuestMemoryError::InvalidGuestAddress(
                GuestAddress(gpa),
            ))),
        }
    }

    /// Writes the whole buffer, or as much of it as is still there.
    fn write_from(&self, image: &File) -> Result<(), Errno> {
        let address = std::ptr::with_exposed_provenance_mut::<libc::c_void>(self.address);
        // SAFETY: the kernel checks the address and refuses what is not mapped writable. What is mapped there is guest
        // memory, as the caller of `start` promised, and no Rust reference to guest memory exists anywhere.
        let read = unsafe { libc::pread(image.as_raw_fd(), address, self.bytes, 0) };
        Errno::result(read).map(|_| ())
    }
}

/// A file in memory with `bytes` bytes of `secret`.
fn disk_image(secret: u64, bytes: usize) -> io::Result<File> {
    let mut image = File::from(memfd_create(c"stray-device", MFdFlags::MFD_CLOEXEC)?);
    image.write_all(&secret.to_le_bytes().repeat(bytes.div_ceil(WORD as usize)))?;
    Ok(image)
}
