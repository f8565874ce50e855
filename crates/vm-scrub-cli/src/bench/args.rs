//! What can be said on the command line about benchmarks.

use clap::{Args as Arguments, ValueEnum};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;
use vm_scrub::PageSize;

/// More seconds than anybody waits for one group.
const MAX_SECONDS: f64 = 86_400.0;

/// A question that can be put to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Benchmark {
    /// Every zeroing and verification loop, by size and threads
    Loops,
    /// From a dirty guest to the next guest's memory, beside what people do today
    Turnaround,
    /// Memory of which only a part was touched
    Sparse,
    /// A KVM guest's first touch of all its memory, recycled and fresh
    Guest,
    /// What a cache-sensitive workload loses while another core scrubs, by loop and with the throttle; and whether the throttle
    /// keeps the rate that it is given
    Neighbour,
    /// More threads than cores
    Scaling,
}

impl Benchmark {
    /// What it is called on the command line and in results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Benchmark::Loops => "loops",
            Benchmark::Turnaround => "turnaround",
            Benchmark::Sparse => "sparse",
            Benchmark::Guest => "guest",
            Benchmark::Neighbour => "neighbour",
            Benchmark::Scaling => "scaling",
        }
    }
}

impl fmt::Display for Benchmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One benchmark or all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Selection(Option<Benchmark>);

impl Selection {
    /// The benchmarks that were asked for, in the order in which they run.
    pub(crate) fn benchmarks(self) -> &'static [Benchmark] {
        match self.0 {
            None => Benchmark::value_variants(),
            Some(one) => {
                let position = Benchmark::value_variants()
                    .iter()
                    .position(|each| *each == one);
                position.map_or(&[], |at| &Benchmark::value_variants()[at..=at])
            }
        }
    }
}

impl ValueEnum for Selection {
    fn value_variants<'a>() -> &'a [Self] {
        const {
            &[
                Selection(Some(Benchmark::Loops)),
                Selection(Some(Benchmark::Turnaround)),
                Selection(Some(Benchmark::Sparse)),
                Selection(Some(Benchmark::Guest)),
                Selection(Some(Benchmark::Neighbour)),
                Selection(Some(Benchmark::Scaling)),
                Selection(None),
            ]
        }
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        match self.0 {
            Some(one) => one.to_possible_value(),
            None => Some(clap::builder::PossibleValue::new("all").help("All of these")),
        }
    }
}

/// `vm-scrub bench`.
#[derive(Debug, Arguments)]
pub(crate) struct BenchArgs {
    /// What to measure
    #[arg(value_name = "BENCHMARK", value_enum)]
    pub(crate) benchmark: Selection,

    /// Memory of a guest, a multiple of 2 MiB (K, M, G and KiB, MiB, GiB are powers of 1024). `turnaround` needs about six
    /// times as much, eight times with 4 KiB pages
    #[arg(long, value_name = "SIZE", default_value = "1G", allow_negative_numbers = true, value_parser = crate::args::memory)]
    pub(crate) memory: u64,

    /// Pages the memory consists of; several are separated by commas [default: all; `loops` and `neighbour`: thp]
    #[arg(long, value_name = "4k|thp|2m", value_delimiter = ',', value_parser = crate::args::page_size)]
    pub(crate) page_size: Vec<PageSize>,

    /// Threads, of vm-scrub and of what it is compared with, at most 16 per processor [default: one per processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    /// Timed runs of each contender [default: 10 to 50, until --min-time is reached]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub(crate) runs: Option<u32>,

    /// Seconds for which each contender is timed at least, unless --runs is given
    #[arg(long, value_name = "SECONDS", default_value = "0.3", allow_negative_numbers = true, value_parser = seconds)]
    pub(crate) min_time: Duration,

    /// Seconds after which no further runs are begun in a group of contenders
    #[arg(long, value_name = "SECONDS", default_value = "120", allow_negative_numbers = true, value_parser = seconds)]
    pub(crate) max_time: Duration,

    /// Runs of each contender that are not counted [default: until it gets no faster, at most 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(crate) warmup: Option<u32>,

    /// Write the results, every single time and the host's setup as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) export_json: Option<PathBuf>,

    /// Write the results as comma-separated values
    #[arg(long, value_name = "FILE")]
    pub(crate) export_csv: Option<PathBuf>,

    /// Write the results as Markdown tables
    #[arg(long, value_name = "FILE")]
    pub(crate) export_markdown: Option<PathBuf>,

