//! Each question is answered from the right rows, the right way up, and only where both contenders are there.

use super::*;
use crate::bench::export::samples::{self, against, labels, row};
use crate::bench::row::{Labels, Op, Pattern};
use crate::bench::setup::Setup;
use crate::bench::warning::Warning;
use vm_scrub::{PageSize, Revocation, Verify};

fn answers(rows: Vec<Row>) -> Vec<Answer> {
    let mut results = Results::new(Setup::of_this_host());
    results.rows = rows;
    of(&results)
}

#[track_caller]
fn only(rows: Vec<Row>) -> Answer {
    let mut answers = answers(rows);
    assert_eq!(answers.len(), 1, "{answers:?}");
    answers.remove(0)
}

fn turnaround(name: &str, verify: Verify, millis: [f64; 4]) -> Row {
    let group = "1 GiB, thp, 2 threads";
    let row = row(Benchmark::Turnaround, group, labels(name, verify), millis);
    against(row, "munmap-mmap-populate", 1.0)
}

fn by_loop(group: &str, name: &str, op: Op, chosen: bool, ms: f64) -> Row {
    let labels = Labels {
        by_loop: Some(name.into()),
        op: Some(op),
        calibrated: Some(chosen),
        verify: None,
        ..labels(&format!("{name} {}", op.name()), Verify::None)
    };
    row(Benchmark::Loops, group, labels, [ms; 4])
}

fn touched(name: &str, bytes: u64, pattern: Pattern, baseline: &str, ms: f64) -> Row {
    let labels = Labels {
        bytes,
        touched_bytes: Some(256 << 20),
        pattern: Some(pattern),
        ..labels(name, Verify::Full)
    };
    let group = "8 GiB, thp, teardown with 256 MiB touched";
    against(
        row(Benchmark::Sparse, group, labels, [ms; 4]),
        baseline,
        1.0,
    )
}

#[test]
fn a_turnaround_is_so_many_times_as_fast() {
    let mut own = turnaround("vm-scrub", Verify::Full, [10.0, 10.0, 20.0, 10.0]);
    own.warnings = vec![
        Warning::TooShort { nanos: 1.0 },
        Warning::Noise { spread: 0.2 },
    ];
    let mut kernel = turnaround(
        "munmap-mmap-populate",
        Verify::None,
        [40.0, 50.0, 60.0, 60.0],
    );
    kernel.warnings = vec![Warning::Noise { spread: 0.3 }];
    let other = turnaround("zeroize", Verify::None, [1.0; 4]);
    let answer = only(vec![own, other, kernel]);
    assert_eq!(answer.benchmark, Benchmark::Turnaround);
    assert_eq!(answer.of, Quantity::Speed);
    // 55 / 10; and of 4, 5, 3 and 6 within the rounds.
    assert_eq!(
        (answer.ratio, answer.ratio_q1, answer.ratio_q3),
        (5.5, 3.75, 5.25)
    );
    assert_eq!(answer.figure(), "5.50×");
    assert_eq!(answer.group, "1 GiB, thp, 2 threads");
    assert_eq!(
        answer.question,
        "turnaround, THP, verified: speed against munmap + mmap + populate"
    );
    assert_eq!(answer.warnings, ["noise", "too-short"]);
}

#[test]
fn with_and_without_verification_are_two_questions() {
    let rows = vec![
        turnaround("vm-scrub", Verify::Full, [10.0; 4]),
        turnaround("vm-scrub", Verify::None, [5.0; 4]),
        turnaround("munmap-mmap-populate", Verify::None, [40.0; 4]),
    ];
    let answers = answers(rows);
    assert_eq!(answers.len(), 2);
    assert!(answers[0].question.contains(", verified"));
    assert!(answers[1].question.contains("not verified"));
    assert_eq!((answers[0].ratio, answers[1].ratio), (4.0, 8.0));
}

