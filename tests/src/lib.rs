//! What the integration tests share: pools and guests of a few megabytes, and ways to look at memory from outside.
//!
//! Everything here goes through the public interface of vm-scrub and what Linux tells about a process; nothing reaches
//! into the library. Functions panic where a test would: they are for tests.

pub mod child;
pub mod clock;
pub mod documents;
pub mod fuzz;
pub mod guest;
pub mod huge_pages;
pub mod kvm;
pub mod limits;
pub mod logs;
pub mod maps;
pub mod model;
pub mod numa;
pub mod numbers;
pub mod older;
pub mod peer;
pub mod pinned;
pub mod pools;
pub mod seccomp;
mod skip;
pub mod walk;

pub use guest::{assert_all_zero, fill, first_nonzero, smear};
pub use huge_pages::HugePages;
pub use pools::{
    PAGE, assert_adds_up, assert_nothing_dirty_left, pool, quiesce, regions, teardown,
};
pub use skip::skipped;

/// Makes three tests out of a function that takes a [`PageSize`](vm_scrub::PageSize): one for each size.
///
/// The number is how many hugetlb pages of 2 MiB the function needs at most; where the host has none to give, that one
/// test says so and does nothing. It runs in a process of its own: see [`child::with_huge_pages`].
#[macro_export]
macro_rules! on_every_page_size {
    ($($name:ident: $huge_pages:expr),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn base_4k() {
                super::$name(vm_scrub::PageSize::Base4K);
            }

            #[test]
            fn transparent() {
                super::$name(vm_scrub::PageSize::Transparent);
            }

            #[test]
            fn huge_2m() {
                let test = concat!(stringify!($name), "::huge_2m");
                $crate::child::with_huge_pages(test, $huge_pages, || {
                    super::$name(vm_scrub::PageSize::Huge2M);
                });
            }
        }
    )+};
}

/// The same for the two sizes whose guests may have regions of any number of 4 KiB pages.
#[macro_export]
macro_rules! on_small_page_sizes {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn base_4k() {
                super::$name(vm_scrub::PageSize::Base4K);
            }

            #[test]
            fn transparent() {
                super::$name(vm_scrub::PageSize::Transparent);
            }
        }
    )+};
}
