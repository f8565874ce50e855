//! A `SIGBUS` that is not about memory being scrubbed goes where it went before the handler of memory errors was installed.
//!
//! Handlers belong to the process, so each test has one of its own.

use std::mem::MaybeUninit;
use std::os::unix::process::ExitStatusExt;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::thread;
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{Policy, ScrubError, memory_errors, scrub_raw};
use vm_scrub_tests::child::{alone, end_of};

const PAGE: usize = 4096;

/// `pages` pages of a file that has none.
fn truncated(pages: usize) -> *mut u8 {
    // SAFETY: a new file and a new mapping of it, both of this function's own.
    unsafe {
        let file = libc::memfd_create(c"truncated".as_ptr(), libc::MFD_CLOEXEC);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED;
        let start = libc::mmap(ptr::null_mut(), pages * PAGE, protection, flags, file, 0);
        assert_ne!(start, libc::MAP_FAILED);
        libc::close(file);
        start.cast()
    }
}

fn touch(address: *mut u8) {
    // SAFETY: mapped and this test's own; that it raises a signal is the point.
    unsafe { address.write_volatile(1) };
}

fn send() {
    // SAFETY: calls without pointers.
    unsafe { libc::raise(libc::SIGBUS) };
}

fn assert_scrubs() {
    let start = truncated(3);
    // SAFETY: mapped, and nobody else's.
    let error = unsafe { scrub_raw(start, 3 * PAGE, &Policy::new()) }.unwrap_err();
    let all = std::iter::once(0..3 * PAGE).collect();
    assert_eq!(error, ScrubError::MemoryError { ranges: all });
}

/// Sets what `SIGBUS` leads to, as somebody would have before.
fn before(action: usize, flags: libc::c_int) {
    let mut new = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: zeroed is a valid value; the handlers of this file may run at any time.
    unsafe {
        (*new.as_mut_ptr()).sa_sigaction = action;
        (*new.as_mut_ptr()).sa_flags = flags;
        libc::sigaddset(&raw mut (*new.as_mut_ptr()).sa_mask, libc::SIGUSR1);
        assert_eq!(
            libc::sigaction(libc::SIGBUS, new.as_ptr(), ptr::null_mut()),
            0
        );
    }
}

static CALLS: AtomicUsize = AtomicUsize::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
static CONTEXT: AtomicUsize = AtomicUsize::new(0);
static MASKED: AtomicUsize = AtomicUsize::new(0);
static STACK: AtomicUsize = AtomicUsize::new(0);

/// What a VMM might have: maps a page where there is none, and goes on.
extern "C" fn with_info(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    assert_eq!(signal, libc::SIGBUS);
    let here = 0_u8;
    STACK.store((&raw const here).addr(), SeqCst);
    // SAFETY: the kernel's structures, and calls on this function's own memory. Where it maps is what could not be accessed.
    unsafe {
        CODE.store((*info).si_code, SeqCst);
        let mut mask = MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigprocmask(libc::SIG_BLOCK, ptr::null(), mask.as_mut_ptr());
        let masked = |signal| libc::sigismember(mask.as_ptr(), signal) == 1;
        MASKED.store(
            usize::from(masked(libc::SIGUSR1)) + 2 * usize::from(masked(libc::SIGBUS)),
            SeqCst,
        );
        CONTEXT.store(context.addr(), SeqCst);
        if (*info).si_code > 0 {
            let address = (*info).si_addr();
            ADDRESS.store(address.addr(), SeqCst);
            let page = address.map_addr(|address| address & !(PAGE - 1));
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            libc::mmap(page, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        }
    }
    CALLS.fetch_add(1, SeqCst);
}

extern "C" fn without_info(signal: libc::c_int) {
    assert_eq!(signal, libc::SIGBUS);
    CALLS.fetch_add(1, SeqCst);
}

fn handler_with_info() -> usize {
    with_info as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize
}

fn handler_without_info() -> usize {
    without_info as extern "C" fn(libc::c_int) as usize
}

/// The process ends by `SIGBUS`, and not before `body` gets to what is to end it.
fn ends(test: &str, body: impl FnOnce()) {
    if let Some((status, output)) = end_of(test, body) {
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}\n{output}");
        assert!(output.contains("NOW"), "{output}");
    }
}