#[test]
fn taking_memory_away_without_proof_is_a_question_of_its_own() {
    let mut usual = turnaround("vm-scrub", Verify::Full, [10.0; 4]);
    usual.labels.revocation = Some(Revocation::Move);
    let mut faster = turnaround("vm-scrub", Verify::Full, [5.0; 4]);
    faster.labels.revocation = Some(Revocation::Mremap);
    let kernel = turnaround("munmap-mmap-populate", Verify::None, [40.0; 4]);
    let answers = answers(vec![usual, faster, kernel]);
    let questions: Vec<&str> = answers.iter().map(|each| each.question.as_str()).collect();
    assert_eq!(
        questions,
        [
            "turnaround, THP, verified: speed against munmap + mmap + populate",
            "turnaround, THP, verified, revoked by mremap: speed against munmap + mmap + populate",
        ]
    );
    assert_eq!((answers[0].ratio, answers[1].ratio), (4.0, 8.0));
}

#[test]
fn a_contender_that_failed_leaves_its_question_open() {
    assert_eq!(answers(Vec::new()), []);
    assert_eq!(
        answers(vec![turnaround("vm-scrub", Verify::Full, [1.0; 4])]),
        []
    );
    let kernel = turnaround("munmap-mmap-populate", Verify::None, [1.0; 4]);
    assert_eq!(answers(vec![kernel]), []);
    let large = touched(
        "large-lease",
        8 << 30,
        Pattern::Contiguous,
        "small-lease",
        1.0,
    );
    assert_eq!(answers(vec![large]), []);
}

#[test]
fn the_choice_is_judged_where_it_is_worst_and_for_each_operation() {
    let rows = vec![
        by_loop("zero, 4 KiB", "a", Op::Zero, true, 10.0),
        by_loop("zero, 4 KiB", "b", Op::Zero, false, 9.0),
        by_loop("zero, 1 GiB", "a", Op::Zero, false, 30.0),
        by_loop("zero, 1 GiB", "b", Op::Zero, true, 40.0),
        by_loop("verify, 4 KiB", "c", Op::Verify, true, 7.0),
        by_loop("verify, 4 KiB", "d", Op::Verify, false, 8.0),
    ];
    let answers = answers(rows);
    let found: Vec<_> = answers
        .iter()
        .map(|each| (each.group.as_str(), each.ratio))
        .collect();
    assert_eq!(found, [("zero, 1 GiB", 0.75), ("verify, 4 KiB", 1.0)]);
    assert!(answers[0].question.starts_with("zeroing: "), "{answers:?}");
    assert!(
        answers[1].question.starts_with("reading back: "),
        "{answers:?}"
    );
}

#[test]
fn fused_is_compared_with_the_same_loops_and_with_the_fastest() {
    let group = "fused, 1 GiB, thp, 1 thread";
    let rows = vec![
        by_loop(group, "b", Op::Fused, false, 12.0),
        by_loop(group, "b", Op::Separate, true, 14.0),
        by_loop(group, "a", Op::Fused, true, 10.0),
        by_loop(group, "a", Op::Separate, false, 15.0),
    ];
    let answers = answers(rows);
    let ratios: Vec<f64> = answers.iter().map(|each| each.ratio).collect();
    assert_eq!(ratios, [1.0, 1.5, 1.4], "{answers:?}");
    assert!(answers[1].question.ends_with("by the same zeroing loop"));
    assert!(answers[2].question.ends_with("by the fastest"));
}

#[test]
fn a_sparse_lease_takes_so_many_times_as_long() {
    let rows = vec![
        touched(
            "small-lease",
            256 << 20,
            Pattern::Contiguous,
            "small-lease",
            10.0,
        ),
        touched(
            "large-lease",
            8 << 30,
            Pattern::Contiguous,
            "small-lease",
            12.0,
        ),
        touched(
            "large-lease-scattered",
            8 << 30,
            Pattern::Scattered,
            "small-lease",
            15.0,
        ),
    ];
    let answers = answers(rows);
    assert!(answers.iter().all(|each| each.of == Quantity::Time));
    assert_eq!(
        (answers[0].ratio, answers[1].ratio, answers.len()),
        (1.2, 1.5, 2)
    );
    assert_eq!(
        answers[0].question,
        "teardown, 8 GiB of THP, 256 MiB touched, contiguous: time against 256 MiB all touched"
    );
    assert!(answers[1].question.contains("scattered"));
}

