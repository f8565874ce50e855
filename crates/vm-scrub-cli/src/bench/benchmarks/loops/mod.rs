//! `loops`: every loop by itself, by size and threads.
//!
//! The same memory is worked on over and over, so what fits into a cache stays there. With several threads each has a share of
//! the size that is named. Fused loops zero and read back in turn; for the largest size and one thread
//! the same is done one after the other over all of the memory, which is what fusing is compared with.

mod subject;

use super::{count, title, unless_hugetlb_is_missing};
use crate::bench::calibrated;
use crate::bench::memory::{self, Mapping};
use crate::bench::row::{Labels, Op};
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan};
use crate::bench::team::Team;
use std::cell::RefCell;
use std::rc::Rc;
use subject::{LoopSubject, Shared};
use vm_scrub::PageSize;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};

/// Sizes in bytes: within the first-level cache, the second, the third, and beyond.
const SIZES: [u64; 7] = [
    4 << 10,
    32 << 10,
    256 << 10,
    1 << 20,
    8 << 20,
    64 << 20,
    1 << 30,
];

/// The smallest share of a thread, in bytes: a page, because nobody hands less to a thread.
const SMALLEST_SHARE: u64 = 4 << 10;

pub(super) fn plans(settings: &Rc<Settings>) -> Vec<Plan> {
    let mut plans = Vec::new();
    for page_size in settings.page_sizes_or(&[PageSize::Transparent]) {
        for threads in settings.one_and_all_threads() {
            for bytes in sizes(settings.memory) {
                if bytes / (threads as u64) < SMALLEST_SHARE {
                    continue;
                }
                for op in [Op::Zero, Op::Verify, Op::Fused] {
                    let settings = Rc::clone(settings);
                    let title = format!(
                        "{}, {}, {}",
                        op.name(),
                        title(bytes, page_size),
                        count(threads)
                    );
                    plans.push(Plan::new(title, move || {
                        let case = Case {
                            page_size,
                            threads,
                            bytes,
                            op,
                        };
                        let built = build(&settings, case);
                        unless_hugetlb_is_missing(&settings, page_size, built)
                    }));
                }
            }
        }
    }
    plans
}

/// The usual sizes as far as memory goes, and all of the memory.
fn sizes(memory: u64) -> Vec<u64> {
    let mut sizes: Vec<u64> = SIZES.into_iter().filter(|size| *size < memory).collect();
    sizes.push(memory);
    sizes
}

#[derive(Debug, Clone, Copy)]
struct Case {
    page_size: PageSize,
    threads: usize,
    bytes: u64,
    op: Op,
}

fn build(settings: &Settings, case: Case) -> anyhow::Result<Built> {
    let keep = memory::reserve(case.page_size, case.bytes)?;
    let team = Rc::new(Team::new(case.threads)?);
    let len = usize::try_from(case.bytes)?.next_multiple_of(memory::HUGE);
    let mut mapping = Mapping::anonymous(len, case.page_size)?;
    team.each(mapping.bytes(), memory::HUGE, memory::populate)?;
    let shared: Shared = Rc::new(RefCell::new(mapping));
    let contender = |op, zero: Option<ZeroLoop>, verify: Option<VerifyLoop>| {
        contender(case, op, zero, verify, &team, &shared)
    };
    let verify = |op| calibrated::verify_loop(op, case.bytes, case.threads);
    let contenders = match case.op {
        Op::Zero => ZeroLoop::available()
            .map(|each| contender(Op::Zero, Some(each), None))
            .collect(),
        Op::Verify => VerifyLoop::available()
            .map(|each| contender(Op::Verify, None, Some(each)))
            .collect(),
        Op::Fused | Op::Separate => {
            let both = case.threads == 1 && case.bytes == settings.memory;
            let ops: &[Op] = if both {
                &[Op::Fused, Op::Separate]
            } else {
                &[Op::Fused]
            };
            ZeroLoop::available()
                .flat_map(|zero| ops.iter().map(move |op| (zero, *op)))
                .map(|(zero, op)| contender(op, Some(zero), Some(verify(op))))
                .collect()
        }
    };
    Ok(Built::Ready(Group::new(contenders, keep)))
}

fn contender(
    case: Case,
    op: Op,
    zero: Option<ZeroLoop>,
    verify: Option<VerifyLoop>,
    team: &Rc<Team>,
    shared: &Shared,
) -> Contender {
    // A fused loop is called by the name of the part that differs.
    let by_loop = zero
        .map(ZeroLoop::name)
        .or(verify.map(VerifyLoop::name))
        .unwrap_or_default();
    let calibrated = match zero {
        Some(zero) => zero == calibrated::zero_loop(op, case.bytes, case.threads),
        None => verify == Some(calibrated::verify_loop(op, case.bytes, case.threads)),
    };
    let name = match op {
        Op::Zero | Op::Verify => by_loop.to_owned(),
        Op::Fused | Op::Separate => format!("{by_loop} {}", op.name()),
    };
    let labels = Labels {
        name,
        by_loop: Some(by_loop.into()),
        op: Some(op),
        calibrated: Some(calibrated),
        page_size: Some(case.page_size),
        threads: case.threads,
        bytes: case.bytes,
        ..Labels::default()
    };
    let subject = LoopSubject {
        zero,
        verify,
        fused: op == Op::Fused,
        bytes: case.bytes as usize,
        team: Rc::clone(team),
        shared: Rc::clone(shared),
    };
    let contender = Contender::new(labels, subject);
    match op {
        Op::Fused => contender.against(format!("{by_loop} {}", Op::Separate.name())),
        _ => contender,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_end_with_all_of_the_memory() {
        assert_eq!(sizes(1 << 30), SIZES);
        assert_eq!(
            sizes(2 << 20),
            [4 << 10, 32 << 10, 256 << 10, 1 << 20, 2 << 20]
        );
        assert_eq!(sizes(2 << 30).last(), Some(&(2 << 30)));
    }
}
