//! Pages that go to a window and come home.

use super::*;
use crate::sys::fault;

const PAGE: usize = 4096;

fn fill(start: *mut u8, len: usize, byte: u8) {
    // SAFETY: tests pass mapped, writable ranges of their own.
    unsafe { start.write_bytes(byte, len) };
}

fn read(at: *mut u8) -> u8 {
    // SAFETY: tests pass mapped, readable addresses of their own.
    unsafe { at.read_volatile() }
}

#[test]
fn bytes_come_back_to_the_arena_and_the_window_is_closed() {
    let arena = AnonymousArena::map(2 * BLOCK, false, None, false).unwrap();
    let window = WindowSpace::new(0).open(BLOCK).unwrap();
    let start = window.start().0;
    // SAFETY: the range is free and the window closed; then it is granted and nobody refers to it.
    unsafe {
        arena.grant(BLOCK, start, BLOCK).unwrap();
        fill(start, BLOCK, 0xa5);
        assert_eq!(
            read(arena.base.at(BLOCK)),
            0,
            "the arena still sees the guest's pages"
        );
        arena.revoke(BLOCK, start, BLOCK).unwrap();
    }
    assert_eq!(read(arena.base.at(BLOCK)), 0xa5);
    assert_eq!(read(arena.base.at(2 * BLOCK - 1)), 0xa5);
    // SAFETY: the window is ours. That populating fails is how one sees that it is closed without touching it.
    assert!(unsafe { map::populate(start, BLOCK) }.is_err());
}

#[test]
fn borders_that_the_vmm_made_do_not_stop_revocation() {
    let arena = AnonymousArena::map(2 * BLOCK, true, None, false).unwrap();
    let window = WindowSpace::new(0).open(2 * BLOCK).unwrap();
    let start = window.start().0;
    // SAFETY: as above; mprotect and madvise are applied to the window, which is ours.
    unsafe {
        arena.grant(0, start, 2 * BLOCK).unwrap();
        fill(start, 2 * BLOCK, 0x5a);
        let page = start.wrapping_add(BLOCK + 3 * 4096);
        assert_eq!(libc::mprotect(page.cast(), 4096, libc::PROT_READ), 0);
        map::advise(start, 8192, Advice::NoHugePage).unwrap();
        arena.revoke(0, start, 2 * BLOCK).unwrap();
        assert_eq!(read(arena.base.at(BLOCK + 3 * 4096)), 0x5a);
        // Writable everywhere again, or the scrubber would fault.
        fill(arena.base.0, 2 * BLOCK, 0);
    }
}

#[test]
fn each_step_that_fails_is_reported() {
    let cases = [
        (fault::Call::Mremap, 0, libc::ENOMEM),
        (fault::Call::Mmap, 0, libc::ENOMEM),
        (fault::Call::Mprotect, 0, libc::EACCES),
    ];
    for (call, skip, errno) in cases {
        let arena = AnonymousArena::map(BLOCK, false, None, false).unwrap();
        let window = WindowSpace::new(0).open(BLOCK).unwrap();
        // SAFETY: the range is free and the window closed; then it is granted and nobody refers to it.
        let error = unsafe {
            arena.grant(0, window.start().0, BLOCK).unwrap();
            let _fault = fault::inject(call, skip, 1, errno);
            arena.revoke(0, window.start().0, BLOCK).unwrap_err()
        };
        assert_eq!((error.call, error.errno()), (call, Some(errno)));
    }
}

/// Whether each `unit` of `[start, start + len)` is closed. That populating fails is how one sees it without touching it.
fn is_closed(start: *mut u8, len: usize, unit: usize) -> bool {
    let mut units = (0..len).step_by(unit);
    // SAFETY: tests pass address space of their own; populating changes no byte.
    units.all(|at| unsafe { map::populate(start.wrapping_add(at), unit) }.is_err())
}

/// The window is put away as if it were empty.
#[test]
fn what_cannot_be_locked_in_its_window_is_home_again() {
    let arena = AnonymousArena::map(BLOCK, false, None, true).unwrap();
    fill(arena.base.0, BLOCK, 0xa5);
    let window = WindowSpace::new(0).open(BLOCK).unwrap();
    let start = window.start().0;
    let refused = fault::inject(fault::Call::Mlock, 0, 1, libc::ENOMEM);
    // SAFETY: the range is free and the window closed.
    let failed = unsafe { arena.grant(0, start, BLOCK) }.unwrap_err();
    drop(refused);
    assert_eq!(failed.error.call, fault::Call::Mlock);
    assert!(!failed.stuck);
    assert!(is_closed(start, BLOCK, BLOCK), "the window shows it");
    assert_eq!(read(arena.base.0), 0xa5);
    assert_eq!(read(arena.base.at(BLOCK - 1)), 0xa5);
}

