//! The Internet checksum (RFC 1071), in eight-byte strides.

use std::net::IpAddr;

/// Sums `data` onto `sum`; an odd last byte counts as if a zero followed it.
#[must_use]
pub fn sum(data: &[u8], mut sum: u64) -> u64 {
    let (words, tail) = data.as_chunks::<4>();
    // A u64 holds 2^32 words of four bytes before it could overflow; a packet has 2^14.
    for word in words {
        sum += u64::from(u32::from_be_bytes(*word));
    }
    let mut last = [0; 4];
    last[..tail.len()].copy_from_slice(tail);
    sum + u64::from(u32::from_be_bytes(last))
}

/// Folds a sum to the 16 bits of the one's complement total.
#[must_use]
pub fn fold(mut sum: u64) -> u16 {
    sum = (sum >> 32) + (sum & 0xffff_ffff);
    for _ in 0..4 {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The sum of a pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1) with an upper-layer `length` in bytes.
#[must_use]
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u64 {
    let addresses = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => sum(&destination.octets(), sum(&source.octets(), 0)),
        (IpAddr::V6(source), IpAddr::V6(destination)) => sum(&destination.octets(), sum(&source.octets(), 0)),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => 0,
    };
    addresses + u64::from(protocol) + length as u64
}

/// The checksum field for `segment` (its own field zeroed) of an upper-layer protocol.
#[must_use]
pub fn upper_layer(source: IpAddr, destination: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    !fold(sum(segment, pseudo_header(source, destination, protocol, segment.len())))
}

/// The checksum field for an IPv4 `header` (its own field zeroed).
#[must_use]
pub fn ipv4_header(header: &[u8]) -> u16 {
    !fold(sum(header, 0))
}

#[cfg(test)]
mod tests {
    use super::{fold, ipv4_header, sum};

    #[test]
    fn the_example_of_rfc_1071() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0)), 0xddf2);
    }

    #[test]
    fn a_header_with_its_checksum_sums_to_zero() {
        let mut header =
            [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        let field = ipv4_header(&header);
        assert_eq!(field, 0xb861);
        header[10..12].copy_from_slice(&field.to_be_bytes());
        assert_eq!(ipv4_header(&header), 0);
    }

    #[test]
    fn an_odd_byte_is_padded_with_zero() {
        assert_eq!(fold(sum(&[0x12], 0)), fold(sum(&[0x12, 0], 0)));
        assert_eq!(fold(sum(&[1, 2, 3, 4, 5], 0)), fold(sum(&[1, 2, 3, 4, 5, 0], 0)));
    }
}
