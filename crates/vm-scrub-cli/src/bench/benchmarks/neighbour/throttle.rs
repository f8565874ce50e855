//! Whether the throttle keeps the rate that it is asked for.
//!
//! A run is the time in which background scrubbing gets through what the rate allows in two seconds; it begins when what may be
//! done at once after a pause has been used up. Memory is of the same kind and as busy as beside a neighbour, who is not there.

use super::background::{Paced, Retiring, capacity};
use super::looping::PIECE;
use super::{RATES, SCRUBBED, Scrub, at, count};
use crate::bench::cpus;
use crate::bench::memory;
use crate::bench::row::{Labels, gib_per_s};
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan, Subject};
use anyhow::ensure;
use std::cell::RefCell;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};
use vm_scrub::{PageSize, Verify};

/// How long a run takes at the rate that is asked for, in seconds.
const SECONDS: u64 = 2;

/// How many times as long it may take before it is given up.
const PATIENCE: u32 = 15;

/// Between two looks at how far it is: what is done meanwhile at the highest rate is a ten-thousandth of a run.
const LOOK: Duration = Duration::from_micros(200);

pub(super) fn plan(settings: &Settings, page_size: PageSize) -> Plan {
    let scrubbed = SCRUBBED.min(settings.memory);
    let title = format!(
        "background scrubbing for {SECONDS} s at a given rate, {}, {}",
        super::title(capacity(scrubbed), page_size),
        count(1)
    );
    Plan::new(title, move || build(scrubbed, page_size))
}

fn build(scrubbed: u64, page_size: PageSize) -> anyhow::Result<Built> {
    let keep = memory::reserve(page_size, capacity(scrubbed))?;
    let other = cpus::two()?.map(|(_, other)| other);
    let retiring = Retiring::new(other, scrubbed, page_size)?;
    let retiring = Rc::new(RefCell::new(retiring));
    let contenders = RATES.into_iter().rev().map(|rate| {
        let labels = Labels {
            name: at(rate),
            verify: Some(Verify::Full),
            page_size: Some(page_size),
            threads: 1,
            bytes: rate * SECONDS,
            asked_gib_per_s: Some(gib_per_s(rate, 1e9)),
            ..Labels::default()
        };
        let subject = Throttled {
            scrub: Paced::new(&retiring, Some(rate)),
            bytes: rate * SECONDS,
        };
        Contender::new(labels, subject)
    });
    Ok(Built::Ready(Group::new(contenders.collect(), keep)))
}

/// Background scrubbing at a rate, until `bytes` are done.
struct Throttled {
    scrub: Paced,
    bytes: u64,
}

impl Subject for Throttled {
    fn prepare(&mut self) -> anyhow::Result<()> {
        self.scrub.start()
    }

    fn run(&mut self, _: u64) -> anyhow::Result<()> {
        let begun = Instant::now();
        let until = self.scrub.done() + self.bytes;
        while self.scrub.done() < until {
            ensure!(
                begun.elapsed() < PATIENCE * Duration::from_secs(SECONDS),
                "this processor is too slow for this rate"
            );
            thread::sleep(LOOK);
        }
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        self.scrub.stop()
    }

    fn is_long(&self) -> bool {
        true
    }
}

const _: () = assert!(
    RATES[0] * SECONDS >= 1000 * PIECE as u64,
    "a piece is a thousandth of a run at most"
);
