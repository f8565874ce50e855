//! How likely what is, where bytes from a fuzzer decide: what pools are for often, what is wrong with it now and then.
//!
//! With everything equally likely, most pools could not be built and most guests had no memory to do anything with.

use super::{Knobs, Op, Pages, Region};
use arbitrary::{Arbitrary, Unstructured};

impl Knobs {
    /// Makes up a pool: most can be built, and in most of them faults can be met, which takes the calling thread's own work.
    pub(crate) fn likely(input: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        let mut knobs = Self::arbitrary(input)?;
        let dice: u8 = input.arbitrary()?;
        if !dice.is_multiple_of(16) {
            knobs.odd = None;
            // Room for more than one guest.
            knobs.blocks |= 3;
        }
        if !(dice / 16).is_multiple_of(4) {
            knobs.on_node = false;
            // Hugetlb memory is revoked in one way only.
            if knobs.pages == Pages::Huge2M {
                knobs.by_move = None;
            }
        }
        if dice >= 128 {
            knobs.threads = 0;
            knobs.on_node = false;
        }
        Ok(knobs)
    }
}

impl Op {
    /// Makes up something: what pools are for often, what is wrong seldom.
    pub(crate) fn likely(input: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        let guest = input.arbitrary()?;
        Ok(match input.int_in_range(0_u8..=31)? {
            0..=5 => Op::Lease {
                regions: layout(input)?,
                shareable: input.ratio(1_u8, 4)?,
            },
            6..=8 => {
                let (page, at, len, tag) = input.arbitrary()?;
                Op::Write {
                    guest,
                    page,
                    at,
                    len,
                    tag,
                }
            }
            9..=11 => Op::Smear {
                guest,
                stride: input.arbitrary()?,
                tag: input.arbitrary()?,
            },
            12..=18 => Op::Teardown {
                guest,
                way: input.arbitrary()?,
            },
            19..=20 => Op::Proceed {
                which: guest,
                to_the_end: input.arbitrary()?,
            },
            21..=22 => Op::Ticket {
                which: guest,
                way: input.arbitrary()?,
            },
            23..=25 => Op::Fault(input.arbitrary()?),
            26 => {
                let (what, page, pages) = input.arbitrary()?;
                Op::Vmm {
                    guest,
                    what,
                    page,
                    pages,
                }
            }
            27 => Op::Share {
                guest,
                writable: input.arbitrary()?,
            },
            28 => Op::LetGo(guest),
            29 => Op::Reclaim,
            _ => input.arbitrary()?,
        })
    }
}

/// One to three regions that every pool of small pages gives, most often; anything, now and then.
fn layout(input: &mut Unstructured<'_>) -> arbitrary::Result<Vec<Region>> {
    let count = input.int_in_range(0_u8..=7)?;
    if count == 7 {
        let count = input.int_in_range(0_u8..=5)?;
        return (0..count).map(|_| input.arbitrary()).collect();
    }
    let likely = |input: &mut Unstructured<'_>| {
        let (gap, blocks) = input.arbitrary::<(u8, u8)>()?;
        Ok(match blocks {
            0..=127 => Region::Blocks {
                gap,
                blocks: 1 + blocks % 8 / 6,
            },
            _ => Region::After {
                gap,
                pages: 1 + u16::from(blocks - 128) * 5,
            },
        })
    };
    (0..=count / 3).map(|_| likely(input)).collect()
}
