//! vm-scrub's own contenders: memory that is leased from a pool, dirtied, torn down and leased again.

use crate::bench::memory;
use crate::bench::row::Labels;
use crate::bench::subject::Subject;
use crate::bench::team::Team;
use crate::bench::warning::Warning;
use anyhow::{Context, ensure};
use std::rc::Rc;
use vm_memory::GuestAddress;
use vm_scrub::{
    Lease, PageSize, Policy, Pool, Quiesced, Revocation, RevokeBy, ScrubReceipt, Ticket, Verify,
};

/// A pool of exactly `bytes` bytes, populated.
pub(super) fn pool(
    bytes: u64,
    page_size: PageSize,
    threads: usize,
    verify: Verify,
    populate: bool,
    revoke_by: RevokeBy,
) -> anyhow::Result<Pool> {
    Pool::builder()
        .capacity(bytes)
        .page_size(page_size)
        .threads(threads)
        .policy(Policy::new().verify(verify))
        .populate(populate)
        .revoke_by(revoke_by)
        .build()
        .context("no pool")
}

/// All of a pool, in one region.
pub(super) fn lease_all(pool: &Pool) -> anyhow::Result<Lease> {
    pool.lease(&[(GuestAddress(0), pool.capacity())])
        .context("no lease")
}

/// Tears down a lease that only the harness has used.
///
/// # Errors
///
/// If it is refused, or not every byte could be scrubbed.
pub(super) fn teardown(lease: Lease) -> anyhow::Result<ScrubReceipt> {
    // SAFETY: no guest and no device ever had this memory; slices of it end before the lease is passed on.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    let receipt = lease.teardown(quiesced)?;
    ensure!(
        receipt.bytes_quarantined == 0,
        "{} bytes are in quarantine: {:?}",
        receipt.bytes_quarantined,
        receipt.quarantined
    );
    Ok(receipt)
}

/// Revokes a lease that only the harness has used; it is scrubbed in the background.
///
/// # Errors
///
/// If it is refused.
pub(super) fn retire(lease: Lease) -> anyhow::Result<Ticket> {
    // SAFETY: as in `teardown`.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    Ok(lease.retire(quiesced)?)
}

/// vm-scrub's complete path: revoke, scrub, verify, recycle, and grant to the next guest, ready and resident.
pub(super) struct Turnaround {
    pool: Pool,
    lease: Option<Lease>,
    team: Rc<Team>,
}

impl Turnaround {
    /// With a pool of `labels.bytes` that scrubs with `labels.threads` threads; `team` plays the guest.
    pub(super) fn new(
        labels: &Labels,
        revoke_by: RevokeBy,
        team: &Rc<Team>,
    ) -> anyhow::Result<Self> {
        let page_size = labels.page_size.unwrap_or_default();
        let verify = labels.verify.unwrap_or_default();
        let pool = pool(
            labels.bytes,
            page_size,
            labels.threads,
            verify,
            true,
            revoke_by,
        )?;
        Ok(Self {
            lease: Some(lease_all(&pool)?),
            pool,
            team: Rc::clone(team),
        })
    }

    /// How its pool takes memory away.
    pub(super) fn revocation(&self) -> Revocation {
        self.pool.revocation()
    }

    fn lease(&mut self) -> anyhow::Result<&mut Lease> {
        self.lease.as_mut().context("the last run lost the lease")
    }
}

impl Subject for Turnaround {
    fn prepare(&mut self) -> anyhow::Result<()> {
        let team = Rc::clone(&self.team);
        // SAFETY: the harness is the only one who has this lease.
        for region in unsafe { memory::of_lease(self.lease()?) } {
            memory::dirty(&team, region);
        }
        Ok(())
    }

    fn run(&mut self, _: u64) -> anyhow::Result<()> {
        let dirty = self.lease.take().context("the last run lost the lease")?;
        let _ = teardown(dirty)?;
        self.lease = Some(lease_all(&self.pool)?);
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        // SAFETY: as in `prepare`.
        for region in unsafe { memory::of_lease(self.lease()?) } {
            memory::ensure_resident(region)?;
            memory::ensure_zero(region)?;
        }
        Ok(())
    }

    fn doubts(&mut self) -> Vec<Warning> {
        let page_size = self.pool.page_size();
        let Some(lease) = &mut self.lease else {
            return Vec::new();
        };
        // SAFETY: as in `prepare`.
        let regions = unsafe { memory::of_lease(lease) }.into_iter();
        regions
            .filter_map(|region| memory::small_pages(region, page_size))
            .collect()
    }
}

impl Drop for Turnaround {
    fn drop(&mut self) {
        end(self.lease.take());
    }
}

/// Tears down what is left when all runs are over: a lease that is merely dropped is quarantined, with an error in the log.
pub(super) fn end(lease: Option<Lease>) {
    if let Some(Err(error)) = lease.map(teardown) {
        log::warn!("the last teardown failed: {error:#}");
    }
}
