//! Making leases whose memory can be shared with other processes: a file takes the place of blocks of the pool, whose own memory
//! is lent to the kernel meanwhile. See [`sealing`](super::sealing) for the way back.

use super::{GuestRegion, Lease, LeaseError, LeasedRegion, Segment, close_unseen};
use crate::BLOCK_SIZE;
use crate::backing::{BLOCK, Backing, NotGranted, SharedFile};
use crate::pool::blocks::{Blocks, Taken};
use crate::pool::{OwnedFile, PageSize, Remains, Withheld};
use crate::scrub::HostPtr;
use std::sync::Arc;
use vm_memory::FileOffset;

/// Puts a file into the place of the blocks in `taken`, and shows it to the guest.
pub(super) fn open(
    mut lease: Lease,
    regions: Vec<GuestRegion>,
    taken: Blocks<Taken>,
) -> Result<Lease, LeaseError> {
    let pool = Arc::clone(&lease.pool);
    pool.lend(taken.extents());
    let bytes = taken.count() * BLOCK_SIZE;
    // No truncation: the pool holds this many bytes, so the address space does.
    let made = SharedFile::map(
        bytes as usize,
        pool.page_size == PageSize::Huge2M,
        pool.numa_node,
        pool.lock_memory,
    )
    .and_then(|file| {
        if pool.populate {
            file.populate(0..file.len())?;
        }
        Ok(file)
    })
    .map_err(|source| LeaseError::Share { bytes, source })
    .and_then(|file| match show(&lease, regions, &file) {
        Ok(regions) => Ok((file, regions)),
        Err(error) => Err(error),
    });
    match made {
        Ok((file, regions)) => {
            lease.regions = regions;
            lease.file = Some(Box::new(OwnedFile::new(
                &pool,
                lease.id,
                lease.guest.clone(),
                file,
            )));
            lease.blocks = Some(taken.lease());
            Ok(lease)
        }
        Err(error) => {
            match pool.refill(taken.extents()) {
                Ok(_) => taken.give_back(),
                Err(refused) => {
                    let reason = refused.to_string();
                    let about = Withheld::new(lease.id, lease.guest.clone(), bytes, reason);
                    pool.withhold(about, Remains::Capacity, taken.withhold());
                }
            }
            Err(error)
        }
    }
}

/// Opens a window for each region: one behind the other in the file, each from a block's border on.
fn show(
    lease: &Lease,
    regions: Vec<GuestRegion>,
    file: &SharedFile,
) -> Result<Vec<LeasedRegion>, LeaseError> {
    let pool = &lease.pool;
    let mut shown: Vec<LeasedRegion> = Vec::with_capacity(regions.len());
    let mut offset = 0;
    for region in regions {
        // No truncation, as above.
        let len = region.bytes as usize;
        let opened = pool.windows.open(len).and_then(|window| {
            let segment = Segment {
                guest_address: region.guest_address,
                offset,
                window: HostPtr(window.start().0),
                len,
            };
            // SAFETY: this part of the file is this region's alone, and the window was opened just now.
            match unsafe { file.grant(offset, segment.window.0, len) } {
                Ok(()) => Ok(LeasedRegion {
                    region,
                    window,
                    segments: vec![segment],
                }),
                Err(NotGranted { error, stuck }) => {
                    // It shows a file that is given to nobody.
                    if stuck {
                        window.leak();
                    } else {
                        pool.windows.retire(window);
                    }
                    Err(error)
                }
            }
        });
        match opened {
            Ok(region) => shown.push(region),
            Err(source) => {
                for region in shown {
                    // A window that stays open shows a file that is given to nobody.
                    close_unseen(pool, file, region, 0..0);
                }
                return Err(LeaseError::no_window(region.bytes, source));
            }
        }
        offset += len.next_multiple_of(BLOCK);
    }
    Ok(shown)
}

impl Lease {
    /// Whether the memory can be shared with other processes: see [`LeaseOptions::shareable`](super::LeaseOptions::shareable).
    pub fn is_shareable(&self) -> bool {
        self.file.is_some()
    }

    /// Where the regions of a shareable lease are in its file, by ascending guest address: what the back-end of a vhost-user
    /// device is told. Empty if the lease is not shareable.
    ///
    /// The regions from [`Lease::memory`] and [`Lease::regions`] have this as their `file_offset` too. The lease cannot see
    /// what becomes of the descriptor; the kernel does, when the file is sealed.
    pub fn file_offsets(&self) -> Vec<(GuestRegion, FileOffset)> {
        self.handles.expose();
        self.regions
            .iter()
            .filter_map(|leased| Some((leased.region, self.file_offset(leased)?)))
            .collect()
    }

    pub(super) fn file_offset(&self, leased: &LeasedRegion) -> Option<FileOffset> {
        let file = self.file.as_ref()?.get()?;
        let segment = leased.segments.first()?;
        Some(FileOffset::from_arc(
            Arc::clone(file.file()),
            segment.offset as u64,
        ))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sys::fault::{self, Call};
    use crate::{PageSize, Pool};
    use std::os::unix::fs::MetadataExt;
    use vm_memory::GuestAddress;

    /// How many mappings this process has of the file.
    fn mappings(file: &SharedFile) -> usize {
        let of = file.file().metadata().unwrap();
        let (major, minor) = (libc::major(of.dev()), libc::minor(of.dev()));
        let named = format!(" {major:02x}:{minor:02x} {} ", of.ino());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains(&named)).count()
    }

    /// Whatever is mapped there: its address space is nobody's any more, and is not given back as if it were closed.
    #[test]
    fn a_window_that_cannot_be_closed_stays_reserved() {
        let pool = Pool::builder()
            .capacity(BLOCK_SIZE)
            .page_size(PageSize::Base4K)
            .threads(1)
            // Closed windows go at once.
            .kept_windows(0)
            .build()
            .unwrap();
        let lease = pool.lease(&[(GuestAddress(0), BLOCK_SIZE)]).unwrap();
        let file = SharedFile::map(BLOCK, false, None, true).unwrap();
        assert_eq!(mappings(&file), 1, "the view");
        for (closes, left) in [(true, 1), (false, 2)] {
            let not_locked = fault::inject(Call::Mlock, 0, 1, libc::ENOMEM);
            // Behind reserving the window and showing the file in it.
            let times = if closes { 0 } else { 1 };
            let _not_closed = fault::inject(Call::Mmap, 2, times, libc::ENOMEM);
            let error = show(&lease, lease.guest_regions().collect(), &file).unwrap_err();
            assert_eq!(not_locked.hits(), 1 + times);
            assert!(matches!(error, LeaseError::Lock { .. }), "{error}");
            assert_eq!(mappings(&file), left, "closes: {closes}");
        }
    }
}
