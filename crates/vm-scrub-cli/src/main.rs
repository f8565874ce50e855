//! The `vm-scrub` command.
//!
//! Results go to standard output, everything about them (progress, warnings, errors) to standard error. The exit status is
//! 0 if what was asked for was shown to hold, 1 if it was not or could not be tried, and 2 for bad arguments.

mod args;
mod bench;
mod demo;
mod format;
mod output;
mod signals;

use args::{Args, Command};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use std::io::{self, Write};
use std::process::ExitCode;
use vm_scrub::Policy;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Command::Bench(bench) = &args.command
        && let Err(why) = bench.check()
    {
        let mut command = Args::command();
        command.build();
        let bench = command.find_subcommand_mut("bench");
        bench
            .expect("it was just parsed")
            .error(ErrorKind::ArgumentConflict, why)
            .exit();
    }
    // To scrub nothing asks for nothing but loops that exist, which the environment may name.
    if let Err(why) = vm_scrub::scrub(&mut [], &Policy::new()) {
        let _ = writeln!(io::stderr(), "error: {why}");
        return ExitCode::from(BAD_ARGUMENTS);
    }
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error")).init();
    let done = match args.command {
        Command::Demo(demo) => demo::run(&demo),
        Command::Bench(bench) => bench::run(&bench),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Whoever was to read the results has gone, and will not read this either.
            if !error.is::<output::NobodyReads>() {
                let _ = writeln!(io::stderr(), "error: {error:#}");
            }
            if error.is::<bench::NotWritable>() {
                return ExitCode::from(BAD_ARGUMENTS);
            }
            ExitCode::FAILURE
        }
    }
}

/// The exit status of what clap refuses.
const BAD_ARGUMENTS: u8 = 2;
