//! The x86_64 guest: how a vCPU enters it and how it answers.
//!
//! A vCPU begins directly in 64-bit mode at privilege level 3, with an identity mapping and without an interrupt
//! table. That spares the guest all start-up code, runs at full speed also where KVM has no hardware virtualisation
//! under it (privilege level 0 would be emulated there, instruction by instruction), and turns every fault into a
//! triple fault, a `Shutdown` exit, at once. It needs no stack: nothing is called and nothing interrupts.

mod code;
mod paging;
mod tss;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

pub(crate) use code::code;

use crate::error::Error;
use crate::firmware::{Firmware, RESERVED};
use crate::vcpu::{Answer, Start};

/// What x86_64 needs of KVM besides what every processor needs.
pub(crate) const CAPABILITIES: &[Cap] = &[Cap::ExtCpuid, Cap::SetTssAddr];

/// Where KVM puts three pages of its own on Intel processors without unrestricted guests: the place Firecracker and
/// others use. Its identity map page is just below by default, at 0xFFFB_C000. Both are in [`RESERVED`].
const KVM_TSS: usize = 0xFFFB_D000;

// Bits of control registers (Intel SDM volume 3, 2.5; AMD APM volume 2, 3.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// RFLAGS: the bit that is always one, and an I/O privilege level of 3, so that `out` works at privilege level 3 (where
/// KVM does not keep that level, [`tss`] allows it).
const RFLAGS: u64 = (1 << 1) | (3 << 12);

/// The state of a vCPU when it enters the guest, apart from the general registers.
#[derive(Debug)]
pub(crate) struct EntryState {
    sregs: kvm_sregs,
}

/// This processor has guest code.
pub(crate) fn supported() -> Result<(), Error> {
    Ok(())
}

/// Writes what the guest needs besides its code.
pub(crate) fn write_tables(firmware: &Firmware) -> Result<(), Error> {
    paging::write_page_tables(firmware)?;
    tss::write(firmware)
}

/// What must be done once per virtual machine, before its first vCPU.
pub(crate) fn prepare_vm(vm: &VmFd) -> Result<(), Error> {
    vm.set_tss_address(KVM_TSS)
        .map_err(Error::kvm("set the TSS address"))
}

impl EntryState {
    /// Prepares a new vCPU.
    pub(crate) fn new(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, Error> {
        // Before the first KVM_SET_SREGS: a vCPU without CPUID has no long mode, and Linux 6.12 insists on it.
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("get the supported CPUID"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(Error::kvm("set the CPUID"))?;

        let mut sregs = vcpu
            .get_sregs()
            .map_err(Error::kvm("get the system registers"))?;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
        sregs.cr3 = paging::ROOT;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
        sregs.idt = kvm_dtable::default();
        sregs.gdt = kvm_dtable::default();
        sregs.ldt = kvm_segment {
            unusable: 1,
            ..kvm_segment::default()
        };
        sregs.tr = tss::segment();
        sregs.cs = segment(true);
        for data in [
            &mut sregs.ss,
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
        ] {
            *data = segment(false);
        }
        Ok(Self { sregs })
    }

    /// Sets everything a former run may have changed. A `Shutdown` resets a vCPU on AMD processors, and a run that
    /// ended in the delivery of an exception would begin with it again.
    pub(crate) fn enter(&self, vcpu: &VcpuFd, start: &Start) -> Result<(), Error> {
        vcpu.set_sregs(&self.sregs)
            .map_err(Error::kvm("set the system registers"))?;
        vcpu.set_vcpu_events(&kvm_vcpu_events::default())
            .map_err(Error::kvm("clear pending events"))?;
        let regs = kvm_regs {
            rip: RESERVED.start + code::entry(start.program),
            rflags: RFLAGS,
            rax: start.word,
            rbx: start.mailbox.table.start,
            rdx: start.mailbox.table.end,
            r8: start.mailbox.passes,
            ..kvm_regs::default()
        };
        vcpu.set_regs(&regs)
            .map_err(Error::kvm("set the registers"))
    }
}

/// Reads what the guest left in its registers when it had finished.
pub(crate) fn answer(vcpu: &VcpuFd) -> Result<Answer, Error> {
    let regs = vcpu.get_regs().map_err(Error::kvm("get the registers"))?;
    Ok(Answer {
        bytes_read: regs.r12,
        found: regs.r13,
        first_gpa: regs.r14,
        first_value: regs.r15,
    })
}

/// A flat segment at privilege level 3; the selectors have no table behind them, because nothing ever loads one.
fn segment(code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector: if code { 0x33 } else { 0x2B },
        // Execute/read or read/write, both already accessed.
        type_: if code { 11 } else { 3 },
        present: 1,
        dpl: 3,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..kvm_segment::default()
    }
}
