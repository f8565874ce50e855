//! `vm-scrub demo`: guests one after the other in the same memory, each looking for what its predecessors left.

mod guest;
mod narrator;
mod report;
mod secrets;

use crate::args::{DemoArgs, Sabotage, VerifyArg};
use crate::format;
use crate::signals::{HeldBack, Lent};
use anyhow::{Context, bail};
use guest::{GuestKind, RunningGuest};
use narrator::Narrator;
use report::{GuestReport, LateWrites, Report};
use std::time::Duration;
use vm_memory::GuestAddress;
use vm_scrub::test_support::{self, build_sabotaged};
use vm_scrub::{BLOCK_SIZE, LeaseError, PageSize, Policy, Pool};
use vm_scrub_vmm::{HugePages, StrayDevice, kvm_usable, memory_available};

/// How long one step of a guest may take: a guest that hangs must not hang the command.
fn step_limit(memory: u64) -> Duration {
    Duration::from_secs(30)
        + Duration::from_secs(10) * u32::try_from(memory >> 30).unwrap_or(u32::MAX)
}

/// Runs the demonstration and prints what it found. `true` if every teardown was proven and nothing leaked.
pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<bool> {
    // Before any thread is started, and the narrator has one.
    let requests = match args.page_size {
        PageSize::Huge2M => Some(HeldBack::new().context("signals cannot be held back")?),
        _ => None,
    };
    let narrator = Narrator::new(args);
    let kind = match kvm_usable() {
        Ok(()) => GuestKind::Kvm,
        Err(error) => {
            narrator.no_kvm(&error);
            GuestKind::Threads
        }
    };
    // Held until the pool is gone: dropping it gives the pages back.
    let _huge_pages = match requests {
        Some(requests) => Some(borrow_huge_pages(
            args.memory / BLOCK_SIZE,
            requests,
            &narrator,
        )?),
        None => {
            ensure_memory(args.memory)?;
            None
        }
    };
    let pool = build_pool(args)?;
    let mut report = Report::new(kind, args, &pool);
    narrator.begin(&report);
    let stray = run_guests(args, kind, &pool, &mut report, &narrator)?;
    if let Some(stray) = stray {
        let all = stray.stop();
        if let Some(late) = &mut report.late_writes {
            // Whatever it did while the other guests ran.
            late.landed_after_revocation = all.landed - late.landed_before_revocation;
            late.refused = all.refused;
        }
    }
    report.close();
    narrator.end(&report)?;
    let out_of_reach = report
        .late_writes
        .is_none_or(|late| late.landed_after_revocation == 0);
    Ok(report.proven && report.leaked_bytes == 0 && out_of_reach)
}

fn borrow_huge_pages(
    pages: u64,
    requests: HeldBack,
    narrator: &Narrator,
) -> anyhow::Result<Lent<HugePages>> {
    let huge_pages = HugePages::ensure(pages)?;
    narrator.huge_pages(huge_pages.added());
    requests
        .lend(huge_pages)
        .context("signals cannot be waited for")
}

/// A host that has too little memory would end some process, and not necessarily this one.
fn ensure_memory(wanted: u64) -> anyhow::Result<()> {
    // Where the host does not say, it is tried.
    if let Ok(available) = memory_available()
        && available < wanted
    {
        bail!(
            "a guest of {} was asked for and the host has {} of memory available: choose a smaller --memory",
            format::bytes(wanted),
            format::bytes(available)
        );
    }
    Ok(())
}

/// A pool that holds exactly one guest: the next one gets the same blocks or none.
fn build_pool(args: &DemoArgs) -> anyhow::Result<Pool> {
    let mut builder = Pool::builder()
        .capacity(args.memory)
        .page_size(args.page_size)
        .policy(Policy::new().verify(args.verify.into()));
    if let Some(threads) = args.threads {
        builder = builder.threads(threads as usize);
    }
    let pool = match args.sabotage {
        Sabotage::None | Sabotage::LateWrite => builder.build(),
        Sabotage::SkipScrub => build_sabotaged(builder, test_support::Sabotage::SkipScrub),
        Sabotage::SkipChunk => build_sabotaged(builder, test_support::Sabotage::SkipChunk),
    };
    pool.context("no pool")
}

