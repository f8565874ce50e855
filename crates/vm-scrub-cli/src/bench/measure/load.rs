//! Who else used the processors while times were taken.

use std::fs;
use std::time::Instant;

/// Processors that were not at the disposal of this process, on average.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Load {
    /// Used by other processes of this host.
    pub(crate) others: f64,
    /// Taken by the hypervisor under it.
    pub(crate) stolen: f64,
}

/// Clock ticks since boot: proc(5), `/proc/stat` and `/proc/[pid]/stat`, both in the same unit.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ticks {
    all: u64,
    busy: u64,
    stolen: u64,
    own: u64,
}

/// Watches the load.
#[derive(Debug)]
pub(crate) struct LoadMeter {
    started: Instant,
    ticks: Option<Ticks>,
}

impl LoadMeter {
    pub(crate) fn start() -> Self {
        Self {
            started: Instant::now(),
            ticks: now(),
        }
    }

    /// The load since the start. None where the time was shorter than a few ticks, or the kernel does not say.
    pub(crate) fn stop(self) -> Load {
        // At 100 ticks a second, less than this cannot be told from rounding.
        if self.started.elapsed().as_millis() < 200 {
            return Load::default();
        }
        match (self.ticks, now()) {
            (Some(before), Some(after)) => between(before, after),
            _ => Load::default(),
        }
    }
}

fn now() -> Option<Ticks> {
    let own = own(&fs::read_to_string("/proc/self/stat").ok()?)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let (all, busy, stolen) = host(&fs::read_to_string("/proc/stat").ok()?)?;
    Some(Ticks {
        // The ticks of one processor, so that quotients are processors.
        all: all / processors,
        busy,
        stolen,
        own,
    })
}

fn between(before: Ticks, after: Ticks) -> Load {
    let since = |field: fn(&Ticks) -> u64| field(&after).saturating_sub(field(&before));
    let all = since(|ticks| ticks.all).max(1) as f64;
    let busy = since(|ticks| ticks.busy).saturating_sub(since(|ticks| ticks.own));
    Load {
        others: busy as f64 / all,
        stolen: since(|ticks| ticks.stolen) as f64 / all,
    }
}

/// All, busy and stolen ticks of all processors: `cpu user nice system idle iowait irq softirq steal guest guest_nice`, where
/// guest time is part of user time.
fn host(stat: &str) -> Option<(u64, u64, u64)> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    let [user, nice, system, idle, waiting, irq, softirq, stolen, ..] = ticks[..] else {
        return None;
    };
    let busy = user + nice + system + irq + softirq;
    Some((busy + idle + waiting + stolen, busy, stolen))
}

/// User and system ticks of this process: fields 14 and 15; the name, field 2, is in parentheses and may contain anything.
fn own(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_lines_are_understood() {
        let stat = "cpu  100 1 50 1000 9 2 3 40 77 0\ncpu0 1 2 3\n";
        assert_eq!(host(stat), Some((1205, 156, 40)));
        assert_eq!(host("cpu0 1 2\n"), None);
        let line = "7 (a b) c) S 1 2 3 4 5 6 7 8 9 10 140 15 0 0 20 0";
        assert_eq!(own(line), Some(155));
        assert!(now().is_some(), "on this host, too");
    }

    #[test]
    fn own_work_is_not_load() {
        let before = Ticks {
            all: 100,
            busy: 50,
            stolen: 0,
            own: 10,
        };
        let after = Ticks {
            all: 200,
            busy: 250,
            stolen: 30,
            own: 160,
        };
        let load = between(before, after);
        assert_eq!((load.others, load.stolen), (0.5, 0.3));
        assert_eq!(between(before, before), Load::default());
    }
}
