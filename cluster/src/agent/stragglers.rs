//! Connections that went to the app before the redirect was there, and still do: the kernel knows them, the agent doesn't.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;

use super::sockets::{self, State, TcpSocket};

/// An open TCP connection of the pod with a client outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection {
    local: SocketAddr,
    remote: SocketAddr,
}

/// Those that there are now. A pod with more than the tables are read for has its stragglers counted too low.
///
/// # Errors
/// Fails where there is no /proc.
pub fn connections() -> io::Result<Vec<Connection>> {
    Ok(sockets::tcp()?.iter().filter_map(Connection::from_outside).collect())
}

impl Connection {
    /// Not one with both ends in the pod: what the agent connects to the app is of that kind, and never was a client's.
    fn from_outside(socket: &TcpSocket) -> Option<Self> {
        let TcpSocket { local, remote, state } = *socket;
        let is_internal = local.ip() == remote.ip() || remote.ip().is_loopback();
        (state == State::Open && !is_internal).then_some(Self { local, remote })
    }
}

/// Stragglers of the ports that are redirected.
#[derive(Debug, Default)]
pub struct Stragglers {
    ports: BTreeMap<u16, BTreeSet<Connection>>,
}

impl Stragglers {
    /// Whether the tables must be read: some port is new, or had stragglers the last time.
    pub fn is_concerned(&self, ports: &BTreeSet<u16>) -> bool {
        ports.iter().any(|port| self.ports.get(port).is_none_or(|stragglers| !stragglers.is_empty()))
    }

    /// Takes notice of the open connections. What is open to a port that is new came before its redirect; later ones, as those of
    /// probes, are no stragglers.
    pub fn observe(&mut self, ports: &BTreeSet<u16>, open: &[Connection]) {
        self.ports.retain(|port, _| ports.contains(port));
        for port in ports {
            let open = open.iter().filter(|connection| connection.local.port() == *port).copied();
            match self.ports.get_mut(port) {
                Some(stragglers) => {
                    let open: BTreeSet<_> = open.collect();
                    stragglers.retain(|straggler| open.contains(straggler));
                }
                None => {
                    self.ports.insert(*port, open.collect());
                }
            }
        }
    }

    /// How many a port has.
    #[must_use]
    pub fn count(&self, port: u16) -> u64 {
        self.ports.get(&port).map_or(0, |stragglers| stragglers.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::{Connection, State, Stragglers, TcpSocket};

    #[test]
    fn only_clients_outside_count() {
        let socket = |remote: &str, state| {
            let (local, remote) = ("10.244.0.7:80".parse().unwrap(), remote.parse().unwrap());
            Connection::from_outside(&TcpSocket { local, remote, state }).is_some()
        };
        assert!(socket("10.244.0.1:50000", State::Open));
        assert!(!socket("0.0.0.0:0", State::Listens));
        assert!(!socket("10.244.0.7:50000", State::Open), "from the pod itself");
        assert!(!socket("127.0.0.1:50000", State::Open), "from the pod itself");
    }

    #[test]
    fn only_what_was_open_when_the_redirect_came_is_a_straggler() {
        let open = |port: u16| Connection {
            local: "10.0.0.7:80".parse().unwrap(),
            remote: (std::net::Ipv4Addr::new(10, 0, 0, 1), port).into(),
        };
        let ports = [80].into();
        let mut stragglers = Stragglers::default();
        assert!(stragglers.is_concerned(&ports));
        stragglers.observe(&ports, &[open(1), open(2)]);
        assert_eq!((stragglers.count(80), stragglers.count(81)), (2, 0));
        stragglers.observe(&ports, &[open(2), open(3)]);
        assert_eq!(stragglers.count(80), 1, "the third is a probe's");
        stragglers.observe(&ports, &[open(3)]);
        assert_eq!(stragglers.count(80), 0);
        assert!(!stragglers.is_concerned(&ports), "there is nothing left to wait for");
        stragglers.observe(&[].into(), &[]);
        assert!(stragglers.is_concerned(&ports), "the redirect may come anew");
    }
}
