//! The redirect, as nf_tables has it. In the words of `nft`:
//!
//! ```text
//! table inet tpd {
//!     map tcp_live { type inet_service : inet_service; size 64; flags dynamic,timeout; timeout 2s; }
//!     map udp_live { type inet_service : inet_service; size 64; flags dynamic,timeout; timeout 2s; }
//!     map udp_back { type inet_service : inet_service; size 64; flags dynamic,timeout; timeout 67s; }
//!     chain datagrams {
//!         type filter hook prerouting priority mangle; policy accept;
//!         iif "lo" accept
//!         ct direction original udp checksum 0 udp dport set udp dport map @udp_live
//!         ct direction original udp dport set udp dport map @udp_live
//!     }
//!     chain prerouting {
//!         type nat hook prerouting priority dstnat; policy accept;
//!         iif "lo" accept
//!         tcp dport 19950 redirect to :8080
//!         meta l4proto tcp redirect to :tcp dport map @tcp_live
//!     }
//!     chain output {
//!         type filter hook output priority filter; policy accept;
//!         oif "lo" ip daddr 127.0.0.1 meta skuid 1337 udp sport 19901-19949
//!             update @tcp_live { udp dport timeout 2s : udp sport } drop
//!         oif "lo" ip daddr 127.0.0.2 meta skuid 1337 udp sport 19901-19949
//!             update @udp_live { udp dport timeout 2s : udp sport }
//!             update @udp_back { udp sport timeout 67s : udp dport } drop
//!         udp sport 19901-19949 udp sport set udp sport map @udp_back
//!         tcp sport 19901-19949 tcp flags & rst == rst ct direction reply ct status ! assured
//!             delete @tcp_live { ct original proto-dst : tcp sport }
//!     }
//! }
//! ```
//!
//! The last rule is for an agent whose sockets are gone with it: the first connection that the kernel itself refuses in its place
//! (a reset before there was a connection) ends the redirect, so that the next one reaches the app.
//!
//! Datagrams are not redirected but readdressed, each by itself: where a redirect has led a conversation, or has not, it stays
//! for as long as the client is never silent. What answers the app's own datagrams is left alone, though it comes to the same
//! port. The first of the two rules leaves a checksum alone that says there is none (RFC 768); `nft` has no words for that
//! difference. The agent's answers are given back the app's port for as long as it may have some.
//!
//! Nothing here ever changes. What a port is redirected to, and whether it is, is in the maps; and what is in them is there for as
//! long as the agent says so and 2 s more. So an agent that is killed, stopped or starved takes no traffic with it.

use std::net::Ipv4Addr;

use tpd_api::agent::Protocol;
use tpd_api::inject::{AGENT_UID, ENTRY_PORTS};

use super::expression::{
    Checksum, Compare, Connection, Expression, Header, MapName, Meta, Register, UDP_CHECKSUM,
};
use super::netlink::{Attributes, Transaction};
use crate::agent::heartbeat;
use crate::agent::proxy::udp;

/// Name of the table. Nobody else's is touched.
pub(crate) const TABLE: &str = "tpd";

/// The table's family: IPv4 and IPv6 together (`NFPROTO_INET`).
const INET: u8 = 1;
const IPV4: u8 = 2;

/// Index of the loopback interface, in every network namespace.
const LOOPBACK: u32 = 1;

/// How long a heartbeat is good for, milliseconds: four of them. A node that is short of CPU lets one or two be late, and no
/// more than the two seconds that production may wait for a stopped agent pass.
const LIFETIME: u64 = 2_000;

/// Most ports at a time: there are [`ENTRY_PORTS`] to lead them to.
const SIZE: u32 = 64;

/// Types of messages (`NFT_MSG_*`).
const NEW_TABLE: u8 = 0;
const DELETE_TABLE: u8 = 2;
const NEW_CHAIN: u8 = 3;
const NEW_RULE: u8 = 6;
const NEW_MAP: u8 = 9;

/// Flags of a message that makes something (`NLM_F_CREATE`), and of one that puts it behind the others (`NLM_F_APPEND`).
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// How long the agent's datagrams are taken for answers after a heartbeat, milliseconds: as long as it keeps a conversation after the
/// last datagram that a heartbeat has led to it.
const ANSWERS: u64 = udp::KEPT.as_millis() as u64 + LIFETIME;

