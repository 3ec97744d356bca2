//! What agents send: flows to local targets, which end in the lane, and answers to the laptop's own kernel.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{PoisonError, RwLock},
};

use ipnet::{IpNet, Ipv6Net};

use crate::{
    flow::{self, Limits, Protocol, Route},
    hub::may_answer,
    packet::{
        IpHeader,
        icmp::{Echo, parse_unreachable, quoted_sockets},
        protocol,
    },
};

/// Datagrams of the kernel's of which later fragments may still come: a resolver has fewer questions open that are
/// answered with more than a packet.
const MOST_FRAGMENTED: usize = 16;

/// Bounds of a laptop's flow engine: a busy service, not a cluster. A descriptor each; a developer's soft limit is 1,024,
/// which the daemon, as root, may exceed.
pub(super) fn limits(mtu: u16) -> Limits {
    Limits {
        mtu,
        tcp_flows: 2_048,
        tcp_flows_per_peer: 2_048,
        // Sixteen that fill 4 MiB each way.
        tcp_memory: 128 << 20,
        tcp_patience: flow::TCP_PATIENCE,
        datagram_flows: 1_024,
        datagram_flows_per_peer: 1_024,
        reporters: Vec::new(),
    }
}

/// Where flows from agents go, by the port of our overlay address that they come to.
#[derive(Debug, Default)]
pub(super) struct Targets(RwLock<HashMap<(Protocol, u16), SocketAddr>>);

impl Targets {
    pub(super) fn set(&self, targets: HashMap<(Protocol, u16), SocketAddr>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = targets;
    }
}

impl flow::Policy for Targets {
    fn route(&self, protocol: Protocol, _source: IpAddr, destination: SocketAddr) -> Route {
        if protocol == Protocol::Icmp {
            return Route::Drop;
        }
        let targets = self.0.read().unwrap_or_else(PoisonError::into_inner);
        targets.get(&(protocol, destination.port())).map_or(Route::Prohibited, |target| Route::Dial(*target))
    }
}

/// Tells what agents send to local targets from what answers the kernel.
#[derive(Debug)]
pub(super) struct Agents {
    range: Option<Ipv6Net>,
    /// Ports of agents that the kernel opens flows to.
    kernel_ports: Vec<u16>,
    /// Sources and numbers of datagrams to the kernel whose first fragment has come.
    fragmented: RefCell<VecDeque<(IpAddr, u32)>>,
}

impl Agents {
    pub(super) fn new(range: Option<Ipv6Net>, kernel_ports: Vec<u16>) -> Self {
        Self { range, kernel_ports, fragmented: RefCell::default() }
    }

    /// The networks that the manager may send from, and agents' addresses.
    pub(super) fn and(&self, mut networks: Vec<IpNet>) -> Vec<IpNet> {
        networks.extend(self.range.map(IpNet::V6));
        networks
    }

    /// Whether `packet` is from an agent, and for a local target.
    pub(super) fn call(&self, header: &IpHeader, packet: &[u8]) -> bool {
        let from_agent = match (self.range, header.source) {
            (Some(range), IpAddr::V6(source)) => range.contains(&source),
            _ => false,
        };
        from_agent && !self.is_answer(header, packet)
    }

    /// Whether `packet` is part of a flow that the kernel has opened, as far as it can be told without having seen that.
    fn is_answer(&self, header: &IpHeader, packet: &[u8]) -> bool {
        match header.protocol {
            protocol::ICMPV6 => self.is_message_to_kernel(header, packet),
            protocol::TCP | protocol::UDP => match header.fragment {
                Some(fragment) if fragment.offset > 0 => {
                    self.fragmented.borrow().contains(&(header.source, fragment.id))
                }
                _ => self.is_answer_by_ports(header, packet),
            },
            _ => false,
        }
    }

    fn is_answer_by_ports(&self, header: &IpHeader, packet: &[u8]) -> bool {
        let Some((source, destination)) = header.sockets(packet) else { return false };
        let answers = self.kernel_ports.contains(&source.port()) && may_answer(packet, destination.port());
        if let Some(fragment) = header.fragment.filter(|_| answers) {
            let mut fragmented = self.fragmented.borrow_mut();
            fragmented.truncate(MOST_FRAGMENTED - 1);
            fragmented.push_front((header.source, fragment.id));
        }
        answers
    }

