//! The answer to a name that is no loop here: on a command line or in a configuration file, the
//! useful part is what would have worked.

use core::error::Error;
use core::fmt;

/// A loop was asked for by a name that can't be had on this processor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnknownLoop {
    /// No architecture has a loop of this name.
    NoSuchLoop {
        /// What the loop was to do: `zeroing` or `verification`.
        task: &'static str,
        /// The name that was asked for.
        name: String,
        /// The names that work on this processor.
        available: Vec<&'static str>,
    },
    /// There is a loop of this name, but this processor can't run it.
    NotAvailable {
        /// What the loop was to do: `zeroing` or `verification`.
        task: &'static str,
        /// The name that was asked for.
        name: &'static str,
        /// The names that work on this processor.
        available: Vec<&'static str>,
    },
}

impl fmt::Display for UnknownLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let available = match self {
            Self::NoSuchLoop {
                task,
                name,
                available,
            } => {
                write!(f, "there is no {task} loop called `{name}`")?;
                available
            }
            Self::NotAvailable {
                task,
                name,
                available,
            } => {
                write!(f, "the {task} loop `{name}` does not run on this processor")?;
                available
            }
        };
        write!(f, "; available here: {}", available.join(", "))
    }
}

impl Error for UnknownLoop {}