const TCP_LIVE: MapName = MapName { name: "tcp_live", id: 1 };
const UDP_LIVE: MapName = MapName { name: "udp_live", id: 2 };
const UDP_BACK: MapName = MapName { name: "udp_back", id: 3 };

/// A port where probes come in for one of the app's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandIn {
    /// The port that the kubelet asks.
    pub port: u16,
    /// The app's.
    pub app: u16,
}

/// A transaction that replaces whatever table of ours there is, and the names of what each of its messages is about.
pub(crate) fn replacement(probes: &[StandIn]) -> (Vec<u8>, Vec<(u32, String)>) {
    let mut table = Writer { transaction: Transaction::begin(), names: Vec::new() };
    // Made first so that it can be deleted whether or not it was there.
    table.table(NEW_TABLE, CREATE);
    table.table(DELETE_TABLE, 0);
    table.table(NEW_TABLE, CREATE);
    table.map(TCP_LIVE, LIFETIME);
    table.map(UDP_LIVE, LIFETIME);
    table.map(UDP_BACK, ANSWERS);
    for chain in [&DATAGRAMS, &PREROUTING, &OUTPUT] {
        table.chain(chain);
    }
    for rule in datagrams() {
        table.rule(&DATAGRAMS, &rule);
    }
    for rule in prerouting(probes) {
        table.rule(&PREROUTING, &rule);
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        table.rule(&OUTPUT, &heartbeat(protocol));
    }
    table.rule(&OUTPUT, &answer());
    table.rule(&OUTPUT, &refusal());
    (table.transaction.end(), table.names)
}

/// A chain that the kernel sends packets through.
struct Chain {
    name: &'static str,
    kind: &'static str,
    /// Place in the packet's way (`NF_INET_*`).
    hook: u32,
    priority: i32,
}

/// Where packets come in, at the priority `mangle`: fragments are joined, and it is known who has begun the conversation.
const DATAGRAMS: Chain = Chain { name: "datagrams", kind: "filter", hook: 0, priority: -150 };

/// Where packets come in, at the priority `dstnat`.
const PREROUTING: Chain = Chain { name: "prerouting", kind: "nat", hook: 0, priority: -100 };

/// Where the pod's own packets go out, at the priority `filter`.
const OUTPUT: Chain = Chain { name: "output", kind: "filter", hook: 3, priority: 0 };

/// What becomes of datagrams to the pod.
fn datagrams() -> [Vec<Expression>; 3] {
    let asked = || {
        let mut rule = direction(ORIGINAL).to_vec();
        rule.extend(transport(Protocol::Udp));
        rule
    };
    let (mut unsummed, mut summed) = (asked(), asked());
    unsummed.extend([checksum(), equal(&[0; 2])]);
    unsummed.extend(readdress(UDP_LIVE, Port::Destination, Checksum::None));
    summed.extend(readdress(UDP_LIVE, Port::Destination, Checksum::Kept));
    [own(), unsummed, summed]
}

/// What becomes of new connections to the pod.
fn prerouting(probes: &[StandIn]) -> Vec<Vec<Expression>> {
    let mut rules = vec![own()];
    rules.extend(probes.iter().map(|probe| stand_in(*probe)));
    rules.push(redirect());
    rules
}

/// What the pod says to itself is its own affair; and so the agent reaches the app.
fn own() -> Vec<Expression> {
    vec![Expression::Meta(Meta::InputInterface), equal(&LOOPBACK.to_ne_bytes()), Expression::Accept]
}

/// Probes reach the app, past any intercept and with nobody's help.
fn stand_in(probe: StandIn) -> Vec<Expression> {
    let mut rule = transport(Protocol::Tcp).to_vec();
    rule.extend([
        load(Port::Destination, Register::First),
        equal(&probe.port.to_be_bytes()),
        Expression::Port(probe.app),
        Expression::Redirect,
    ]);
    rule
}

/// A port with a living heartbeat leads to the agent.
fn redirect() -> Vec<Expression> {
    let mut rule = transport(Protocol::Tcp).to_vec();
    rule.extend([
        load(Port::Destination, Register::First),
        Expression::Lookup(TCP_LIVE),
        Expression::Redirect,
    ]);
    rule
}

