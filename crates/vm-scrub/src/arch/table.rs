//! The list behind the handles: a row for each loop, and how a name finds its row.
//!
//! A row whose loop this processor can't run is never handed out; everything that holds a row may
//! run its loop.

use super::UnknownLoop;

/// A loop and what one has to know to choose it.
pub(super) struct Row<Run: 'static> {
    pub(super) name: &'static str,
    pub(super) streaming: bool,
    pub(super) is_available: fn() -> bool,
    pub(super) run: Run,
}

/// Sets the bytes to zero.
pub(super) type Zero = unsafe fn(*mut u8, usize);
/// The offset of the first byte that is not zero.
pub(super) type FirstNonzero = unsafe fn(*const u8, usize) -> Option<usize>;

/// The rows whose loops this processor can run.
pub(super) fn available<Run>(
    rows: &'static [Row<Run>],
) -> impl Iterator<Item = &'static Row<Run>> + Clone {
    rows.iter().filter(|row| (row.is_available)())
}

/// The row of this name, if this processor can run it. `every_name` are the names of all
/// architectures.
pub(super) fn by_name<Run>(
    task: &'static str,
    rows: &'static [Row<Run>],
    every_name: &[&'static str],
    name: &str,
) -> Result<&'static Row<Run>, UnknownLoop> {
    if let Some(row) = available(rows).find(|row| row.name == name) {
        return Ok(row);
    }
    let available = available(rows).map(|row| row.name).collect();
    Err(match every_name.iter().find(|known| **known == name) {
        Some(name) => UnknownLoop::NotAvailable {
            task,
            name,
            available,
        },
        None => UnknownLoop::NoSuchLoop {
            task,
            name: name.to_owned(),
            available,
        },
    })
}

/// The row of a zeroing loop.
macro_rules! zero_row {
    ($loop:ty) => {
        $crate::arch::table::Row {
            name: <$loop>::NAME,
            streaming: <$loop>::STREAMING,
            is_available: <$loop>::is_available,
            // SAFETY: a row is only handed out where its loop is available; the memory is the
            // promise of whoever calls `ZeroLoop::zero`.
            run: |ptr, len| unsafe { <$loop>::new_unchecked().zero(ptr, len) },
        }
    };
}

/// The row of a verification loop.
macro_rules! verify_row {
    ($loop:ty) => {
        $crate::arch::table::Row {
            name: <$loop>::NAME,
            streaming: false,
            is_available: <$loop>::is_available,
            // SAFETY: a row is only handed out where its loop is available; the memory is the
            // promise of whoever calls `VerifyLoop::first_nonzero`.
            run: |ptr, len| unsafe { <$loop>::new_unchecked().first_nonzero(ptr, len) },
        }
    };
}

/// What the handles have in common: `ZeroLoop` and `VerifyLoop` differ only in what they run.
macro_rules! handle {
    ($handle:ident, $task:literal, $rows:expr, $names:expr) => {
        impl $handle {
            /// What these loops do, as [`UnknownLoop`] has it.
            pub(crate) const TASK: &'static str = $task;

            /// Every loop that this processor can run, `portable` first.
            pub fn available() -> impl Iterator<Item = Self> + Clone {
                $crate::arch::table::available($rows).map(Self)
            }

            /// The loop of this name.
            ///
            /// # Errors
            ///
            /// [`UnknownLoop::NoSuchLoop`] if no architecture has a loop of this name,
            /// [`UnknownLoop::NotAvailable`] if this processor can't run it. Both list the names
            /// that would have worked.
            pub fn by_name(name: &str) -> Result<Self, UnknownLoop> {
                $crate::arch::table::by_name(Self::TASK, $rows, $names, name).map(Self)
            }

            /// The name: what [`by_name`](Self::by_name) takes and `Display` prints.
            pub fn name(self) -> &'static str {
                self.0.name
            }
        }

        impl PartialEq for $handle {
            fn eq(&self, other: &Self) -> bool {
                self.0.name == other.0.name
            }
        }

        impl Eq for $handle {}

        impl core::fmt::Debug for $handle {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.debug_tuple(stringify!($handle))
                    .field(&self.0.name)
                    .finish()
            }
        }

        impl core::fmt::Display for $handle {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.pad(self.0.name)
            }
        }

        impl core::str::FromStr for $handle {
            type Err = UnknownLoop;

            fn from_str(name: &str) -> Result<Self, UnknownLoop> {
                Self::by_name(name)
            }
        }
    };
}

pub(super) use {handle, verify_row, zero_row};
