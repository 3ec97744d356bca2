//! Building ICMP and ICMPv6 messages (RFC 792, RFC 4443).

use std::net::{IpAddr, SocketAddr};

use super::{IpHeader, checksum, header, protocol};

/// Why a packet can't be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unreachable {
    /// No route to the destination's network.
    Network,
    /// The destination itself does not answer.
    Host,
    /// Nothing listens on the destination's port.
    Port,
    /// A rule forbids it.
    Prohibited,
}

impl Unreachable {
    /// Type and code: RFC 792 and RFC 1812, 5.2.7.1 for IPv4; RFC 4443, 3.1 for IPv6.
    const fn codes(self, version: IpAddr) -> [u8; 2] {
        match (version, self) {
            (IpAddr::V4(_), Self::Network) => [3, 0],
            (IpAddr::V4(_), Self::Host) => [3, 1],
            (IpAddr::V4(_), Self::Port) => [3, 3],
            (IpAddr::V4(_), Self::Prohibited) => [3, 13],
            (IpAddr::V6(_), Self::Network) => [1, 0],
            (IpAddr::V6(_), Self::Prohibited) => [1, 1],
            (IpAddr::V6(_), Self::Host) => [1, 3],
            (IpAddr::V6(_), Self::Port) => [1, 4],
        }
    }

    const fn from_codes(codes: [u8; 2], version: IpAddr) -> Option<Self> {
        match (version, codes) {
            (IpAddr::V4(_), [3, 0 | 6]) | (IpAddr::V6(_), [1, 0]) => Some(Self::Network),
            (IpAddr::V4(_), [3, 1 | 7]) | (IpAddr::V6(_), [1, 3]) => Some(Self::Host),
            (IpAddr::V4(_), [3, 2 | 3]) | (IpAddr::V6(_), [1, 4]) => Some(Self::Port),
            (IpAddr::V4(_), [3, 9 | 10 | 13]) | (IpAddr::V6(_), [1, 1 | 5]) => Some(Self::Prohibited),
            _ => None,
        }
    }
}

/// Longest error packets: what every host must accept (RFC 1812, 4.3.2.3; RFC 4443, 2.4 (c)), bytes.
const MAX_ERROR_V4: usize = 576;
const MAX_ERROR_V6: usize = 1280;

/// As much of a quoted packet as its ports are looked for in: IPv6 with a few extensions, bytes.
const MAX_HEADERS: usize = 128;

/// An error about `packet`, quoting it, from `reporter` (its own destination if that is `None` or of the other family).
///
/// `None` where RFC 1122, 3.2.2 and RFC 4443, 2.4 (e) ask for silence: errors about errors, later fragments,
/// and packets from or to what isn't one host.
#[must_use]
pub fn unreachable(packet: &[u8], why: Unreachable, reporter: Option<IpAddr>) -> Option<Vec<u8>> {
    let header = IpHeader::parse(packet)?;
    if !may_report(&header, packet) {
        return None;
    }
    let reporter = reporter
        .filter(|reporter| reporter.is_ipv4() == header.source.is_ipv4())
        .unwrap_or(header.destination);
    let limit = if header.source.is_ipv4() { MAX_ERROR_V4 } else { MAX_ERROR_V6 };
    let quoted = header.total.min(limit - header::length(header.source) - 8);

    let mut message = vec![0; 8 + quoted];
    message[..2].copy_from_slice(&why.codes(header.source));
    message[8..].copy_from_slice(&packet[..quoted]);
    Some(wrap(reporter, header.source, &mut message))
}

fn may_report(header: &IpHeader, packet: &[u8]) -> bool {
    let is_error = match (header.protocol, packet.get(header.payload)) {
        (protocol::ICMP, Some(kind)) => !matches!(kind, 8 | 13),
        (protocol::ICMPV6, Some(kind)) => *kind < 128,
        _ => false,
    };
    let later = header.fragment.is_some_and(|fragment| fragment.offset > 0);
    !is_error && !later && is_host(header.source) && is_host(header.destination)
}

/// Whether `address` can name one host.
fn is_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast()
        }
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_multicast(),
    }
}

/// Puts an IP header before an ICMP `message` and fills its checksum.
#[must_use]
pub fn wrap(source: IpAddr, destination: IpAddr, message: &mut [u8]) -> Vec<u8> {
    fill_checksum(source, destination, message);
    let number = if source.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 };
    let start = header::length(source);
    let mut packet = vec![0; start + message.len()];
    header::write(&mut packet, source, destination, number, message.len());
    packet[start..].copy_from_slice(message);
    packet
}

/// Fills the checksum of an ICMP `message` of four bytes or more.
pub fn fill_checksum(source: IpAddr, destination: IpAddr, message: &mut [u8]) {
    message[2..4].fill(0);
    let field = match source {
        IpAddr::V4(_) => !checksum::fold(checksum::sum(message, 0)),
        IpAddr::V6(_) => checksum::upper_layer(source, destination, protocol::ICMPV6, message),
    };
    message[2..4].copy_from_slice(&field.to_be_bytes());
}

/// What an "unreachable" message in `packet` says, and the start of the packet that it is about.
#[must_use]
pub fn parse_unreachable(packet: &[u8]) -> Option<(Unreachable, &[u8])> {
    let header = IpHeader::parse(packet)?;
    if !matches!(header.protocol, protocol::ICMP | protocol::ICMPV6) || header.fragment.is_some() {
        return None;
    }
    let message = &packet[header.payload..header.total];
    let codes: [u8; 2] = *message.first_chunk()?;
    Some((Unreachable::from_codes(codes, header.source)?, message.get(8..)?))
}

