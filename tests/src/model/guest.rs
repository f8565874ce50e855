//! A guest, and what it must see in its memory.

use super::gone::Windows;
use crate::PAGE;
use std::collections::{BTreeMap, BTreeSet};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_scrub::{BLOCK_SIZE, Lease};

const PAGES_IN_BLOCK: u64 = BLOCK_SIZE / PAGE;

/// Where a page is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// In guest physical memory.
    pub(super) address: u64,
    /// In which block of the pool.
    pub(super) block: u64,
    /// Which page of that block.
    pub(super) page: u64,
    /// How many pages of the region begin here.
    pub(super) left: u64,
}

#[derive(Debug)]
pub(super) struct Guest {
    pub(super) lease: Lease,
    /// The numbers of its blocks, in the order in which its regions use them.
    pub(super) blocks: Vec<u64>,
    pub(super) pages: u64,
    /// Whether nobody has looked at it, so that nobody has its address.
    pub(super) unseen: bool,
    /// What is not zero, by the number of the page.
    pub(super) content: BTreeMap<u64, Vec<u8>>,
    /// Pages that cannot be accessed, or of which nobody knows what they contain.
    pub(super) off_limits: BTreeSet<u64>,
    /// Whether quarantine is an answer to what the VMM has done.
    pub(super) may_lose: bool,
    /// The guest addresses of pages that are pinned.
    pub(super) pinned: Vec<u64>,
    /// A handle that stands against its teardown.
    pub(super) held: Option<GuestMemoryMmap>,
    /// Where its memory is in this process, once anybody knows.
    pub(super) windows: Windows,
}

impl Guest {
    pub(super) fn new(lease: Lease) -> Self {
        let blocks = lease.blocks().iter();
        Self {
            blocks: blocks
                .flat_map(|extent| extent.first..extent.first + extent.blocks)
                .collect(),
            pages: lease.bytes() / PAGE,
            unseen: true,
            content: BTreeMap::new(),
            off_limits: BTreeSet::new(),
            may_lose: false,
            pinned: Vec::new(),
            held: None,
            windows: Vec::new(),
            lease,
        }
    }

    /// Where page `number` is, wrapping.
    pub(super) fn place(&self, number: u64) -> Place {
        let mut page = number % self.pages;
        let mut before = 0;
        for region in self.lease.guest_regions() {
            let pages = region.bytes / PAGE;
            if page < pages {
                return Place {
                    address: region.guest_address + page * PAGE,
                    block: self.blocks[before + (page / PAGES_IN_BLOCK) as usize],
                    page: page % PAGES_IN_BLOCK,
                    left: pages - page,
                };
            }
            page -= pages;
            before += region.bytes.div_ceil(BLOCK_SIZE) as usize;
        }
        unreachable!("a page number below the sum is in one of the regions")
    }

    /// The address of page `number` in this process.
    pub(super) fn host(&self, number: u64) -> *mut u8 {
        let address = self.place(number).address;
        let windows = self.lease.host_addresses();
        let found = windows.iter().find(|(region, _)| {
            (region.guest_address..region.guest_address + region.bytes).contains(&address)
        });
        let (region, start) = found.expect("every page is in one of the windows");
        start.wrapping_add((address - region.guest_address) as usize)
    }

    /// The pages from `number` on, wrapping, up to `count` of them, that are one behind the other and can be accessed.
    pub(super) fn run(&self, number: u64, count: u64) -> std::ops::Range<u64> {
        let first = number % self.pages;
        let most = count.max(1).min(self.place(first).left);
        let usable = (first..first + most).take_while(|page| !self.off_limits.contains(page));
        first..first + usable.count() as u64
    }

