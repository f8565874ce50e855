//! Who still has a lease's memory in hand.
//!
//! Handles are vm-memory regions given out by the lease. The lease owns each of the mappings in them too, so that nobody can
//! take one out of its `Arc`, where it could no longer be counted. Asking who holds the memory gives up what nobody else has,
//! in one step, so that a mapping that has been found to be gone cannot come back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestRegionMmap, MmapRegion};

/// A mapping of a region that was given out.
trait Mapping: Send + Sync {
    /// How many others own it.
    fn others(&self) -> usize;

    /// Gives it up for good if nobody else owns it, else hands it back.
    fn give_up(self: Box<Self>) -> Result<GivenUp, Box<dyn Mapping>>;
}

/// A mapping that nobody owns any more, with a bitmap of the embedder's in it.
type GivenUp = Box<dyn Send + Sync>;

impl<B: Bitmap + Send + Sync + 'static> Mapping for Arc<MmapRegion<B>> {
    fn others(&self) -> usize {
        Arc::strong_count(self) - 1
    }

    fn give_up(self: Box<Self>) -> Result<GivenUp, Box<dyn Mapping>> {
        // Also makes weak references worthless, in the same step.
        match Arc::try_unwrap(*self) {
            Ok(mapping) => Ok(Box::new(mapping)),
            Err(shared) => Err(Box::new(shared)),
        }
    }
}

/// One region that was given out.
pub(super) struct Handle {
    /// The mapping inside the region: also owned by whoever called `GuestRegionMmap::get_mmap`.
    mapping: Box<dyn Mapping>,
    /// The region itself, where it went out in a collection: clones of the collection share it.
    region: Option<Weak<GuestRegionMmap>>,
}

impl Handle {
    /// Counts a region that its receiver owns.
    pub(super) fn of_owned<B: Bitmap + Send + Sync + 'static>(region: &GuestRegionMmap<B>) -> Self {
        Self {
            mapping: Box::new(region.get_mmap()),
            region: None,
        }
    }

    /// Counts a region that is shared by a collection and its clones.
    pub(super) fn of_shared(region: &Arc<GuestRegionMmap>) -> Self {
        Self {
            region: Some(Arc::downgrade(region)),
            ..Self::of_owned(region)
        }
    }

    fn holders(&self) -> usize {
        let mappings = self.mapping.others();
        match self.region.as_ref().map_or(0, Weak::strong_count) {
            0 => mappings,
            // One of the mapping's holders is the region itself.
            clones => clones + mappings.saturating_sub(1),
        }
    }
}

/// Every handle that a lease has given out, in the sets in which they were given out.
#[derive(Default)]
pub(super) struct Handles {
    given_out: Mutex<Vec<Vec<Handle>>>,
    exposed: AtomicBool,
}

/// For a set of regions: the owners of the region that has most.
fn owners(set: &[Handle]) -> usize {
    set.iter().map(Handle::holders).max().unwrap_or(0)
}

/// Gives up every mapping that nobody else owns, and forgets sets of which none is left.
fn give_up(sets: &mut Vec<Vec<Handle>>) -> Vec<GivenUp> {
    let mut given_up = Vec::new();
    for set in sets.iter_mut() {
        for Handle { mapping, region } in std::mem::take(set) {
            match mapping.give_up() {
                Ok(gone) => given_up.push(gone),
                Err(mapping) => set.push(Handle { mapping, region }),
            }
        }
    }
    sets.retain(|set| !set.is_empty());
    given_up
}

impl Handles {
    fn lock(&self) -> MutexGuard<'_, Vec<Vec<Handle>>> {
        // No code of the embedder's runs under the lock: bitmaps are dropped outside.
        self.given_out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the owners of a set of regions from now on.
    pub(super) fn give_out(&self, set: impl Iterator<Item = Handle>) {
        self.expose();
        let set = set.collect();
        let mut sets = self.lock();
        let given_up = give_up(&mut sets);
        sets.push(set);
        drop(sets);
        drop(given_up);
    }

    /// Remembers that somebody has got the memory's address.
    pub(super) fn expose(&self) {
        self.exposed.store(true, Ordering::SeqCst);
    }

    /// Whether anybody ever got the memory's address.
    pub(super) fn exposed(&self) -> bool {
        self.exposed.load(Ordering::SeqCst)
    }

    /// How many owners the memory has outside the lease. When there are none there are never going to be any, unless the lease
    /// gives something out again.
    pub(super) fn holders(&self) -> usize {
        let mut sets = self.lock();
        let given_up = give_up(&mut sets);
        // An owner that has just gone between the two is still one: none means that every mapping was given up.
        let holders = sets.iter().map(|set| owners(set).max(1)).sum();
        drop(sets);
        drop(given_up);
        holders
    }
}

impl std::fmt::Debug for Handles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handles")
            .field("exposed", &self.exposed())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Somebody else's when it was to be given up, and nobody's when it was counted.
    struct JustGone;

    impl Mapping for JustGone {
        fn others(&self) -> usize {
            0
        }

        fn give_up(self: Box<Self>) -> Result<GivenUp, Box<dyn Mapping>> {
            Err(self)
        }
    }

    /// It has not been given up, so who has a weak reference can still make it theirs.
    #[test]
    fn who_has_gone_between_two_looks_still_counts() {
        let handles = Handles::default();
        let set = [JustGone, JustGone].map(|mapping| Handle {
            mapping: Box::new(mapping),
            region: None,
        });
        handles.give_out(set.into_iter());
        assert_eq!(handles.holders(), 1);
    }
}
