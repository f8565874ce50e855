//! Contenders that do nothing, too little or fail, and the order in which all take turns.

use super::*;
use crate::bench::row::{Labels, Op};
use crate::bench::subject::Subject;
use anyhow::{bail, ensure};
use std::cell::RefCell;
use std::rc::Rc;

type Log = Rc<RefCell<Vec<String>>>;

struct Fake {
    name: &'static str,
    log: Log,
    fail_at: Option<usize>,
    cycles: usize,
    repeatable: bool,
    long: bool,
}

impl Subject for Fake {
    fn prepare(&mut self) -> anyhow::Result<()> {
        self.cycles += 1;
        Ok(())
    }

    fn run(&mut self, iterations: u64) -> anyhow::Result<()> {
        ensure!(iterations == 1 || self.repeatable);
        self.log.borrow_mut().push(self.name.to_owned());
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        if self.fail_at == Some(self.cycles) {
            bail!("found out");
        }
        Ok(())
    }

    fn is_repeatable(&self) -> bool {
        self.repeatable
    }

    fn is_long(&self) -> bool {
        self.long
    }

    fn is_rehearsed(&self) -> bool {
        self.name == "r"
    }
}

fn group(log: &Log, fakes: &[(&'static str, Option<usize>)]) -> Group {
    let contenders = fakes.iter().map(|&(name, fail_at)| {
        let labels = Labels {
            name: name.into(),
            bytes: 1 << 30,
            op: Some(Op::Zero),
            ..Labels::default()
        };
        let fake = Fake {
            name,
            log: Rc::clone(log),
            fail_at,
            cycles: 0,
            repeatable: name == "repeatable",
            long: name == "long",
        };
        Contender::new(labels, fake).against("a")
    });
    Group::new(contenders.collect(), ())
}

fn run(group: &mut Group, runs: u32, warmup: u32, max_time: Duration) -> Measured {
    let effort = Effort {
        runs: Some(runs),
        min_time: Duration::ZERO,
        max_time,
        warmup: Some(warmup),
    };
    run_with(group, &effort)
}

fn run_with(group: &mut Group, effort: &Effort) -> Measured {
    let (progress, interrupt) = (Progress::hidden(), Interrupt::never());
    measure(
        Benchmark::Loops,
        "fakes",
        group,
        effort,
        &progress,
        &interrupt,
    )
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn contenders_take_turns() {
    let log = Log::default();
    let measured = run(&mut group(&log, &[("a", None), ("b", None)]), 3, 1, LONG);
    assert_eq!(log.borrow().concat(), "abababab");
    let [a, b] = &measured.rows[..] else {
        panic!("{measured:?}")
    };
    assert_eq!((a.runs, a.warmup_runs, b.times_ns.len()), (3, 1, 3));
    let compared = b.comparison.as_ref().expect("`a` is there");
    assert_eq!(compared.baseline, "a");
    assert!(compared.ratio > 0.0);
    let best = a.of_ceiling.unwrap().max(b.of_ceiling.unwrap());
    assert_eq!(best, 1.0);
}

#[test]
fn what_is_rehearsed_runs_once_more_before_each_timed_run() {
    let log = Log::default();
    let measured = run(&mut group(&log, &[("a", None), ("r", None)]), 2, 1, LONG);
    assert_eq!(log.borrow().concat(), "ararrarr");
    assert_eq!(measured.rows[1].runs, 2);

    // Found out in the rehearsal.
    let measured = run(&mut group(&log, &[("r", Some(2)), ("a", None)]), 2, 1, LONG);
    assert_eq!((measured.failed.len(), measured.rows.len()), (1, 1));
}

#[test]
fn a_contender_that_is_found_out_has_no_row_and_the_others_go_on() {
    let log = Log::default();
    let measured = run(&mut group(&log, &[("a", Some(3)), ("b", None)]), 4, 1, LONG);
    assert_eq!(measured.failed.len(), 1);
    assert_eq!(measured.failed[0].0, "a");
    assert_eq!(measured.failed[0].1.to_string(), "found out");
    let [b] = &measured.rows[..] else {
        panic!("{measured:?}")
    };
    assert_eq!((b.labels.name.as_str(), b.runs), ("b", 4));
    assert!(b.comparison.is_none(), "the baseline is not there");
}

#[test]
fn the_time_limit_ends_the_runs_and_says_so() {
    let log = Log::default();
    let measured = run(&mut group(&log, &[("a", None)]), 100, 1, Duration::ZERO);
    assert_eq!(measured.rows[0].runs, 2, "one alone has no spread");
    let kinds: Vec<_> = measured.rows[0]
        .warnings
        .iter()
        .map(|each| each.kind())
        .collect();
    assert!(kinds.contains(&"fewer-runs"), "{kinds:?}");
}

#[test]
fn only_what_is_repeatable_is_repeated() {
    let log = Log::default();
    let measured = run(
        &mut group(&log, &[("a", None), ("repeatable", None)]),
        2,
        2,
        LONG,
    );
    assert!(measured.failed.is_empty(), "{measured:?}");
    assert_eq!(measured.rows[0].iterations, 1);
    assert!(measured.rows[1].iterations > 1);
}

#[test]
fn a_few_runs_of_what_is_long_are_enough() {
    let unsaid = Effort {
        runs: None,
        min_time: Duration::ZERO,
        max_time: LONG,
        warmup: None,
    };
    let log = Log::default();
    let long = run_with(&mut group(&log, &[("long", None)]), &unsaid);
    assert_eq!(
        (long.rows[0].runs, long.rows[0].warmup_runs),
        (LONG_RUNS, 0)
    );
    let usual = run_with(&mut group(&log, &[("a", None)]), &unsaid);
    assert_eq!(usual.rows[0].runs, RUNS.0);
    assert!(usual.rows[0].warmup_runs >= WARMUP.0);
    let said = run(&mut group(&log, &[("long", None)]), 3, 2, LONG);
    assert_eq!((said.rows[0].runs, said.rows[0].warmup_runs), (3, 0));
}

#[test]
fn a_rate_is_set_in_relation_to_the_one_that_was_asked_for() {
    let log = Log::default();
    let mut asked = group(&log, &[("a", None), ("b", None)]);
    asked.contenders[0].labels.asked_gib_per_s = Some(4.0);
    let workload = &mut asked.contenders[1].labels;
    (workload.asked_gib_per_s, workload.accesses) = (Some(4.0), Some(1));
    let measured = run(&mut asked, 2, 0, LONG);
    let [a, b] = &measured.rows[..] else {
        panic!("{measured:?}")
    };
    assert_eq!(a.of_asked, Some(a.gib_per_s / 4.0));
    assert_eq!(b.of_asked, None, "the rate is that of something else");
}
