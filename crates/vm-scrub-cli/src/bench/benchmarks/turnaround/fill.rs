//! Writing zeros over the old guest's memory in place, and hoping: nothing is revoked or read back.

use crate::bench::memory::{self, HUGE, Mapping};
use crate::bench::subject::Subject;
use crate::bench::team::Team;
use crate::bench::warning::Warning;
use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;
use zeroize::Zeroize;

/// Overwrites memory with zeros.
pub(crate) type Write = fn(&Team, &mut [u8]);

/// `ptr::write_bytes`, which is `memset`, in one thread.
pub(crate) const WRITE_BYTES: (&str, Write) = ("write-bytes", |_, memory| {
    // SAFETY: an exclusively borrowed slice; zero is a valid byte.
    unsafe { std::ptr::write_bytes(memory.as_mut_ptr(), 0, memory.len()) }
});

/// `fill(0)` of chunks of 2 MiB, in all threads.
pub(crate) const RAYON_FILL: (&str, Write) = ("rayon-fill", |team, memory| {
    let Ok(()) = team.chunks(memory, HUGE, |chunk| {
        chunk.fill(0);
        Ok::<(), Infallible>(())
    });
});

/// The `zeroize` crate, in one thread: it has no other way.
pub(crate) const ZEROIZE: (&str, Write) = ("zeroize", |_, memory| memory.zeroize());

/// Memory that stays where it is and is overwritten. Contenders take turns, so they can share it.
pub(crate) struct Fill {
    mapping: Rc<RefCell<Mapping>>,
    write: Write,
    team: Rc<Team>,
}

impl Fill {
    pub(crate) fn new(mapping: Rc<RefCell<Mapping>>, write: Write, team: &Rc<Team>) -> Self {
        Self {
            mapping,
            write,
            team: Rc::clone(team),
        }
    }
}

impl Subject for Fill {
    fn prepare(&mut self) -> anyhow::Result<()> {
        memory::dirty(&self.team, self.mapping.borrow_mut().bytes());
        Ok(())
    }

    fn run(&mut self, _: u64) -> anyhow::Result<()> {
        (self.write)(&self.team, self.mapping.borrow_mut().bytes());
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        let mut mapping = self.mapping.borrow_mut();
        memory::ensure_resident(mapping.bytes())?;
        memory::ensure_zero(mapping.bytes())
    }

    fn doubts(&mut self) -> Vec<Warning> {
        let mut mapping = self.mapping.borrow_mut();
        let page_size = mapping.page_size();
        memory::small_pages(mapping.bytes(), page_size)
            .into_iter()
            .collect()
    }
}
