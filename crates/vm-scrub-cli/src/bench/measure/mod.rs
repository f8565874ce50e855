//! Taking times: warm-up, then runs of all contenders in turn (A B A B), so that a machine that slows down slows all of them.

mod doubts;
mod load;
mod sample;

pub(crate) use doubts::warnings;
pub(crate) use load::{Load, LoadMeter};
pub(crate) use sample::Sample;

use super::args::Benchmark;
use super::interrupt::Interrupt;
use super::progress::Progress;
use super::row::Row;
use super::subject::{Contender, Group};
use std::time::{Duration, Instant};

/// Timed runs if nobody said how many: at least, and at most.
const RUNS: (usize, usize) = (10, 50);

/// Warm-up runs if nobody said how many: at least, and at most.
const WARMUP: (usize, usize) = (2, 5);

/// Further warm-up has to make the best time better by this fraction to be worth it.
const STILL_WARMING: f64 = 0.05;

/// Timed runs of what is long, if nobody said how many: the fewest that have quartiles of their own.
const LONG_RUNS: usize = 5;

/// How often to measure.
#[derive(Debug, Clone)]
pub(crate) struct Effort {
    /// Timed runs, if somebody said how many.
    pub(crate) runs: Option<u32>,
    /// The time of all runs of each contender together, otherwise.
    pub(crate) min_time: Duration,
    /// When to stop, whatever has been reached.
    pub(crate) max_time: Duration,
    /// Warm-up runs, if somebody said how many.
    pub(crate) warmup: Option<u32>,
}

/// What became of a group.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub(crate) rows: Vec<Row>,
    /// Contenders that failed, by name, and why. They have no row.
    pub(crate) failed: Vec<(String, anyhow::Error)>,
}

/// A contender with its times.
struct Turn {
    contender: Contender,
    sample: Sample,
    failure: Option<anyhow::Error>,
}

impl Turn {
    /// One run from preparation to check; the time in nanoseconds of one iteration.
    fn cycle(&mut self) -> Option<f64> {
        let iterations = self.sample.iterations;
        let subject = &mut self.contender.subject;
        let result = subject.prepare().and_then(|()| {
            let started = Instant::now();
            subject.run(iterations)?;
            let elapsed = started.elapsed();
            subject.check()?;
            Ok(elapsed.as_nanos() as f64 / iterations as f64)
        });
        result.map_err(|error| self.failure = Some(error)).ok()
    }

    fn warm_up(&mut self, effort: &Effort) {
        if self.is_warm(effort) {
            // Keeps its turn while others are still warming up, so that it does not cool down.
            self.cycle();
            return;
        }
        if let Some(nanos) = self.cycle() {
            self.sample.warmup.push(nanos);
            let subject = &self.contender.subject;
            if subject.is_repeatable() {
                let run = subject.shortest_run().as_nanos() as f64;
                self.sample.iterations = (run / nanos.max(0.1)).ceil() as u64;
            }
        }
    }

    fn is_warm(&self, effort: &Effort) -> bool {
        let done = self.sample.warmup.len();
        match effort.warmup {
            _ if self.contender.subject.is_long() => true,
            Some(wanted) => done >= wanted as usize,
            None => {
                done >= WARMUP.1 || (done >= WARMUP.0 && self.sample.has_settled(STILL_WARMING))
            }
        }
    }

    /// How many runs there should be at least.
    fn wanted(&self, effort: &Effort) -> usize {
        match effort.runs {
            Some(wanted) => wanted as usize,
            None if self.contender.subject.is_long() => LONG_RUNS,
            None => RUNS.0,
        }
    }

    fn is_done(&self, effort: &Effort) -> bool {
        let done = self.sample.times.len();
        let enough_time = || self.sample.timed_nanos() >= effort.min_time.as_nanos() as f64;
        done >= self.wanted(effort) && (effort.runs.is_some() || done >= RUNS.1 || enough_time())
    }
}

/// Runs the contenders of `group` in turn. A contender that fails is left out from then on; the others go on.
pub(crate) fn measure(
    benchmark: Benchmark,
    title: &str,
    group: &mut Group,
    effort: &Effort,
    progress: &Progress,
    interrupt: &Interrupt,
) -> Measured {
    let mut turns: Vec<Turn> = group
        .contenders
        .drain(..)
        .map(|contender| Turn {
            contender,
            sample: Sample::default(),
            failure: None,
        })
        .collect();
    let started = Instant::now();
    let over = || interrupt.is_requested() || started.elapsed() >= effort.max_time;
    let mut measured = Measured::default();

    while !over() && turns.iter().any(|turn| !turn.is_warm(effort)) {
        for turn in &mut turns {
            progress.turn(&turn.contender.labels.name, "warm-up");
            turn.warm_up(effort);
        }
        drop_failed(&mut turns, &mut measured);
    }
    let meter = LoadMeter::start();
    let mut round = 0;
    // Two rounds whatever the time: one alone has no spread.
    while turns.iter().any(|turn| !turn.is_done(effort))
        && !interrupt.is_requested()
        && (round < 2 || !over())
    {
        round += 1;
        for turn in &mut turns {
            progress.turn(&turn.contender.labels.name, &format!("run {round}"));
            if turn.contender.subject.is_rehearsed() && turn.cycle().is_none() {
                continue;
            }
            if let Some(nanos) = turn.cycle() {
                turn.sample.times.push(nanos);
            }
        }
        drop_failed(&mut turns, &mut measured);
    }
    let load = meter.stop();

    let doubts: Vec<_> = turns
        .iter_mut()
        .map(|turn| turn.contender.subject.doubts())
        .collect();
    for (turn, doubts) in turns.iter().zip(doubts) {
        let Some(mut row) = turn.sample.row(benchmark, title, &turn.contender.labels) else {
            continue;
        };
        turn.contender.subject.observe(&mut row.labels);
        row.warnings = warnings(&turn.sample, turn.wanted(effort), load);
        row.warnings.extend(doubts);
        row.warm = !turn.sample.is_cold();
        // A workload's rate is not that of the scrub beside it.
        row.of_asked = match (row.labels.asked_gib_per_s, row.labels.accesses) {
            (Some(asked), None) if asked > 0.0 => Some(row.gib_per_s / asked),
            _ => None,
        };
        row.comparison = turn.contender.baseline.as_ref().and_then(|baseline| {
            let other = turns
                .iter()
                .find(|turn| turn.contender.labels.name == *baseline)?;
            turn.sample.compared_with(baseline, &other.sample)
        });
        measured.rows.push(row);
    }
    ceilings(&mut measured.rows);
    measured
}

fn drop_failed(turns: &mut Vec<Turn>, measured: &mut Measured) {
    turns.retain_mut(|turn| match turn.failure.take() {
        Some(error) => {
            measured
                .failed
                .push((turn.contender.labels.name.clone(), error));
            false
        }
        None => true,
    });
}

/// Sets each loop's rate in relation to the best of its operation.
fn ceilings(rows: &mut [Row]) {
    let rates: Vec<_> = rows
        .iter()
        .map(|row| (row.labels.op, row.gib_per_s))
        .collect();
    for row in rows.iter_mut().filter(|row| row.labels.op.is_some()) {
        let same = rates.iter().filter(|(op, _)| *op == row.labels.op);
        let best = same.map(|(_, rate)| *rate).fold(0.0, f64::max);
        row.of_ceiling = (best > 0.0).then(|| row.gib_per_s / best);
    }
}

#[cfg(test)]
mod tests;