/// Says that what is to end the process comes now.
fn now() {
    use std::io::Write;
    let _ = std::io::stdout().write_all(b"NOW\n");
}

#[test]
fn the_default_is_the_end_for_another_address() {
    ends("the_default_is_the_end_for_another_address", || {
        before(libc::SIG_DFL, 0);
        memory_errors::install().unwrap();
        assert_scrubs();
        now();
        touch(truncated(1));
    });
}

#[test]
fn the_default_is_the_end_when_it_is_sent() {
    ends("the_default_is_the_end_when_it_is_sent", || {
        before(libc::SIG_DFL, 0);
        memory_errors::install().unwrap();
        assert_scrubs();
        now();
        send();
    });
}

#[test]
fn what_rust_itself_installs_is_the_end_too() {
    ends("what_rust_itself_installs_is_the_end_too", || {
        memory_errors::install().unwrap();
        assert_scrubs();
        now();
        touch(truncated(1));
    });
}

#[test]
fn what_is_ignored_is_ignored_when_sent_and_the_end_when_raised() {
    ends(
        "what_is_ignored_is_ignored_when_sent_and_the_end_when_raised",
        || {
            before(libc::SIG_IGN, 0);
            memory_errors::install().unwrap();
            send();
            assert_scrubs();
            now();
            touch(truncated(1));
        },
    );
}

#[test]
fn the_handler_before_hears_what_the_kernel_said() {
    alone("the_handler_before_hears_what_the_kernel_said", || {
        before(handler_with_info(), libc::SA_SIGINFO);
        memory_errors::install().unwrap();
        memory_errors::install().unwrap();
        assert_scrubs();
        assert_eq!(CALLS.load(SeqCst), 0);

        let there = truncated(1).wrapping_add(123);
        touch(there);
        assert_eq!(
            (CALLS.load(SeqCst), ADDRESS.load(SeqCst)),
            (1, there.addr())
        );
        // BUS_ADRERR.
        assert_eq!((CODE.load(SeqCst), MASKED.load(SeqCst)), (2, 3));
        assert_ne!(CONTEXT.load(SeqCst), 0);
        let here = 0_u8;
        let distance = STACK.load(SeqCst).abs_diff((&raw const here).addr());
        assert!(
            distance < 64 << 10,
            "it runs on the stack that it asked for"
        );

        send();
        assert_eq!((CALLS.load(SeqCst), CODE.load(SeqCst)), (2, libc::SI_TKILL));
        assert_scrubs();
        assert_eq!(CALLS.load(SeqCst), 2);
    });
}

#[test]
fn a_handler_that_wants_another_stack_has_it() {
    alone("a_handler_that_wants_another_stack_has_it", || {
        before(
            handler_with_info(),
            libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER,
        );
        memory_errors::install().unwrap();
        // The test's thread has an alternate stack: Rust gives one to each.
        let mut stack = MaybeUninit::<libc::stack_t>::zeroed();
        // SAFETY: the structure is live, and zeroed is a valid value.
        let stack = unsafe {
            assert_eq!(libc::sigaltstack(ptr::null(), stack.as_mut_ptr()), 0);
            stack.assume_init()
        };
        assert_eq!(stack.ss_flags & libc::SS_DISABLE, 0);
        touch(truncated(1));
        let alternate = stack.ss_sp.addr()..stack.ss_sp.addr() + stack.ss_size;
        assert!(alternate.contains(&STACK.load(SeqCst)));
        assert_eq!(MASKED.load(SeqCst), 1, "SIGBUS itself is not blocked");
        assert_scrubs();
    });
}

#[test]
fn a_handler_without_information_is_called() {
    alone("a_handler_without_information_is_called", || {
        before(handler_without_info(), 0);
        memory_errors::install().unwrap();
        send();
        send();
        assert_scrubs();
        assert_eq!(CALLS.load(SeqCst), 2);
    });
}

#[test]
fn a_handler_for_once_is_called_once() {
    ends("a_handler_for_once_is_called_once", || {
        before(handler_without_info(), libc::SA_RESETHAND);
        memory_errors::install().unwrap();
        send();
        assert_eq!(CALLS.load(SeqCst), 1);
        assert_scrubs();
        now();
        send();
    });
}

