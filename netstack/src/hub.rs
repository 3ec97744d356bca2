//! What peers of a manager may send to each other: pairs of an agent and a laptop, and nothing else. Pure.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
};

use crate::{
    packet::{IpHeader, protocol},
    tcp,
};

/// Ports from here on are nobody's by right (RFC 6335, 6): a client asks from there, and is answered there.
const UNPRIVILEGED: u16 = 1024;

/// The peers that may talk with each other. By default there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hub {
    /// Each agent with each laptop that its traffic goes to.
    pub pairs: Vec<Pair>,
}

/// An agent and a laptop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The agent's overlay address.
    pub agent: Ipv6Addr,
    /// The laptop's overlay address.
    pub laptop: Ipv6Addr,
    /// The laptop's ports, TCP and UDP, that the agent may open flows to.
    pub ports: Vec<u16>,
    /// The agent's ports, TCP and UDP, that the laptop may open flows to.
    pub services: Vec<u16>,
}

/// A hub as packets are held against it.
#[derive(Debug, Default)]
pub(crate) struct Rules(HashMap<(Ipv6Addr, Ipv6Addr), Ports>);

/// What one end of a pair may send to the other.
#[derive(Debug, Default)]
struct Ports {
    /// Ports of the receiver that the sender may open flows to.
    open: Vec<u16>,
    /// Ports of the sender's own that it answers from.
    answer: Vec<u16>,
}

impl From<Hub> for Rules {
    fn from(hub: Hub) -> Self {
        let mut rules: HashMap<_, Ports> = HashMap::new();
        for Pair { agent, laptop, ports, services } in hub.pairs {
            // A pair that is named twice has the ports of both.
            let there = rules.entry((agent, laptop)).or_default();
            there.open.extend(&ports);
            there.answer.extend(&services);
            let back = rules.entry((laptop, agent)).or_default();
            back.open.extend(services);
            back.answer.extend(ports);
        }
        Self(rules)
    }
}

impl Rules {
    /// Whether `packet`, whose source is its sender's own address, may go to its destination.
    pub(crate) fn allow(&self, header: &IpHeader, packet: &[u8]) -> bool {
        let (IpAddr::V6(source), IpAddr::V6(destination)) = (header.source, header.destination) else {
            return false;
        };
        let Some(ports) = self.0.get(&(source, destination)) else { return false };
        match header.protocol {
            protocol::ICMPV6 => true,
            protocol::TCP | protocol::UDP => ports.allow(header, packet),
            _ => false,
        }
    }
}

impl Ports {
    fn allow(&self, header: &IpHeader, packet: &[u8]) -> bool {
        // Of no use to anyone who wasn't sent the first fragment.
        if header.fragment.is_some_and(|fragment| fragment.offset > 0) {
            return true;
        }
        let Some((source, destination)) = header.sockets(packet) else { return false };
        self.open.contains(&destination.port())
            || (self.answer.contains(&source.port()) && may_answer(packet, destination.port()))
    }
}

