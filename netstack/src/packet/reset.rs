//! The reset that answers a TCP segment for which there is no connection (RFC 9293, 3.10.7.1).

use super::{IpHeader, checksum, header, protocol};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// The answer to the segment in `packet`; `None` for a reset, and for what isn't a whole TCP segment.
#[must_use]
pub fn reset(packet: &[u8]) -> Option<Vec<u8>> {
    let ip = IpHeader::parse(packet)?;
    if ip.protocol != protocol::TCP || ip.fragment.is_some() {
        return None;
    }
    let segment = &packet[ip.payload..ip.total];
    let tcp: &[u8; 20] = segment.first_chunk()?;
    let data = segment.len().checked_sub(usize::from(tcp[12] >> 4) * 4)?;
    let flags = tcp[13];
    if flags & RST != 0 {
        return None;
    }

    let start = header::length(ip.source);
    let mut reply = vec![0; start + 20];
    header::write(&mut reply, ip.destination, ip.source, protocol::TCP, 20);
    let answer = &mut reply[start..];
    answer[..2].copy_from_slice(&tcp[2..4]);
    answer[2..4].copy_from_slice(&tcp[..2]);
    if flags & ACK != 0 {
        answer[4..8].copy_from_slice(&tcp[8..12]);
        answer[13] = RST;
    } else {
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let length = data as u32 + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        answer[8..12].copy_from_slice(&sequence.wrapping_add(length).to_be_bytes());
        answer[13] = RST | ACK;
    }
    answer[12] = 5 << 4;
    let field = checksum::upper_layer(ip.destination, ip.source, protocol::TCP, answer);
    answer[16..18].copy_from_slice(&field.to_be_bytes());
    Some(reply)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    fn segment(flags: u8, data: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        header::write(&mut packet, A, B, protocol::TCP, 20 + data.len());
        packet[20..24].copy_from_slice(&[0, 80, 1, 0]);
        packet[24..28].copy_from_slice(&u32::MAX.to_be_bytes());
        packet[28..32].copy_from_slice(&77u32.to_be_bytes());
        packet[32] = 5 << 4;
        packet[33] = flags;
        packet.extend_from_slice(data);
        packet
    }

    #[test]
    fn a_segment_without_ack_is_acknowledged_in_full() {
        let reply = reset(&segment(SYN, b"abc")).unwrap();
        assert_eq!(reply[20..24], [1, 0, 0, 80]);
        assert_eq!(reply[24..28], [0; 4]);
        assert_eq!(reply[28..32], 3u32.to_be_bytes(), "sequence 2^32-1, plus SYN and three bytes, wraps");
        assert_eq!(reply[33], RST | ACK);
        assert_eq!(checksum::upper_layer(B, A, protocol::TCP, &reply[20..]), 0);
    }

    #[test]
    fn a_segment_with_ack_is_reset_where_it_acknowledges() {
        let reply = reset(&segment(ACK, b"")).unwrap();
        assert_eq!(reply[24..28], 77u32.to_be_bytes());
        assert_eq!(reply[33], RST);
    }

    #[test]
    fn a_reset_is_never_answered() {
        assert_eq!(reset(&segment(RST, b"")), None);
        assert_eq!(reset(&segment(RST | ACK, b"")), None);
    }
}
