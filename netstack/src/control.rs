//! The control channel: small JSON messages in UDP inside the tunnel, so the tunnel authenticates them.
//!
//! The laptop pings the manager through every path that it holds open. A ping with `select` says which path is
//! to carry the way back; it is repeated with every heartbeat, so a lost one costs half a second and no more.
//! What a receiver does not know it ignores: fields are added, never changed; [`VERSION`] is for the rest.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::packet::{IpHeader, header, protocol, segment};

/// Version of the messages.
pub const VERSION: u32 = 1;

/// Longest message that is read, bytes: a ping fills a packet of the overlay's MTU at the most.
const MAX_MESSAGE: usize = 1_500;

/// Who one side is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Host or pod name.
    pub name: String,
    /// Version of tpd.
    pub version: String,
    /// Drawn anew by each process: a changed one tells a restart.
    pub instance: u64,
    /// What the side can do beyond version 1 of the channel.
    #[serde(default)]
    pub features: Vec<String>,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Message {
    /// Laptop to manager: answer through the path that this came by.
    Ping {
        /// Echoed by the pong.
        sequence: u64,
        /// Whether this path is to carry the session.
        select: bool,
        /// Who asks.
        hello: Hello,
    },
    /// Manager to laptop.
    Pong {
        /// That of the ping.
        sequence: u64,
        /// Who answers.
        hello: Hello,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    v: u32,
    #[serde(flatten)]
    message: Message,
}

/// An IP packet with `message`, padded with blanks to `size` bytes in all where it is shorter: a ping as large as
/// the largest packet proves that the path carries those too.
#[must_use]
pub fn encode(source: SocketAddr, destination: SocketAddr, message: &Message, size: usize) -> Vec<u8> {
    let envelope = Envelope { v: VERSION, message: message.clone() };
    let body = serde_json::to_vec(&envelope).unwrap_or_default();
    let ip = header::length(source.ip());
    let length = 8 + body.len().max(size.saturating_sub(ip + 8));

    let mut packet = vec![b' '; ip + length];
    header::write(&mut packet, source.ip(), destination.ip(), protocol::UDP, length);
    packet[ip..ip + 2].copy_from_slice(&source.port().to_be_bytes());
    packet[ip + 2..ip + 4].copy_from_slice(&destination.port().to_be_bytes());
    packet[ip + 4..ip + 6].copy_from_slice(&(length as u16).to_be_bytes());
    packet[ip + 8..ip + 8 + body.len()].copy_from_slice(&body);
    segment::finish(&mut packet);
    packet
}

/// A message that arrived, with the sockets of its datagram.
#[derive(Debug, PartialEq, Eq)]
pub struct Received {
    /// Who sent it.
    pub source: SocketAddr,
    /// Whom it was sent to.
    pub destination: SocketAddr,
    /// What it says.
    pub message: Message,
}

/// Reads a control message to or from `port`; `None` if the packet is anything else.
#[must_use]
pub fn decode(packet: &[u8], port: u16) -> Option<Received> {
    let header = IpHeader::parse(packet)?;
    if header.protocol != protocol::UDP || header.fragment.is_some() || header.total > MAX_MESSAGE {
        return None;
    }
    let (source, destination) = header.sockets(packet)?;
    if source.port() != port && destination.port() != port {
        return None;
    }
    let body = packet.get(header.payload + 8..header.total)?;
    let envelope: Envelope = serde_json::from_slice(body).ok()?;
    (envelope.v == VERSION).then_some(Received { source, destination, message: envelope.message })
}

#[cfg(test)]
mod tests {
    use super::{Hello, Message, decode, encode};
    use crate::packet::IpHeader;

    fn ping() -> Message {
        let hello = Hello { name: "laptop".into(), version: "0.1.0".into(), instance: 7, features: vec![] };
        Message::Ping { sequence: 3, select: true, hello }
    }

    #[test]
    fn a_message_survives_padding() {
        for (source, destination) in [("100.127.0.2:1", "100.127.0.1:1"), ("[fd00::2]:1", "[fd00::1]:1")] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let packet = encode(source, destination, &ping(), 1420);
            assert_eq!(packet.len(), 1420);
            assert_eq!(IpHeader::parse(&packet).unwrap().total, 1420);
            let received = decode(&packet, 1).unwrap();
            assert_eq!((received.source, received.message), (source, ping()));
        }
    }

    #[test]
    fn what_is_unknown_is_ignored() {
        let (source, destination) = ("100.127.0.2:1".parse().unwrap(), "100.127.0.1:1".parse().unwrap());
        let packet = encode(source, destination, &ping(), 0);
        assert!(decode(&packet, 2).is_none());
        let later = String::from_utf8_lossy(&packet[28..]).replace("\"v\":1", "\"v\":2");
        let mut newer = packet[..28].to_vec();
        newer.extend(later.bytes());
        assert!(decode(&newer, 1).is_none());
        assert!(decode(&packet[..40], 1).is_none());
    }
}
