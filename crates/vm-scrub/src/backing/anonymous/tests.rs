//! Pages that go to a window and come home.

use super::*;
use crate::sys::fault;

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
