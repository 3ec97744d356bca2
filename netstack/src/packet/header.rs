//! Writing IP headers for packets that the overlay itself originates.

use std::net::IpAddr;

use super::checksum;

/// The default time-to-live and hop limit (IANA, ip-parameters).
const HOP_LIMIT: u8 = 64;

/// Length of the header that [`write()`] puts before a payload for `address`, bytes.
#[must_use]
pub const fn length(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    }
}

/// Writes an IP header for a payload of `payload` bytes at the start of `packet`.
///
/// IPv4 packets are atomic (RFC 6864): they carry "don't fragment" and no identification.
///
/// # Panics
///
/// When the two addresses are of different families, or `packet` is shorter than the header.
pub fn write(packet: &mut [u8], source: IpAddr, destination: IpAddr, protocol: u8, payload: usize) {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let total = (20 + payload) as u16;
            packet[..12].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0]);
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&destination.octets());
            let field = checksum::ipv4_header(&packet[..20]);
            packet[10..12].copy_from_slice(&field.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, protocol, HOP_LIMIT]);
            packet[4..6].copy_from_slice(&(payload as u16).to_be_bytes());
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&destination.octets());
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            panic!("a packet from {source} to {destination} mixes address families")
        }
    }
}
