//! What an embedder decides about one lease.

/// What a lease is to be, besides its regions.
///
/// ```
/// # use vm_scrub::{LeaseOptions, Pool};
/// # use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
/// let pool = Pool::builder().capacity(2 << 20).build()?;
/// let options = LeaseOptions::new().guest("web-7").shareable(true);
/// let lease = pool.lease_with(&[(GuestAddress(0), 2 << 20)], options)?;
/// for region in lease.memory().iter() {
///     // What a vhost-user front-end sends to its back-end.
///     let place = region.file_offset().expect("the memory is shareable");
///     let (_descriptor, _offset) = (place.file(), place.start());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct LeaseOptions {
    pub(super) guest: Option<String>,
    pub(super) shareable: bool,
}

impl LeaseOptions {
    /// A guest without a name, in memory of this process's own.
    pub fn new() -> Self {
        Self::default()
    }

    /// The guest's name, which the receipt will carry.
    pub fn guest(mut self, name: impl Into<String>) -> Self {
        self.guest = Some(name.into());
        self
    }

    /// Whether the memory can be shared with other processes, as the back-ends of vhost-user devices need it. It is not, if
    /// not said otherwise.
    ///
    /// The memory is then a file (`memfd_create(2)`, sealed against changes of its size) in 4 KiB pages, or in hugetlb pages
    /// in a pool of those, and its descriptor goes out with the regions: `GuestMemoryRegion::file_offset`, or
    /// [`Lease::file_offsets`](super::Lease::file_offsets). It takes as much of the pool as any lease, but the pool's own
    /// memory is lent to the kernel for that time, and the file is never leased again: after teardown the kernel gets it,
    /// and fresh memory takes its place.
    ///
    /// Teardown seals the file against writing (`F_SEAL_WRITE`), which the kernel refuses while any process has a mapping that
    /// could be written to, or while pages are pinned for DMA; a mapping that is only readable counts too, if it was made
    /// through the descriptor that was given out. So tell the back-ends to let go first. What they do not let go of
    /// is quarantined, and tried again later: [`Pool::withheld`](crate::Pool::withheld). A back-end that keeps nothing
    /// but the descriptor reads zeros ever after, and keeps the zeroed pages from the kernel.
    ///
    /// A back-end can make holes in the file and so take memory away from the guest and from this process, which is then killed by
    /// `SIGBUS` if the host has no page to fill them; and it can keep the file from being sealed, or write to it at the last
    /// moment. The last two cost the pool the lease's blocks, in the worst case for good.
    pub fn shareable(mut self, shareable: bool) -> Self {
        self.shareable = shareable;
        self
    }
}
