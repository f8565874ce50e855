//! Who else has a guest's memory: somebody with a mapping of a shareable lease, or a device that has pinned pages.
//!
//! The somebody lives in this process. To the kernel, which is asked whether the memory can be sealed, that is the same.

use super::op::Op;
use super::{Model, guest::Guest};
use crate::PAGE;
use crate::pinned::Pinned;
use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use vm_scrub::{BLOCK_SIZE, LeaseId};

/// More rings than this need more locked memory than some processes may have.
const MOST_PINS: usize = 4;

#[derive(Debug)]
enum Peer {
    Mapped {
        lease: LeaseId,
        start: *mut u8,
        len: usize,
        writable: bool,
    },
    Pinning {
        lease: LeaseId,
        address: u64,
        pages: u64,
        _ring: Pinned,
    },
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Peers {
    peers: Vec<Peer>,
    /// Leases whose pages were ever pinned: the kernel takes its time to let go.
    lingering: BTreeSet<LeaseId>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Peer::Mapped { start, len, .. } = *self {
            // SAFETY: mapped by `share`, and no longer used.
            unsafe { libc::munmap(start.cast(), len) };
        }
    }
}

impl Peers {
    /// Whether somebody has a mapping of this lease's memory.
    pub(super) fn have(&self, of: LeaseId) -> bool {
        self.peers
            .iter()
            .any(|peer| matches!(peer, Peer::Mapped { lease, .. } if *lease == of))
    }

    /// Whether the page at this guest address is pinned.
    pub(super) fn have_pinned(&self, of: LeaseId, at: u64) -> bool {
        self.peers.iter().any(|peer| match peer {
            Peer::Pinning {
                lease,
                address,
                pages,
                ..
            } => *lease == of && (*address..*address + pages * PAGE).contains(&at),
            Peer::Mapped { .. } => false,
        })
    }

    /// Whether pages of it are pinned, or were until a moment ago.
    pub(super) fn may_linger(&self, of: LeaseId) -> bool {
        self.lingering.contains(&of)
    }

    pub(super) fn clear(&mut self) {
        self.peers.clear();
    }

    fn share(&mut self, guest: &Guest, writable: bool) {
        let offsets = guest.lease.file_offsets();
        let Some((_, place)) = offsets.first() else {
            return;
        };
        let len = guest.blocks.len() * BLOCK_SIZE as usize;
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let file = place.file().as_raw_fd();
        // SAFETY: a mapping at a place of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                file,
                0,
            )
        };
        if start != libc::MAP_FAILED {
            let (lease, start) = (guest.lease.id(), start.cast());
            self.peers.push(Peer::Mapped {
                lease,
                start,
                len,
                writable,
            });
        }
    }

    fn pin(&mut self, guest: &mut Guest, page: u64, pages: u64) {
        let pins = self
            .peers
            .iter()
            .filter(|peer| matches!(peer, Peer::Pinning { .. }));
        let run = guest.run(page, pages);
        if pins.count() >= MOST_PINS || run.is_empty() {
            return;
        }
        let count = run.end - run.start;
        let address = guest.place(run.start).address;
        let Some(ring) = Pinned::new(guest.host(run.start), (count * PAGE) as usize) else {
            // Said already.
            return;
        };
        guest.may_lose = true;
        let pinned: Vec<u64> = run.map(|page| guest.place(page).address).collect();
        guest.pinned.extend(pinned);
        let lease = guest.lease.id();
        self.lingering.insert(lease);
        self.peers.push(Peer::Pinning {
            lease,
            address,
            pages: count,
            _ring: ring,
        });
    }

    /// Lets go of one of them. A peer that can still write to memory whose guest is gone does so at the last moment.
    fn let_go(&mut self, number: usize, is_alive: impl Fn(LeaseId) -> bool) {
        if self.peers.is_empty() {
            return;
        }
        let peer = self.peers.swap_remove(number % self.peers.len());
        if let Peer::Mapped {
            lease,
            start,
            len,
            writable: true,
        } = peer
            && !is_alive(lease)
        {
            for at in (0..len).step_by(BLOCK_SIZE as usize) {
                // SAFETY: mapped by `share`, and this thread's alone to write to through this mapping. Whoever else looks at
                // the file does so through the kernel or loops that expect it.
                unsafe { start.wrapping_add(at).write_volatile(0x77) };
            }
        }
    }
}

impl Model {
    /// Somebody takes hold of memory, or lets go.
    pub(super) fn hold(&mut self, op: &Op) {
        let (Op::Pin { guest: number, .. } | Op::Share { guest: number, .. }) = op else {
            if let Op::LetGo(number) = op {
                let alive = |lease| {
                    let guests = self.guests.iter().map(|guest| guest.lease.id());
                    guests
                        .chain(self.forgotten.iter().map(|(lease, _)| lease.id()))
                        .any(|id| id == lease)
                };
                self.peers.let_go(usize::from(*number), alive);
            }
            return;
        };
        let Some(mut guest) = self.pick(*number) else {
            return;
        };
        self.see(&mut guest);
        match *op {
            Op::Pin { page, pages, .. } => {
                self.peers
                    .pin(&mut guest, u64::from(page), 1 + u64::from(pages % 8));
            }
            Op::Share { writable, .. } => self.peers.share(&guest, writable),
            _ => {}
        }
        self.guests.push(guest);
    }
}
