//! Can this host run the guests of this crate, and if not, what has to be done about it?
//!
//! Tests and the demonstration ask this first, and fall back to [`crate::ThreadGuest`] or skip.

use kvm_ioctls::{Cap, Kvm};
use nix::errno::Errno;

use crate::arch;
use crate::error::Error;

/// The only version of the KVM interface there has ever been since it became stable (Documentation/virt/kvm/api.rst).
const KVM_API_VERSION: i32 = 12;

/// Opens `/dev/kvm`, checks its version and capabilities, and creates a virtual machine for trial.
///
/// # Errors
///
/// [`Error::KvmUnusable`], which says what is missing and what to do; [`Error::Architecture`] on other processors
/// than x86_64.
pub fn kvm_usable() -> Result<(), Error> {
    let kvm = open()?;
    kvm.create_vm().map(|_| ()).map_err(|source| Error::KvmUnusable {
        problem: format!("it opens, but no virtual machine can be created: {source}"),
        advice: "another hypervisor may hold the processor's virtualisation, or memory is short; see the kernel log",
    })
}

/// Opens `/dev/kvm` and checks all but the creation of a virtual machine.
pub(crate) fn open() -> Result<Kvm, Error> {
    arch::supported()?;
    let kvm = Kvm::new().map_err(|source| Error::KvmUnusable {
        problem: source.to_string(),
        advice: advice(source.errno()),
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(Error::KvmUnusable {
            problem: format!("its interface has version {version}, not {KVM_API_VERSION}"),
            advice: "use a kernel newer than 2.6.22",
        });
    }
    let missing: Vec<_> = arch::CAPABILITIES
        .iter()
        .chain(&[Cap::UserMemory, Cap::ImmediateExit, Cap::VcpuEvents])
        .filter(|cap| !kvm.check_extension(**cap))
        .map(|cap| format!("{cap:?}"))
        .collect();
    if !missing.is_empty() {
        return Err(Error::KvmUnusable {
            problem: format!("capabilities are missing: {}", missing.join(", ")),
            advice: "use Linux 4.13 or newer",
        });
    }
    Ok(kvm)
}

fn advice(errno: i32) -> &'static str {
    match Errno::from_raw(errno) {
        Errno::ENOENT => {
            "`modprobe kvm_intel` or `modprobe kvm_amd`; in a container pass the device in (`--device /dev/kvm`); \
             in a virtual machine switch nested virtualisation on"
        }
        Errno::EACCES | Errno::EPERM => {
            "add the user to the group that owns /dev/kvm (`usermod -aG kvm USER`) or run as root"
        }
        Errno::ENODEV | Errno::ENXIO => {
            "the device node has no driver behind it: `modprobe kvm_intel` or `modprobe kvm_amd`, and look in the \
             firmware's settings whether virtualisation is switched on"
        }
        _ => "see `dmesg | grep kvm`",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_fits_the_error() {
        assert!(advice(Errno::ENOENT as i32).contains("modprobe"));
        assert!(advice(Errno::EACCES as i32).contains("group"));
        assert!(advice(Errno::ENODEV as i32).contains("modprobe"));
    }
}