/// Protocol, source and destination of the TCP or UDP packet of which `quoted` is the start.
#[must_use]
pub fn quoted_sockets(quoted: &[u8]) -> Option<(u8, SocketAddr, SocketAddr)> {
    let mut start = [0; MAX_HEADERS];
    let start = &mut start[..quoted.len().min(MAX_HEADERS)];
    start.copy_from_slice(&quoted[..start.len()]);
    // Made as long as it says that it is, which a long packet's start isn't.
    let length = start.len() as u16;
    match start.first()? >> 4 {
        4 => start.get_mut(2..4)?.copy_from_slice(&length.to_be_bytes()),
        6 => start.get_mut(4..6)?.copy_from_slice(&length.checked_sub(40)?.to_be_bytes()),
        _ => return None,
    }
    let header = IpHeader::parse(start)?;
    let (source, destination) = header.sockets(start)?;
    Some((header.protocol, source, destination))
}

/// An echo request or reply (RFC 792; RFC 4443, 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// Whether it asks to be answered.
    pub request: bool,
    /// Identifier: which pinger.
    pub id: u16,
}

impl Echo {
    /// Reads an ICMP `message` of the family of `address`.
    #[must_use]
    pub fn parse(message: &[u8], address: IpAddr) -> Option<Self> {
        let head: &[u8; 8] = message.first_chunk()?;
        let request = match (address, head[0], head[1]) {
            (IpAddr::V4(_), 8, 0) | (IpAddr::V6(_), 128, 0) => true,
            (IpAddr::V4(_), 0, 0) | (IpAddr::V6(_), 129, 0) => false,
            _ => return None,
        };
        Some(Self { request, id: u16::from_be_bytes([head[4], head[5]]) })
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn udp(source: IpAddr, destination: IpAddr, payload: usize) -> Vec<u8> {
        let start = header::length(source);
        let mut packet = vec![7; start + 8 + payload];
        header::write(&mut packet, source, destination, protocol::UDP, 8 + payload);
        packet
    }

    const V4: (IpAddr, IpAddr) =
        (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)));
    const V6: (IpAddr, IpAddr) = (
        IpAddr::V6(Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 1)),
        IpAddr::V6(Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 2)),
    );

    #[test]
    fn an_error_quotes_what_it_is_about_and_is_read_back() {
        for (source, destination) in [V4, V6] {
            for why in [Unreachable::Network, Unreachable::Host, Unreachable::Port, Unreachable::Prohibited] {
                let packet = udp(source, destination, 20);
                let error = unreachable(&packet, why, None).unwrap();
                let header = IpHeader::parse(&error).unwrap();
                assert_eq!((header.source, header.destination), (destination, source));
                assert_eq!(parse_unreachable(&error), Some((why, &packet[..])));
            }
        }
    }

    #[test]
    fn checksums_sum_to_zero() {
        let error = unreachable(&udp(V4.0, V4.1, 9), Unreachable::Port, None).unwrap();
        assert_eq!(checksum::ipv4_header(&error[..20]), 0);
        assert_eq!(!checksum::fold(checksum::sum(&error[20..], 0)), 0);
        let error = unreachable(&udp(V6.0, V6.1, 9), Unreachable::Port, None).unwrap();
        assert_eq!(checksum::upper_layer(V6.1, V6.0, protocol::ICMPV6, &error[40..]), 0);
    }

    #[test]
    fn a_long_packet_is_quoted_as_far_as_every_host_accepts() {
        assert_eq!(unreachable(&udp(V4.0, V4.1, 3000), Unreachable::Host, None).unwrap().len(), MAX_ERROR_V4);
        assert_eq!(unreachable(&udp(V6.0, V6.1, 3000), Unreachable::Host, None).unwrap().len(), MAX_ERROR_V6);
    }

    #[test]
    fn the_reporter_is_used_when_its_family_fits() {
        let gateway = IpAddr::V4(Ipv4Addr::new(100, 127, 0, 1));
        let error = unreachable(&udp(V4.0, V4.1, 1), Unreachable::Host, Some(gateway)).unwrap();
        assert_eq!(IpHeader::parse(&error).unwrap().source, gateway);
        let error = unreachable(&udp(V6.0, V6.1, 1), Unreachable::Host, Some(gateway)).unwrap();
        assert_eq!(IpHeader::parse(&error).unwrap().source, V6.1);
    }

    #[test]
    fn a_packet_that_is_quoted_in_part_is_recognized() {
        for (source, destination) in [V4, V6] {
            let mut packet = udp(source, destination, 9000);
            let start = header::length(source);
            packet[start..start + 4].copy_from_slice(&[0, 1, 0, 2]);
            let error = unreachable(&packet, Unreachable::Port, None).unwrap();
            let (_, quoted) = parse_unreachable(&error).unwrap();
            let expected = (protocol::UDP, SocketAddr::new(source, 1), SocketAddr::new(destination, 2));
            assert_eq!(quoted_sockets(quoted), Some(expected));
            assert_eq!(quoted_sockets(&quoted[..start + 3]), None);
            assert_eq!(quoted_sockets(&quoted[..9]), None);
        }
        assert_eq!(quoted_sockets(&[]), None);
    }

    #[test]
    fn no_error_about_an_error_or_a_multicast() {
        let error = unreachable(&udp(V4.0, V4.1, 9), Unreachable::Port, None).unwrap();
        assert_eq!(unreachable(&error, Unreachable::Port, None), None);
        let multicast = IpAddr::V4(Ipv4Addr::new(224, 0, 0, 1));
        assert_eq!(unreachable(&udp(V4.0, multicast, 9), Unreachable::Port, None), None);
    }
}
