//! `scaling`: a turnaround with one thread, and with one to four times as many threads as were asked for (by default, as there
//! are processors). More threads than processors must not cost much: hosts are full of other people's threads.

use super::leased::Turnaround;
use super::{title, unless_hugetlb_is_missing};
use crate::bench::memory;
use crate::bench::row::Labels;
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan};
use crate::bench::team::Team;
use std::rc::Rc;
use vm_scrub::{PageSize, RevokeBy, Verify};

pub(super) fn plans(settings: &Rc<Settings>) -> Vec<Plan> {
    let mut plans = Vec::new();
    for page_size in settings.page_sizes() {
        for verify in [Verify::Full, Verify::None] {
            let settings = Rc::clone(settings);
            let read_back = if verify == Verify::Full {
                "verified"
            } else {
                "not verified"
            };
            let title = format!("{}, {read_back}", title(settings.memory, page_size));
            plans.push(Plan::new(title, move || {
                let built = build(&settings, page_size, verify);
                unless_hugetlb_is_missing(&settings, page_size, built)
            }));
        }
    }
    plans
}

/// Thread counts to compare, ascending.
fn thread_counts(threads: usize) -> Vec<usize> {
    let mut counts = vec![1, threads, 2 * threads, 3 * threads, 4 * threads];
    counts.dedup();
    counts
}

fn name(threads: usize) -> String {
    format!("{threads}-threads")
}

fn build(settings: &Settings, page_size: PageSize, verify: Verify) -> anyhow::Result<Built> {
    let counts = thread_counts(settings.threads);
    let keep = memory::reserve(page_size, settings.memory * counts.len() as u64)?;
    let team = Rc::new(Team::new(settings.threads)?);
    let contenders = counts.into_iter().map(|threads| {
        let labels = Labels {
            name: name(threads),
            verify: Some(verify),
            page_size: Some(page_size),
            threads,
            bytes: settings.memory,
            ..Labels::default()
        };
        let subject = Turnaround::new(&labels, RevokeBy::Automatic, &team)?;
        Ok(Contender::new(labels, subject).against(name(settings.threads)))
    });
    Ok(Built::Ready(Group::new(
        contenders.collect::<anyhow::Result<_>>()?,
        keep,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_to_four_times_as_many() {
        assert_eq!(thread_counts(2), [1, 2, 4, 6, 8]);
        assert_eq!(thread_counts(1), [1, 2, 3, 4]);
    }
}
