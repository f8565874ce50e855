//! `vm-scrub bench`: what scrubbing costs on this host, beside what people do today.
//!
//! Each [`Benchmark`] is a question. It plans groups of contenders; each group is set up, measured in turns,
//! reported and taken down before the next, and what has been measured is kept whatever happens later. Measuring knows nothing
//! of memory, contenders nothing of the clock, and exporters nothing of either.

pub(crate) mod args;
mod benchmarks;
mod calibrated;
mod cpus;
mod export;
mod interrupt;
mod measure;
mod memory;
mod progress;
mod random;
mod results;
mod row;
mod settings;
mod setup;
mod stats;
mod subject;
mod summary;
mod table;
mod team;
mod units;
mod warning;

use args::{BenchArgs, Benchmark};
use export::Exports;
pub(crate) use export::NotWritable;
use interrupt::Interrupt;
use measure::measure;
use progress::Progress;
use results::{Note, Results};
use row::{Op, Row};
use settings::Settings;
use setup::Setup;
use std::rc::Rc;
use subject::{Built, Plan};
use table::Table;

/// Runs the benchmarks and reports what they found. `true` if something was measured and nothing failed.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<bool> {
    let exports = Exports::open(args)?;
    let interrupt = Interrupt::listen()?;
    let settings = Rc::new(Settings::new(args));
    let plans: Vec<(Benchmark, Plan)> = args
        .benchmark
        .benchmarks()
        .iter()
        .flat_map(|benchmark| {
            let plans = benchmarks::plans(*benchmark, &settings);
            plans.into_iter().map(|plan| (*benchmark, plan))
        })
        .collect();
    let mut session = Session {
        json: args.json,
        progress: Progress::new(plans.len()),
        results: Results::new(Setup::of_this_host()),
    };
    let mut last = None;
    for (benchmark, plan) in plans {
        let why = if interrupt.is_requested() {
            Some("interrupted before its turn")
        } else if session.progress.is_in_vain() {
            Some("nobody reads the results any more")
        } else {
            None
        };
        if let Some(why) = why {
            session.fail(benchmark, &plan.title, None, why.into());
            continue;
        }
        if last
            .replace(benchmark)
            .is_some_and(|before| before != benchmark)
        {
            // Hours may be lost if a later benchmark takes the host down.
            exports.write(&session.results)?;
        }
        session.run(benchmark, plan, &settings, &interrupt);
    }
    session.progress.finish();
    exports.write(&session.results)?;
    // One benchmark's groups are still in sight.
    if !args.json && args.benchmark.benchmarks().len() > 1 {
        let answers = summary::of(&session.results);
        session.progress.say(format_args!(
            "\nsummary\n{}\n{}",
            summary::table(&answers).for_terminal(),
            summary::ABOUT
        ));
    }
    if args.json {
        // Programs know three things that loops do; what those are compared with is in the exports.
        let rows = session.results.rows.iter();
        let rows: Vec<&Row> = rows
            .filter(|row| row.labels.op != Some(Op::Separate))
            .collect();
        session.progress.say(serde_json::to_string_pretty(&rows)?);
    }
    if interrupt.is_requested() {
        session.progress.note("interrupted: what there is was kept");
    }
    session.progress.ensure_somebody_reads()?;
    let Results { rows, failed, .. } = &session.results;
    Ok(failed.is_empty() && !rows.is_empty() && !interrupt.is_requested())
}

/// What has been measured so far, and who is told.
struct Session {
    json: bool,
    progress: Progress,
    results: Results,
}

impl Session {
    fn run(
        &mut self,
        benchmark: Benchmark,
        plan: Plan,
        settings: &Settings,
        interrupt: &Interrupt,
    ) {
        let Plan { title, build } = plan;
        self.progress.group(&format!("{benchmark}: {title}"));
        match build() {
            Ok(Built::Ready(mut group)) => {
                let effort = &settings.effort;
                let measured = measure(
                    benchmark,
                    &title,
                    &mut group,
                    effort,
                    &self.progress,
                    interrupt,
                );
                self.report(benchmark, &title, &measured.rows);
                self.results.rows.extend(measured.rows);
                for (contender, error) in measured.failed {
                    self.fail(benchmark, &title, Some(contender), format!("{error:#}"));
                }
            }
            Ok(Built::Skipped(reason)) => {
                self.progress
                    .note(format_args!("{benchmark}: {title}: SKIPPED: {reason}"));
                self.results
                    .skipped
                    .push(Note::new(benchmark, &title, None, reason));
            }
            Err(error) => self.fail(benchmark, &title, None, format!("{error:#}")),
        }
        self.progress.group_done();
    }

    fn report(&self, benchmark: Benchmark, title: &str, rows: &[Row]) {
        if !self.json && !rows.is_empty() {
            let table = Table::of(rows);
            self.progress.say(format_args!(
                "\n{benchmark}: {title}\n{}",
                table.for_terminal()
            ));
        }
        for (warning, contenders) in results::by_warning(rows) {
            self.progress.note(format_args!(
                "warning: {benchmark}: {title}: {}: {warning} ({})",
                contenders,
                warning.advice()
            ));
        }
    }

    fn fail(
        &mut self,
        benchmark: Benchmark,
        title: &str,
        contender: Option<String>,
        reason: String,
    ) {
        let who = contender
            .as_ref()
            .map_or(String::new(), |name| format!(": {name}"));
        self.progress
            .note(format_args!("{benchmark}: {title}{who}: FAILED: {reason}"));
        self.results
            .failed
            .push(Note::new(benchmark, title, contender, reason));
    }
}
