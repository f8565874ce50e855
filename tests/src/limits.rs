//! Limits of this process, for tests that run in a child of their own.

use std::fs;
use std::io::Error;

/// The type of `RLIMIT_AS` and the like.
#[cfg(target_env = "gnu")]
type Resource = libc::__rlimit_resource_t;
#[cfg(not(target_env = "gnu"))]
type Resource = libc::c_int;

/// Sets the limit on `resource` (`RLIMIT_AS` and the like) to `value`; `RLIM_INFINITY` is as much as this process may have.
pub fn set(resource: Resource, value: u64) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is live and of the right type, and writable for the first call.
    let status = unsafe {
        assert_eq!(libc::getrlimit(resource, &raw mut limit), 0);
        if value == libc::RLIM_INFINITY {
            limit.rlim_cur = limit.rlim_max;
        } else {
            limit.rlim_cur = value;
            limit.rlim_max = limit.rlim_max.max(value);
        }
        libc::setrlimit(resource, &raw const limit)
    };
    assert_eq!(status, 0, "{}", Error::last_os_error());
}

/// Takes away what lets a privileged thread, and those that it starts, lock memory without limit.
pub fn obey_memlock() {
    /// `CAP_IPC_LOCK` of `linux/capability.h`.
    const CAP_IPC_LOCK: u32 = 14;
    // `_LINUX_CAPABILITY_VERSION_3`, and the calling thread.
    let mut header = [0x2008_0522_u32, 0];
    // Effective, permitted and inheritable capabilities, twice.
    let mut sets = [0_u32; 6];
    // SAFETY: both structures are live, and as large as this version has them.
    unsafe {
        let got = libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr());
        assert_eq!(got, 0, "{}", Error::last_os_error());
        sets[0] &= !(1 << CAP_IPC_LOCK);
        let set = libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr());
        assert_eq!(set, 0, "{}", Error::last_os_error());
    }
}

/// Bytes of address space that this process has locked in memory, as the kernel counts them.
pub fn locked() -> u64 {
    in_status("VmLck:")
}

/// A number of bytes in `/proc/self/status`.
pub fn in_status(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a process can read its status");
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    let number = number.and_then(|number| number.trim().parse::<u64>().ok());
    number.expect("the kernel says how much") << 10
}
