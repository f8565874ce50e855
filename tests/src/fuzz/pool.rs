//! Pools with every knob at random, and what happens to them, against a model.

use crate::model::{self, Knobs, MOST_OPS, Op};
use arbitrary::Unstructured;

/// Makes up a pool and what happens to it.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(knobs) = Knobs::likely(&mut input) else {
        return;
    };
    let mut ops = Vec::new();
    while !input.is_empty() && ops.len() < MOST_OPS {
        match Op::likely(&mut input) {
            Ok(op) => ops.push(op),
            Err(_) => break,
        }
    }
    if std::env::var_os("VM_SCRUB_FUZZ_PRINT").is_some() {
        eprintln!("{knobs:#?}\n{ops:#?}");
    }
    model::run(knobs, ops);
}
