//! Who cleans memory of which only a part was touched.

use super::super::leased;
use super::touched::Touched;
use crate::bench::memory::{self, Mapping};
use crate::bench::row::Labels;
use crate::bench::subject::Subject;
use anyhow::Context;
use std::cell::RefCell;
use std::rc::Rc;
use vm_scrub::{Lease, Policy, Pool, RevokeBy, Verify, scrub_raw};

/// A lease of which a part was touched.
pub(super) struct Leased {
    pool: Pool,
    lease: Option<Lease>,
    touched: Touched,
    again: bool,
}

impl Leased {
    /// From a pool of `labels.bytes`, none of which was populated. If `again` is set, leasing the same memory to the next guest
    /// is timed, too.
    pub(super) fn new(labels: &Labels, touched: &Touched, again: bool) -> anyhow::Result<Self> {
        let page_size = labels.page_size.unwrap_or_default();
        let verify = labels.verify.unwrap_or_default();
        Ok(Self {
            pool: leased::pool(
                labels.bytes,
                page_size,
                labels.threads,
                verify,
                false,
                RevokeBy::Automatic,
            )?,
            lease: None,
            touched: touched.clone(),
            again,
        })
    }

    fn with_memory<R>(&mut self, work: impl FnOnce(&Touched, &mut [u8]) -> R) -> anyhow::Result<R> {
        let lease = match &mut self.lease {
            Some(lease) => lease,
            none => none.insert(leased::lease_all(&self.pool)?),
        };
        // SAFETY: the harness is the only one who has this lease.
        let mut regions = unsafe { memory::of_lease(lease) };
        let region = regions.pop().context("a lease has a region")?;
        Ok(work(&self.touched, region))
    }
}

impl Subject for Leased {
    fn prepare(&mut self) -> anyhow::Result<()> {
        Ok(self.with_memory(Touched::dirty)??)
    }

    fn run(&mut self, _: u64) -> anyhow::Result<()> {
        let dirty = self.lease.take().context("the last run lost the lease")?;
        let _ = leased::teardown(dirty)?;
        if self.again {
            self.lease = Some(leased::lease_all(&self.pool)?);
        }
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        self.with_memory(|touched, memory| touched.ensure_zero(memory))?
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        leased::end(self.lease.take());
    }
}

/// Cleans an embedder's own mapping.
pub(super) type Clean = fn(&Touched, &mut [u8]) -> anyhow::Result<()>;

/// `scrub_raw` with full verification, over the whole mapping.
pub(super) const SCRUB_RAW: (&str, Verify, Clean) = ("scrub-raw", Verify::Full, |_, memory| {
    let policy = Policy::new().verify(Verify::Full);
    // SAFETY: an exclusively borrowed slice of bytes, in one mapping.
    let _ = unsafe { scrub_raw(memory.as_mut_ptr(), memory.len(), &policy) }
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(())
});

/// `fill(0)` of the whole mapping, which makes the kernel supply what was never there.
pub(super) const FILL: (&str, Verify, Clean) = ("fill", Verify::None, |_, memory| {
    memory.fill(0);
    Ok(())
});

/// `MADV_DONTNEED` of the whole mapping; then the next guest touches the same pages.
pub(super) const DONTNEED_TOUCH: (&str, Verify, Clean) =
    ("dontneed-touch", Verify::None, |touched, memory| {
        memory::discard(memory)?;
        Ok(touched.touch(memory)?)
    });

/// An embedder's own mapping, which contenders that take turns share.
pub(super) struct Mapped {
    mapping: Rc<RefCell<Mapping>>,
    touched: Touched,
    clean: Clean,
    /// Whether it takes the less time the less was touched.
    short: bool,
}

impl Mapped {
    pub(super) fn new(
        mapping: &Rc<RefCell<Mapping>>,
        touched: &Touched,
        clean: Clean,
        short: bool,
    ) -> Self {
        Self {
            mapping: Rc::clone(mapping),
            touched: touched.clone(),
            clean,
            short,
        }
    }
}

impl Subject for Mapped {
    fn prepare(&mut self) -> anyhow::Result<()> {
        let mut mapping = self.mapping.borrow_mut();
        // Whatever the last contender has populated must not be there. Mapped anew rather than discarded: that also promises
        // hugetlb pages for all of it, without which writing to one that cannot be had would be a signal.
        mapping.map_again()?;
        Ok(self.touched.dirty(mapping.bytes())?)
    }

    fn run(&mut self, _: u64) -> anyhow::Result<()> {
        (self.clean)(&self.touched, self.mapping.borrow_mut().bytes())
    }

    fn is_rehearsed(&self) -> bool {
        self.short
    }

    fn check(&mut self) -> anyhow::Result<()> {
        let mut mapping = self.mapping.borrow_mut();
        self.touched.ensure_resident(mapping.bytes())?;
        self.touched.ensure_zero(mapping.bytes())
    }
}
