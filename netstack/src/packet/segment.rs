//! Cutting super-packets to the path's size, and finishing checksums that were left to hardware.
//!
//! A kernel hands over up to 64 KiB of TCP (or UDP) behind one header. Where a path carries datagrams it is cut
//! here, straight into packets that are ready to seal; where it is a stream it never comes here.

use super::{IpHeader, MAX, checksum, protocol};

/// Longest headers that are cut: IPv6 with a few extensions, and TCP with all its options.
const MAX_HEADERS: usize = 256;

const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// FIN and PSH belong on the last segment only, CWR on the first only (RFC 3168, 6.1.2).
const TCP_LAST_ONLY: u8 = 0x09;
const TCP_FIRST_ONLY: u8 = 0x80;

/// Length of the upper-layer header of a TCP or UDP packet.
fn upper_header(header: &IpHeader, packet: &[u8]) -> Option<usize> {
    let length = match header.protocol {
        protocol::TCP => usize::from(packet.get(header.payload + 12)? >> 4) * 4,
        protocol::UDP => 8,
        _ => return None,
    };
    let minimum = if header.protocol == protocol::TCP { 20 } else { 8 };
    (length >= minimum && header.payload + length <= header.total).then_some(length)
}

/// Bytes of headers in front of a TCP packet's payload; `None` if it is not whole TCP.
#[must_use]
pub fn tcp_headers(packet: &[u8]) -> Option<usize> {
    let header = IpHeader::parse(packet)?;
    (header.protocol == protocol::TCP && header.fragment.is_none())
        .then(|| upper_header(&header, packet))?
        .map(|upper| header.payload + upper)
}

