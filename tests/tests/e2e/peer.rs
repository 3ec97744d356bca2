//! A WireGuard peer by hand, which keeps no rule: what a modified client could send.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};
use tpd_netstack::key::{PrivateKey, PublicKey};
use tpd_netstack::tunnel::{Opened, Responder, Tunnel};
use tpd_tests::{Laptop, until};

/// Large enough for every datagram here.
const BUFFER: usize = 2048;

/// A peer with a ClientSession of its own, under the name that the API server knows its owner by.
pub(crate) struct Peer<'a> {
    laptop: &'a Laptop,
    name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) gateway: Ipv4Addr,
    /// A manager's UDP port as the laptop reaches it.
    pub(crate) manager: SocketAddr,
    tunnel: Tunnel,
    socket: UdpSocket,
}

/// A ClientSession with one key.
pub(crate) fn session(name: &str, owner: &str, key: &str) -> Value {
    json!({
        "apiVersion": "tpd.dev/v1alpha1", "kind": "ClientSession",
        "metadata": { "name": name, "namespace": "tpd-system" },
        "spec": { "owner": owner, "publicKeys": [key], "host": "by-hand" },
    })
}

impl<'a> Peer<'a> {
    /// Makes the session and shakes hands.
    pub(crate) fn connect(laptop: &'a Laptop, name: &str) -> Self {
        let key = PrivateKey::generate().expect("the kernel has random numbers");
        laptop.cluster.apply(&session(name, "admin", &key.public().to_string()));
        let (status, _) = until(Duration::from_secs(10), "a manager takes up the session", || {
            let session = laptop.cluster.object(&format!("clientsession {name} -n tpd-system"));
            if session["status"]["phase"] == "Ready" {
                Ok(session["status"].clone())
            } else {
                Err(session.to_string())
            }
        });
        let text = |value: &Value| value.as_str().expect("a string").to_owned();
        let manager: SocketAddr = status["endpoints"]
            .as_array()
            .and_then(|endpoints| endpoints.iter().find_map(|endpoint| endpoint["udp"][0].as_str()))
            .and_then(|address| address.parse().ok())
            .expect("an endpoint with a UDP address");
        let public: PublicKey = text(&status["managerKey"]).parse().expect("a WireGuard key");
        let socket = laptop.inside(|| {
            let socket = UdpSocket::bind(if manager.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.connect(manager)?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            io::Result::Ok(socket)
        });
        let mut peer = Self {
            laptop,
            name: name.to_owned(),
            address: text(&status["address"]["ipv4"]).parse().expect("an address"),
            gateway: text(&status["gateway"]["ipv4"]).parse().expect("an address"),
            manager,
            tunnel: Responder::new(&key).tunnel(public, 1),
            socket: socket.expect("a UDP socket"),
        };
        until(Duration::from_secs(10), "a manager shakes hands", || peer.handshake());
        peer
    }

    /// The initiation of a handshake, to be sent by whoever likes.
    pub(crate) fn initiation(&mut self) -> Vec<u8> {
        let mut buffer = [0; BUFFER];
        let length = self.tunnel.initiate(&mut buffer).expect("a handshake can always be begun");
        buffer[..length].to_vec()
    }

    fn handshake(&mut self) -> Result<(), String> {
        let initiation = self.initiation();
        self.socket.send(&initiation).map_err(|error| error.to_string())?;
        let _ = self.receive();
        self.tunnel.handshake_age().map(drop).ok_or_else(|| "no answer".to_owned())
    }

    /// The next packet that the manager sends through the tunnel, if it sends one.
    pub(crate) fn receive(&mut self) -> Option<Vec<u8>> {
        let (mut datagram, mut packet) = ([0; BUFFER], [0; BUFFER]);
        let from: IpAddr = self.manager.ip();
        while let Ok(length) = self.socket.recv(&mut datagram) {
            match self.tunnel.open(from, &datagram[..length], &mut packet) {
                Ok(Opened::Packet(length)) => return Some(packet[..length].to_vec()),
                Ok(Opened::Reply(length)) => drop(self.socket.send(&packet[..length])),
                Ok(Opened::Nothing) | Err(_) => {}
            }
        }
        None
    }

    /// A packet, sealed.
    pub(crate) fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut buffer = [0; BUFFER];
        let length = self.tunnel.seal(packet, &mut buffer).expect("hands were shaken");
        buffer[..length].to_vec()
    }

    /// Sends a packet through the tunnel.
    pub(crate) fn send(&mut self, packet: &[u8]) {
        let datagram = self.seal(packet);
        self.socket.send(&datagram).expect("UDP goes out");
    }

    /// Whether a ping from this source to that destination is answered.
    pub(crate) fn ping(&mut self, source: Ipv4Addr, destination: Ipv4Addr) -> bool {
        self.send(&echo_request(source, destination));
        std::iter::from_fn(|| self.receive()).any(|packet| is_echo_reply(&packet))
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        let _ = self.laptop.cluster.kubectl(&format!("-n tpd-system delete clientsession {}", self.name));
    }
}

/// An ICMP echo request (RFC 792) in an IPv4 packet.
pub(crate) fn echo_request(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 36, 0, 1, 0, 0, 64, 1, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend([8, 0, 0, 0, 0x74, 0x70, 0, 1]);
    packet.extend(*b"a ping");
    packet.extend([0, 0]);
    let header = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&header);
    let message = checksum(&packet[20..]);
    packet[22..24].copy_from_slice(&message);
    packet
}

fn is_echo_reply(packet: &[u8]) -> bool {
    packet.len() >= 28 && packet[0] == 0x45 && packet[9] == 1 && packet[20] == 0
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