/// The window of which a part shows memory already is put away too.
#[test]
fn what_cannot_be_moved_as_a_whole_is_home_again() {
    let arena = AnonymousArena::map(2 * BLOCK, false, None, false).unwrap();
    let window = WindowSpace::new(0).open(2 * BLOCK).unwrap();
    let start = window.start().0;
    fill(arena.base.0, 2 * BLOCK, 0xa5);
    // A border, so that each block is moved by itself.
    // SAFETY: the range is the arena's, and has no children to be kept for.
    unsafe { map::advise(arena.base.at(BLOCK), BLOCK, Advice::KeepOnFork) }.unwrap();
    // Asked about both, then asked about and moved one by one.
    for skip in 0..5 {
        let fault = fault::inject(fault::Call::Mremap, skip, 1, libc::ENOMEM);
        // SAFETY: the range is free and the window closed.
        let failed = unsafe { arena.grant(0, start, 2 * BLOCK) }.unwrap_err();
        drop(fault);
        assert_eq!(failed.error.call, fault::Call::Mremap);
        assert!(!failed.stuck);
        assert!(is_closed(start, 2 * BLOCK, BLOCK), "after {skip} calls");
        for block in [0, BLOCK] {
            assert_eq!(read(arena.base.at(block)), 0xa5, "after {skip} calls");
        }
    }
}

/// What a device holds stays there for good, and around it would be memory that is in nobody's books.
#[test]
fn nothing_of_the_lock_is_accessible_when_something_is_kept_there() {
    let mut arena = AnonymousArena::map(2 * BLOCK, false, None, false).unwrap();
    if let Err(error) = arena.prepare(RevokeBy::Move, Duration::ZERO) {
        return crate::test_support::skipped(format_args!("{error:?}"));
    }
    let window = WindowSpace::new(0).open(2 * BLOCK).unwrap();
    // SAFETY: the range is free and the window closed; then it is granted and nobody refers to it.
    let revoked = unsafe {
        arena.grant(0, window.start().0, 2 * BLOCK).unwrap();
        fill(window.start().0, 2 * BLOCK, 0xa5);
        // The first page moves, the second does not, the rest does.
        let refused = fault::inject(fault::Call::UffdMove, 1, 1, libc::EBUSY);
        let _one_page = fault::inject_short(fault::Call::UffdMove, 0, 1, PAGE);
        let revoked = arena.revoke(0, window.start().0, 2 * BLOCK).unwrap();
        assert_eq!(refused.hits(), 2);
        revoked
    };
    assert_eq!(revoked.pinned, std::slice::from_ref(&(PAGE..2 * PAGE)));
    let lock = arena.isolation.as_ref().unwrap().lock;
    assert!(is_closed(lock.0, 2 * BLOCK, PAGE));
}

#[test]
fn what_is_lent_is_the_kernels() {
    for locked in [false, true] {
        let arena = AnonymousArena::map(2 * BLOCK, false, None, locked).unwrap();
        fill(arena.base.0, 2 * BLOCK, 1);
        arena.lend(0..BLOCK).unwrap();
        let found = arena.residency(0..2 * BLOCK).unwrap();
        assert_eq!(found.populated, std::slice::from_ref(&(BLOCK..2 * BLOCK)));
        assert_eq!(found.never_populated, BLOCK as u64);
    }
}

/// Each lease would leave one mapping more otherwise.
#[test]
fn what_comes_home_is_one_mapping_with_its_neighbours() {
    const BLOCKS: usize = 5;
    let arena = AnonymousArena::map(BLOCKS * BLOCK, false, None, false).unwrap();
    let inside = arena.base.0.addr()..arena.base.0.addr() + BLOCKS * BLOCK;
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let start = |line: &str| {
            let (start, _) = line.split_once('-').unwrap();
            usize::from_str_radix(start, 16).unwrap()
        };
        let starts = maps.lines().map(start);
        starts.filter(|start| inside.contains(start)).count()
    };
    let before = mappings();
    for block in [1, 3] {
        let window = WindowSpace::new(0).open(BLOCK).unwrap();
        // SAFETY: the range is free and the window closed; then it is granted and nobody refers to it.
        unsafe {
            arena.grant(block * BLOCK, window.start().0, BLOCK).unwrap();
            fill(window.start().0, 1, 1);
            arena
                .revoke(block * BLOCK, window.start().0, BLOCK)
                .unwrap();
        }
        assert_eq!(mappings(), before, "block {block}");
    }
}
