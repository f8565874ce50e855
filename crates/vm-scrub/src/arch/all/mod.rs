//! Loops that run on every processor: the fallback, and what the others are compared with.

pub mod portable;