/// Computes the TCP, UDP or ICMPv6 checksum of a whole packet, whatever its field holds. Others stay as they are.
pub fn finish(packet: &mut [u8]) {
    let Some(header) = IpHeader::parse(packet) else { return };
    let field = match header.protocol {
        protocol::TCP => TCP_CHECKSUM,
        protocol::UDP => UDP_CHECKSUM,
        protocol::ICMPV6 => 2,
        _ => return,
    };
    let Some(upper) = packet.get_mut(header.payload..header.total) else { return };
    if header.fragment.is_some() || upper.len() < field + 2 {
        return;
    }
    upper[field..field + 2].fill(0);
    let sum = checksum::upper_layer(header.source, header.destination, header.protocol, upper);
    // An all-zero UDP checksum means that there is none (RFC 768).
    let sum = if sum == 0 && header.protocol == protocol::UDP { 0xffff } else { sum };
    upper[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Cuts a TCP or UDP super-packet into packets of at most `size` payload bytes, each with its headers and
/// checksums complete, and gives them to `emit` in order. A packet that needs no cutting is finished and emitted
/// as it is. `scratch` holds one packet at a time.
pub fn split(packet: &mut [u8], size: u16, scratch: &mut Vec<u8>, mut emit: impl FnMut(&[u8])) {
    let Some(header) = IpHeader::parse(packet) else { return };
    let upper = header.fragment.is_none().then(|| upper_header(&header, packet)).flatten();
    let size = usize::from(size);
    let Some(upper) = upper.filter(|upper| header.total - header.payload - upper > size && size > 0) else {
        finish(packet);
        return emit(&packet[..header.total]);
    };
    let start = header.payload + upper;
    if start > MAX_HEADERS {
        return;
    }

    let (headers, payload) = packet[..header.total].split_at(start);
    let cut = Cut { header, headers, upper };
    let pieces = payload.len().div_ceil(size);
    for (number, piece) in payload.chunks(size).enumerate() {
        cut.build(number, number + 1 == pieces, number * size, piece, scratch);
        emit(scratch);
    }
}

/// One super-packet being cut.
struct Cut<'a> {
    header: IpHeader,
    headers: &'a [u8],
    upper: usize,
}

impl Cut<'_> {
    fn build(&self, number: usize, last: bool, offset: usize, piece: &[u8], packet: &mut Vec<u8>) {
        packet.clear();
        packet.extend_from_slice(self.headers);
        packet.extend_from_slice(piece);
        let total = packet.len();
        debug_assert!(total <= MAX);

        if self.header.source.is_ipv4() {
            packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
            let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(number as u16);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum::ipv4_header(&packet[..self.header.payload]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            packet[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
        }

        let upper = &mut packet[self.header.payload..];
        let field = if self.header.protocol == protocol::TCP {
            let sequence = u32::from_be_bytes([upper[4], upper[5], upper[6], upper[7]]);
            upper[4..8].copy_from_slice(&sequence.wrapping_add(offset as u32).to_be_bytes());
            if number > 0 {
                upper[13] &= !TCP_FIRST_ONLY;
            }
            if !last {
                upper[13] &= !TCP_LAST_ONLY;
            }
            TCP_CHECKSUM
        } else {
            let length = (self.upper + piece.len()) as u16;
            upper[4..6].copy_from_slice(&length.to_be_bytes());
            UDP_CHECKSUM
        };
        upper[field..field + 2].fill(0);
        let sum =
            checksum::upper_layer(self.header.source, self.header.destination, self.header.protocol, upper);
        let sum = if sum == 0 && field == UDP_CHECKSUM { 0xffff } else { sum };
        upper[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    /// A TCP packet with a valid checksum, sequence number 1000, ACK and whatever flags are given.
    pub(in crate::packet) fn tcp(v6: bool, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        let length = 20 + payload.len();
        if v6 {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((length as u16).to_be_bytes());
            packet.extend([protocol::TCP, 64]);
            packet.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).octets());
            packet.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2).octets());
        } else {
            packet.extend([0x45, 0]);
            packet.extend(((20 + length) as u16).to_be_bytes());
            packet.extend([0, 9, 0x40, 0, 64, protocol::TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = checksum::ipv4_header(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet.extend([0x1f, 0x90, 0xc0, 0x00]);
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 5, 0x50, 0x10 | flags, 0x20, 0, 0, 0, 0, 0]);
        packet.extend_from_slice(payload);
        finish(&mut packet);
        packet
    }

    /// Whether the upper-layer checksum of `packet` holds.
    pub(in crate::packet) fn holds(packet: &[u8]) -> bool {
        let header = IpHeader::parse(packet).unwrap();
        let upper = &packet[header.payload..header.total];
        checksum::upper_layer(header.source, header.destination, header.protocol, upper) == 0
            && (header.source.is_ipv6() || checksum::ipv4_header(&packet[..header.payload]) == 0)
    }

    fn split_all(packet: &mut [u8], size: u16) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        split(packet, size, &mut Vec::new(), |piece| pieces.push(piece.to_vec()));
        pieces
    }

    #[test]
    fn segments_carry_on_where_the_last_one_ended() {
        for v6 in [false, true] {
            let payload: Vec<u8> = (0..5000u32).map(|byte| byte as u8).collect();
            let mut packet = tcp(v6, u32::MAX - 1500, 0x09 | 0x80, &payload);
            let pieces = split_all(&mut packet, 1380);
            assert_eq!(pieces.len(), 4);
            let mut joined = Vec::new();
            for (number, piece) in pieces.iter().enumerate() {
                assert!(holds(piece), "piece {number} of v6={v6}");
                let start = tcp_headers(piece).unwrap();
                let upper = &piece[start - 20..];
                let sequence = u32::from_be_bytes(upper[4..8].try_into().unwrap());
                assert_eq!(sequence, (u32::MAX - 1500).wrapping_add(joined.len() as u32));
                assert_eq!(upper[13] & TCP_FIRST_ONLY != 0, number == 0);
                assert_eq!(upper[13] & TCP_LAST_ONLY == TCP_LAST_ONLY, number == 3);
                joined.extend_from_slice(&piece[start..]);
            }
            assert_eq!(joined, payload);
        }
    }

    #[test]
    fn datagrams_of_a_burst_keep_their_size() {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol::UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0, 7, 0, 7, 0, 0, 0, 0]);
        packet.extend([0xab; 2500]);
        let total = packet.len() as u16;
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        let pieces = split_all(&mut packet, 1000);
        let lengths: Vec<_> = pieces.iter().map(|piece| u16::from_be_bytes([piece[24], piece[25]])).collect();
        assert_eq!(lengths, [1008, 1008, 508]);
        assert!(pieces.iter().all(|piece| holds(piece)));
    }

    #[test]
    fn a_small_packet_is_finished_and_left_whole() {
        let mut packet = tcp(false, 1, 0, b"hello");
        packet[36..38].fill(0xee);
        let pieces = split_all(&mut packet, 1380);
        assert_eq!(pieces.len(), 1);
        assert!(holds(&pieces[0]));
    }

    #[test]
    fn garbage_is_swallowed() {
        assert!(split_all(&mut [0; 40], 100).is_empty());
        let mut packet = tcp(true, 1, 0, &[0; 300]);
        packet[52] = 0xf0;
        packet.truncate(300);
        let _ = split_all(&mut packet, 10);
        let _: (IpAddr, IpAddr) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    }
}
