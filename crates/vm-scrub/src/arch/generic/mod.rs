//! What the loops of every instruction set have in common, so that each file there holds only its
//! instructions.

pub(super) mod lines;
pub(super) mod verify;

/// Bytes in a cache line, the step of the loops that need not ask the processor.
///
/// 64 on every x86-64 processor (CPUID leaf 1 reports it as the CLFLUSH line size) and on most Arm
/// ones. On a processor with longer lines the loops stay correct and only lose the exact match
/// between a step and a line.
pub(super) const LINE: usize = 64;
