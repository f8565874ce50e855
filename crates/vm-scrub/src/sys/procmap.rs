//! Asking the kernel what is mapped at an address of this process.
//!
//! `PROCMAP_QUERY` (Linux 6.11) answers about one mapping; before that the whole of `/proc/self/maps` is read.

use super::identity::Identity;
use super::{Call, Error, Result, fault};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

/// `struct procmap_query` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: u64 =
    (3 << 30) | ((size_of::<Query>() as u64) << 16) | ((b'f' as u64) << 8) | 17;

// linux/fs.h.
const VMA_SHARED: u64 = 0x08;
const COVERING_OR_NEXT: u64 = 0x10;

/// One mapping of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) range: Range<usize>,
    /// Whether it is private and has no file behind it: then a page that is not populated has no content.
    pub(crate) private_anonymous: bool,
}

/// `/proc/self/maps`, open for reading.
#[derive(Debug)]
pub(crate) struct Maps {
    file: File,
    identity: Identity,
}

impl Maps {
    /// Opens this process's list of mappings.
    pub(crate) fn open() -> Result<Self> {
        fault::check(Call::MapsOpen)?;
        let file = File::open("/proc/self/maps").map_err(|source| Error {
            call: Call::MapsOpen,
            source,
        })?;
        let identity = Identity::of(file.as_fd())?;
        Ok(Self { file, identity })
    }

    /// The mapping at `address`, or the next one above; `None` above the last one.
    ///
    /// Fails with `ENOTTY` (or `ENOSYS`) where there is no `PROCMAP_QUERY`.
    pub(crate) fn query(&self, address: usize) -> Result<Option<Mapping>> {
        self.identity.check(self.file.as_fd())?;
        fault::check(Call::MapsQuery)?;
        let mut query = Query {
            size: size_of::<Query>() as u64,
            query_flags: COVERING_OR_NEXT,
            query_addr: address as u64,
            ..Query::default()
        };
        // SAFETY: the structure is live and writable for the call, and has no room for names that would be filled in.
        let status =
            unsafe { libc::ioctl(self.file.as_raw_fd(), PROCMAP_QUERY as _, &raw mut query) };
        if status < 0 {
            let error = Error::last(Call::MapsQuery);
            return if error.errno() == Some(libc::ENOENT) {
                Ok(None)
            } else {
                Err(error)
            };
        }
        let no_file = (query.inode, query.dev_major, query.dev_minor) == (0, 0, 0);
        Ok(Some(Mapping {
            range: query.vma_start as usize..query.vma_end as usize,
            private_anonymous: no_file && query.vma_flags & VMA_SHARED == 0,
        }))
    }
}

/// Every mapping of this process, by ascending address.
pub(crate) fn read_all() -> Result<Vec<Mapping>> {
    fault::check(Call::MapsRead)?;
    let failed = |source| Error {
        call: Call::MapsRead,
        source,
    };
    let mut text = String::new();
    File::open("/proc/self/maps")
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(failed)?;
    text.lines()
        .map(|line| {
            parse(line).ok_or_else(|| failed(io::Error::other(format!("not understood: {line}"))))
        })
        .collect()
}

/// `start-end perms offset major:minor inode [name]`, numbers but the inode in hexadecimal.
pub(crate) fn parse(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let _offset = fields.next()?;
    let (device, inode) = (fields.next()?, fields.next()?);
    Some(Mapping {
        range: usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?,
        private_anonymous: permissions.ends_with('p') && device == "00:00" && inode == "0",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map;

    #[test]
    fn what_another_list_says_is_not_believed() {
        let own = Maps::open().unwrap();
        let file = own.file.try_clone().unwrap();
        let identity = own.identity;
        let other = File::open("/proc/1/maps").or_else(|_| File::open("/dev/zero"));
        // SAFETY: both descriptors are this test's.
        assert!(unsafe { libc::dup2(other.unwrap().as_raw_fd(), file.as_raw_fd()) } >= 0);
        let error = Maps { file, identity }.query(0).unwrap_err();
        assert_eq!(error.call, Call::Fstat, "{error}");
        assert!(!error.is_no_such_ioctl());
    }

    #[test]
    fn both_ways_of_asking_tell_private_anonymous_memory_from_the_rest() {
        let len = 1 << 20;
        let anonymous = map::reserve(len).unwrap();
        let file = File::open("/proc/self/exe").unwrap();
        let mapped = map::reserve(len).unwrap();
        // SAFETY: both are reservations of our own.
        unsafe {
            map::map_anonymous(anonymous, len).unwrap();
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
            let address = libc::mmap(
                mapped.cast(),
                len,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(address, libc::MAP_FAILED);
        }
        let all = read_all().unwrap();
        assert!(
            all.windows(2)
                .all(|pair| pair[0].range.end <= pair[1].range.start)
        );
        let maps = Maps::open().unwrap();
        for (address, expected) in [(anonymous.addr(), true), (mapped.addr(), false)] {
            let read = all
                .iter()
                .find(|mapping| mapping.range.contains(&address))
                .unwrap();
            assert_eq!(read.private_anonymous, expected);
            match maps.query(address) {
                Ok(queried) => assert_eq!(queried.as_ref(), Some(read)),
                Err(error) => assert!(error.is_no_such_ioctl(), "{error}"),
            }
        }
        // SAFETY: ours, and no longer used.
        unsafe {
            map::unmap(anonymous, len).unwrap();
            map::unmap(mapped, len).unwrap();
        }
    }

    #[test]
    fn lines_of_all_kinds() {
        let private = |line| parse(line).map(|mapping| mapping.private_anonymous);
        assert_eq!(
            private("7f0000000000-7f0000200000 rw-p 00000000 00:00 0"),
            Some(true)
        );
        assert_eq!(
            private("7f0000000000-7f0000200000 rw-p 00000000 00:00 0   [heap]"),
            Some(true)
        );
        assert_eq!(
            private("7f0000000000-7f0000200000 rw-s 00000000 00:01 1024 /dev/zero (deleted)"),
            Some(false)
        );
        assert_eq!(
            private("7f0000000000-7f0000200000 rw-p 00000000 fe:00 77 /bin/true"),
            Some(false)
        );
        assert_eq!(private("nonsense"), None);
        assert_eq!(private(""), None);
    }
}