/// Whether `packet`, which is from a port that flows are opened to, may be part of such a flow: it opens none itself,
/// and goes where clients are.
pub(crate) fn may_answer(packet: &[u8], destination: u16) -> bool {
    destination >= UNPRIVILEGED && !tcp::opens(packet)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::header;

    const AGENT: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0x8000, 0, 0, 1);
    const OTHER_AGENT: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0x8000, 0, 0, 2);
    const LAPTOP: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 2);
    const OTHER_LAPTOP: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 3);

    const TCP: u8 = protocol::TCP;
    const UDP: u8 = protocol::UDP;
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;

    fn rules() -> Rules {
        let pair = Pair { agent: AGENT, laptop: LAPTOP, ports: vec![20_000, 20_001], services: vec![53] };
        let other = Pair { agent: OTHER_AGENT, laptop: OTHER_LAPTOP, ports: vec![20_002], services: vec![] };
        Hub { pairs: vec![pair, other] }.into()
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

    fn allowed(rules: &Rules, packet: &[u8]) -> bool {
        rules.allow(&IpHeader::parse(packet).unwrap(), packet)
    }

    #[test]
    fn only_what_a_pair_is_for_passes() {
        let rules = rules();
        for (number, source, destination, flags, expected) in [
            // The agent opens flows to the laptop's overlay ports, and the laptop answers.
            (TCP, (AGENT, 50_000), (LAPTOP, 20_000), SYN, true),
            (UDP, (AGENT, 50_000), (LAPTOP, 20_001), 0, true),
            (TCP, (LAPTOP, 20_000), (AGENT, 50_000), SYN | ACK, true),
            (TCP, (LAPTOP, 20_000), (AGENT, 50_000), ACK, true),
            (UDP, (LAPTOP, 20_001), (AGENT, 50_000), 0, true),
            // The laptop asks the agent's services, and the agent answers.
            (UDP, (LAPTOP, 40_000), (AGENT, 53), 0, true),
            (TCP, (LAPTOP, 40_000), (AGENT, 53), SYN, true),
            (UDP, (AGENT, 53), (LAPTOP, 40_000), 0, true),
            (TCP, (AGENT, 53), (LAPTOP, 40_000), SYN | ACK, true),
            // Nothing else: other ports,
            (TCP, (AGENT, 50_000), (LAPTOP, 22), SYN, false),
            (TCP, (AGENT, 50_000), (LAPTOP, 20_002), SYN, false),
            (UDP, (LAPTOP, 40_000), (AGENT, 2), 0, false),
            (TCP, (LAPTOP, 40_000), (AGENT, 20_000), SYN, false),
            // a port that answers used to open flows, or to reach what isn't a client,
            (TCP, (AGENT, 53), (LAPTOP, 40_000), SYN, false),
            (UDP, (AGENT, 53), (LAPTOP, 53), 0, false),
            (TCP, (LAPTOP, 20_000), (AGENT, 50_000), SYN, false),
            // other pairs,
            (TCP, (OTHER_AGENT, 50_000), (LAPTOP, 20_000), SYN, false),
            (TCP, (AGENT, 50_000), (OTHER_LAPTOP, 20_002), SYN, false),
            (TCP, (LAPTOP, 40_000), (OTHER_LAPTOP, 20_002), SYN, false),
            (TCP, (AGENT, 50_000), (OTHER_AGENT, 53), SYN, false),
            // other protocols.
            (132, (AGENT, 50_000), (LAPTOP, 20_000), 0, false),
            (protocol::ICMP, (AGENT, 0), (LAPTOP, 0), 0, false),
            (protocol::ICMPV6, (AGENT, 0), (LAPTOP, 0), 0, true),
            (protocol::ICMPV6, (LAPTOP, 0), (AGENT, 0), 0, true),
            (protocol::ICMPV6, (OTHER_AGENT, 0), (LAPTOP, 0), 0, false),
        ] {
            let packet = packet(number, source, destination, flags);
            assert_eq!(allowed(&rules, &packet), expected, "{number} {source:?} {destination:?} {flags:#x}");
        }
    }

    #[test]
    fn by_default_nothing_passes() {
        let packet = packet(TCP, (AGENT, 50_000), (LAPTOP, 20_000), SYN);
        assert!(!allowed(&Rules::default(), &packet));
        assert!(!allowed(&Hub::default().into(), &packet));
    }

    #[test]
    fn a_pair_that_is_named_twice_has_the_ports_of_both() {
        let pair = |ports| Pair { agent: AGENT, laptop: LAPTOP, ports, services: vec![] };
        let rules: Rules = Hub { pairs: vec![pair(vec![20_000]), pair(vec![20_001])] }.into();
        for port in [20_000, 20_001] {
            assert!(allowed(&rules, &packet(TCP, (AGENT, 50_000), (LAPTOP, port), SYN)));
        }
    }

    #[test]
    fn later_fragments_pass_within_a_pair() {
        let mut fragment = packet(protocol::IPV6_FRAGMENT, (AGENT, 0), (LAPTOP, 0), 0);
        fragment[40..48].copy_from_slice(&[UDP, 0, 0, 0x10, 0, 0, 0, 7]);
        assert!(allowed(&rules(), &fragment));
        fragment[8..24].copy_from_slice(&OTHER_AGENT.octets());
        assert!(!allowed(&rules(), &fragment));
        // The first fragment has ports, and is held to them.
        fragment[8..24].copy_from_slice(&AGENT.octets());
        fragment[42..44].copy_from_slice(&[0, 1]);
        assert!(!allowed(&rules(), &fragment));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 40..120)) {
            bytes[0] = 0x60;
            bytes[8..24].copy_from_slice(&AGENT.octets());
            bytes[24..40].copy_from_slice(&LAPTOP.octets());
            if let Some(header) = IpHeader::parse(&bytes) {
                rules().allow(&header, &bytes);
            }
        }
    }
}