    /// Answers to its pings, and errors about what it sent.
    fn is_message_to_kernel(&self, header: &IpHeader, packet: &[u8]) -> bool {
        let message = &packet[header.payload..header.total];
        if let Some(echo) = Echo::parse(message, header.source) {
            return !echo.request;
        }
        let sockets = parse_unreachable(packet).and_then(|(_, quoted)| quoted_sockets(quoted));
        sockets.is_some_and(|(_, _, destination)| self.kernel_ports.contains(&destination.port()))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;
    use crate::{
        flow::Policy,
        packet::{
            header,
            icmp::{self, Unreachable},
        },
    };

    const AGENT: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0x8000, 0, 0, 1);
    const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 1);
    const US: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 2);

    const TCP: u8 = protocol::TCP;
    const UDP: u8 = protocol::UDP;
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;

    fn agents() -> Agents {
        Agents::new(Some("fd74:0:0:0:8000::/65".parse().unwrap()), vec![53, 2])
    }

    fn packet(number: u8, source: (Ipv6Addr, u16), destination: (Ipv6Addr, u16), flags: u8) -> Vec<u8> {
        let mut packet = vec![0; 60];
        header::write(&mut packet, source.0.into(), destination.0.into(), number, 20);
        packet[40..42].copy_from_slice(&source.1.to_be_bytes());
        packet[42..44].copy_from_slice(&destination.1.to_be_bytes());
        packet[52] = 5 << 4;
        packet[53] = flags;
        packet
    }

    fn calls(agents: &Agents, packet: &[u8]) -> bool {
        agents.call(&IpHeader::parse(packet).unwrap(), packet)
    }

    #[test]
    fn calls_and_answers_are_told_apart() {
        for (number, source, destination, flags, expected) in [
            (TCP, (AGENT, 50_000), (US, 20_000), SYN, true),
            (TCP, (AGENT, 50_000), (US, 20_000), ACK, true),
            (UDP, (AGENT, 50_000), (US, 20_000), 0, true),
            (UDP, (AGENT, 53), (US, 40_000), 0, false),
            (TCP, (AGENT, 2), (US, 40_000), SYN | ACK, false),
            (TCP, (AGENT, 2), (US, 40_000), ACK, false),
            // A port that answers, used to open a flow, or to reach what isn't a client.
            (TCP, (AGENT, 53), (US, 40_000), SYN, true),
            (UDP, (AGENT, 53), (US, 631), 0, true),
            // Not an agent.
            (TCP, (GATEWAY, 50_000), (US, 20_000), SYN, false),
            (UDP, (GATEWAY, 53), (US, 40_000), 0, false),
        ] {
            let packet = packet(number, source, destination, flags);
            assert_eq!(calls(&agents(), &packet), expected, "{number} {source:?} {destination:?} {flags:#x}");
        }
        let nobody = Agents::new(None, vec![]);
        assert!(!calls(&nobody, &packet(TCP, (AGENT, 50_000), (US, 20_000), SYN)));
    }

    #[test]
    fn messages_go_to_whom_they_concern() {
        let echo = |kind| icmp::wrap(AGENT.into(), US.into(), &mut [kind, 0, 0, 0, 0, 1, 0, 1]);
        assert!(calls(&agents(), &echo(128)), "a ping of ours is not the kernel's to answer");
        assert!(!calls(&agents(), &echo(129)), "an answer to the kernel's");
        let error = |source, destination| {
            let packet = packet(UDP, (US, source), (AGENT, destination), 0);
            icmp::unreachable(&packet, Unreachable::Port, None).unwrap()
        };
        assert!(!calls(&agents(), &error(40_000, 53)));
        assert!(calls(&agents(), &error(20_000, 50_000)));
        let other = icmp::wrap(AGENT.into(), US.into(), &mut [134, 0, 0, 0, 0, 0, 0, 0]);
        assert!(calls(&agents(), &other), "no business of the kernel's");
    }

    #[test]
    fn later_fragments_follow_the_first() {
        let agents = agents();
        let fragment = |id: u8, source: u16, offset: u8| {
            let mut fragment = packet(protocol::IPV6_FRAGMENT, (AGENT, 0), (US, 0), 0);
            fragment[40..48].copy_from_slice(&[UDP, 0, 0, offset | 1, 0, 0, 0, id]);
            fragment[48..50].copy_from_slice(&source.to_be_bytes());
            fragment[50..52].copy_from_slice(&40_000u16.to_be_bytes());
            fragment
        };
        assert!(!calls(&agents, &fragment(1, 53, 0)));
        assert!(calls(&agents, &fragment(2, 50_000, 0)));
        assert!(!calls(&agents, &fragment(1, 0, 8)));
        assert!(calls(&agents, &fragment(2, 0, 8)));
        assert!((10..10 + MOST_FRAGMENTED as u8).all(|id| !calls(&agents, &fragment(id, 53, 0))));
        assert!(calls(&agents, &fragment(1, 0, 8)), "forgotten");
        assert_eq!(agents.fragmented.borrow().len(), MOST_FRAGMENTED);
    }

    #[test]
    fn only_ports_of_the_table_are_dialed() {
        let targets = Targets::default();
        let route = |protocol, port| targets.route(protocol, AGENT.into(), (US, port).into());
        assert_eq!(route(Protocol::Tcp, 20_000), Route::Prohibited);
        let local: SocketAddr = "127.0.0.1:8080".parse().unwrap();
        targets.set(HashMap::from([((Protocol::Tcp, 20_000), local)]));
        assert_eq!(route(Protocol::Tcp, 20_000), Route::Dial(local));
        assert_eq!(route(Protocol::Udp, 20_000), Route::Prohibited);
        assert_eq!(route(Protocol::Tcp, 22), Route::Prohibited);
        assert_eq!(route(Protocol::Icmp, 0), Route::Drop);
    }
}
