//! Quantities of Kubernetes, as whole thousandths.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Thousandths of a unit: of a CPU, or of a byte.
pub type Milli = i128;

/// Suffixes and what they multiply a thousandth's thousand by.
const SUFFIXES: [(&str, Milli); 15] = [
    ("Ki", 1000 << 10),
    ("Mi", 1000 << 20),
    ("Gi", 1000 << 30),
    ("Ti", 1000 << 40),
    ("Pi", 1000 << 50),
    ("Ei", 1000 << 60),
    ("m", 1),
    ("k", 1_000_000),
    ("M", 1_000_000_000),
    ("G", 1_000_000_000_000),
    ("T", 1_000_000_000_000_000),
    ("P", 1_000_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000_000),
    ("u", 0),
    ("n", 0),
];

/// Reads a quantity; what is finer than a thousandth is rounded up. `None` if it is none.
#[must_use]
pub fn parse(quantity: &Quantity) -> Option<Milli> {
    let text = quantity.0.trim();
    if let Some((suffix, unit)) = SUFFIXES.iter().find(|(suffix, _)| text.ends_with(suffix)) {
        let number = text.strip_suffix(suffix)?;
        return match *suffix {
            "u" => decimal(number, 0, 1).map(|micro| div_ceil(micro, 1000)),
            "n" => decimal(number, 0, 1).map(|nano| div_ceil(nano, 1_000_000)),
            _ => decimal(number, 0, *unit),
        };
    }
    match text.split_once(['e', 'E']) {
        Some((number, exponent)) => decimal(number, exponent.parse().ok()?, 1000),
        None => decimal(text, 0, 1000),
    }
}

/// Writes a quantity.
#[must_use]
pub fn format(milli: Milli) -> String {
    if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") }
}

/// A decimal number times a power of ten times a unit, rounded up.
fn decimal(number: &str, exponent: i32, unit: Milli) -> Option<Milli> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.bytes().any(|byte| !byte.is_ascii_digit()) || whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits: Milli = format!("{whole}{fraction}").parse().ok()?;
    let power = exponent.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    let scale = 10_i128.checked_pow(power.unsigned_abs())?;
    let product = digits.checked_mul(unit)?;
    if power >= 0 { product.checked_mul(scale) } else { Some(div_ceil(product, scale)) }
}

/// The quotient, rounded up.
#[must_use]
pub fn div_ceil(dividend: Milli, divisor: Milli) -> Milli {
    dividend.div_euclid(divisor) + Milli::from(dividend.rem_euclid(divisor) != 0)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::{format, parse};

    #[test]
    fn quantities_are_read_in_every_notation() {
        for (text, expected) in [
            ("100m", Some(100)),
            ("1", Some(1000)),
            ("0.5", Some(500)),
            (".5", Some(500)),
            ("2.", Some(2000)),
            ("1e3", Some(1_000_000)),
            ("15E-1", Some(1500)),
            ("64Mi", Some(1000 * 64 * 1024 * 1024)),
            ("1.5Gi", Some(1000 * 1536 * 1024 * 1024)),
            ("128M", Some(128_000_000_000)),
            ("1500u", Some(2)),
            ("1n", Some(1)),
            ("2E", Some(2_000_000_000_000_000_000_000)),
            ("", None),
            ("Mi", None),
            ("lots", None),
            ("1.x", None),
            ("1e999999999", None),
        ] {
            assert_eq!(parse(&Quantity(text.into())), expected, "{text}");
        }
    }

    #[test]
    fn what_is_written_reads_the_same() {
        for milli in [0, 1, 10, 999, 1000, 1500, 67_108_864_000] {
            assert_eq!(parse(&Quantity(format(milli))), Some(milli));
        }
    }
}
