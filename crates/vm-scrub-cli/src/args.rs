//! What can be said on the command line.

use crate::bench::args::BenchArgs;
use clap::{Args as Arguments, Parser, Subcommand, ValueEnum};
use vm_scrub::{BLOCK_SIZE, PageSize, Verify};
use vm_scrub_vmm::MAX_VCPUS;

/// The most guests that one demonstration runs: a larger number is taken for a mistake.
const MAX_GUESTS: i64 = 10_000;

/// The largest guest, in bytes: what the page tables of the guests of `vm-scrub-vmm` can map.
const MAX_MEMORY: u64 = 64 << 30;

/// How vm-scrub is told which loops to use where no argument says it.
const LOOP_VARIABLES: &str = "\
Environment:
  VM_SCRUB_LOOP         The zeroing loop that vm-scrub's pools use, instead of the fastest that is measured
  VM_SCRUB_VERIFY_LOOP  The verification loop, likewise (`bench loops` lists the names of both kinds)";

/// Scrubs a guest's memory when the guest goes, proves it, and only then lets another guest have it.
#[derive(Debug, Parser)]
#[command(name = "vm-scrub", version, propagate_version = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show it on real guests: one fills its memory with secrets and goes, the next gets the same memory and looks.
    ///
    /// Exit status 0 only if every teardown was proven and nothing leaked, 1 otherwise, 2 for bad arguments.
    #[command(after_help = LOOP_VARIABLES)]
    Demo(DemoArgs),
    /// Measure it on this host, beside what people do today.
    ///
    /// Contenders take turns, after warm-up; what they leave behind is looked at after each run. Exit status 0 if everything that
    /// this host can do was measured, 1 if something failed or nothing could be measured, 2 for bad arguments.
    #[command(after_help = LOOP_VARIABLES)]
    Bench(BenchArgs),
}

#[derive(Debug, Arguments)]
pub(crate) struct DemoArgs {
    /// Memory of each guest, a multiple of 2 MiB (K, M, G and KiB, MiB, GiB are powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "1G", allow_negative_numbers = true, value_parser = memory)]
    pub(crate) memory: u64,

    /// Pages the memory consists of: 4 KiB, transparent huge pages, or hugetlb pages of 2 MiB
    #[arg(long, value_name = "4k|thp|2m", default_value = "thp", value_parser = page_size)]
    pub(crate) page_size: PageSize,

    /// Guests, one after the other, all in the same memory
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=MAX_GUESTS))]
    pub(crate) guests: u32,

    /// vCPUs of each guest
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_VCPUS as i64))]
    pub(crate) vcpus: u32,

    /// Threads that scrub [default: one per processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) threads: Option<u32>,

    /// How much of the memory is read back after it was zeroed
    #[arg(long, value_enum, default_value_t = VerifyArg::Full)]
    pub(crate) verify: VerifyArg,

    /// Break the scrubber on purpose, to see that the proof can fail
    #[arg(long, value_enum, default_value_t = Sabotage::None)]
    pub(crate) sabotage: Sabotage,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerifyArg {
    /// Every byte
    Full,
    /// Nothing: then no teardown is proven
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sabotage {
    /// Do not
    None,
    /// The scrubber zeroes nothing
    SkipScrub,
    /// The scrubber leaves out one piece of 256 KiB
    SkipChunk,
    /// A device keeps a pointer into the first guest's memory and goes on writing after its teardown
    LateWrite,
}

impl From<VerifyArg> for Verify {
    fn from(verify: VerifyArg) -> Self {
        match verify {
            VerifyArg::Full => Verify::Full,
            VerifyArg::None => Verify::None,
        }
    }
}

/// Reads the name of a page size.
pub(crate) fn page_size(name: &str) -> Result<PageSize, String> {
    name.parse()
        .map_err(|error: vm_scrub::pool::UnknownPageSize| error.to_string())
}

/// Reads a guest's memory in bytes.
pub(crate) fn memory(text: &str) -> Result<u64, String> {
    let bytes = parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|_| "not a size: write it like 512M or 1G")?;
    if bytes == 0 || !bytes.is_multiple_of(BLOCK_SIZE) {
        return Err("a guest's memory is a multiple of 2 MiB, and not zero".into());
    }
    if bytes > MAX_MEMORY {
        return Err("a guest has at most 64 GiB here".into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes_are_powers_of_1024_and_whole_blocks() {
        assert_eq!(memory("1G"), Ok(1 << 30));
        assert_eq!(memory("2MiB"), Ok(2 << 20));
        assert_eq!(memory("4194304"), Ok(4 << 20));
        for bad in [
            "0",
            "1M",
            "3MiB",
            "65G",
            "",
            "x",
            "-2M",
            "1.0000001G",
            "99999999999G",
        ] {
            assert!(memory(bad).is_err(), "{bad}");
        }
    }
}
