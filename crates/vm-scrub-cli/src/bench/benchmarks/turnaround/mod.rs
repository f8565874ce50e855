//! `turnaround`: from a dirty guest to the next guest's memory, zero and resident, beside what people do today.
//!
//! Every contender begins with memory of which a guest has written every byte, and ends with memory that is zero and entered
//! in the page tables: nothing is left for the next guest to wait for. What has threads has the same number of them. Only
//! vm-scrub takes the memory away from the old guest's addresses and reads it back; with `verify` `none` it does not read it
//! back either.

mod fill;
mod kernel;

use super::leased::Turnaround;
use super::{count, title, unless_hugetlb_is_missing};
use crate::bench::memory::{self, Mapping};
use crate::bench::row::Labels;
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan};
use crate::bench::team::Team;
use fill::{Fill, RAYON_FILL, WRITE_BYTES, ZEROIZE};
use kernel::{DONTNEED, Kernel, MUNMAP, PUNCH_HOLE};
use std::cell::RefCell;
use std::rc::Rc;
use vm_scrub::{PageSize, RevokeBy, Verify};

/// How many times a guest's memory is there at once: vm-scrub has a pool for each way to revoke, with and without
/// verification; the three ways through the kernel have memory of their own; the three that write zeros share theirs.
fn memories(page_size: PageSize) -> u64 {
    2 * ways(page_size).len() as u64 + 3 + 1
}

/// What everybody is compared with.
const BASELINE: &str = MUNMAP.0;

pub(super) fn plans(settings: &Rc<Settings>) -> Vec<Plan> {
    let mut plans = Vec::new();
    for page_size in settings.page_sizes() {
        let settings = Rc::clone(settings);
        let title = format!(
            "{}, {}",
            title(settings.memory, page_size),
            count(settings.threads)
        );
        plans.push(Plan::new(title, move || {
            let built = build(&settings, page_size);
            unless_hugetlb_is_missing(&settings, page_size, built)
        }));
    }
    plans
}

/// The ways to take memory away that are worth comparing. That nothing is pinned for DMA can be proven page by page only, which small
/// pages make expensive; what vm-scrub is compared with does not prove it.
fn ways(page_size: PageSize) -> &'static [RevokeBy] {
    match page_size {
        PageSize::Base4K => &[RevokeBy::Automatic, RevokeBy::Mremap],
        _ => &[RevokeBy::Automatic],
    }
}

