//! A TCP endpoint (RFC 9293), pure: packets, bytes and the time go in, packets and bytes come out.
//!
//! It exists because of loss. A sender without selective recovery gets megabits per second out of a gigabit
//! path that loses one packet in a hundred; this one gets what the path delivers. And because of numbers:
//! buffers grow with what they have to hold, so that thousands of connections that do little cost little.

mod budget;
mod connection;
mod ranges;
mod rate;
mod receiver;
mod ring;
mod rtt;
mod segment;
mod sender;
#[cfg(test)]
mod tests;

pub use self::{
    budget::Budget,
    connection::{Connection, Options},
};

use self::segment::{ACK, RST, SYN, Segment};
use crate::packet::{IpHeader, protocol};

/// Whether `packet` asks for a new connection.
#[must_use]
pub fn opens(packet: &[u8]) -> bool {
    let segment = IpHeader::parse(packet)
        .filter(|header| header.protocol == protocol::TCP)
        .and_then(|header| Segment::parse(&packet[header.payload..header.total]));
    segment.is_some_and(|segment| segment.flags & (SYN | ACK | RST) == SYN)
}
