//! What a VMM does to its guest's memory: ordinary access, and things that it had better leave.

use super::Model;
use super::guest::Guest;
use super::op::{Meddling, Op};
use crate::PAGE;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// Pages of the files that are mapped over a guest's memory; more are never replaced at once.
const MOST_PAGES: u64 = 16;

/// What such a file is full of.
const SECRET: u8 = 0x5e;

/// `MADV_GUARD_INSTALL` of `asm-generic/mman-common.h`, Linux 6.13.
const MADV_GUARD_INSTALL: libc::c_int = 102;

fn file() -> File {
    // SAFETY: the name is a NUL-terminated literal; the descriptor is new and nobody else's.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"vmm".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    };
    file.write_all(&[SECRET; (MOST_PAGES * PAGE) as usize])
        .expect("a file in memory can be written");
    file
}

/// Panics if the file is not what it was: nobody but the guest may have written to it, and the guest does not.
#[track_caller]
pub(super) fn assert_untouched(file: &File) {
    let mut seen = [0; (MOST_PAGES * PAGE) as usize];
    file.read_exact_at(&mut seen, 0)
        .expect("it is as long as it was");
    assert!(
        seen.iter().all(|byte| *byte == SECRET),
        "a file of the VMM's was scrubbed"
    );
}

impl Model {
    /// The guest of this number, wrapping, taken out of the list.
    pub(super) fn pick(&mut self, number: u8) -> Option<Guest> {
        let count = self.guests.len();
        (count > 0).then(|| self.guests.swap_remove(usize::from(number) % count))
    }

    /// The first look at a guest's memory.
    pub(super) fn see(&self, guest: &mut Guest) {
        guest.see(&self.dirtied, self.knobs.thorough);
    }

    /// Writes or reads.
    pub(super) fn touch(&mut self, op: &Op) {
        let (Op::Write { guest: number, .. }
        | Op::Smear { guest: number, .. }
        | Op::Look { guest: number, .. }) = op
        else {
            return;
        };
        let Some(mut guest) = self.pick(*number) else {
            return;
        };
        self.see(&mut guest);
        match *op {
            Op::Write {
                page, at, len, tag, ..
            } => {
                let (at, len) = (u64::from(at), u64::from(len % 9000));
                guest.write(u64::from(page), at, len, tag, &mut self.dirtied);
            }
            Op::Smear { stride, tag, .. } => {
                let stride = 16 + usize::from(stride);
                let last = guest.pages - 1;
                for page in (0..last).step_by(stride).chain([last]) {
                    guest.write(page, PAGE - 8, 8, tag, &mut self.dirtied);
                }
            }
            Op::Look { page, .. } => guest.check(u64::from(page)),
            _ => {}
        }
        self.guests.push(guest);
    }

    /// Does to a part of a guest's window what no guest asks for.
    pub(super) fn meddle(&mut self, op: &Op) {
        let Op::Vmm {
            guest: number,
            what,
            page,
            pages,
        } = *op
        else {
            return;
        };
        let Some(mut guest) = self.pick(number) else {
            return;
        };
        self.see(&mut guest);
        let run = guest.run(u64::from(page), 1 + u64::from(pages) % MOST_PAGES);
        // Ordinary access goes on in hugetlb memory, whose parts cannot be treated differently.
        if !run.is_empty() && guest.lease.page_size() != vm_scrub::PageSize::Huge2M {
            let pages = run.clone().map(|page| guest.place(page).address);
            let pages: Vec<u64> = pages.collect();
            let kept = apply(&mut guest, what, run);
            self.files.extend(kept);
            // What the device has is not the guest's memory any more, or may not be.
            if !matches!(what, Meddling::Close | Meddling::ReadOnly | Meddling::Lock) {
                guest.pinned.retain(|page| !pages.contains(page));
            }
        }
        self.guests.push(guest);
    }
}

/// Carries it out; the file that is visible now, if it is one.
fn apply(guest: &mut Guest, what: Meddling, run: std::ops::Range<u64>) -> Option<File> {
    let start: *mut libc::c_void = guest.host(run.start).cast();
    let len = ((run.end - run.start) * PAGE) as usize;
    let private = !guest.lease.is_shareable();
    // SAFETY: the range lies in the guest's window, to which nobody holds a reference.
    let advise = |advice| unsafe { libc::madvise(start, len, advice) } == 0;
    // SAFETY: as above.
    let protect = |protection| unsafe { libc::mprotect(start, len, protection) } == 0;
    let map = |flags, file: Option<&File>| {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: as above; what was there is the guest's and gives way.
        let mapped = unsafe { libc::mmap(start, len, protection, flags | libc::MAP_FIXED, fd, 0) };
        assert_ne!(
            mapped,
            libc::MAP_FAILED,
            "{}",
            std::io::Error::last_os_error()
        );
    };
    match what {
        Meddling::Close if protect(libc::PROT_NONE) => guest.give_up(run),
        Meddling::ReadOnly if protect(libc::PROT_READ) => guest.give_up(run),
        Meddling::Discard => {
            if advise(libc::MADV_DONTNEED) && private {
                guest.content.retain(|page, _| !run.contains(page));
            }
        }
        Meddling::Free => {
            if advise(libc::MADV_FREE) {
                guest.give_up(run);
            }
        }
        Meddling::Huge => drop(advise(libc::MADV_HUGEPAGE)),
        Meddling::Small => drop(advise(libc::MADV_NOHUGEPAGE)),
        Meddling::Mergeable => drop(advise(libc::MADV_MERGEABLE)),
        Meddling::Inherit => drop(advise(libc::MADV_DOFORK) && advise(libc::MADV_DODUMP)),
        // SAFETY: as above.
        Meddling::Lock => drop(unsafe { libc::mlock(start, len) } == 0),
        Meddling::Guard => {
            if advise(MADV_GUARD_INSTALL) {
                guest.give_up(run);
            }
        }
        Meddling::MapAnonymous => {
            map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None);
            guest.content.retain(|page, _| !run.contains(page));
            // Memory that was locked as a whole may come populated; either way it is the guest's.
        }
        Meddling::MapShared | Meddling::MapSnapshot | Meddling::MapFile => {
            guest.may_lose |= private;
            let file = (what != Meddling::MapShared).then(file);
            match what {
                Meddling::MapShared => map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, None),
                Meddling::MapSnapshot => map(libc::MAP_PRIVATE, file.as_ref()),
                _ => map(libc::MAP_SHARED, file.as_ref()),
            }
            guest.give_up(run);
            return file;
        }
        Meddling::Close | Meddling::ReadOnly => {}
    }
    None
}
