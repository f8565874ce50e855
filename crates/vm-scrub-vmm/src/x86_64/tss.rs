//! The guest's task state segment, which allows `out` at privilege level 3.
//!
//! `RFLAGS.IOPL = 3` alone should do that. But a KVM that has no hardware virtualisation under it does not keep that
//! level, and looks into the I/O permission bitmap of the segment the task register names. After reset that segment
//! begins at address 0, so the bitmap would be whatever stands in the first bytes of the guest's RAM: a guest whose RAM
//! is zero could exit, and one whose RAM is full of secrets could not. So the segment is kept in the firmware.

use kvm_bindings::kvm_segment;

use crate::error::Error;
use crate::firmware::{Firmware, RESERVED};

/// Place in the firmware, between the page tables.
const TSS: u64 = 0x3000;
const TSS_BYTES: u32 = 4096;

/// Where the segment says at which of its bytes the bitmap begins, and where that is: right after the fixed part
/// (Intel SDM volume 3, figure 8-11). A port is allowed if its bit is zero, and the rest of the page is.
const BITMAP_BASE_FIELD: u64 = 0x66;
const BITMAP_BASE: u16 = 0x68;

/// Writes the segment into the firmware.
pub(super) fn write(firmware: &Firmware) -> Result<(), Error> {
    firmware.write(TSS + BITMAP_BASE_FIELD, &BITMAP_BASE.to_le_bytes())
}

/// What belongs into the task register: a busy 64-bit TSS.
pub(super) fn segment() -> kvm_segment {
    kvm_segment {
        base: RESERVED.start + TSS,
        limit: TSS_BYTES - 1,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    }
}