#[test]
fn a_mapping_is_asked_about_where_what_is_dirty_was_given_in_bytes() {
    let mapping = |name, ms| touched(name, 1 << 30, Pattern::Scattered, "dontneed-touch", ms);
    let rows = [
        mapping("scrub-raw", 1.0),
        mapping("fill", 50.0),
        mapping("dontneed-touch", 8.0),
    ];
    let answer = only(rows.to_vec());
    assert_eq!((answer.of, answer.ratio), (Quantity::Time, 0.125));
    assert_eq!(
        answer.question,
        "scrub_raw, 1 GiB of THP, 256 MiB dirty, scattered, verified: time against MADV_DONTNEED and touching again"
    );
    let in_percent = rows.map(|mut row| {
        row.labels.touched_percent = Some(25.0);
        row
    });
    assert_eq!(answers(in_percent.into()), []);
}

#[test]
fn of_the_leases_that_are_plotted_one_part_is_asked_about() {
    let lease = |name, percent, ms| {
        let mut row = touched(name, 1 << 30, Pattern::Scattered, "dontneed-touch", ms);
        row.labels.touched_percent = Some(percent);
        row
    };
    let of = |percent| {
        answers(vec![
            lease("lease-teardown", percent, 40.0),
            lease("lease-turnaround", percent, 50.0),
            lease("dontneed-touch", percent, 8.0),
        ])
    };
    assert_eq!(of(25.0), []);
    let [answer] = &of(1.0)[..] else {
        panic!("one answer");
    };
    assert_eq!((answer.of, answer.ratio), (Quantity::Time, 5.0));
    assert_eq!(
        answer.question,
        "teardown, 1 GiB of THP, 256 MiB touched, scattered: time against MADV_DONTNEED and touching again"
    );
}

#[test]
fn a_rate_is_compared_with_the_one_that_was_asked_for() {
    let labels = Labels {
        bytes: 2 << 30,
        asked_gib_per_s: Some(1.0),
        ..labels("vm-scrub at 1 GiB/s", Verify::Full)
    };
    let millis = [2000.0, 2500.0, 2500.0, 1600.0];
    let mut throttled = row(Benchmark::Neighbour, "at a given rate", labels, millis);
    throttled.of_asked = Some(1.0);
    let answer = only(vec![throttled]);
    assert_eq!((answer.of, answer.ratio), (Quantity::Rate, 2000.0 / 2250.0));
    assert_eq!((answer.ratio_q1, answer.ratio_q3), (0.8, 1.0625));
    assert_eq!(
        answer.question,
        "vm-scrub at 1 GiB/s: rate against the one asked for, over 2 s"
    );
}

#[test]
fn a_neighbour_is_asked_about_the_chosen_loop_and_vm_scrub_s_own_scrubbing() {
    let neighbour = |name: &str, chosen: Option<bool>, verify, ms: f64| {
        let labels = Labels {
            bytes: 768 << 10,
            calibrated: chosen,
            verify,
            accesses: Some(100),
            ..labels(name, Verify::None)
        };
        let row = row(Benchmark::Neighbour, "768 KiB, thp (L2)", labels, [ms; 4]);
        against(row, "alone", 1.0)
    };
    let answers = answers(vec![
        neighbour("alone", None, None, 3.0),
        neighbour("beside rep-stosb", Some(true), None, 4.0),
        neighbour("beside clzero", Some(false), None, 9.0),
        neighbour("vm-scrub unthrottled", None, Some(Verify::Full), 6.0),
    ]);
    let found: Vec<_> = answers
        .iter()
        .map(|each| (each.question.as_str(), each.ratio))
        .collect();
    let expected = [
        (
            "neighbour that works in 768 KiB, beside rep-stosb: speed against alone",
            0.75,
        ),
        (
            "neighbour that works in 768 KiB, beside vm-scrub unthrottled: speed against alone",
            0.5,
        ),
    ];
    assert_eq!(found, expected);
}