fn build(settings: &Settings, page_size: PageSize) -> anyhow::Result<Built> {
    let keep = memory::reserve(page_size, settings.memory * memories(page_size))?;
    let team = Rc::new(Team::new(settings.threads)?);
    let len = usize::try_from(settings.memory)?;
    let labels = |name: &str, verify, threads| Labels {
        name: name.into(),
        verify: Some(verify),
        page_size: Some(page_size),
        threads,
        bytes: settings.memory,
        ..Labels::default()
    };

    let mut contenders = Vec::new();
    let mut ways_seen = Vec::new();
    for revoke_by in ways(page_size) {
        for verify in [Verify::Full, Verify::None] {
            let mut labels = labels("vm-scrub", verify, settings.threads);
            let subject = Turnaround::new(&labels, *revoke_by, &team)?;
            let way = (subject.revocation(), verify);
            // Some kernels have one way only.
            if !ways_seen.contains(&way) {
                labels.revocation = Some(way.0);
                contenders.push(Contender::new(labels, subject).against(BASELINE));
                ways_seen.push(way);
            }
        }
    }
    for (name, renew) in [MUNMAP, DONTNEED, PUNCH_HOLE] {
        let mapping = if name == PUNCH_HOLE.0 {
            Mapping::memfd(len, page_size)?
        } else {
            Mapping::anonymous(len, page_size)?
        };
        let subject = Kernel::new(mapping, renew, &team);
        let labels = labels(name, Verify::None, settings.threads);
        contenders.push(Contender::new(labels, subject).against(BASELINE));
    }
    let shared = Rc::new(RefCell::new(Mapping::anonymous(len, page_size)?));
    for (name, fill, threads) in [
        (WRITE_BYTES.0, WRITE_BYTES.1, 1),
        (RAYON_FILL.0, RAYON_FILL.1, settings.threads),
        (ZEROIZE.0, ZEROIZE.1, 1),
    ] {
        let subject = Fill::new(Rc::clone(&shared), fill, &team);
        let labels = labels(name, Verify::None, threads);
        contenders.push(Contender::new(labels, subject).against(BASELINE));
    }
    Ok(Built::Ready(Group::new(contenders, keep)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::subject::Subject;

    /// Eight small pages for each contender: enough to see whether it works.
    const LEN: usize = 2 * memory::HUGE;

    #[test]
    fn enough_is_asked_for_before_anything_is_populated() {
        let contenders = |page_size| {
            let args = crate::bench::args::tests::parse("turnaround --memory 2M --threads 1");
            let settings = Settings::new(&args.expect("good arguments"));
            match build(&settings, page_size).expect("memory") {
                Built::Ready(group) => group.contenders.len() as u64,
                Built::Skipped(reason) => panic!("{reason}"),
            }
        };
        // Three of them share their memory.
        for page_size in [PageSize::Base4K, PageSize::Transparent] {
            assert!(
                memories(page_size) >= contenders(page_size) - 2,
                "{page_size}"
            );
        }
    }

    fn cycle(subject: &mut dyn Subject) -> anyhow::Result<()> {
        subject.prepare()?;
        subject.run(1)?;
        subject.check()
    }

    #[test]
    fn every_contender_that_works_is_believed() {
        let team = Rc::new(Team::new(2).expect("threads"));
        for page_size in [PageSize::Base4K, PageSize::Transparent] {
            for (name, renew) in [MUNMAP, DONTNEED, PUNCH_HOLE] {
                let mapping = if name == PUNCH_HOLE.0 {
                    Mapping::memfd(LEN, page_size)
                } else {
                    Mapping::anonymous(LEN, page_size)
                };
                let mut subject = Kernel::new(mapping.expect("mapped"), renew, &team);
                for _ in 0..2 {
                    cycle(&mut subject)
                        .unwrap_or_else(|error| panic!("{name} {page_size}: {error:#}"));
                }
            }
            let mapping = Mapping::anonymous(LEN, page_size).expect("mapped");
            let shared = Rc::new(RefCell::new(mapping));
            for (name, fill) in [WRITE_BYTES, RAYON_FILL, ZEROIZE] {
                let mut subject = Fill::new(Rc::clone(&shared), fill, &team);
                cycle(&mut subject).unwrap_or_else(|error| panic!("{name} {page_size}: {error:#}"));
            }
        }
    }

    #[test]
    fn a_contender_that_does_nothing_or_half_of_it_is_caught() {
        let team = Rc::new(Team::new(2).expect("threads"));
        let mapping = || Mapping::anonymous(LEN, PageSize::Base4K).expect("mapped");
        let fills: [fill::Write; 2] = [
            |_, _| {},
            |_, memory| {
                let last = memory.len() - 1;
                memory[..last].fill(0);
            },
        ];
        for fill in fills {
            let mut subject = Fill::new(Rc::new(RefCell::new(mapping())), fill, &team);
            let error = cycle(&mut subject)
                .expect_err("dirty memory is left")
                .to_string();
            assert!(error.contains("did not do its work"), "{error}");
        }
        let renewals: [(kernel::Renew, &str); 3] = [
            (|_, _| Ok(()), "did not do its work"),
            (
                |mapping, _| mapping.map_again(),
                "0 of 1024 pages are resident",
            ),
            (
                |mapping, team| {
                    mapping.map_again()?;
                    let memory = mapping.bytes();
                    let half = memory.len() / 2;
                    Ok(team.each(&mut memory[..half], memory::HUGE, memory::populate)?)
                },
                "512 of 1024 pages are resident",
            ),
        ];
        for (renew, caught) in renewals {
            let mut subject = Kernel::new(mapping(), renew, &team);
            let error = cycle(&mut subject).expect_err(caught).to_string();
            assert!(error.contains(caught), "{error}");
        }
    }
}