    /// Looks at it for the first time: at every page that a guest has written before in the same blocks, and at the ends of
    /// each region; `everywhere`, at every byte.
    pub(super) fn see(&mut self, dirtied: &[BTreeSet<u64>], everywhere: bool) {
        if !std::mem::replace(&mut self.unseen, false) {
            return;
        }
        let host = self.lease.host_addresses();
        self.windows = host
            .iter()
            .map(|(region, start)| (*region, start.addr()))
            .collect();
        if everywhere {
            return crate::assert_all_zero(&self.lease);
        }
        let memory = self.lease.memory();
        let mut before = 0;
        for region in self.lease.guest_regions() {
            let pages = region.bytes / PAGE;
            let ends = [0, pages - 1].into_iter();
            let written = (0..pages.div_ceil(PAGES_IN_BLOCK)).flat_map(|block| {
                let number = self.blocks[before + block as usize];
                let first = block * PAGES_IN_BLOCK;
                dirtied[number as usize]
                    .iter()
                    .map(move |page| first + page)
            });
            for page in ends.chain(written).filter(|page| *page < pages) {
                let address = region.guest_address + page * PAGE;
                assert_page(&memory, address, None, &self.lease);
            }
            before += region.bytes.div_ceil(BLOCK_SIZE) as usize;
        }
    }

    /// Writes `bytes` bytes of `tag` from `at` in page `number` on, as far as the guest can.
    pub(super) fn write(
        &mut self,
        number: u64,
        at: u64,
        bytes: u64,
        tag: u8,
        dirtied: &mut [BTreeSet<u64>],
    ) {
        let memory = self.lease.memory();
        let mut at = at % PAGE;
        let mut left = bytes.max(1);
        for page in self.run(number, (at + left).div_ceil(PAGE)) {
            let now = left.min(PAGE - at);
            let place = self.place(page);
            let (from, to) = (at as usize, (at + now) as usize);
            let content = self
                .content
                .entry(page)
                .or_insert_with(|| vec![0; PAGE as usize]);
            content[from..to].fill(tag.max(1));
            memory
                .write_slice(&content[from..to], GuestAddress(place.address + at))
                .expect("a guest's memory can be written");
            if !self.lease.is_shareable() {
                dirtied[place.block as usize].insert(place.page);
            }
            (at, left) = (0, left - now);
        }
    }

    /// Looks at a page.
    pub(super) fn check(&self, number: u64) {
        let number = number % self.pages;
        if !self.off_limits.contains(&number) {
            let memory = self.lease.memory();
            let expected = self.content.get(&number).map(Vec::as_slice);
            assert_page(&memory, self.place(number).address, expected, &self.lease);
        }
    }

    /// Looks at every page that has been written; `everywhere`, at all of them.
    pub(super) fn check_all(&self, everywhere: bool) {
        let memory = self.lease.memory();
        let written = self.content.keys().copied();
        let pages: Vec<u64> = if everywhere {
            (0..self.pages).collect()
        } else {
            written.collect()
        };
        for page in pages
            .into_iter()
            .filter(|page| !self.off_limits.contains(page))
        {
            let expected = self.content.get(&page).map(Vec::as_slice);
            assert_page(&memory, self.place(page).address, expected, &self.lease);
        }
    }

    /// Nobody looks at these pages any more, or writes to them.
    pub(super) fn give_up(&mut self, pages: std::ops::Range<u64>) {
        self.content.retain(|page, _| !pages.contains(page));
        self.off_limits.extend(pages);
    }
}

/// A page of zeros, or of `expected`.
#[track_caller]
fn assert_page(memory: &GuestMemoryMmap, address: u64, expected: Option<&[u8]>, lease: &Lease) {
    static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
    let expected = expected.unwrap_or(&ZEROS);
    // Not zero before, so that a read that delivers nothing is noticed.
    let mut seen = [0xff_u8; PAGE as usize];
    memory
        .read_slice(&mut seen, GuestAddress(address))
        .expect("a guest's memory can be read");
    if seen[..] != *expected {
        let at = seen
            .iter()
            .zip(expected)
            .position(|(seen, expected)| seen != expected);
        let at = at.expect("they differ");
        panic!(
            "{lease:?}: the byte at guest address {:#x} is {:#x} and should be {:#x}",
            address + at as u64,
            seen[at],
            expected[at]
        );
    }
}
