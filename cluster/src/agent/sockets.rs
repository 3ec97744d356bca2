//! The pod's TCP sockets, as the kernel's tables list them: its own say needs no privilege.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Most lines that are read of one table: those that listen come first, of others a pod may have more.
const MAX_LINES: usize = 32 << 10;

/// A TCP socket of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// Our end.
    pub local: SocketAddr,
    /// The other.
    pub remote: SocketAddr,
    /// What the kernel says of it.
    pub state: State,
}

/// States that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// `TCP_ESTABLISHED`.
    Open,
    /// `TCP_LISTEN`.
    Listens,
}

/// Reads the kernel's tables.
///
/// # Errors
/// Fails where there is no /proc.
pub fn tcp() -> io::Result<Vec<TcpSocket>> {
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match File::open(table) {
            Ok(file) => {
                let lines = BufReader::new(file).lines().take(MAX_LINES);
                found.extend(lines.map_while(Result::ok).filter_map(|line| parse(&line)));
            }
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table.ends_with('6') => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// A socket in a state that matters, if a line of the table is one.
fn parse(line: &str) -> Option<TcpSocket> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    let state = match state {
        "01" => State::Open,
        "0A" => State::Listens,
        _ => return None,
    };
    Some(TcpSocket { local: address(local)?, remote: address(remote)?, state })
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

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::{State, TcpSocket, address, parse, tcp};

    #[test]
    #[cfg(target_endian = "little")]
    fn the_kernels_lines() {
        let v4 = "   3: 0700F40A:1F90 0100F40A:C350 01 00000000:00000000 00:00000000 00000000  1000        0 31 1 0 20 4";
        let expected = TcpSocket {
            local: "10.244.0.7:8080".parse().unwrap(),
            remote: "10.244.0.1:50000".parse().unwrap(),
            state: State::Open,
        };
        assert_eq!(parse(v4), Some(expected));
        let listening = TcpSocket { state: State::Listens, ..expected };
        assert_eq!(parse(&v4.replace(" 01 0", " 0A 0")), Some(listening));
        assert_eq!(parse(&v4.replace(" 01 0", " 06 0")), None, "it waits for its end");
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
    fn the_tables_of_a_real_kernel_can_be_read() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let client = TcpStream::connect(local).unwrap();
        let sockets = tcp().unwrap();
        let states = sockets.iter().filter(|socket| socket.local == local).map(|socket| socket.state);
        assert_eq!(states.filter(|state| *state == State::Listens).count(), 1);
        let client = client.local_addr().unwrap();
        assert!(sockets.iter().any(|socket| socket.local == client && socket.state == State::Open));
    }
}
