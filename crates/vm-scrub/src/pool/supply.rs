//! Getting a pool's memory from the kernel: mapped, bound to a NUMA node if it has one, and populated if that is wanted or
//! needed.

use super::{PageSize, PoolError};
use crate::BLOCK_SIZE;
use crate::backing::{AnonymousArena, Backing, HugetlbArena, HugetlbError};
use crate::scrub::Workers;
use crate::sys::{self, hugetlb};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// What a pool's memory is to be like.
pub(super) struct Supply {
    /// The pool's capacity, in bytes: a multiple of the block size.
    pub(super) len: usize,
    pub(super) page_size: PageSize,
    pub(super) populate: bool,
    pub(super) numa_node: Option<u32>,
    /// Whether what is populated is locked in memory. Hugetlb pages need no lock.
    pub(super) lock: bool,
}

impl Supply {
    /// Whether the kernel supplies all memory when the pool is built: because it was asked to, or because hugetlb pages of one
    /// node are promised by nothing else.
    pub(super) fn is_populated(&self) -> bool {
        self.populate || self.needs_pages_of_node().is_some()
    }

    /// The node that must have a hugetlb page for each block.
    fn needs_pages_of_node(&self) -> Option<u32> {
        self.numa_node
            .filter(|_| self.page_size == PageSize::Huge2M)
    }

    fn not_populated(&self, source: sys::Error) -> PoolError {
        match self.needs_pages_of_node() {
            // What is `SIGBUS` to whoever touches memory for which there is no page.
            Some(node) if source.errno() == Some(libc::EFAULT) => PoolError::NoHugePagesOnNode {
                node,
                asked: self.len as u64 / BLOCK_SIZE,
                free: hugetlb::free_2m_pages(Some(node)),
            },
            _ => PoolError::Populate {
                capacity: self.len as u64,
                source,
            },
        }
    }

    fn not_mapped(&self, source: sys::Error) -> PoolError {
        match self.numa_node {
            Some(node) if source.call == sys::Call::Mbind => PoolError::NumaBind { node, source },
            _ if source.call == sys::Call::Mlock => PoolError::Lock {
                capacity: self.len as u64,
                source,
            },
            _ => PoolError::Map {
                capacity: self.len as u64,
                source,
            },
        }
    }

    /// Maps the arena, with nothing populated.
    pub(super) fn map(&self) -> Result<Box<dyn Backing>, PoolError> {
        let huge_pages = match self.page_size {
            PageSize::Base4K => false,
            PageSize::Transparent => true,
            PageSize::Huge2M => {
                return match HugetlbArena::map(self.len, self.is_populated(), self.numa_node) {
                    Ok(arena) => Ok(Box::new(arena)),
                    Err(HugetlbError::NoPages { free }) => Err(PoolError::NoHugePages {
                        asked: self.len as u64 / BLOCK_SIZE,
                        free,
                    }),
                    Err(HugetlbError::Sys(source)) => Err(self.not_mapped(source)),
                };
            }
        };
        match AnonymousArena::map(self.len, huge_pages, self.numa_node, self.lock) {
            Ok(arena) => Ok(Box::new(arena)),
            Err(source) if huge_pages && source.call == sys::Call::Madvise => {
                Err(PoolError::NoTransparentHugePages { source })
            }
            Err(source) => Err(self.not_mapped(source)),
        }
    }

    /// Populates the arena, if that is wanted or needed; what cannot be goes back to the kernel.
    pub(super) fn populate(
        &self,
        backing: Box<dyn Backing>,
        workers: &Workers,
    ) -> Result<Box<dyn Backing>, PoolError> {
        if self.is_populated()
            && let Err(source) = populate(backing.as_ref(), self.len, workers)
        {
            // Before the node's free pages are counted, because by now they are this pool's.
            drop(backing);
            return Err(self.not_populated(source));
        }
        Ok(backing)
    }
}

/// Populates `[0, len)` of the arena with all threads, in chunks large enough that the calls themselves cost nothing.
fn populate(backing: &dyn Backing, len: usize, workers: &Workers) -> sys::Result<()> {
    const CHUNK: usize = 64 << 20;
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    workers.all(|| {
        loop {
            let start = next.fetch_add(CHUNK, Ordering::Relaxed);
            if start >= len {
                return;
            }
            if let Err(error) = backing.populate(start..len.min(start + CHUNK)) {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return;
            }
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Call;

    fn supply(page_size: PageSize, numa_node: Option<u32>) -> Supply {
        Supply {
            len: 6 << 20,
            page_size,
            populate: false,
            numa_node,
            lock: false,
        }
    }

    fn failed(call: Call, errno: i32) -> sys::Error {
        sys::Error {
            call,
            source: std::io::Error::from_raw_os_error(errno),
        }
    }

    #[test]
    fn only_a_node_without_pages_is_told_from_a_host_without_memory() {
        let of = |page_size, node, errno| {
            supply(page_size, node).not_populated(failed(Call::Populate, errno))
        };
        assert!(matches!(
            of(PageSize::Huge2M, Some(1), libc::EFAULT),
            PoolError::NoHugePagesOnNode {
                node: 1,
                asked: 3,
                ..
            }
        ));
        for other in [
            of(PageSize::Huge2M, Some(1), libc::ENOMEM),
            of(PageSize::Huge2M, None, libc::EFAULT),
            of(PageSize::Base4K, Some(1), libc::EFAULT),
        ] {
            assert!(
                matches!(other, PoolError::Populate { capacity, .. } if capacity == 6 << 20),
                "{other}"
            );
        }
    }

    #[test]
    fn the_error_names_what_the_kernel_refused() {
        let of = |node, call| supply(PageSize::Base4K, node).not_mapped(failed(call, libc::EPERM));
        assert!(matches!(
            of(Some(1), Call::Mbind),
            PoolError::NumaBind { node: 1, .. }
        ));
        for node in [None, Some(1)] {
            assert!(matches!(of(node, Call::Mlock), PoolError::Lock { .. }));
            assert!(matches!(of(node, Call::Mmap), PoolError::Map { .. }));
        }
    }
}