/// Guest memory as PCs have it: from 0, and what does not fit below 3 GiB from 4 GiB on.
fn memory_layout(memory: u64) -> Vec<(GuestAddress, u64)> {
    const BELOW: u64 = 3 << 30;
    const ABOVE: u64 = 4 << 30;
    let mut layout = vec![(GuestAddress(0), memory.min(BELOW))];
    if memory > BELOW {
        layout.push((GuestAddress(ABOVE), memory - BELOW));
    }
    layout
}

/// Runs all guests. Returns the stray device, which is still writing, if there is to be one.
fn run_guests(
    args: &DemoArgs,
    kind: GuestKind,
    pool: &Pool,
    report: &mut Report,
    narrator: &Narrator,
) -> anyhow::Result<Option<StrayDevice>> {
    let layout = memory_layout(args.memory);
    let limit = step_limit(args.memory);
    let mut stray = None;
    for number in 1..=args.guests {
        narrator.ensure_somebody_reads()?;
        let name = format!("guest-{number}");
        let lease = match pool.lease_for(name.clone(), &layout) {
            Ok(lease) => lease,
            // The scrubber was caught: what the last guest left is in quarantine, and there is no other memory.
            Err(error @ LeaseError::NotEnough { .. }) if pool.accounts().quarantined > 0 => {
                narrator.refused(&name, &error);
                report.refused = Some(error.to_string());
                break;
            }
            Err(error) => return Err(error).context(format!("no memory for {name}")),
        };
        let mut entry = GuestReport::new(&name, lease.blocks());
        narrator.leased(&name, &lease);
        let guest = RunningGuest::boot(kind, args.vcpus as usize, lease)
            .with_context(|| format!("{name} did not start"))?;

        if number > 1 {
            narrator.step(&name, "reads its whole memory");
            let found = guest.look_for_leftovers(number, limit)?;
            narrator.looked(&name, &found);
            entry.looked(found);
        }
        if number < args.guests {
            narrator.step(&name, "fills its whole memory with a secret");
            entry.secret_bytes_before_teardown = guest.fill_with_secrets(number, limit)?;
            narrator.filled(&name, entry.secret_bytes_before_teardown);
        }
        if number == 1 && args.sabotage == Sabotage::LateWrite {
            // SAFETY: the pool keeps the windows of guests that are gone reserved and inaccessible (1 TiB of them), and the
            // device is stopped before the pool is dropped.
            let device = unsafe { guest.start_stray_device() }?;
            // A device that reaches nothing now proves nothing later.
            let landed = device.round(limit)?.landed;
            anyhow::ensure!(
                landed > 0,
                "the device could not write to the memory of {name}"
            );
            stray = Some(device);
            narrator.stray_device_started(landed);
        }

        narrator.step(&name, "is torn down");
        let (lease, quiesced) = guest.stop()?;
        let receipt = lease
            .teardown(quiesced)
            .with_context(|| format!("{name} was not torn down"))?;
        narrator.torn_down(&receipt);
        if number == 1
            && let Some(stray) = &stray
        {
            let before = stray.snapshot();
            let after = stray.round(limit)?;
            report.late_writes = Some(LateWrites {
                landed_before_revocation: before.landed,
                landed_after_revocation: after.landed,
                refused: after.refused,
            });
            narrator.stray_device(&after);
        }
        report.add(entry, receipt);
    }
    if report.guests.is_empty() {
        bail!("no guest could be run");
    }
    Ok(stray)
}

/// Whether a report can be called proven at all: without reading back, nothing is.
fn can_prove(verify: VerifyArg) -> bool {
    verify == VerifyArg::Full
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_hole_below_4_gib_free() {
        let layout = |bytes| -> Vec<(u64, u64)> {
            let regions = memory_layout(bytes);
            regions
                .into_iter()
                .map(|(start, bytes)| (start.0, bytes))
                .collect()
        };
        let (three, four) = (3 << 30, 4 << 30);
        assert_eq!(layout(2 << 20), [(0, 2 << 20)]);
        assert_eq!(layout(three), [(0, three)]);
        assert_eq!(layout(three + BLOCK_SIZE), [(0, three), (four, BLOCK_SIZE)]);
        for bytes in [three, four, 64 << 30] {
            vm_scrub_vmm::check_ranges(&layout(bytes)).expect("guests can work on it");
        }
    }

    #[test]
    fn a_step_may_take_longer_where_there_is_more_memory() {
        assert!(step_limit(2 << 20) >= Duration::from_secs(30));
        assert!(step_limit(64 << 30) > step_limit(1 << 30));
    }
}
