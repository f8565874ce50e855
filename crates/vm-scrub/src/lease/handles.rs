//! Who still has a lease's memory in hand.
//!
//! Handles are vm-memory regions given out by the lease. The lease keeps weak references only, so that what it counts is
//! what others hold. A count that has reached zero stays there: nobody can make a new handle out of an old one, and the
//! lease makes no new ones once teardown owns it.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestRegionMmap, MmapRegion};

type Counted = Weak<dyn Any + Send + Sync>;

/// One region that was given out.
#[derive(Debug)]
pub(super) struct Handle {
    /// The mapping inside the region: also held by whoever called `GuestRegionMmap::get_mmap`.
    mapping: Counted,
    /// The region itself, where it went out in a collection: clones of the collection share it.
    region: Option<Counted>,
}

impl Handle {
    /// Counts a region that its receiver owns.
    pub(super) fn of_owned<B: Bitmap + Send + Sync + 'static>(region: &GuestRegionMmap<B>) -> Self {
        let mapping: Arc<MmapRegion<B>> = region.get_mmap();
        let counted = Arc::downgrade(&mapping);
        Self {
            mapping: counted,
            region: None,
        }
    }

    /// Counts a region that is shared by a collection and its clones.
    pub(super) fn of_shared(region: &Arc<GuestRegionMmap>) -> Self {
        let counted = Arc::downgrade(region);
        Self {
            region: Some(counted),
            ..Self::of_owned(region)
        }
    }

    fn holders(&self) -> usize {
        let mappings = self.mapping.strong_count();
        match self.region.as_ref().map_or(0, Weak::strong_count) {
            0 => mappings,
            // One of the mapping's holders is the region itself.
            clones => clones + mappings.saturating_sub(1),
        }
    }
}

/// Every handle that a lease has given out, in the sets in which they were given out.
#[derive(Debug, Default)]
pub(super) struct Handles {
    given_out: Mutex<Vec<Vec<Handle>>>,
    exposed: AtomicBool,
}

/// For a set of regions: the owners of the region that has most.
fn owners(set: &[Handle]) -> usize {
    set.iter().map(Handle::holders).max().unwrap_or(0)
}

impl Handles {
    fn lock(&self) -> MutexGuard<'_, Vec<Vec<Handle>>> {
        // A vector of weak references cannot be half changed.
        self.given_out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the owners of a set of regions from now on.
    pub(super) fn give_out(&self, set: impl Iterator<Item = Handle>) {
        self.expose();
        let mut sets = self.lock();
        sets.retain(|set| owners(set) > 0);
        sets.push(set.collect());
    }

    /// Remembers that somebody has got the memory's address.
    pub(super) fn expose(&self) {
        self.exposed.store(true, Ordering::SeqCst);
    }

    /// Whether anybody ever got the memory's address.
    pub(super) fn exposed(&self) -> bool {
        self.exposed.load(Ordering::SeqCst)
    }

    /// How many owners the memory has outside the lease.
    pub(super) fn holders(&self) -> usize {
        self.lock().iter().map(|set| owners(set)).sum()
    }
}