/// A datagram of the agent's, from where those of clients come in, answers one of them.
fn answer() -> Vec<Expression> {
    let mut rule = from_entry(Protocol::Udp);
    rule.extend(readdress(UDP_BACK, Port::Source, Checksum::Kept));
    rule
}

/// Puts into a port's place what a map has for it, if it has something.
fn readdress(map: MapName, port: Port, checksum: Checksum) -> [Expression; 3] {
    [
        load(port, Register::First),
        Expression::Lookup(map),
        Expression::Store { header: Header::Transport, offset: port.offset(), length: 2, checksum },
    ]
}

/// The agent's word that it takes a port; it never arrives anywhere.
fn heartbeat(protocol: Protocol) -> Vec<Expression> {
    const APP: Register = Register::First;
    const ENTRY: Register = Register::Second;
    let mut rule = vec![Expression::Meta(Meta::OutputInterface), equal(&LOOPBACK.to_ne_bytes())];
    rule.extend(to_address(heartbeat::address(protocol)));
    rule.extend([Expression::Meta(Meta::SocketUser), equal(&AGENT_UID.to_ne_bytes())]);
    rule.extend(from_entry(Protocol::Udp));
    rule.extend([load(Port::Destination, APP), load(Port::Source, ENTRY)]);
    match protocol {
        Protocol::Tcp => rule.push(enter(TCP_LIVE, APP, ENTRY, LIFETIME)),
        Protocol::Udp => {
            rule.extend([enter(UDP_LIVE, APP, ENTRY, LIFETIME), enter(UDP_BACK, ENTRY, APP, ANSWERS)]);
        }
    }
    rule.push(Expression::Drop);
    rule
}

fn enter(map: MapName, key: Register, value: Register, milliseconds: u64) -> Expression {
    Expression::Update { map, key, value, milliseconds }
}

/// A connection that was led to the agent and that nobody takes: the port is led there no longer.
fn refusal() -> Vec<Expression> {
    /// The RST bit of TCP's flags (RFC 9293, 3.1), which are that octet of its header.
    const RESET: u8 = 0x04;
    const FLAGS: u32 = 13;
    /// `IPS_ASSURED`: the connection was made.
    const ASSURED: u32 = 1 << 2;
    let flags = Expression::Payload {
        header: Header::Transport,
        offset: FLAGS,
        length: 1,
        register: Register::First,
    };
    let mut rule = from_entry(Protocol::Tcp);
    rule.extend([flags, Expression::Mask(vec![RESET]), equal(&[RESET])]);
    rule.extend(direction(REPLY));
    rule.extend([
        Expression::Connection(Connection::Status),
        Expression::Mask(ASSURED.to_ne_bytes().into()),
        equal(&0u32.to_ne_bytes()),
    ]);
    rule.extend([
        Expression::Connection(Connection::OriginalPort),
        load(Port::Source, Register::Second),
        Expression::Delete(TCP_LIVE),
    ]);
    rule
}

/// What leaves by a port where intercepted traffic comes in.
fn from_entry(protocol: Protocol) -> Vec<Expression> {
    let mut rule = transport(protocol).to_vec();
    rule.extend([
        load(Port::Source, Register::First),
        Expression::Compare(Compare::AtLeast, ENTRY_PORTS.start().to_be_bytes().into()),
        Expression::Compare(Compare::AtMost, ENTRY_PORTS.end().to_be_bytes().into()),
    ]);
    rule
}

/// Directions of a connection (`IP_CT_DIR_*`).
const ORIGINAL: u8 = 0;
const REPLY: u8 = 1;

fn direction(number: u8) -> [Expression; 2] {
    [Expression::Connection(Connection::Direction), equal(&[number])]
}

fn transport(protocol: Protocol) -> [Expression; 2] {
    let number: u8 = match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    };
    [Expression::Meta(Meta::Transport), equal(&[number])]
}

fn to_address(address: Ipv4Addr) -> [Expression; 4] {
    // The destination is the last of IPv4's fixed fields (RFC 791, 3.1).
    let destination =
        Expression::Payload { header: Header::Network, offset: 16, length: 4, register: Register::First };
    [Expression::Meta(Meta::Family), equal(&[IPV4]), destination, equal(&address.octets())]
}