    /// Write one page with plots, that needs nothing else to be shown
    #[arg(long, value_name = "FILE")]
    pub(crate) export_html: Option<PathBuf>,

    /// Write a picture of `turnaround`, all page sizes in one plot, that can be shown by itself
    #[arg(long, value_name = "FILE")]
    pub(crate) export_svg: Option<PathBuf>,

    /// Print one JSON array instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

impl BenchArgs {
    /// Refuses what can be said and makes no sense together.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.export_svg.is_some()
            && !self.benchmark.benchmarks().contains(&Benchmark::Turnaround)
        {
            return Err("--export-svg draws `turnaround`, which is not measured: ask for `turnaround` or `all`, or use --export-html".into());
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let most = most_threads(processors);
        if let Some(threads) = self.threads.filter(|threads| *threads as usize > most) {
            return Err(format!(
                "{threads} threads on {processors} processors would measure how long idle threads look for work: ask for at most \
                 --threads {most}"
            ));
        }
        let files = [
            &self.export_json,
            &self.export_csv,
            &self.export_markdown,
            &self.export_html,
            &self.export_svg,
        ];
        let mut files: Vec<&PathBuf> = files.into_iter().flatten().collect();
        files.sort();
        match files.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!(
                "{} is to have two formats: name a file for each",
                pair[0].display()
            )),
            None => Ok(()),
        }
    }
}

/// The most threads that are measured. Each thread of a rayon pool that runs out of work looks for some with all others, several
/// times, before it sleeps: that grows with the square of their number, and there is a pool for each contender. With 1,024 threads on
/// 2 processors one run of 4 MiB took minutes.
fn most_threads(processors: usize) -> usize {
    const FOR_EACH: usize = 16;
    FOR_EACH * processors
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    if !(0.0..=MAX_SECONDS).contains(&seconds) {
        return Err("between 0 and 86400 seconds are possible".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;

    pub(crate) fn parse(line: &str) -> Result<BenchArgs, clap::Error> {
        let words = ["vm-scrub", "bench"].into_iter().chain(line.split(' '));
        match Args::try_parse_from(words)?.command {
            Command::Bench(args) => Ok(args),
            Command::Demo(_) => unreachable!("`bench` was asked for"),
        }
    }

    #[test]
    fn what_is_documented_can_be_said() {
        let line = "turnaround --memory 1G --page-size thp --threads 2 --json";
        let args = parse(line).expect("good arguments");
        assert_eq!(args.benchmark.benchmarks(), [Benchmark::Turnaround]);
        assert_eq!(
            (args.memory, args.threads, args.json),
            (1 << 30, Some(2), true)
        );
        assert_eq!(args.page_size, [PageSize::Transparent]);
        let all =
            parse("all --page-size 4k,2m --page-size thp --min-time 0.5").expect("good arguments");
        assert_eq!(all.benchmark.benchmarks(), Benchmark::value_variants());
        assert_eq!(
            all.page_size,
            [PageSize::Base4K, PageSize::Huge2M, PageSize::Transparent]
        );
        assert_eq!(all.min_time, Duration::from_millis(500));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "nothing",
            "loops --memory 1M",
            "loops --memory 0",
            "loops --memory 65G",
            "loops --page-size 1g",
            "loops --threads 0",
            "loops --runs 1",
            "loops --min-time -1",
            "loops --min-time NaN",
            "loops --max-time inf",
            "loops --warmup x",
        ] {
            assert_eq!(parse(bad).expect_err(bad).exit_code(), 2, "{bad}");
        }
        let negative = parse("loops --min-time -1").expect_err("less than nothing");
        assert!(
            negative.to_string().contains("between 0 and 86400"),
            "{negative}"
        );
    }

    #[test]
    fn more_threads_than_can_be_measured_are_refused_with_advice() {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let most = most_threads(processors);
        let with = |threads| {
            let line = format!("turnaround --memory 4M --threads {threads}");
            parse(&line).expect("good by itself").check()
        };
        assert_eq!(with(most.min(1024)), Ok(()));
        if most < 1024 {
            let error = with(1024).expect_err("too many");
            let advice = format!("at most --threads {most}");
            assert!(error.contains(&advice), "{error}");
        }
    }

    #[test]
    fn names_are_what_the_command_line_and_the_results_say() {
        for benchmark in Benchmark::value_variants() {
            let spoken = benchmark.to_possible_value().expect("none is hidden");
            assert_eq!(spoken.get_name(), benchmark.name());
            let written = serde_json::to_value(benchmark).expect("a name");
            assert_eq!(written, benchmark.name());
        }
    }
}
