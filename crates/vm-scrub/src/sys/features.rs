//! What this kernel has of what is used where it is there, for the log.
//!
//! Nothing is decided by this. A filter, a limit or the kind of memory can have one call refused that another was granted, so each call's
//! own answer says whether it is to be done another way. But whoever reads in a receipt that pins were not excluded, or wonders why
//! teardowns take longer on one host than on another, finds the reason in one line.

use super::map::{self, Advice};
use super::pagemap::Pagemap;
use super::procmap::Maps;
use super::userfaultfd::Userfaultfd;
use super::{Result, fault, memfd, mlock};
use std::sync::atomic::{AtomicBool, Ordering};

/// Something that not every kernel has.
struct Feature {
    /// What the kernel's documentation calls it.
    name: &'static str,
    /// The first version of Linux that has it, and what else it depends on.
    since: &'static str,
    probe: Probe,
}

/// How to try it.
enum Probe {
    /// By itself.
    Alone(fn() -> Result<()>),
    /// On a page of private anonymous memory whose content is worth nothing.
    OnPage(unsafe fn(*mut u8, usize) -> Result<()>),
    /// By advice about such a page.
    Advice(Advice),
}

/// All of them. What stands in for each is in `docs/kernels.md`.
const FEATURES: &[Feature] = &[
    Feature {
        name: "UFFDIO_MOVE",
        since: "6.8",
        probe: Probe::Alone(|| Userfaultfd::open().map(drop)),
    },
    Feature {
        name: "PAGEMAP_SCAN",
        since: "6.7",
        probe: Probe::Alone(|| Pagemap::open()?.scan(0..map::host_page_size(), |_| {})),
    },
    Feature {
        name: "PROCMAP_QUERY",
        since: "6.11",
        probe: Probe::Alone(|| Maps::open()?.query(0).map(drop)),
    },
    Feature {
        name: "MADV_POPULATE_WRITE",
        since: "5.14",
        probe: Probe::OnPage(map::populate_at_once),
    },
    Feature {
        name: "MADV_POPULATE_READ",
        since: "5.14",
        probe: Probe::OnPage(map::populate_readable),
    },
    Feature {
        name: "MADV_DONTNEED_LOCKED",
        since: "5.18",
        probe: Probe::OnPage(mlock::discard),
    },
    Feature {
        name: "MADV_GUARD_REMOVE",
        since: "6.13",
        probe: Probe::Advice(Advice::RemoveGuards),
    },
    Feature {
        name: "MADV_UNMERGEABLE",
        since: "CONFIG_KSM",
        probe: Probe::Advice(Advice::Unmergeable),
    },
    Feature {
        name: "MADV_HUGEPAGE",
        since: "CONFIG_TRANSPARENT_HUGEPAGE",
        probe: Probe::Advice(Advice::HugePage),
    },
    Feature {
        name: "MFD_NOEXEC_SEAL",
        since: "6.3",
        probe: Probe::Alone(|| memfd::not_executable().map(drop)),
    },
    Feature {
        name: "pkey_mprotect",
        since: "4.9",
        probe: Probe::OnPage(map::make_writable_without_key),
    },
];

/// Logs what this kernel has and what it has not, once in a process. Where nobody would read it, nothing is tried.
pub(crate) fn log_once() {
    static LOGGED: AtomicBool = AtomicBool::new(false);
    if !log::log_enabled!(log::Level::Info) || LOGGED.swap(true, Ordering::Relaxed) {
        return;
    }
    // With nothing held: the embedder's logger may panic, or build a pool.
    match fault::spared(probe_all) {
        Ok(answers) => log::info!("{}", line(&answers)),
        Err(error) => log::info!("not found out what this kernel has: {error}"),
    }
}

/// What each feature answers, in their order.
fn probe_all() -> Result<Vec<Result<()>>> {
    let len = map::host_page_size();
    let page = map::reserve(len)?;
    let probe = |feature: &Feature| match feature.probe {
        Probe::Alone(call) => call(),
        // SAFETY: the page was reserved above and is nobody else's; what it contains is worth nothing.
        Probe::OnPage(call) => unsafe { call(page, len) },
        // SAFETY: as above.
        Probe::Advice(advice) => unsafe { map::advise(page, len, advice) },
    };
    // SAFETY: as above.
    let mapped = unsafe { map::map_anonymous(page, len) };
    let answers = mapped.map(|()| FEATURES.iter().map(probe).collect());
    // SAFETY: as above, and nobody refers to it.
    unsafe { map::unmap(page, len) }?;
    answers
}

fn line(answers: &[Result<()>]) -> String {
    let all = || FEATURES.iter().zip(answers);
    let here = all().filter(|(_, answer)| answer.is_ok());
    let here: Vec<_> = here.map(|(feature, _)| feature.name).collect();
    let absent = all().filter_map(|(feature, answer)| {
        let error = answer.as_ref().err()?;
        Some(format!(
            "{} ({}; {})",
            feature.name, feature.since, error.source
        ))
    });
    let absent: Vec<_> = absent.collect();
    let absent = match absent.is_empty() {
        true => String::new(),
        false => format!("; done another way: {}", absent.join(", ")),
    };
    format!("the kernel has {}{absent}", here.join(", "))
}

/// The name of each feature and since when there is one, for the test of what is said about them.
#[cfg(any(test, feature = "test-support"))]
pub fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    FEATURES.iter().map(|each| (each.name, each.since))
}

#[cfg(test)]
mod tests {
    use super::super::Call;
    use super::super::fault::inject;
    use super::*;

    #[test]
    fn what_the_kernel_refuses_is_named_with_its_version_and_the_reason() {
        let mut answers: Vec<Result<()>> = FEATURES.iter().map(|_| Ok(())).collect();
        let all = line(&answers);
        assert!(all.starts_with("the kernel has UFFDIO_MOVE, ") && !all.contains(';'));
        answers[0] = Err(super::super::Error {
            call: Call::UffdApi,
            source: std::io::Error::from_raw_os_error(libc::EINVAL),
        });
        let most = line(&answers);
        assert!(most.starts_with("the kernel has PAGEMAP_SCAN, "), "{most}");
        assert!(
            most.contains("; done another way: UFFDIO_MOVE (6.8; Invalid argument"),
            "{most}"
        );
    }

    #[test]
    fn faults_that_are_planned_are_for_others() {
        let everything: Vec<_> = Call::ALL.to_vec();
        let guards: Vec<_> = everything
            .iter()
            .map(|call| inject(*call, 0, 1, libc::EIO))
            .collect();
        let answers = fault::spared(probe_all).unwrap();
        assert_eq!(answers.len(), FEATURES.len());
        let is_planned = |answer: &Result<()>| {
            answer
                .as_ref()
                .is_err_and(|error| error.errno() == Some(libc::EIO))
        };
        assert!(!answers.iter().any(is_planned));
        assert_eq!(guards[0].hits(), 0);
        // And they are still there.
        assert!(fault::is_planned(Call::Mmap));
        assert!(map::reserve(1 << 20).is_err());
    }
}
