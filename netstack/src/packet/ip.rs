//! Reading an IP packet: as much of it as routing, demultiplexing and offloads need.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// IP protocol numbers (IANA) that the overlay terminates.
pub mod protocol {
    /// ICMP (RFC 792).
    pub const ICMP: u8 = 1;
    /// TCP (RFC 9293).
    pub const TCP: u8 = 6;
    /// UDP (RFC 768).
    pub const UDP: u8 = 17;
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: u8 = 58;
    /// IPv6 fragment header (RFC 8200, 4.5).
    pub const IPV6_FRAGMENT: u8 = 44;
}

/// Most IPv6 extension headers that are walked before a packet is given up on.
const MAX_EXTENSIONS: usize = 8;

/// What an IP header says, with extension headers followed to the upper layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpHeader {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Upper-layer protocol.
    pub protocol: u8,
    /// Offset of the upper layer in the packet, bytes.
    pub payload: usize,
    /// Length of the whole packet as its header says, bytes; never more than what was given.
    pub total: usize,
    /// Where the packet stands in its datagram, if it is a fragment.
    pub fragment: Option<Fragment>,
}

/// A fragment's place (RFC 791, 3.2; RFC 8200, 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification.
    pub id: u32,
    /// Offset of this piece in the datagram's payload, bytes.
    pub offset: usize,
    /// Whether more pieces follow.
    pub more: bool,
}

impl IpHeader {
    /// Reads the header of `packet`; `None` if it is not a whole, sane IP packet.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::parse_v4(packet),
            6 => Self::parse_v6(packet),
            _ => None,
        }
    }

    fn parse_v4(packet: &[u8]) -> Option<Self> {
        let header: &[u8; 20] = packet.first_chunk()?;
        let payload = usize::from(header[0] & 0xf) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if payload < 20 || total < payload || total > packet.len() {
            return None;
        }
        let flags = u16::from_be_bytes([header[6], header[7]]);
        let (more, offset) = (flags & 0x2000 != 0, usize::from(flags & 0x1fff) * 8);
        let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
        Some(Self {
            source: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
            destination: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
            protocol: header[9],
            payload,
            total,
            fragment: (more || offset > 0).then_some(Fragment { id, offset, more }),
        })
    }

    fn parse_v6(packet: &[u8]) -> Option<Self> {
        let header: &[u8; 40] = packet.first_chunk()?;
        let total = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
        let packet = packet.get(..total)?;
        let source: [u8; 16] = *header[8..].first_chunk()?;
        let destination: [u8; 16] = *header[24..].first_chunk()?;

        let mut protocol = header[6];
        let mut payload = 40;
        let mut fragment = None;
        for _ in 0..MAX_EXTENSIONS {
            match protocol {
                // Hop-by-hop, routing, destination options: length in eight-byte units, less the first.
                0 | 43 | 60 => {
                    let extension = packet.get(payload..payload + 2)?;
                    protocol = extension[0];
                    payload += 8 + usize::from(extension[1]) * 8;
                }
                protocol::IPV6_FRAGMENT => {
                    let extension: &[u8; 8] = packet.get(payload..)?.first_chunk()?;
                    let place = u16::from_be_bytes([extension[2], extension[3]]);
                    let (offset, more) = (usize::from(place & !7), place & 1 != 0);
                    let id = u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]);
                    protocol = extension[0];
                    payload += 8;
                    fragment = (more || offset > 0).then_some(Fragment { id, offset, more });
                    if offset > 0 {
                        break;
                    }
                }
                _ => break,
            }
        }
        (payload <= total).then_some(Self {
            source: Ipv6Addr::from(source).into(),
            destination: Ipv6Addr::from(destination).into(),
            protocol,
            payload,
            total,
            fragment,
        })
    }

    /// The ports of a TCP or UDP packet, as addresses; `None` for fragments past the first and for other protocols.
    #[must_use]
    pub fn sockets(&self, packet: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
        if !matches!(self.protocol, protocol::TCP | protocol::UDP)
            || self.fragment.is_some_and(|fragment| fragment.offset > 0)
        {
            return None;
        }
        let ports: &[u8; 4] = packet.get(self.payload..self.total)?.first_chunk()?;
        Some((
            SocketAddr::new(self.source, u16::from_be_bytes([ports[0], ports[1]])),
            SocketAddr::new(self.destination, u16::from_be_bytes([ports[2], ports[3]])),
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 7, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend_from_slice(payload);
        let total = packet.len() as u16;
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        packet[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        packet.extend(Ipv6Addr::LOCALHOST.octets());
        packet.extend(Ipv6Addr::UNSPECIFIED.octets());
        packet.extend_from_slice(payload);
        packet
    }

    #[test]
    fn ports_are_read_behind_options_and_extensions() {
        let packet = v4(protocol::UDP, &[0, 53, 1, 0, 0, 8, 0, 0]);
        let (source, destination) = IpHeader::parse(&packet).unwrap().sockets(&packet).unwrap();
        assert_eq!((source.port(), destination.port()), (53, 256));

        let hop_by_hop = [protocol::UDP, 0, 0, 0, 0, 0, 0, 0];
        let packet = v6(0, &[&hop_by_hop[..], &[0, 53, 1, 0, 0, 8, 0, 0]].concat());
        let header = IpHeader::parse(&packet).unwrap();
        assert_eq!((header.protocol, header.payload), (protocol::UDP, 48));
        assert_eq!(header.sockets(&packet).unwrap().0.port(), 53);
    }

    #[test]
    fn a_later_fragment_has_no_ports() {
        let mut packet = v4(protocol::UDP, &[0; 16]);
        packet[6..8].copy_from_slice(&0x2002u16.to_be_bytes());
        let header = IpHeader::parse(&packet).unwrap();
        assert_eq!(header.fragment, Some(Fragment { id: 7, offset: 16, more: true }));
        assert_eq!(header.sockets(&packet), None);
    }

    #[test]
    fn a_packet_cut_short_is_refused() {
        let packet = v4(protocol::TCP, &[0; 20]);
        assert!(IpHeader::parse(&packet[..packet.len() - 1]).is_none());
        assert!(IpHeader::parse(&[]).is_none());
        assert!(IpHeader::parse(&[0x75; 60]).is_none());
    }

    proptest! {
        #[test]
        fn garbage_never_reaches_past_its_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(header) = IpHeader::parse(&bytes) {
                prop_assert!(header.payload <= header.total && header.total <= bytes.len());
                let _ = header.sockets(&bytes);
            }
        }
    }
}
