//! Connections that went to the app before the redirect was there, and still do: the kernel knows them, the agent doesn't.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Most lines that are read of one table. A pod with more connections has its stragglers counted too low.
const MAX_LINES: usize = 32 << 10;

/// State of an open connection (`TCP_ESTABLISHED`).
const ESTABLISHED: &str = "01";

/// An open TCP connection of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection {
    local: SocketAddr,
    remote: SocketAddr,
}

impl Connection {
    /// Whether both ends are in the pod: what the agent connects to the app is of that kind, and never was a client's.
    fn is_internal(&self) -> bool {
        self.local.ip() == self.remote.ip() || self.remote.ip().is_loopback()
    }
}

/// Reads the kernel's tables of TCP connections.
///
/// # Errors
/// Fails where there is no /proc.
pub fn connections() -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match File::open(table) {
            Ok(file) => {
                let lines = BufReader::new(file).lines().take(MAX_LINES);
                found.extend(lines.map_while(Result::ok).filter_map(|line| parse(&line)));
            }
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !found.is_empty() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// An open connection from a client outside, if a line of the table is one.
fn parse(line: &str) -> Option<Connection> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    if state != ESTABLISHED {
        return None;
    }
    let connection = Connection { local: address(local)?, remote: address(remote)? };
    (!connection.is_internal()).then_some(connection)
}

/// An address as the table has it: words of 32 bits in the machine's order, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let octets: Vec<u8> = (address.as_bytes().chunks(8))
        .map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok().map(u32::to_ne_bytes))
        .collect::<Option<Vec<_>>>()?
        .concat();
    let address = match octets.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(octets).ok()?),
        16 => Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
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
    use std::net::{TcpListener, TcpStream};

    use super::{Connection, Stragglers, address, connections, parse};

    #[test]
    #[cfg(target_endian = "little")]
    fn the_kernels_lines() {
        let v4 = "   3: 0700F40A:1F90 0100F40A:C350 01 00000000:00000000 00:00000000 00000000  1000        0 31 1 0 20 4";
        let expected = Connection {
            local: "10.244.0.7:8080".parse().unwrap(),
            remote: "10.244.0.1:50000".parse().unwrap(),
        };
        assert_eq!(parse(v4), Some(expected));
        assert_eq!(parse(&v4.replace(" 01 0", " 0A 0")), None, "not open");
        assert_eq!(parse(&v4.replace("0100F40A", "0700F40A")), None, "from the pod itself");
        let mapped =
            "   0: 0000000000000000FFFF00000700F40A:1F90 0000000000000000FFFF00000100F40A:C350 01 0:0";
        assert_eq!(parse(mapped), Some(expected));
        let v6 = address("000000FD0000000000000000 01000000:0050".replace(' ', "").as_str()).unwrap();
        assert_eq!(v6.to_string(), "[fd00::1]:80");
        for garbage in ["", "sl local_address rem_address st", "0: x:y z:w 01", "0: 0700F40A 0100F40A 01"] {
            assert_eq!(parse(garbage), None);
        }
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

    #[test]
    fn the_tables_of_a_real_kernel_can_be_read() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(connections().unwrap().iter().all(|connection| connection.local.port() != port));
    }
}
