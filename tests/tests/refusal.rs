//! A teardown is refused while anybody holds the memory, says how many do, and hands back all that is needed to try again.

use std::sync::Arc;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion};
use vm_scrub::lease::{Refusal, Refused};
use vm_scrub::{BLOCK_SIZE, Lease, LeaseId, PageSize, Pool, Quiesced, TeardownError};
use vm_scrub_tests::{
    assert_nothing_dirty_left, fill, first_nonzero, on_every_page_size, pool, quiesce, regions,
    teardown,
};

on_every_page_size!(
    clones_are_counted_one_by_one: 4,
    what_is_taken_out_of_a_collection_counts: 4,
    regions_with_a_bitmap_count: 4,
    a_mapping_cannot_be_taken_out_of_what_counts_it: 4,
    a_statement_about_another_lease: 4,
);

fn lease(pool: &Pool) -> Lease {
    let layout = regions(&[(0, BLOCK_SIZE), (8 * BLOCK_SIZE, 2 * BLOCK_SIZE)]);
    let lease = pool.lease(&layout).unwrap();
    fill(&lease, 1);
    lease
}

/// Expects `holders` owners, and gives the lease back with the statement.
#[track_caller]
fn refused(lease: Lease, quiesced: Quiesced, holders: usize) -> (Lease, Quiesced) {
    let id = lease.id();
    let error = lease.teardown(quiesced).expect_err("a handle is alive");
    let text = error.to_string();
    let advice =
        format!("{id} is not torn down: its guest memory still has {holders} other owner(s)");
    assert!(text.starts_with(&advice), "{text}");
    assert!(
        text.contains("drop every clone of `GuestMemoryMmap`"),
        "{text}"
    );
    // The message has the reason in it; an error chain would print it twice.
    assert!(std::error::Error::source(&error).is_none());
    let TeardownError::Refused(refused) = error else {
        panic!("{text}");
    };
    assert!(text.ends_with(&refused.reason.to_string()), "{text}");
    let Refused {
        reason,
        lease,
        quiesced,
        ..
    } = *refused;
    assert_eq!(reason, Refusal::Held { holders });
    assert_eq!(lease.id(), id);
    (lease, quiesced)
}

/// Nothing was done to the lease by a refusal: it is there with all its bytes, and can be torn down.
#[track_caller]
fn ends_well(pool: &Pool, lease: Lease, quiesced: Quiesced) {
    assert_eq!(first_nonzero(&lease), Some(0));
    assert_eq!(pool.accounts().leased, 3 * BLOCK_SIZE);
    assert!(lease.teardown(quiesced).unwrap().is_proven());
    assert_nothing_dirty_left(pool);
    assert_eq!(pool.accounts().clean, pool.capacity());
}

fn clones_are_counted_one_by_one(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = lease(&pool);
    let quiesced = quiesce(&lease);
    let first = lease.memory();
    let (lease, quiesced) = refused(lease, quiesced, 1);
    let second = first.clone();
    let (lease, quiesced) = refused(lease, quiesced, 2);
    let third = second.clone();
    let (lease, quiesced) = refused(lease, quiesced, 3);
    // Asked for anew: regions of their own, which count on top.
    let other = lease.memory();
    let (lease, quiesced) = refused(lease, quiesced, 4);
    drop(first);
    let (lease, quiesced) = refused(lease, quiesced, 3);
    drop(other);
    drop(third);
    let (lease, quiesced) = refused(lease, quiesced, 1);
    // The memory is as usable as before.
    second
        .write_obj(7_u8, GuestAddress(8 * BLOCK_SIZE))
        .unwrap();
    drop(second);
    ends_well(&pool, lease, quiesced);
}

fn what_is_taken_out_of_a_collection_counts(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = lease(&pool);
    let quiesced = quiesce(&lease);
    let memory = lease.memory();
    let mapping: Arc<MmapRegion> = memory.iter().nth(1).unwrap().get_mmap();
    let (lease, quiesced) = refused(lease, quiesced, 2);
    // Without the region: the rest of the collection and the region that was taken out, in two hands.
    let (rest, region) = memory
        .remove_region(GuestAddress(8 * BLOCK_SIZE), 2 * BLOCK_SIZE)
        .unwrap();
    drop(memory);
    drop(rest);
    let (lease, quiesced) = refused(lease, quiesced, 2);
    drop(region);
    let (lease, quiesced) = refused(lease, quiesced, 1);
    assert_eq!(mapping.size() as u64, 2 * BLOCK_SIZE);
    drop(mapping);
    ends_well(&pool, lease, quiesced);
}

