//! The agent's word that it takes a port: what keeps the kernel's redirect alive.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tpd_api::agent::Protocol;

/// How often a port is claimed. The redirect outlives the last one by 2 s.
pub const PERIOD: Duration = Duration::from_millis(500);

/// Where heartbeats for a protocol go. They arrive nowhere: the rules of the redirect read and drop them.
#[must_use]
pub fn address(protocol: Protocol) -> Ipv4Addr {
    match protocol {
        Protocol::Tcp => Ipv4Addr::LOCALHOST,
        Protocol::Udp => Ipv4Addr::new(127, 0, 0, 2),
    }
}

/// What came of a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// The rules took it.
    Taken,
    /// It left, so there are no rules.
    Ignored,
}

/// Heartbeats of the ports that are redirected.
#[derive(Debug, Default)]
pub struct Heartbeats {
    /// By entry port: what they are sent from.
    sockets: BTreeMap<u16, UdpSocket>,
}

impl Heartbeats {
    /// Says once that `port` is to come to `entry`.
    ///
    /// # Errors
    /// Fails where the entry port is taken, or the kernel refuses for a reason of its own.
    pub fn beat(&mut self, protocol: Protocol, port: u16, entry: u16) -> io::Result<Beat> {
        let socket = match self.sockets.entry(entry) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => place.insert(bind(entry)?),
        };
        match socket.send_to(&[], (address(protocol), port)) {
            // A packet that a rule drops on its way out is "not permitted".
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Beat::Taken),
            // That nobody listened is about the one before: it had left, too.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(Beat::Ignored),
            Err(error) => Err(error),
            Ok(_) => Ok(Beat::Ignored),
        }
    }

    /// Lets go of every socket but those of these entry ports.
    pub fn retain(&mut self, entries: impl Fn(u16) -> bool) {
        self.sockets.retain(|entry, _| entries(*entry));
    }
}

/// A socket at an entry port, on loopback alone: that of a UDP port's own traffic stands beside it, on every address.
fn bind(entry: u16) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, entry)).into())?;
    Ok(socket.into())
}
