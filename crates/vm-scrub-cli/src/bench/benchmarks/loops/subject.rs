//! One loop, or two, at work on memory that its competitors use as well.

use crate::bench::memory::{self, Mapping};
use crate::bench::subject::Subject;
use crate::bench::team::Team;
use anyhow::ensure;
use std::cell::RefCell;
use std::rc::Rc;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};

/// What the engine zeroes and reads back in turn, in bytes.
const PIECE: usize = 256 << 10;

/// One mapping for all contenders of a group.
pub(super) type Shared = Rc<RefCell<Mapping>>;

/// Zeroes, reads, or both.
pub(super) struct LoopSubject {
    pub(super) zero: Option<ZeroLoop>,
    pub(super) verify: Option<VerifyLoop>,
    pub(super) fused: bool,
    pub(super) bytes: usize,
    pub(super) team: Rc<Team>,
    pub(super) shared: Shared,
}

impl LoopSubject {
    fn with_memory<R>(&self, work: impl FnOnce(&mut [u8]) -> R) -> R {
        work(&mut self.shared.borrow_mut().bytes()[..self.bytes])
    }
}

/// What a verification loop that finds something in zeroed memory, or nothing in dirty memory, leaves behind.
#[derive(Debug, thiserror::Error)]
#[error("the loop's answer is wrong")]
struct WrongAnswer;

/// One pass of the loops over a thread's share.
fn pass(
    zero: Option<ZeroLoop>,
    verify: Option<VerifyLoop>,
    memory: &mut [u8],
) -> Result<(), WrongAnswer> {
    if let Some(zero) = zero {
        // SAFETY: an exclusively borrowed slice.
        unsafe { zero.zero(memory.as_mut_ptr(), memory.len()) };
    }
    let Some(verify) = verify else {
        return Ok(());
    };
    // SAFETY: as above, and initialised.
    match unsafe { verify.first_nonzero(memory.as_ptr(), memory.len()) } {
        None => Ok(()),
        Some(_) => Err(WrongAnswer),
    }
}

impl Subject for LoopSubject {
    fn prepare(&mut self) -> anyhow::Result<()> {
        let reads_only = self.zero.is_none();
        self.with_memory(|memory| {
            if reads_only {
                memory.fill(0);
            } else {
                memory::dirty(&self.team, memory);
            }
        });
        Ok(())
    }

    fn run(&mut self, iterations: u64) -> anyhow::Result<()> {
        let (zero, verify, fused) = (self.zero, self.verify, self.fused);
        let unit = 64;
        self.with_memory(|memory| {
            self.team.each(memory, unit, |share| {
                for _ in 0..iterations {
                    if fused {
                        share
                            .chunks_mut(PIECE)
                            .try_for_each(|piece| pass(zero, verify, piece))?;
                    } else {
                        pass(zero, verify, share)?;
                    }
                }
                Ok::<(), WrongAnswer>(())
            })
        })
        .map_err(anyhow::Error::from)
    }

    fn check(&mut self) -> anyhow::Result<()> {
        self.with_memory(|memory| {
            memory::ensure_zero(memory)?;
            if let Some(verify) = self.verify {
                // A loop that looks at nothing would be the fastest.
                let last = memory.len() - 1;
                memory[last] = 1;
                // SAFETY: an exclusively borrowed slice.
                let found = unsafe { verify.first_nonzero(memory.as_ptr(), memory.len()) };
                memory[last] = 0;
                ensure!(found == Some(last), "{verify} does not find the last byte");
            }
            Ok(())
        })
    }

    fn is_repeatable(&self) -> bool {
        true
    }
}
