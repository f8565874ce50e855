//! Hugetlb pages for tests: reserved while they are needed, and given back.

/// So many free pages of 2 MiB, for as long as this lives. Drop the pool first.
#[derive(Debug)]
pub struct HugePages {
    _added: vm_scrub_vmm::HugePages,
}

impl HugePages {
    /// Sees to it that `pages` pages are free for the caller, or says loudly that the test is skipped.
    #[must_use = "the pages are given back when this is dropped"]
    pub fn reserve(pages: u64) -> Option<Self> {
        match vm_scrub_vmm::HugePages::ensure(pages) {
            Ok(added) => Some(Self { _added: added }),
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                None
            }
        }
    }
}