fn regions_with_a_bitmap_count(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = lease(&pool);
    let quiesced = quiesce(&lease);
    let mut lengths = Vec::new();
    let tracked = lease.regions(|len| {
        lengths.push(len as u64);
        AtomicBitmap::new(len, std::num::NonZeroUsize::new(4096).unwrap())
    });
    assert_eq!(lengths, [BLOCK_SIZE, 2 * BLOCK_SIZE]);
    let memory = GuestMemoryMmap::from_regions(tracked).unwrap();
    memory.write_obj(9_u8, GuestAddress(4096)).unwrap();
    let dirty = |memory: &GuestMemoryMmap<AtomicBitmap>, page: usize| {
        use vm_memory::GuestMemoryRegion;
        use vm_memory::bitmap::Bitmap;
        memory.iter().next().unwrap().bitmap().dirty_at(page * 4096)
    };
    assert!(dirty(&memory, 1) && !dirty(&memory, 0));
    let (lease, quiesced) = refused(lease, quiesced, 1);

    // Bitmaps are fresh each time: no dirty bits of somebody else.
    let again =
        lease.regions(|len| AtomicBitmap::new(len, std::num::NonZeroUsize::new(4096).unwrap()));
    let again = GuestMemoryMmap::from_regions(again).unwrap();
    assert!(!dirty(&again, 1));
    let (lease, quiesced) = refused(lease, quiesced, 2);
    let mapping = again.iter().next().unwrap().get_mmap();
    drop(again);
    drop(memory);
    let (lease, quiesced) = refused(lease, quiesced, 1);
    drop(mapping);
    ends_well(&pool, lease, quiesced);
}

/// Somebody who has the only reference to a mapping, and so could have had the mapping itself.
fn a_mapping_cannot_be_taken_out_of_what_counts_it(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = lease(&pool);
    let quiesced = quiesce(&lease);
    let region = lease.regions(|_| ()).remove(0);
    let mapping = region.get_mmap();
    let forgotten = Arc::downgrade(&mapping);
    drop(region);
    let mapping = Arc::try_unwrap(mapping).expect_err("the lease owns it too");
    let (lease, quiesced) = refused(lease, quiesced, 1);
    drop(mapping);
    ends_well(&pool, lease, quiesced);
    assert!(
        forgotten.upgrade().is_none(),
        "a weak reference leads nowhere after the teardown"
    );
}

fn a_statement_about_another_lease(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let mine = lease(&pool);
    let other = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let (mine_id, other_id): (LeaseId, LeaseId) = (mine.id(), other.id());
    let right = quiesce(&mine);
    let error = mine.teardown(quiesce(&other)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&format!("about {other_id} and not about {mine_id}")),
        "{text}"
    );
    let TeardownError::Refused(refused) = error else {
        panic!("{text}");
    };
    let expected = Refusal::OtherLease {
        lease: mine_id,
        quiesced: other_id,
    };
    assert_eq!(refused.reason, expected);
    // The statement that was passed is handed back too, and is good for the lease that it is about.
    assert!(other.teardown(refused.quiesced).unwrap().is_proven());
    ends_well(&pool, refused.lease, right);
}

/// A refusal, without a second try: the lease that comes out of the error is an ordinary lease.
#[test]
fn a_lease_out_of_an_error_can_be_kept() {
    let pool = pool(PageSize::Base4K, 4);
    let lease = lease(&pool);
    let memory = lease.memory();
    let quiesced = quiesce(&lease);
    let lease = lease.revoke(quiesced).unwrap_err().into_lease().unwrap();
    drop(memory);
    assert_eq!(first_nonzero(&lease), Some(0));
    assert!(teardown(lease).is_proven());
    assert_nothing_dirty_left(&pool);
}
