//! Giving the pages back to the kernel, and having it supply zeroed ones at once, in all threads.

use crate::bench::memory::{self, HUGE, Mapping};
use crate::bench::subject::Subject;
use crate::bench::team::Team;
use crate::bench::warning::Warning;
use std::rc::Rc;

/// Replaces the pages of a mapping by populated ones that are zero.
pub(crate) type Renew = fn(&mut Mapping, &Team) -> anyhow::Result<()>;

/// What a VMM does that unmaps a guest's memory and maps the next guest's.
pub(crate) const MUNMAP: (&str, Renew) = ("munmap-mmap-populate", |mapping, team| {
    mapping.map_again()?;
    Ok(team.each(mapping.bytes(), HUGE, memory::populate)?)
});

/// What one does that keeps the mapping. Each thread discards and populates its own part.
pub(crate) const DONTNEED: (&str, Renew) = ("dontneed-populate", |mapping, team| {
    Ok(team.each(mapping.bytes(), HUGE, |part| {
        memory::discard(part)?;
        memory::populate(part)
    })?)
});

/// What one does whose guest memory is a memfd, where `MADV_DONTNEED` would bring the old bytes back.
pub(crate) const PUNCH_HOLE: (&str, Renew) = ("punch-hole-populate", |mapping, team| {
    mapping.punch_hole()?;
    Ok(team.each(mapping.bytes(), HUGE, memory::populate)?)
});

/// Memory that goes through the kernel between two guests.
pub(crate) struct Kernel {
    mapping: Mapping,
    renew: Renew,
    team: Rc<Team>,
}

impl Kernel {
    pub(crate) fn new(mapping: Mapping, renew: Renew, team: &Rc<Team>) -> Self {
        Self {
            mapping,
            renew,
            team: Rc::clone(team),
        }
    }
}

impl Subject for Kernel {
    fn prepare(&mut self) -> anyhow::Result<()> {
        memory::dirty(&self.team, self.mapping.bytes());
        Ok(())
    }

    fn run(&mut self, _: u64) -> anyhow::Result<()> {
        (self.renew)(&mut self.mapping, &self.team)
    }

    fn check(&mut self) -> anyhow::Result<()> {
        memory::ensure_resident(self.mapping.bytes())?;
        memory::ensure_zero(self.mapping.bytes())
    }

    fn doubts(&mut self) -> Vec<Warning> {
        let page_size = self.mapping.page_size();
        memory::small_pages(self.mapping.bytes(), page_size)
            .into_iter()
            .collect()
    }
}
