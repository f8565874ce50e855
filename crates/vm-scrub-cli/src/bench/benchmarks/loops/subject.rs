//! One loop, or two, at work on memory that its competitors use as well.

use crate::bench::memory::{self, Mapping};
use crate::bench::subject::Subject;
use crate::bench::team::Team;
use anyhow::ensure;
use std::cell::RefCell;
use std::rc::Rc;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};

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
    fused: bool,
    memory: &mut [u8],
) -> Result<(), WrongAnswer> {
    let (start, len) = (memory.as_mut_ptr(), memory.len());
    // SAFETY: an exclusively borrowed, initialised slice.
    let found = unsafe {
        match (zero, verify) {
            (Some(zero), Some(verify)) if fused => zero.zero_and_verify(verify, start, len),
            (zero, verify) => {
                if let Some(zero) = zero {
                    zero.zero(start, len);
                }
                verify.and_then(|verify| verify.first_nonzero(start, len))
            }
        }
    };
    found.map_or(Ok(()), |_| Err(WrongAnswer))
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
                    pass(zero, verify, fused, share)?;
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
