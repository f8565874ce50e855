//! The handles: what is available, what a name gives, what an error says, and that a handle runs
//! its own loop.

use crate::arch::{UnknownLoop, VERIFY, VERIFY_NAMES, VerifyLoop, ZERO, ZERO_NAMES, ZeroLoop};

/// A loop of an architecture that is not this one.
#[cfg(target_arch = "x86_64")]
const FOREIGN: (&str, &str) = ("dc-zva", "neon");
#[cfg(not(target_arch = "x86_64"))]
const FOREIGN: (&str, &str) = ("clzero", "avx2");

#[test]
fn every_handle_comes_back_by_its_name() {
    for zero in ZeroLoop::available() {
        assert_eq!(ZeroLoop::by_name(zero.name()), Ok(zero));
        assert_eq!(zero.to_string().parse(), Ok(zero));
        assert_eq!(format!("{zero:?}"), format!("ZeroLoop({:?})", zero.name()));
    }
    for verify in VerifyLoop::available() {
        assert_eq!(VerifyLoop::by_name(verify.name()), Ok(verify));
        assert_eq!(verify.to_string().parse(), Ok(verify));
    }
}

#[test]
fn loops_differ_from_each_other() {
    let loops: Vec<_> = ZeroLoop::available().collect();
    for (index, zero) in loops.iter().enumerate() {
        assert!(!loops[..index].contains(zero), "{zero} twice");
    }
}

#[test]
fn every_row_has_a_known_name() {
    for row in ZERO {
        assert!(ZERO_NAMES.contains(&row.name), "{}", row.name);
    }
    for row in VERIFY {
        assert!(VERIFY_NAMES.contains(&row.name), "{}", row.name);
    }
}

#[test]
fn portable_is_always_there_and_first() {
    assert_eq!(
        ZeroLoop::available().next(),
        ZeroLoop::by_name("portable").ok()
    );
    assert_eq!(
        VerifyLoop::available().next(),
        VerifyLoop::by_name("portable").ok()
    );
}

#[test]
fn the_choices_are_available() {
    assert!(ZeroLoop::available().any(|zero| zero == ZeroLoop::best_guess()));
    assert_eq!(VerifyLoop::available().next(), Some(VerifyLoop::portable()));
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
#[test]
fn the_guess_is_the_string_store_where_it_is_fast() {
    let fast = crate::arch::x86_64::rep_stosb::Zero::is_fast();
    let guess = ZeroLoop::best_guess().name();
    assert_eq!(guess, if fast { "rep-stosb" } else { "portable" });
}

#[test]
fn a_name_that_exists_nowhere_is_told_from_one_that_does_not_run_here() {
    let error = ZeroLoop::by_name("fastest").unwrap_err();
    assert!(matches!(error, UnknownLoop::NoSuchLoop { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .starts_with("there is no zeroing loop called `fastest`; available here: portable")
    );

    let error = ZeroLoop::by_name(FOREIGN.0).unwrap_err();
    assert!(
        matches!(error, UnknownLoop::NotAvailable { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("does not run on this processor"));

    let error = "".parse::<VerifyLoop>().unwrap_err();
    assert!(matches!(error, UnknownLoop::NoSuchLoop { .. }), "{error:?}");
    let error = FOREIGN.1.parse::<VerifyLoop>().unwrap_err();
    assert!(
        matches!(error, UnknownLoop::NotAvailable { .. }),
        "{error:?}"
    );
    for verify in VerifyLoop::available() {
        assert!(error.to_string().contains(verify.name()), "{error}");
    }
}

#[test]
fn every_loop_works_through_its_handle() {
    for zero in ZeroLoop::available() {
        let mut bytes = [0xa5; 1000];
        let middle = &mut bytes[3..777];
        // SAFETY: exactly the bytes of the slice, which is borrowed for this.
        unsafe { zero.zero(middle.as_mut_ptr(), middle.len()) };
        let is_exact = |(at, &byte): (usize, &u8)| (byte == 0) == (3..777).contains(&at);
        assert!(bytes.iter().enumerate().all(is_exact), "{zero}");

        for verify in VerifyLoop::available() {
            // SAFETY: exactly the bytes of the array, all initialised.
            let found = |bytes: &[u8]| unsafe { verify.first_nonzero(bytes.as_ptr(), bytes.len()) };
            assert_eq!(found(&bytes[3..777]), None, "{verify}");
            assert_eq!(found(&bytes[3..778]), Some(774), "{verify}");
        }
    }
}
