//! Filters of system calls, as a VMM installs them once its pools are built.

use std::ffi::c_ulong;
use std::io;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// Pairs the names of system calls with their numbers on this architecture.
macro_rules! numbers {
    ($($name:ident)+) => {
        [$((stringify!($name).split_at("SYS_".len()).1, libc::$name)),+]
    };
}

/// The number of a system call, by the name that manual pages have for it. `None` for one that nobody here has asked about.
pub fn number(name: &str) -> Option<libc::c_long> {
    // What the C library makes of `open` on newer architectures.
    #[cfg(target_arch = "aarch64")]
    let open = libc::SYS_openat;
    #[cfg(target_arch = "x86_64")]
    let open = libc::SYS_open;
    let known = numbers![
        SYS_brk SYS_clock_gettime SYS_clock_nanosleep SYS_clone SYS_clone3 SYS_close SYS_exit SYS_exit_group SYS_fcntl
        SYS_fstat SYS_ftruncate SYS_futex SYS_getpid SYS_getrandom SYS_gettid SYS_ioctl SYS_lseek SYS_madvise SYS_mbind
        SYS_memfd_create SYS_mlock2 SYS_mmap SYS_mprotect SYS_mremap SYS_munlock SYS_munmap SYS_nanosleep SYS_openat
        SYS_pkey_mprotect SYS_prctl SYS_pread64 SYS_prlimit64 SYS_read SYS_restart_syscall SYS_rseq SYS_rt_sigprocmask SYS_rt_sigreturn
        SYS_sched_getaffinity SYS_sched_setaffinity SYS_sched_yield SYS_set_robust_list SYS_setpriority SYS_sigaltstack
        SYS_statx SYS_tgkill SYS_userfaultfd SYS_write
    ];
    let mut all = known.into_iter().chain([("open", open)]);
    all.find(|(known, _)| *known == name)
        .map(|(_, number)| number)
}

/// From now on the threads of this process, present and future, make the system calls `allowed` as before and get `EPERM` for
/// those `denied`; any other ends the process with `SIGSYS`.
///
/// # Errors
/// Where the kernel has no filters, or does not let this process have one.
pub fn install(allowed: &[libc::c_long], denied: &[libc::c_long]) -> io::Result<()> {
    let mut program = vec![
        load(ARCHITECTURE),
        skip_one_if(AUDIT_ARCH),
        end(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
    ];
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let answers = [(denied, refused), (allowed, libc::SECCOMP_RET_ALLOW)];
    for (calls, action) in answers {
        for call in calls {
            program.extend([skip_unless(*call as u32, 1), end(action)]);
        }
    }
    program.push(end(libc::SECCOMP_RET_KILL_PROCESS));
    enforce(program)
}

/// A system call that is refused if one of its arguments says so.
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    /// The number of the call.
    pub call: libc::c_long,
    /// Which argument, from 0 to 5; its lower half is looked at.
    pub argument: u32,
    /// These of its bits …
    pub mask: u32,
    /// … are these.
    pub value: u32,
    /// The answer.
    pub errno: i32,
}

/// From now on the threads of this process and what they execute get an error for those `refused`; all other calls are made as
/// before.
///
/// # Errors
/// As for [`install`].
pub fn refuse(refused: &[Refused]) -> io::Result<()> {
    let mut program = vec![
        load(ARCHITECTURE),
        skip_one_if(AUDIT_ARCH),
        end(libc::SECCOMP_RET_ALLOW),
    ];
    for refused in refused {
        program.extend([
            load(NUMBER),
            skip_unless(refused.call as u32, 4),
            load(ARGUMENTS + 8 * refused.argument),
            statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, refused.mask),
            skip_unless(refused.value, 1),
            end(libc::SECCOMP_RET_ERRNO | refused.errno as u32),
        ]);
    }
    program.push(end(libc::SECCOMP_RET_ALLOW));
    enforce(program)
}

// linux/seccomp.h: offsets of `nr`, `arch` and `args` in `struct seccomp_data`; the lower half of an argument comes first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

fn enforce(mut program: Vec<libc::sock_filter>) -> io::Result<()> {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: calls that take numbers, and one that takes a program which is live and as long as it says.
    let status = unsafe {
        let (yes, no): (c_ulong, c_ulong) = (1, 0);
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, yes, no, no, no) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const filter,
        )
    };
    match status {
        0 => Ok(()),
        // A thread that could not be brought under the filter, by its number.
        1.. => Err(io::Error::other(format!(
            "thread {status} has a filter of its own"
        ))),
        _ => Err(io::Error::last_os_error()),
    }
}

fn load(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn end(action: u32) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, action)
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    instruction(code, 0, 0, k)
}

fn skip_one_if(value: u32) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, value)
}

fn skip_unless(value: u32, statements: u8) -> libc::sock_filter {
    let compare = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    instruction(compare, 0, statements, value)
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    // All codes of classic BPF fit.
    libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}
