//! What a guest does with its memory: write all of it, read all of it.
//!
//! Through vm-memory, as a VMM would, with handles that are gone when the function returns.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_scrub::Lease;

/// Bytes that are copied in one go.
const CHUNK: usize = 64 << 10;

/// Writes to every byte of the lease something that is not zero and differs from page to page.
pub fn fill(lease: &Lease, seed: u8) {
    let memory = lease.memory();
    for region in lease.guest_regions() {
        fill_range(&memory, region.guest_address, region.bytes, seed);
    }
}

/// Writes a little to every eighth page of the lease, from its first to its last: dirty everywhere, and cheap, because the
/// kernel need not supply the pages between.
pub fn smear(lease: &Lease, seed: u8) {
    let memory = lease.memory();
    for region in lease.guest_regions() {
        let last = region.bytes - 8;
        for at in (0..last).step_by(8 * 4096).chain([last]) {
            let address = GuestAddress(region.guest_address.wrapping_add(at));
            memory
                .write_obj([seed.max(1); 8], address)
                .expect("a guest's memory can be written");
        }
    }
}

/// Writes something that is not zero to every byte of `[address, address + bytes)`.
pub fn fill_range(memory: &GuestMemoryMmap, address: u64, bytes: u64, seed: u8) {
    // 251 is a prime: neighbouring pages and chunks begin at different places of the pattern.
    let pattern: Vec<u8> = (0..CHUNK + 251)
        .map(|at| (at % 251) as u8)
        .map(|byte| byte.wrapping_add(seed).max(1))
        .collect();
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(CHUNK as u64) as usize;
        let shift = (at / CHUNK as u64 % 251) as usize;
        memory
            .write_slice(
                &pattern[shift..shift + len],
                GuestAddress(address.wrapping_add(at)),
            )
            .expect("a guest's memory can be written");
        at += len as u64;
    }
}

/// The guest address of the lease's first byte that is not zero.
pub fn first_nonzero(lease: &Lease) -> Option<u64> {
    let memory = lease.memory();
    lease
        .guest_regions()
        .find_map(|region| first_nonzero_in(&memory, region.guest_address, region.bytes))
}

/// The first address in `[address, address + bytes)` whose byte is not zero.
pub fn first_nonzero_in(memory: &GuestMemoryMmap, address: u64, bytes: u64) -> Option<u64> {
    static ZEROS: [u8; CHUNK] = [0; CHUNK];
    let mut chunk = vec![0xff_u8; CHUNK];
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(CHUNK as u64) as usize;
        // Not zero before, so that a read that delivers nothing is noticed.
        chunk.fill(0xff);
        memory
            .read_slice(&mut chunk[..len], GuestAddress(address + at))
            .expect("a guest's memory can be read");
        // A comparison of slices is one `memcmp`; searching byte by byte is slow without optimisation.
        if chunk[..len] != ZEROS[..len] {
            let offset = chunk.iter().position(|byte| *byte != 0)?;
            return Some(address + at + offset as u64);
        }
        at += len as u64;
    }
    None
}

/// Panics if any byte of the lease is not zero.
#[track_caller]
pub fn assert_all_zero(lease: &Lease) {
    if let Some(address) = first_nonzero(lease) {
        panic!(
            "{} in {:?}: the byte at guest address {address:#x} is not zero",
            lease.id(),
            lease.blocks()
        );
    }
}
