//! A device that behaves: it writes to guest memory through vm-memory, as the device models of a monitor do.
//!
//! Such writes come from the host. KVM's dirty log does not know them, and neither does anything that watches the
//! guest's own accesses. A scrubber that went by what the *guest* has written would leave them behind; the packets of
//! this module are there to catch that.

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::Error;
use crate::ranges::WORD;

/// Length of a packet in bytes: the secret word eight times.
pub const PACKET_BYTES: u64 = 8 * WORD;

/// Packets across a page border are laid at the first border of each of these sizes inside a region.
const BORDERS: [u64; 2] = [4096, 2 << 20];

/// Writes packets full of `secret` where mistakes are likely: the first and the last bytes of every region, and across
/// the first border between 4 KiB pages and between 2 MiB pages. Returns where, as (guest-physical address, length) in
/// bytes.
///
/// # Errors
///
/// [`Error::GuestMemory`] if the memory cannot be written.
pub fn write_packets<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
    secret: u64,
) -> Result<Vec<(u64, u64)>, Error> {
    let packet = secret.to_le_bytes().repeat((PACKET_BYTES / WORD) as usize);
    let mut written = Vec::new();
    for region in memory.iter() {
        for gpa in places(region.start_addr().0, region.len()) {
            memory
                .write_slice(&packet, GuestAddress(gpa))
                .map_err(|source| Error::GuestMemory {
                    doing: "write",
                    gpa,
                    source,
                })?;
            written.push((gpa, PACKET_BYTES));
        }
    }
    Ok(written)
}

/// Where the packets of a region go: in order, not overlapping, all inside.
fn places(start: u64, bytes: u64) -> Vec<u64> {
    let end = start.saturating_add(bytes);
    let borders = BORDERS
        .iter()
        .filter_map(|size| start.checked_add(1)?.checked_next_multiple_of(*size));
    let mut places = vec![start];
    places.extend(borders.map(|border| border.saturating_sub(PACKET_BYTES / 2)));
    places.push(end.saturating_sub(PACKET_BYTES));
    let mut free = start;
    places.retain(|&place| {
        let fits = place >= free
            && end
                .checked_sub(PACKET_BYTES)
                .is_some_and(|last| place <= last);
        if fits {
            free = place.saturating_add(PACKET_BYTES);
        }
        fits
    });
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_go_to_both_ends_and_across_borders() {
        assert_eq!(
            places(0, 64 << 20),
            [0, 4096 - 32, (2 << 20) - 32, (64 << 20) - 64]
        );
        assert_eq!(
            places(1 << 32, 8192),
            [1 << 32, (1 << 32) + 4064, (1 << 32) + 8192 - 64]
        );
        assert_eq!(places(0x1000, 4096), [0x1000, 0x2000 - 64]);
        assert_eq!(places(0x1000, 64), [0x1000]);
        assert!(places(0x1000, 63).is_empty());
    }

    #[test]
    fn the_secret_is_where_it_is_said_to_be() {
        let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 8192)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("memory");
        let secret = 0x1122_3344_5566_7788;
        let packets = write_packets(&memory, secret).expect("written");
        assert_eq!(packets.len(), 7);
        for (gpa, bytes) in packets {
            for offset in (0..bytes).step_by(8) {
                let word: u64 = memory.read_obj(GuestAddress(gpa + offset)).expect("read");
                assert_eq!(word, secret);
            }
        }
    }
}
