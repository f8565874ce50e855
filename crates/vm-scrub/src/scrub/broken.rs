//! Memory that cannot be accessed: found by asking the kernel before, or by the signal that the access raises.

use super::pass::HostPtr;
use crate::sys::watched::Bad;
use crate::sys::{map, sigbus};
use std::ops::Range;

/// Memory that could not be accessed, and counts neither as zeroed nor as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Broken {
    /// What of it was to be worked on: offsets within one piece.
    pub(crate) range: Range<usize>,
    /// The page, or huge page, that the kernel spoke of. May reach beyond the memory that is scrubbed.
    pub(crate) reported: Range<usize>,
    /// The addresses at which there is other memory now: empty, if nothing was replaced.
    pub(crate) replaced: Range<usize>,
    /// What is wrong with it.
    pub(crate) what: String,
}

impl Broken {
    /// What the handler of `SIGBUS` has noted while `piece` was worked on.
    pub(super) fn of_signal(base: HostPtr, piece: &Range<usize>, bad: Bad) -> Self {
        let relative = |address: usize| address.saturating_sub(base.0.addr());
        let reported = relative(bad.reported.start)..relative(bad.reported.end);
        Self {
            range: reported.start.max(piece.start)..reported.end.min(piece.end),
            reported,
            replaced: bad.replaced,
            what: format!("SIGBUS, {}", sigbus::meaning(bad.code)),
        }
    }

    /// Asks the kernel about every page of `piece`, and says which cannot be had.
    ///
    /// # Safety
    /// The piece must be mapped, and the caller's.
    pub(super) unsafe fn by_asking(base: HostPtr, piece: &Range<usize>) -> Vec<Self> {
        let page = map::host_page_size().max(4096);
        let start = base.at(piece.start).addr() / page * page;
        let end = base.at(piece.end).addr().next_multiple_of(page);
        let ask = |at: usize, len| {
            let address = base.0.with_addr(at);
            // SAFETY: populating does not change what memory contains, and whole pages of the caller's are asked about.
            unsafe { map::populate(address, len) }
        };
        if ask(start, end - start).is_ok() {
            return Vec::new();
        }
        let mut broken: Vec<Self> = Vec::new();
        for at in (start..end).step_by(page) {
            let Err(error) = ask(at, page) else {
                continue;
            };
            let from = at.saturating_sub(base.0.addr());
            let to = at + page - base.0.addr();
            let range = from.max(piece.start)..to.min(piece.end);
            match broken.last_mut() {
                Some(last) if last.reported.end == from => {
                    last.reported.end = to;
                    last.range.end = range.end;
                }
                _ => broken.push(Self {
                    range,
                    reported: from..to,
                    replaced: 0..0,
                    what: error.to_string(),
                }),
            }
        }
        broken
    }
}

/// How many bytes are in one of the `ranges`, which may overlap.
pub(crate) fn bytes_in(ranges: impl Iterator<Item = Range<usize>>) -> u64 {
    joined(ranges).iter().map(|range| range.len() as u64).sum()
}

/// The `ranges`, ascending, with those that overlap or touch made one.
pub(crate) fn joined(ranges: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = ranges.filter(|range| !range.is_empty()).collect();
    all.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in all {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What of `piece` is in none of `broken`, ascending.
pub(super) fn sound_parts(piece: &Range<usize>, broken: &[Broken]) -> Vec<Range<usize>> {
    let mut at = piece.start;
    let mut parts = Vec::with_capacity(broken.len() + 1);
    for range in joined(broken.iter().map(|broken| broken.range.clone())) {
        if at < range.start {
            parts.push(at..range.start);
        }
        at = range.end;
    }
    if at < piece.end {
        parts.push(at..piece.end);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::slice::from_ref;

    fn broken(range: Range<usize>) -> Broken {
        Broken {
            reported: range.clone(),
            range,
            replaced: 0..0,
            what: String::new(),
        }
    }

    #[test]
    fn what_is_sound_lies_between_what_is_broken() {
        let parts = |broken: &[Broken]| sound_parts(&(100..200), broken);
        assert_eq!(parts(&[]), from_ref(&(100..200)));
        assert_eq!(
            parts(&[broken(150..160), broken(120..130), broken(130..140)]),
            [100..120, 140..150, 160..200]
        );
        // No part is empty.
        assert_eq!(
            parts(&[broken(100..110), broken(190..200)]),
            from_ref(&(110..190))
        );
        assert!(parts(&[broken(100..200)]).is_empty());
    }
}
