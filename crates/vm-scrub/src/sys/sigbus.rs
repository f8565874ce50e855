//! The handler of `SIGBUS`, which the kernel sends to a thread that accesses memory it cannot give: broken hardware, a
//! mapped file that became shorter, a huge page that the host has not got.
//!
//! Everything that runs in the handler is async-signal-safe: atomics, raw system calls, and the handler that was there
//! before. No frame is skipped: the thread goes on where it was, on a fresh page.

use super::{Call, Error, Result, fault, map, watched};
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

// asm-generic/siginfo.h.
const BUS_ADRERR: i32 = 2;
const BUS_OBJERR: i32 = 3;
const BUS_MCEERR_AR: i32 = 4;
const BUS_MCEERR_AO: i32 = 5;

/// Where `si_addr_lsb` is in a `siginfo_t`, in bytes: behind three words, padding and the address.
const ADDRESS_LSB: usize = 24;

/// What memory can be replaced by, in bytes: a page, or the sizes of huge pages on the supported architectures. Of a huge page the
/// kernel replaces all or nothing.
const GRANULES: [usize; 5] = [4 << 10, 64 << 10, 2 << 20, 32 << 20, 1 << 30];

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// What was there before, leaked; null stands for the default.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

static PAGE: AtomicUsize = AtomicUsize::new(4096);

fn ours() -> usize {
    handle as Handler as usize
}

/// Reads what `SIGBUS` leads to, and changes it if there is something `new`.
fn exchange(new: Option<&libc::sigaction>) -> Result<libc::sigaction> {
    fault::check(Call::Sigaction)?;
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: both structures are live for the call; the handler in `new` is one that may run at any time.
    if unsafe { libc::sigaction(libc::SIGBUS, new, old.as_mut_ptr()) } != 0 {
        return Err(Error::last(Call::Sigaction));
    }
    // SAFETY: zeroed is a valid value of it, and the kernel has filled it in.
    Ok(unsafe { old.assume_init() })
}

/// Puts the handler in front of the one that is there. Once in a process; the second time it looks whether it is still there.
pub(crate) fn install() -> Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    let previous = exchange(None)?;
    if previous.sa_sigaction == ours() {
        return Ok(());
    }
    if *installed {
        // To go in front of it again would make a ring of two, if it hands on what is not its own.
        return Err(Error {
            call: Call::Sigaction,
            source: io::Error::new(
                io::ErrorKind::AlreadyExists,
                "another handler of SIGBUS was installed over this one",
            ),
        });
    }
    PAGE.store(map::host_page_size(), Ordering::Relaxed);
    let mut new = previous;
    new.sa_sigaction = ours();
    new.sa_flags = libc::SA_SIGINFO;
    if [libc::SIG_DFL, libc::SIG_IGN].contains(&previous.sa_sigaction) {
        new.sa_flags |= libc::SA_ONSTACK | libc::SA_RESTART;
    } else {
        // The one before finds what it asked for: its stack, its mask.
        let kept = libc::SA_ONSTACK | libc::SA_RESTART | libc::SA_NODEFER;
        new.sa_flags |= previous.sa_flags & kept;
    }
    // Before the handler can run; and once more, should another thread have been quicker.
    PREVIOUS.store(Box::into_raw(Box::new(previous)), Ordering::Release);
    let found = exchange(Some(&new))?;
    if found.sa_sigaction != previous.sa_sigaction {
        PREVIOUS.store(Box::into_raw(Box::new(found)), Ordering::Release);
    }
    *installed = true;
    watched::switch_on();
    Ok(())
}

/// The `errno` of the interrupted code.
fn errno() -> *mut libc::c_int {
    // SAFETY: the call returns a valid pointer for every thread.
    unsafe { libc::__errno_location() }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the calling thread's own.
    let saved = unsafe { *errno() };
    // SAFETY: the kernel passes a valid structure to handlers with SA_SIGINFO, and a memory error has an address.
    let recovered = unsafe { recover(info) };
    if !recovered {
        // SAFETY: what the kernel has passed is passed on.
        unsafe { chain(signal, info, context) };
    }
    // SAFETY: as above.
    unsafe { *errno() = saved };
}