/// A port in the header of TCP or UDP.
#[derive(Clone, Copy)]
enum Port {
    Source,
    Destination,
}

impl Port {
    /// RFC 9293, 3.1, and RFC 768.
    fn offset(self) -> u32 {
        match self {
            Self::Source => 0,
            Self::Destination => 2,
        }
    }
}

fn load(port: Port, register: Register) -> Expression {
    Expression::Payload { header: Header::Transport, offset: port.offset(), length: 2, register }
}

/// UDP's.
fn checksum() -> Expression {
    Expression::Payload {
        header: Header::Transport,
        offset: UDP_CHECKSUM,
        length: 2,
        register: Register::First,
    }
}

fn equal(value: &[u8]) -> Expression {
    Expression::Compare(Compare::Equal, value.into())
}

/// Writes the parts of the table one after another.
struct Writer {
    transaction: Transaction,
    names: Vec<(u32, String)>,
}

impl Writer {
    /// `NFTA_TABLE_*`.
    fn table(&mut self, kind: u8, flags: u16) {
        self.add(kind, flags, format!("table {TABLE}"), |table| table.name(1, TABLE));
    }

    /// `NFTA_SET_*`.
    fn map(&mut self, map: MapName, milliseconds: u64) {
        /// It is a map (`NFT_SET_MAP`), has times (`TIMEOUT`), and rules add to it (`EVAL`).
        const FLAGS: u32 = 0x8 | 0x10 | 0x20;
        /// What `nft` calls `inet_service`; it is of no concern to the kernel.
        const PORT: u32 = 13;
        const PORT_LENGTH: u32 = 2;
        self.add(NEW_MAP, CREATE, format!("map {}", map.name), |attributes| {
            attributes.name(1, TABLE);
            attributes.name(2, map.name);
            attributes.number(3, FLAGS);
            attributes.number(4, PORT);
            attributes.number(5, PORT_LENGTH);
            attributes.number(6, PORT);
            attributes.number(7, PORT_LENGTH);
            attributes.nested(9, |description| description.number(1, SIZE));
            attributes.number(10, map.id);
            attributes.long(11, milliseconds);
        });
    }

    /// `NFTA_CHAIN_*`.
    fn chain(&mut self, chain: &Chain) {
        const POLICY_ACCEPT: u32 = 1;
        self.add(NEW_CHAIN, CREATE, format!("chain {}", chain.name), |attributes| {
            attributes.name(1, TABLE);
            attributes.name(3, chain.name);
            attributes.nested(4, |hook| {
                hook.number(1, chain.hook);
                hook.octets(2, &chain.priority.to_be_bytes());
            });
            attributes.number(5, POLICY_ACCEPT);
            attributes.name(7, chain.kind);
        });
    }

    /// `NFTA_RULE_*`.
    fn rule(&mut self, chain: &Chain, expressions: &[Expression]) {
        self.add(NEW_RULE, CREATE | APPEND, format!("a rule of chain {}", chain.name), |attributes| {
            attributes.name(1, TABLE);
            attributes.name(2, chain.name);
            attributes.nested(4, |list| expressions.iter().for_each(|one| one.write(list)));
        });
    }

    fn add(&mut self, kind: u8, flags: u16, name: String, fill: impl FnOnce(&mut Attributes<'_>)) {
        let sequence = self.transaction.add(kind, flags, INET, fill);
        self.names.push((sequence, name));
    }
}

#[cfg(test)]
mod tests {
    use super::{StandIn, replacement};

    #[test]
    fn each_message_is_named() {
        let probes = [StandIn { port: 19_950, app: 80 }, StandIn { port: 19_951, app: 81 }];
        let (octets, names) = replacement(&probes);
        assert_eq!(octets.len() % 4, 0);
        let names: Vec<_> = names.iter().map(|(sequence, name)| (*sequence, name.as_str())).collect();
        assert_eq!(names[..4], [(1, "table tpd"), (2, "table tpd"), (3, "table tpd"), (4, "map tcp_live")]);
        assert_eq!(names.iter().filter(|(_, name)| *name == "a rule of chain prerouting").count(), 4);
        assert_eq!(names.last(), Some(&(20, "a rule of chain output")));
    }
}
