//! The kinds of pages a pool can be made of.

use std::fmt;
use std::str::FromStr;

/// The pages a pool's memory consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum PageSize {
    /// Anonymous memory in 4 KiB pages, never huge.
    #[cfg_attr(feature = "serde", serde(rename = "4k"))]
    Base4K,
    /// Anonymous memory in which the kernel uses transparent huge pages where it can. The host must have them enabled
    /// (`always` or `madvise` in `/sys/kernel/mm/transparent_hugepage/enabled`), or 4 KiB pages are what one gets.
    #[default]
    #[cfg_attr(feature = "serde", serde(rename = "thp"))]
    Transparent,
    /// 2 MiB pages that the operator has reserved (`vm.nr_hugepages`).
    #[cfg_attr(feature = "serde", serde(rename = "2m"))]
    Huge2M,
}

impl PageSize {
    /// The alignment and granularity, in bytes, that guest regions must have in memory of these pages.
    pub fn granularity(self) -> u64 {
        match self {
            PageSize::Base4K | PageSize::Transparent => 4 << 10,
            PageSize::Huge2M => 2 << 20,
        }
    }

    /// The name: `4k`, `thp` or `2m`.
    pub fn name(self) -> &'static str {
        match self {
            PageSize::Base4K => "4k",
            PageSize::Transparent => "thp",
            PageSize::Huge2M => "2m",
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no page size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownPageSize(String);

impl fmt::Display for UnknownPageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "there is no page size called `{}`: use 4k, thp or 2m",
            self.0
        )
    }
}

impl std::error::Error for UnknownPageSize {}

impl FromStr for PageSize {
    type Err = UnknownPageSize;

    fn from_str(name: &str) -> Result<Self, UnknownPageSize> {
        [PageSize::Base4K, PageSize::Transparent, PageSize::Huge2M]
            .into_iter()
            .find(|size| size.name() == name)
            .ok_or_else(|| UnknownPageSize(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_size_comes_back_by_its_name() {
        for (page_size, name) in [
            (PageSize::Base4K, "4k"),
            (PageSize::Transparent, "thp"),
            (PageSize::Huge2M, "2m"),
        ] {
            assert_eq!(page_size.to_string(), name);
            assert_eq!(name.parse(), Ok(page_size));
        }
        let error = "1g".parse::<PageSize>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no page size called `1g`: use 4k, thp or 2m"
        );
    }
}