/// Replaces the memory whose access raised the signal, if this thread is working on it.
///
/// # Safety
/// As for a handler.
unsafe fn recover(info: *const libc::siginfo_t) -> bool {
    // SAFETY: passed on to the caller.
    let code = unsafe { (*info).si_code };
    // What somebody has sent (codes up to 0), and what is wrong with an access (alignment) and not with memory, is not ours.
    if !(BUS_ADRERR..=BUS_MCEERR_AO).contains(&code) {
        return false;
    }
    // SAFETY: these codes come with an address.
    let address = unsafe { (*info).si_addr() }.addr();
    let Some(interrupted) = watched::at(address) else {
        return false;
    };
    if interrupted.is_helpless() {
        return false;
    }
    let mut shift = 0;
    if code >= BUS_MCEERR_AR {
        // SAFETY: it lies in the structure, and these two codes come with it.
        let lsb = unsafe { info.cast::<u8>().add(ADDRESS_LSB).cast::<i16>().read() };
        shift = u8::try_from(lsb).unwrap_or(0).min(30);
    }
    // Some kernels say `ENOMEM` when a part of a huge page is to be replaced, and others may be meant by that.
    let page = PAGE.load(Ordering::Relaxed).max(interrupted.page());
    for granule in GRANULES {
        let start = address & !(granule - 1);
        if granule < page {
            continue;
        }
        // SAFETY: what is there cannot be accessed, or it is `EINVAL`: a part of a huge page is not replaced.
        match unsafe { replace(start, granule) } {
            0 => {
                interrupted.note(start, granule, shift, code);
                return true;
            }
            libc::EINVAL => {}
            _ => return false,
        }
    }
    false
}

/// Maps fresh private zeros over `[start, start + len)`, and returns an error number or 0.
///
/// Not by the C library, some of which take locks around this call.
///
/// # Safety
/// Nobody may have anything there that can be accessed.
unsafe fn replace(start: usize, len: usize) -> libc::c_int {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: passed on to the caller.
    let status = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            start,
            len,
            protection,
            flags,
            -1_isize,
            0_usize,
        )
    };
    if status == -1 {
        // SAFETY: the calling thread's own.
        unsafe { *errno() }
    } else {
        0
    }
}

/// Does what would have been done without this handler.
///
/// # Safety
/// As for a handler.
unsafe fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: null, or leaked with everything in it stored before.
    let Some(action) = (unsafe { previous.as_ref() }) else {
        // SAFETY: passed on to the caller.
        return unsafe { default(info) };
    };
    // SAFETY: passed on to the caller.
    let code = unsafe { (*info).si_code };
    match action.sa_sigaction {
        // SAFETY: passed on to the caller.
        libc::SIG_DFL => unsafe { default(info) },
        // What an access has raised cannot be ignored: the kernel ends the process.
        // SAFETY: passed on to the caller.
        libc::SIG_IGN if (1..=BUS_MCEERR_AR).contains(&code) => unsafe { default(info) },
        libc::SIG_IGN => {}
        function => {
            if action.sa_flags & libc::SA_RESETHAND != 0 {
                PREVIOUS.store(ptr::null_mut(), Ordering::Release);
            }
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: with this flag, a handler is such a function; whoever installed it says that it may be called.
                let function: Handler = unsafe { std::mem::transmute(function) };
                function(signal, info, context);
            } else {
                // SAFETY: without it, such a one.
                let function: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(function) };
                function(signal);
            }
        }
    }
}

/// Ends the process as the kernel would have: the same signal once more, to this thread, with nobody to handle it. It arrives
/// when the handler returns.
///
/// # Safety
/// As for a handler.
unsafe fn default(info: *mut libc::siginfo_t) {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: zeroed is a valid value: the default, with no flags and an empty mask. The calls take it, numbers, and the
    // signal as it came.
    unsafe {
        (*action.as_mut_ptr()).sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGBUS, action.as_ptr(), ptr::null_mut());
        let process = libc::syscall(libc::SYS_getpid);
        let thread = libc::syscall(libc::SYS_gettid);
        // If this is forbidden, the access that raised the signal raises it again.
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            process,
            thread,
            libc::SIGBUS,
            info,
        );
    }
}

/// What a `si_code` means.
pub(crate) fn meaning(code: i32) -> &'static str {
    match code {
        BUS_MCEERR_AR | BUS_MCEERR_AO => "the hardware reports a memory error",
        BUS_OBJERR => "the hardware reports an error",
        BUS_ADRERR => "there is no memory behind the address",
        _ => "errors in more pages than can be told apart",
    }
}