#[test]
fn most_threads_are_compared_with_as_many_as_asked_for() {
    let scaling = |threads: usize, ms| {
        let labels = Labels {
            threads,
            page_size: Some(PageSize::Base4K),
            ..labels(&format!("{threads}-threads"), Verify::Full)
        };
        let row = row(Benchmark::Scaling, "1 GiB, 4k, verified", labels, [ms; 4]);
        against(row, "2-threads", 1.0)
    };
    let rows = [
        scaling(1, 30.0),
        scaling(2, 18.0),
        scaling(4, 18.0),
        scaling(8, 20.0),
    ];
    let answer = only(rows[..4].to_vec());
    assert_eq!(answer.ratio, 0.9);
    assert_eq!(
        answer.question,
        "turnaround with 8 threads, 4 KiB pages, verified: speed against 2 threads"
    );
    assert_eq!(
        answers(rows[..2].to_vec()),
        [],
        "not more than were asked for"
    );
}

#[test]
fn a_guest_is_asked_about_recycled_memory() {
    let guest = |name: &str, ms| {
        let row = row(
            Benchmark::Guest,
            "1 GiB, thp",
            labels(name, Verify::Full),
            [ms; 4],
        );
        against(row, "fresh-mmap", 1.0)
    };
    let answer = only(vec![guest("recycled", 30.0), guest("fresh-mmap", 90.0)]);
    assert_eq!((answer.of, answer.ratio), (Quantity::Speed, 3.0));
}

#[test]
fn the_table_has_a_line_for_each_answer_and_says_where_it_comes_from() {
    let answers = of(&samples::results());
    let table = table(&answers);
    assert_eq!(table.rows.len(), answers.len());
    assert!(
        table
            .rows
            .iter()
            .all(|row| row.len() == table.headings.len())
    );
    let line = [
        "2.00×",
        "1.94× to 2.04×",
        "turnaround: 1 GiB, thp, 2 threads",
    ];
    let found = table.rows.iter().find(|row| row[1..4] == line);
    assert!(found.is_some(), "{table:?}");
}

#[test]
fn what_is_good_depends_on_what_was_divided() {
    use Quantity::{Rate, Speed, Time};
    use Standing::{Bad, Even, Good};
    let mut answer = answers(samples::results().rows).remove(0);
    for (of, ratio, standing) in [
        (Speed, 2.0, Good),
        (Speed, 0.5, Bad),
        (Speed, 0.96, Even),
        (Time, 2.0, Bad),
        (Time, 0.5, Good),
        (Time, 1.04, Even),
        (Rate, 1.0, Good),
        (Rate, 1.2, Bad),
        (Rate, 0.8, Bad),
    ] {
        (answer.of, answer.ratio) = (of, ratio);
        assert_eq!(answer.standing(), standing, "{of:?} {ratio}");
    }
}

#[test]
fn programs_can_read_it() {
    let value = serde_json::to_value(of(&samples::results())).expect("JSON");
    let first = value
        .as_array()
        .expect("an array")
        .iter()
        .find(|each| each["benchmark"] == "turnaround");
    let first = first.expect("a turnaround");
    assert_eq!(
        (&first["of"], &first["ratio"]),
        (&"speed".into(), &2.0.into())
    );
    assert!(first["question"].is_string() && first["group"].is_string());
    assert!(first["ratio_q1"].is_f64() && first["ratio_q3"].is_f64());
    assert_eq!(first["warnings"][0], "noise");
}
