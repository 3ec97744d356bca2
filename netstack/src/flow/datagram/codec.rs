//! What tells UDP from ping: sockets, headers and time-outs.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use socket2::{Domain, Socket, Type};
use tokio::net::UdpSocket;

use crate::{
    flow::{Counters, FlowKey, Protocol},
    packet::{
        self, IpHeader, checksum, header,
        icmp::{self, Echo},
        protocol,
    },
};

/// How long an unused association is kept. 60 s: Linux' conntrack gives up a one-way association after 30 s and keeps a
/// two-way one for 120 s; RFC 4787 REQ-5 wants two minutes, which QUIC and WireGuard refresh in 15 to 25 s anyway.
const IDLE: Duration = Duration::from_secs(60);

/// The same for DNS, where each query has a port of its own: twice the resolver's usual time-out of 5 s.
const IDLE_DNS: Duration = Duration::from_secs(10);

/// The same for pings, where the next comes in a second or never.
const IDLE_ECHO: Duration = Duration::from_secs(10);

/// Length of a UDP header, bytes.
const UDP_HEADER: usize = 8;

/// Most payload of a datagram over IPv4, bytes; over IPv6, 20 more would fit.
pub(super) const MAX_PAYLOAD: usize = packet::MAX - 20 - UDP_HEADER;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Udp,
    Echo,
}

impl Codec {
    pub(super) const fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Icmp => Self::Echo,
            Protocol::Udp | Protocol::Tcp => Self::Udp,
        }
    }

    /// A socket that talks with `destination` only.
    pub(super) fn open(self, destination: SocketAddr) -> io::Result<UdpSocket> {
        let domain = Domain::for_address(destination);
        let any: SocketAddr = match destination {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let protocol = match (self, destination) {
            (Self::Udp, _) => socket2::Protocol::UDP,
            (Self::Echo, SocketAddr::V4(_)) => socket2::Protocol::ICMPV4,
            (Self::Echo, SocketAddr::V6(_)) => socket2::Protocol::ICMPV6,
        };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(protocol))?;
        socket.bind(&any.into())?;
        socket.connect(&destination.into())?;
        UdpSocket::from_std(socket.into())
    }

    pub(super) const fn gauge(self, counters: &mut Counters) -> &mut u64 {
        match self {
            Self::Udp => &mut counters.udp_flows,
            Self::Echo => &mut counters.echo_flows,
        }
    }

    pub(super) const fn idle(self, key: &FlowKey) -> Duration {
        match self {
            Self::Udp if key.near.port() == 53 => IDLE_DNS,
            Self::Udp => IDLE,
            Self::Echo => IDLE_ECHO,
        }
    }

    /// Room to leave before what a socket receives, for the headers that [`Self::finish`] writes, bytes.
    pub(super) const fn headroom(self, key: &FlowKey) -> usize {
        let ip = header::length(key.far.ip());
        match self {
            Self::Udp => ip + UDP_HEADER,
            Self::Echo => ip,
        }
    }

    /// Makes `packet`, which holds what a socket received behind the headroom, a packet to the peer. `false` if
    /// it is none.
    pub(super) fn finish(self, key: &FlowKey, packet: &mut [u8]) -> bool {
        let (source, destination) = (key.near.ip(), key.far.ip());
        let start = header::length(source);
        let length = packet.len() - start;
        let number = match (self, source) {
            (Self::Udp, _) => protocol::UDP,
            (Self::Echo, IpAddr::V4(_)) => protocol::ICMP,
            (Self::Echo, IpAddr::V6(_)) => protocol::ICMPV6,
        };
        header::write(packet, source, destination, number, length);
        let upper = &mut packet[start..];
        match self {
            Self::Udp => {
                upper[..2].copy_from_slice(&key.near.port().to_be_bytes());
                upper[2..4].copy_from_slice(&key.far.port().to_be_bytes());
                upper[4..6].copy_from_slice(&(length as u16).to_be_bytes());
                upper[6..8].fill(0);
                let field = match checksum::upper_layer(source, destination, protocol::UDP, upper) {
                    0 => u16::MAX,
                    field => field,
                };
                upper[6..8].copy_from_slice(&field.to_be_bytes());
                true
            }
            Self::Echo => {
                let is_reply = Echo::parse(upper, source).is_some_and(|echo| !echo.request);
                if is_reply {
                    // The kernel has put its own identifier in place of the peer's.
                    upper[4..6].copy_from_slice(&key.far.port().to_be_bytes());
                    icmp::fill_checksum(source, destination, upper);
                }
                is_reply
            }
        }
    }

    /// As much of a packet from the peer as an ICMP error about it needs to quote: headers.
    pub(super) fn quote(self, key: &FlowKey) -> Vec<u8> {
        let (source, destination) = (key.far.ip(), key.near.ip());
        let start = header::length(source);
        let mut packet = vec![0; start + 8];
        let number = match (self, source) {
            (Self::Udp, _) => protocol::UDP,
            (Self::Echo, IpAddr::V4(_)) => protocol::ICMP,
            (Self::Echo, IpAddr::V6(_)) => protocol::ICMPV6,
        };
        header::write(&mut packet, source, destination, number, 8);
        let upper = &mut packet[start..];
        match self {
            Self::Udp => {
                upper[..2].copy_from_slice(&key.far.port().to_be_bytes());
                upper[2..4].copy_from_slice(&key.near.port().to_be_bytes());
                upper[4..6].copy_from_slice(&8u16.to_be_bytes());
            }
            Self::Echo => {
                upper[0] = if source.is_ipv4() { 8 } else { 128 };
                upper[4..6].copy_from_slice(&key.far.port().to_be_bytes());
            }
        }
        packet
    }
}

/// The payload of the UDP datagram in `packet`.
pub(super) fn udp_payload<'a>(header: &IpHeader, packet: &'a [u8]) -> Option<&'a [u8]> {
    let datagram = packet.get(header.payload..header.total)?;
    let length = usize::from(u16::from_be_bytes([*datagram.get(4)?, *datagram.get(5)?]));
    datagram.get(UDP_HEADER..length)
}

/// The reply of this host itself to the echo request `message`.
pub(super) fn reply_to(message: &[u8], header: &IpHeader) -> Vec<u8> {
    let mut reply = message.to_vec();
    reply[0] = if header.source.is_ipv4() { 0 } else { 129 };
    icmp::wrap(header.destination, header.source, &mut reply)
}
