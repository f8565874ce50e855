//! Loops for 64-bit Arm, one file for each instruction set.
//!
//! None of them needs a fence of its own: Arm orders no two stores by default, so whoever publishes
//! memory there has to use a release store or a barrier, and that orders all of these like ordinary
//! stores.

pub mod dc_zva;
pub mod neon;