/// Each thread's signals are its own, while others survive theirs.
#[test]
fn another_threads_signals_are_not_taken() {
    alone("another_threads_signals_are_not_taken", || {
        before(handler_with_info(), libc::SA_SIGINFO);
        memory_errors::install().unwrap();
        const ROUNDS: usize = 300;
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..ROUNDS).for_each(|_| assert_scrubs()));
            }
            scope.spawn(|| (0..ROUNDS).for_each(|_| touch(truncated(1))));
        });
        assert_eq!(CALLS.load(SeqCst), ROUNDS);
        // Threads that are gone have left their records to others.
        thread::spawn(assert_scrubs).join().unwrap();
    });
}

struct Sent(libc::siginfo_t);

// SAFETY: its pointer is a number to whoever has it.
unsafe impl Sync for Sent {}

/// Whoever may send signals to this process could otherwise have its memory replaced while it is scrubbed.
#[test]
fn what_is_sent_is_no_error_wherever_it_points() {
    alone("what_is_sent_is_no_error_wherever_it_points", || {
        before(handler_with_info(), libc::SA_SIGINFO | libc::SA_RESTART);
        memory_errors::install().unwrap();
        // As much as is watched at a time.
        let mut memory = vec![1_u8; 128 << 10];
        let middle = memory.as_ptr().addr() + memory.len() / 2;
        // SAFETY: zeroed is a valid value of it; the address is where the kernel puts that of an access.
        let info = unsafe {
            let mut info = MaybeUninit::<libc::siginfo_t>::zeroed().assume_init();
            info.si_signo = libc::SIGBUS;
            info.si_code = libc::SI_QUEUE;
            (&raw mut info).byte_add(16).cast::<usize>().write(middle);
            assert_eq!(info.si_addr().addr(), middle);
            Sent(info)
        };
        // SAFETY: a call that takes nothing.
        let scrubbing = unsafe { libc::gettid() };
        thread::scope(|scope| {
            let (info, scrubbing) = (&info, scrubbing);
            let sending = scope.spawn(move || {
                while CALLS.load(SeqCst) < 5_000 {
                    // SAFETY: the structure is live; the thread is this process's, and waits for this one.
                    let status = unsafe {
                        let (process, call) = (libc::getpid(), libc::SYS_rt_tgsigqueueinfo);
                        libc::syscall(call, process, scrubbing, libc::SIGBUS, &raw const info.0)
                    };
                    assert_eq!(status, 0);
                }
            });
            while !sending.is_finished() {
                memory.fill(1);
                // SAFETY: the vector's own memory.
                let done = unsafe { scrub_raw(memory.as_mut_ptr(), 128 << 10, &Policy::new()) };
                assert_eq!(done.unwrap().bytes, 128 << 10);
            }
        });
        assert_eq!(CODE.load(SeqCst), libc::SI_QUEUE);
    });
}

/// A forked child has one thread, which goes on.
#[test]
fn a_forked_child_survives_too() {
    alone("a_forked_child_survives_too", || {
        memory_errors::install().unwrap();
        assert_scrubs();
        // SAFETY: the other threads of this process, the test harness's, hold nothing that the child needs but the allocator's
        // locks, which the C library hands over.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                assert_scrubs();
                libc::_exit(7);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            assert!(
                libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7,
                "{status:#x}"
            );
        }
    });
}

#[test]
fn what_cannot_be_installed_says_so_and_changes_nothing() {
    alone(
        "what_cannot_be_installed_says_so_and_changes_nothing",
        || {
            before(handler_without_info(), 0);
            for skip in [0, 1] {
                let fault = inject(Call::Sigaction, skip, 1, libc::EPERM);
                let error = memory_errors::install().unwrap_err();
                assert_eq!(fault.hits(), 1);
                assert_eq!(
                    (error.call, error.source.raw_os_error()),
                    (Call::Sigaction, Some(libc::EPERM))
                );
                drop(fault);
                send();
                assert_eq!(CALLS.load(SeqCst), skip as usize + 1);
            }
            memory_errors::install().unwrap();
            assert_scrubs();
            // Somebody comes later, and hands nothing on.
            before(handler_with_info(), libc::SA_SIGINFO);
            let error = memory_errors::install().unwrap_err();
            assert!(error.to_string().contains("another handler"), "{error}");
        },
    );
}
