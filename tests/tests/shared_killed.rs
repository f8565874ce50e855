//! A VMM that is killed, or exits, at any moment while it leases, scrubs and reclaims memory that it shares with another process: what
//! that one reads afterwards is what that guest wrote, or zeros, and never a byte of another guest's.
//!
//! This process is the peer. The VMM is this program once more; each of its guests fills its memory with a word of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::sync::Arc;
use std::thread::{scope, sleep, spawn};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions, PageSize, Pool};
use vm_scrub_tests::kvm::{secret, watchdog};
use vm_scrub_tests::numbers::Numbers;
use vm_scrub_tests::peer::{receive, send};
use vm_scrub_tests::{HugePages, huge_pages, pools, quiesce, regions};

/// Set in the VMM, to the size of its pages, what its random numbers begin with, and after how many microseconds with a guest it is to
/// exit, unless it is to be killed.
const VMM: &str = "VM_SCRUB_TEST_VMM";

const ROUNDS: u64 = 12;

/// The pool's, and as many again that the peer keeps from the kernel.
const BLOCKS: u64 = 12;
const HELD: usize = 6;
const HUGE_PAGES: u64 = 2 * BLOCKS + 2 * HELD as u64;

/// In microseconds, with a guest: about as long as a VMM takes for a few of them.
const LONGEST: u64 = 120_000;

/// What a VMM that exits has time for on a busy host.
const PATIENCE: Duration = Duration::from_secs(30);

const LEN: usize = 2 * BLOCK_SIZE as usize;

/// What guests have that are not shared.
const OTHERS: u64 = 127;

#[test]
fn vmm() {
    let Ok(what) = std::env::var(VMM) else {
        return;
    };
    let what: Vec<&str> = what.split(' ').collect();
    let page_size = if what[0] == "huge" {
        PageSize::Huge2M
    } else {
        PageSize::Base4K
    };
    // SAFETY: standard input is the socket, and nothing else here reads or writes it.
    let socket = unsafe { UnixStream::from_raw_fd(0) };
    let numbers = Numbers(what[1].parse().unwrap());
    let exit_after = what.get(2).map(|micros| micros.parse().unwrap());
    run(
        page_size,
        numbers,
        socket,
        exit_after.map(Duration::from_micros),
    );
}

/// Fills all of a lease with a guest's word.
fn fill(lease: &Lease, number: u64) {
    let words = secret(number).to_le_bytes().repeat(512);
    let memory = lease.memory();
    for region in lease.guest_regions() {
        for at in (0..region.bytes).step_by(words.len()) {
            let address = GuestAddress(region.guest_address + at);
            memory.write_slice(&words, address).unwrap();
        }
    }
}

/// What the VMM does until it is killed or exits.
fn run(
    page_size: PageSize,
    mut numbers: Numbers,
    mut socket: UnixStream,
    mut exit_after: Option<Duration>,
) {
    let pool = pools::builder(page_size, BLOCKS).build().unwrap();
    let mut live: Vec<Lease> = Vec::new();
    for guest in 0.. {
        // Secrets of somebody else, in memory that is lent to the kernel for the next file.
        if let Ok(other) = pool.lease(&regions(&[(0, 3 * BLOCK_SIZE)])) {
            fill(&other, OTHERS);
            end(other, 0);
        }
        let number = 1 + guest % 100;
        if let Ok(lease) = shareable(&pool) {
            let file = Arc::clone(lease.file_offsets()[0].1.arc());
            // Whoever is to hear it may have gone.
            if socket.write_all(&u64::to_ne_bytes(number)).is_err() {
                return;
            }
            send(&socket, file.as_raw_fd());
            drop(file);
            if let Some(moment) = exit_after.take() {
                // As when a signal or the VMM's API says so: nobody tells this thread, nor the pool's.
                spawn(move || {
                    sleep(moment);
                    std::process::exit(0);
                });
            }
            fill(&lease, number);
            live.push(lease);
        }
        if live.len() > 1 {
            let at = numbers.below(live.len() as u64) as usize;
            end(live.swap_remove(at), numbers.below(24));
        }
        if numbers.below(3) == 0 {
            pool.reclaim();
        }
    }
}

fn shareable(pool: &Pool) -> Result<Lease, vm_scrub::LeaseError> {
    let options = LeaseOptions::new().shareable(true);
    pool.lease_with(&regions(&[(0, LEN as u64)]), options)
}

/// One of the ways in which a lease ends.
fn end(lease: Lease, way: u64) {
    let quiesced = quiesce(&lease);
    match way {
        // Quarantined for good: seldom, because the pool gets smaller.
        23 => drop(lease),
        12..23 => drop(lease.retire(quiesced).unwrap()),
        8..12 => drop(lease.retire(quiesced).unwrap().wait().unwrap()),
        _ => drop(lease.teardown(quiesced).unwrap()),
    }
}

/// The memory of one guest, in the hands of the peer.
struct Held {
    number: u64,
    file: File,
    mapping: *mut libc::c_void,
}

impl Held {
    /// Takes a file; maps it, so that the VMM cannot seal it, if told to.
    fn new(number: u64, file: File, map: bool) -> Self {
        let mut mapping = ptr::null_mut();
        if map {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the kernel picks a range that nothing else uses. A file that is sealed by now is refused.
            let mapped = unsafe {
                let fd = file.as_raw_fd();
                libc::mmap(ptr::null_mut(), LEN, protection, libc::MAP_SHARED, fd, 0)
            };
            if mapped != libc::MAP_FAILED {
                mapping = mapped;
            }
        }
        Self {
            number,
            file,
            mapping,
        }
    }

