//! Times, rates and ratios for people, with three digits that count.

/// Three significant digits as far as they are behind the point, and two of what is smaller than a tenth.
fn three(value: f64) -> String {
    let digits = match value.abs() {
        large if large >= 99.95 => 0,
        medium if medium >= 9.995 => 1,
        tiny if (1e-6..0.0995).contains(&tiny) => (1.0 - tiny.log10().floor()) as usize,
        _ => 2,
    };
    format!("{value:.digits$}")
}

/// `45.3 ns`, `1.20 ms`.
pub(crate) fn time(nanos: f64) -> String {
    let (value, unit) = scaled(nanos);
    format!("{} {unit}", three(value))
}

/// A time in the unit that suits it: nanoseconds, µs, ms or seconds.
pub(crate) fn scaled(nanos: f64) -> (f64, &'static str) {
    let unit = unit_of(nanos);
    (nanos / unit.0, unit.1)
}

/// Nanoseconds in the unit that suits this time, and its name.
pub(crate) fn unit_of(nanos: f64) -> (f64, &'static str) {
    match nanos {
        ns if ns < 1e3 => (1.0, "ns"),
        us if us < 1e6 => (1e3, "µs"),
        ms if ms < 1e9 => (1e6, "ms"),
        _ => (1e9, "s"),
    }
}

/// `256 KiB`, `1.5 GiB`: bytes in the largest binary unit of which there is at least one.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let step = bytes
        .checked_ilog2()
        .map_or(0, |log| log as usize / 10)
        .min(units.len() - 1);
    format!(
        "{} {}",
        plain(bytes as f64 / (1_u64 << (10 * step)) as f64),
        units[step]
    )
}

/// `29.4 GiB/s`.
pub(crate) fn rate(gib_per_s: f64) -> String {
    format!("{} GiB/s", three(gib_per_s))
}

/// `6.12×`.
pub(crate) fn ratio(ratio: f64) -> String {
    format!("{}×", three(ratio))
}

/// `97 %`.
pub(crate) fn percent(fraction: f64) -> String {
    format!("{:.0} %", fraction * 100.0)
}

/// A number for a plot: short, and without a trailing zero behind the point.
pub(crate) fn plain(value: f64) -> String {
    let text = three(value);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_unit() {
        assert_eq!(time(45.31), "45.3 ns");
        assert_eq!(time(1_204_999.0), "1.20 ms");
        assert_eq!(time(99_960.0), "100 µs");
        assert_eq!(time(2.5e9), "2.50 s");
        assert_eq!(
            (size(0), size(4096), size(3 << 29)),
            ("0 bytes".into(), "4 KiB".into(), "1.5 GiB".into())
        );
        assert_eq!(
            (size(102_400), size(1000 << 20), size(1 << 50)),
            ("100 KiB".into(), "1000 MiB".into(), "1024 TiB".into())
        );
        assert_eq!(rate(147.2), "147 GiB/s");
        assert_eq!(ratio(6.118), "6.12×");
        assert_eq!(
            (ratio(0.151), ratio(0.0123), ratio(0.00009)),
            ("0.15×".into(), "0.012×".into(), "0.000090×".into())
        );
        assert_eq!(ratio(0.0), "0.00×");
        assert_eq!(percent(0.974), "97 %");
        assert_eq!(
            (plain(2.5), plain(10.0), plain(0.0), plain(100.0)),
            ("2.5".into(), "10".into(), "0".into(), "100".into())
        );
    }
}
