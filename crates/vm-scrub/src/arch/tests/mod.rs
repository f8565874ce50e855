//! One table of cases for every loop.
//!
//! The loops differ in their instructions and must not differ in anything else, so the cases are
//! written once and instantiated for each. A loop that this processor can't run says so where
//! nobody can overlook it.

mod cases;
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod detected;
mod fused;
mod generic;
mod guarded;
mod handles;
mod visible;

/// Says that a loop was not tested.
fn skipped(name: &str) {
    crate::test_support::skipped(format_args!(
        "the loop `{name}` is not available on this processor"
    ));
}

macro_rules! zero_tests {
    ($($module:ident: $loop:ty,)*) => {$(
        mod $module {
            #[test]
            fn writes_zeros_exactly_where_it_is_told() {
                let Some(zero) = <$loop>::new() else {
                    return super::skipped(<$loop>::NAME);
                };
                assert!(<$loop>::is_available());
                let handle = crate::arch::ZeroLoop::by_name(<$loop>::NAME).unwrap();
                assert_eq!(handle.is_streaming(), <$loop>::STREAMING);
                // SAFETY: the cases only pass ranges inside a buffer of their own.
                super::cases::zeroing(|ptr, len| unsafe { zero.zero(ptr, len) });
            }
        }
    )*};
}

macro_rules! verify_tests {
    ($($module:ident: $loop:ty,)*) => {$(
        mod $module {
            #[test]
            fn finds_the_first_byte_that_is_not_zero() {
                let Some(verify) = <$loop>::new() else {
                    return super::skipped(<$loop>::NAME);
                };
                assert!(<$loop>::is_available());
                // SAFETY: the cases only pass ranges inside an initialised buffer of their own.
                super::cases::verification(|ptr, len| unsafe { verify.first_nonzero(ptr, len) });
            }
        }
    )*};
}

zero_tests! {
    zero_portable: crate::arch::all::portable::Zero,
}

verify_tests! {
    verify_portable: crate::arch::all::portable::Verify,
}

#[cfg(target_arch = "x86_64")]
zero_tests! {
    zero_rep_stosb: crate::arch::x86_64::rep_stosb::Zero,
    zero_prefetchw: crate::arch::x86_64::prefetchw::Zero,
    zero_avx2_stream: crate::arch::x86_64::avx2::Stream,
    zero_avx512_stream: crate::arch::x86_64::avx512::Stream,
    zero_clzero: crate::arch::x86_64::clzero::Zero,
}

#[cfg(target_arch = "x86_64")]
verify_tests! {
    verify_sse2: crate::arch::x86_64::sse2::Verify,
    verify_avx2: crate::arch::x86_64::avx2::Verify,
    verify_avx512: crate::arch::x86_64::avx512::Verify,
}

#[cfg(target_arch = "aarch64")]
zero_tests! {
    zero_dc_zva: crate::arch::aarch64::dc_zva::Zero,
    zero_neon_pairs: crate::arch::aarch64::neon::Zero,
}

#[cfg(target_arch = "aarch64")]
verify_tests! {
    verify_neon: crate::arch::aarch64::neon::Verify,
}