    /// Panics if there is a byte in it that its guest did not write. Returns how many pages hold something.
    fn pages_written(&self) -> usize {
        let own = secret(self.number).to_le_bytes().repeat(512);
        let zeros = vec![0_u8; own.len()];
        let mut bytes = vec![0xff_u8; LEN];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        let mut written = 0;
        for (page, bytes) in bytes.chunks(own.len()).enumerate() {
            if bytes == zeros {
                continue;
            }
            written += 1;
            if bytes == own {
                continue;
            }
            // In the middle of being written or zeroed.
            let wrong = bytes.iter().zip(&own);
            let wrong = wrong
                .clone()
                .position(|(found, own)| *found != 0 && found != own);
            assert_eq!(wrong, None, "page {page} of guest {}", self.number);
        }
        written
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.mapping.is_null() {
            // SAFETY: mapped by `new`, and nobody refers to it.
            unsafe { libc::munmap(self.mapping, LEN) };
        }
    }
}

/// A VMM in another process, killed when this is dropped.
struct Vmm(Child);

impl Vmm {
    fn start(page_size: PageSize, seed: u64, exit_after: Option<u64>) -> (Self, UnixStream) {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let size = match page_size {
            PageSize::Huge2M => "huge",
            _ => "base",
        };
        let mut what = format!("{size} {seed}");
        if let Some(micros) = exit_after {
            what += &format!(" {micros}");
        }
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["vmm", "--exact", "--nocapture", "--test-threads=1"])
            .env(VMM, what)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        (Self(process), socket)
    }

    /// Waits for it to exit as it was told to. Panics, and kills it, if it does not, or in another way.
    fn wait_for_exit(mut self) {
        let late = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert_eq!(status.code(), Some(0), "{status}");
                return;
            }
            assert!(Instant::now() < late, "it exits for {PATIENCE:?}");
            sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The next guest's number and file. `None` at the end.
fn next(mut socket: &UnixStream) -> Option<(u64, File)> {
    let mut number = [0; 8];
    socket.read_exact(&mut number).ok()?;
    Some((u64::from_ne_bytes(number), receive(socket.as_raw_fd())?))
}

#[derive(Clone, Copy, PartialEq)]
enum Ending {
    Killed,
    Exits,
}

fn the_vmm_ends_at_any_moment(page_size: PageSize, ending: Ending) {
    let _watchdog = watchdog(Duration::from_secs(240));
    let before = huge_pages::free();
    let (mut guests, mut written, mut empty) = (0, 0, 0);
    for round in 1..=8 * ROUNDS {
        // A busy host may need more of them.
        if round > ROUNDS && written > 0 && empty > 0 {
            break;
        }
        let mut numbers = Numbers(0x5eed_0000 + round);
        let moment = numbers.below(LONGEST);
        let exit_after = (ending == Ending::Exits).then_some(moment);
        let (vmm, socket) = Vmm::start(page_size, round, exit_after);
        let mut held: Vec<Held> = Vec::new();
        scope(|scope| {
            let mut vmm = Some(vmm);
            while let Some((number, file)) = next(&socket) {
                guests += 1;
                if let Some(vmm) = vmm.take() {
                    scope.spawn(move || match ending {
                        Ending::Killed => {
                            sleep(Duration::from_micros(moment));
                            drop(vmm);
                        }
                        Ending::Exits => vmm.wait_for_exit(),
                    });
                }
                held.push(Held::new(number, file, numbers.below(4) == 0));
                if held.len() > HELD {
                    // Also while the VMM is alive.
                    let at = numbers.below(HELD as u64) as usize;
                    let pages = held.swap_remove(at).pages_written();
                    (written, empty) = (written + pages, empty + usize::from(pages == 0));
                }
            }
        });
        for guest in &held {
            let pages = guest.pages_written();
            written += pages;
            empty += usize::from(pages == 0);
        }
    }
    assert!(
        guests > ROUNDS && written > 0 && empty > 0,
        "{guests} {written} {empty}"
    );
    if page_size == PageSize::Huge2M {
        // Nobody has them any more, whatever the VMM was doing.
        let late = Instant::now() + Duration::from_secs(20);
        while huge_pages::free() < before {
            let now = huge_pages::free();
            assert!(Instant::now() < late, "{now} of {before} pages came back");
            sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn the_vmm_is_killed_at_any_moment_4k() {
    the_vmm_ends_at_any_moment(PageSize::Base4K, Ending::Killed);
}

/// Its threads go on while one of them runs what is to be run at the end.
#[test]
fn the_vmm_exits_at_any_moment_4k() {
    the_vmm_ends_at_any_moment(PageSize::Base4K, Ending::Exits);
}

/// No other test has any pages meanwhile, so that they can be counted.
#[test]
fn the_vmm_is_killed_at_any_moment_2m() {
    if let Some(_reserved) = HugePages::reserve_alone(HUGE_PAGES) {
        the_vmm_ends_at_any_moment(PageSize::Huge2M, Ending::Killed);
    }
}

#[test]
fn the_vmm_exits_at_any_moment_2m() {
    if let Some(_reserved) = HugePages::reserve_alone(HUGE_PAGES) {
        the_vmm_ends_at_any_moment(PageSize::Huge2M, Ending::Exits);
    }
}
