//! Random guests against a model: a guest sees zeros where it has written nothing and its own bytes where it has, and the
//! pool has as many blocks in each state as the model. Every byte is looked at.
//!
//! Fuzzing runs the same model with everything at random; here are the guests that most VMMs have.

use proptest::prelude::*;
use vm_scrub_tests::model::{self, Half, Holding, Knobs, Op, Pages, Region, Way};

fn step() -> impl Strategy<Value = Op> {
    let pages = prop_oneof![1..8_u16, 500..530_u16, 1..1600_u16];
    let region = (any::<u8>(), pages).prop_map(|(gap, pages)| Region::After { gap, pages });
    // In any order.
    let regions = prop::collection::vec(region, 1..4).prop_shuffle();
    prop_oneof![
        4 => regions.prop_map(|regions| Op::Lease { regions, shareable: false }),
        8 => (any::<u8>(), any::<u16>(), any::<u16>(), any::<u8>())
            .prop_map(|(guest, page, at, tag)| Op::Write { guest, page, at, len: 1, tag }),
        4 => (any::<u8>(), any::<u16>(), any::<u8>())
            .prop_map(|(guest, page, tag)| Op::Write { guest, page, at: 0, len: 4096, tag }),
        4 => (any::<u8>(), prop_oneof![Just(Way::AtOnce), Just(Way::InSteps), Just(Way::Retired)])
            .prop_map(|(guest, way)| Op::Teardown { guest, way }),
        1 => (any::<u8>(), prop_oneof![Just(Holding::Nothing), Just(Holding::Handle)])
            .prop_map(|(guest, holding)| Op::Drop { guest, holding }),
        1 => any::<u8>()
            .prop_map(|guest| Op::Teardown { guest, way: Way::DroppedHalfWay(Half::Revoked) }),
    ]
}

fn run(pages: Pages, steps: Vec<Op>) {
    let knobs = Knobs {
        blocks: 7,
        pages,
        threads: 1,
        thorough: true,
        ..Knobs::default()
    };
    model::run(knobs, steps);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn guests_see_zeros_and_what_they_wrote_4k(steps in prop::collection::vec(step(), 1..40)) {
        run(Pages::Base4K, steps);
    }

    #[test]
    fn guests_see_zeros_and_what_they_wrote_thp(steps in prop::collection::vec(step(), 1..40)) {
        run(Pages::Transparent, steps);
    }
}
