//! A pointer that somebody in the VMM forgot: to use it after teardown ends the process, and the next guest does not notice.
//!
//! The process that dies is a child: this test program again, with the access to be tried in its environment.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::{env, io, thread};

use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::kvm::{ABOVE_HOLE, Vm, run, secret};
use vm_scrub_tests::{HugePages, pool, regions};

mod a_forgotten_pointer_ends_the_process_and_reaches_no_guest {
    use vm_scrub::PageSize;

    #[test]
    fn base_4k() {
        super::in_both_processes(PageSize::Base4K);
    }

    #[test]
    fn transparent() {
        super::in_both_processes(PageSize::Transparent);
    }

    #[test]
    fn huge_2m() {
        super::in_both_processes(PageSize::Huge2M);
    }
}

/// In the child's environment: what it is to access, and how.
const ACCESS: &str = "VM_SCRUB_TEST_ACCESS";

/// What the child prints between the fault and its end.
const UNHARMED: &str = "the next guest found zeros";

fn in_both_processes(page_size: PageSize) {
    match env::var(ACCESS) {
        // With its parent's huge pages: nobody would give back those of a process that is killed.
        Ok(access) => be_the_child(page_size, &access),
        Err(_) if page_size == PageSize::Huge2M => {
            if let Some(_reserved) = HugePages::reserve(4) {
                run(page_size, be_the_parent);
            }
        }
        Err(_) => run(page_size, be_the_parent),
    }
}

fn be_the_parent(_page_size: PageSize) {
    let name = thread::current().name().unwrap().to_owned();
    for place in ["first", "middle", "last"] {
        for access in ["store", "load"] {
            let child = Command::new(env::current_exe().unwrap())
                .args(["--exact", &name, "--nocapture"])
                .env(ACCESS, format!("{access} {place}"))
                .output()
                .unwrap();
            let (out, err) = (
                String::from_utf8_lossy(&child.stdout),
                String::from_utf8_lossy(&child.stderr),
            );
            let context = format!("{access} {place}: {:?}\n{out}\n{err}", child.status);
            assert_eq!(child.status.signal(), Some(libc::SIGSEGV), "{context}");
            assert!(out.contains(UNHARMED), "{context}");
        }
    }
}

/// Where the child's access goes, for its handler.
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
/// Whether the fault was there.
static AS_EXPECTED: AtomicBool = AtomicBool::new(false);
/// The handler writes to the first, and waits for the second.
static FAULTED: AtomicI32 = AtomicI32::new(-1);
static LOOKED: AtomicI32 = AtomicI32::new(-1);

/// Lets the other thread look at the next guest before the process dies: when it returns the access is tried again, and then
/// there is no handler any more.
extern "C" fn on_fault(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo, and this is a fault, so it has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    AS_EXPECTED.store(address == ADDRESS.load(Ordering::SeqCst), Ordering::SeqCst);
    let mut byte = 0_u8;
    // SAFETY: both are async-signal-safe, the descriptors are open, and the byte is this function's.
    unsafe {
        libc::write(FAULTED.load(Ordering::SeqCst), (&raw const byte).cast(), 1);
        libc::read(LOOKED.load(Ordering::SeqCst), (&raw mut byte).cast(), 1);
    }
}

fn install_handler() {
    // SAFETY: an all-zero sigaction is a valid one, with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_fault as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
    let no_core = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the handler only does what signal handlers may. Nothing is expected of core dumps.
    unsafe {
        assert_eq!(
            libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()),
            0
        );
        assert_eq!(libc::setrlimit(libc::RLIMIT_CORE, &no_core), 0);
    }
}

fn be_the_child(page_size: PageSize, access: &str) {
    let pool = pool(page_size, 4);
    let layout = regions(&[(0, BLOCK_SIZE), (ABOVE_HOLE, 3 * BLOCK_SIZE)]);
    let first = Vm::boot(pool.lease(&layout).unwrap(), 1);
    first.fill(secret(1));
    let (region, start) = first.lease.host_addresses()[1];
    let pointer = match access.split_once(' ').unwrap().1 {
        "first" => start,
        "middle" => start.wrapping_add(BLOCK_SIZE as usize + 123),
        _ => start.wrapping_add(region.bytes as usize - 1),
    };
    // SAFETY: in the lease's memory, which nobody refers to at the moment.
    unsafe {
        assert_ne!(pointer.read_volatile(), 0);
        pointer.write_volatile(0xee);
    }
    let (receipt, _machine) = first.teardown();
    assert!(receipt.is_proven());
    let next = Vm::boot(pool.lease(&layout).unwrap(), 1);
    assert_eq!(next.lease.blocks(), receipt.blocks);

    let (faulted, looked) = (pipe(), pipe());
    FAULTED.store(faulted.1.into_raw_fd(), Ordering::SeqCst);
    LOOKED.store(looked.0.into_raw_fd(), Ordering::SeqCst);
    ADDRESS.store(pointer.addr(), Ordering::SeqCst);
    thread::spawn(move || {
        let mut byte = 0_u8;
        // SAFETY: the descriptor is open and the byte is this thread's.
        let woken = unsafe { libc::read(faulted.0.as_raw_fd(), (&raw mut byte).cast(), 1) };
        assert_eq!(woken, 1);
        assert!(AS_EXPECTED.load(Ordering::SeqCst), "another fault");
        next.assert_zero();
        println!("{UNHARMED}");
        // SAFETY: as above.
        unsafe { libc::write(looked.1.as_raw_fd(), (&raw const byte).cast(), 1) };
        thread::park();
    });
    install_handler();
    // SAFETY: none; this is the mistake. The address is in a window that is closed and stays reserved.
    unsafe {
        match access.split_once(' ').unwrap().0 {
            "store" => pointer.write_volatile(0xdd),
            _ => drop(pointer.read_volatile()),
        }
    }
    println!("the access went through");
    std::process::exit(3);
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = io::pipe().unwrap();
    (read.into(), write.into())
}
