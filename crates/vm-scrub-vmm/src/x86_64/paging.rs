//! The guest's page tables: every guest-physical address below [`ADDRESS_LIMIT`] is mapped to itself.
//!
//! The tables say nothing about where RAM is. A guest that goes to an address without a memslot makes an MMIO exit,
//! and one whose RAM was taken away is stopped by KVM.

use crate::error::Error;
use crate::firmware::{Firmware, RESERVED};
use crate::ranges::ADDRESS_LIMIT;

// Places in the firmware, between code and mailboxes.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORIES: u64 = 0x1_0000;

const TABLE_BYTES: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

// Present, writable, for user mode. Accessed and dirty are set from the beginning, so that no table is ever written to
// by the processor. The last bit makes a directory's entry a 2 MiB page (Intel SDM volume 3, table 4-18).
const PRESENT_WRITABLE_USER: u64 = 0b111;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const TABLE: u64 = PRESENT_WRITABLE_USER | ACCESSED;
const PAGE: u64 = TABLE | DIRTY | LARGE;

/// What belongs into CR3.
pub(super) const ROOT: u64 = RESERVED.start + PML4;

/// Writes the tables into the firmware.
pub(super) fn write_page_tables(firmware: &Firmware) -> Result<(), Error> {
    let directories = RESERVED.start + DIRECTORIES;
    firmware.write(PML4, &((RESERVED.start + PDPT) | TABLE).to_le_bytes())?;
    firmware.write(
        PDPT,
        &entries(directories, TABLE_BYTES, TABLE, ADDRESS_LIMIT / GIB),
    )?;
    firmware.write(
        DIRECTORIES,
        &entries(0, LARGE_PAGE, PAGE, ADDRESS_LIMIT / LARGE_PAGE),
    )
}

/// `count` entries for `first`, `first + step`, and so on.
fn entries(first: u64, step: u64, flags: u64, count: u64) -> Vec<u8> {
    (0..count)
        .flat_map(|index| ((first + index * step) | flags).to_le_bytes())
        .collect()
}
