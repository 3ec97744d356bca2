//! What rules are made of: nf_tables' expressions, and how each is written.

use super::netlink::Attributes;

/// Attributes of the list of a rule's expressions (`NFTA_LIST_ELEM`), and of one of them (`NFTA_EXPR_*`).
const ELEMENT: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;

/// `NFTA_DATA_*`: a value, or a verdict.
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;

/// The register that holds what is compared and looked up, and the one for a second value (`NFT_REG_*`).
const FIRST: u32 = 1;
const SECOND: u32 = 2;
/// The register that verdicts are loaded into.
const VERDICT_REGISTER: u32 = 0;

/// The port of a redirect is given (`NF_NAT_RANGE_PROTO_SPECIFIED`).
const PORT_SPECIFIED: u32 = 2;

/// What is known about a packet beside its octets (`NFT_META_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meta {
    /// Index of the interface that it came by.
    InputInterface = 4,
    /// Index of the interface that it leaves by.
    OutputInterface = 5,
    /// User of the socket that sent it.
    SocketUser = 10,
    /// IPv4 or IPv6.
    Family = 15,
    /// TCP, UDP or another.
    Transport = 16,
}

/// What the kernel knows about a packet's connection (`NFT_CT_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connection {
    /// Whether the packet goes the way of the first one, or back.
    Direction = 1,
    /// Flags, such as that both sides have been heard.
    Status = 2,
    /// The port that the first packet was sent to, before any redirect.
    OriginalPort = 12,
}

/// How a value is compared (`NFT_CMP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    /// It is this one.
    Equal = 0,
    /// It is no greater.
    AtMost = 3,
    /// It is no less.
    AtLeast = 5,
}

/// Which header of the packet (`NFT_PAYLOAD_*_HEADER`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Header {
    /// IP.
    Network = 1,
    /// TCP or UDP.
    Transport = 2,
}

/// Which value of a packet, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Register {
    /// What is compared or looked up.
    First,
    /// What goes along with it.
    Second,
}

impl Register {
    fn number(self) -> u32 {
        match self {
            Self::First => FIRST,
            Self::Second => SECOND,
        }
    }
}

/// What becomes of UDP's checksum when its header is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// It stays as it is.
    None,
    /// It is changed so that it holds again.
    Kept,
}

/// Where UDP has its checksum (RFC 768).
pub(crate) const UDP_CHECKSUM: u32 = 6;

/// A map of a table: its name, and its number within the transaction that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapName {
    pub(crate) name: &'static str,
    pub(crate) id: u32,
}

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expression {
    /// Loads what is known about the packet.
    Meta(Meta),
    /// Loads what is known about the packet's connection.
    Connection(Connection),
    /// Keeps these bits of what is loaded.
    Mask(Vec<u8>),
    /// Goes on only if what is loaded compares so, octet by octet.
    Compare(Compare, Vec<u8>),
    /// Loads octets of the packet.
    Payload { header: Header, offset: u32, length: u32, register: Register },
    /// Writes what is loaded into the packet.
    Store { header: Header, offset: u32, length: u32, checksum: Checksum },
    /// Loads a port.
    Port(u16),
    /// Goes on only if the map has what is loaded; its value is loaded then.
    Lookup(MapName),
    /// Redirects the connection to this host at the port that is loaded.
    Redirect,
    /// Enters something into the map, for so many milliseconds.
    Update { map: MapName, key: Register, value: Register, milliseconds: u64 },
    /// Takes the first value out of the map. (The second is loaded, but of no concern.)
    Delete(MapName),
    /// The packet is let through.
    Accept,
    /// The packet goes no further.
    Drop,
}

impl Expression {
    /// Adds it to a rule's list.
    pub(crate) fn write(&self, list: &mut Attributes<'_>) {
        list.nested(ELEMENT, |element| {
            element.name(NAME, self.name());
            element.nested(DATA, |data| self.write_data(data));
        });
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Meta(_) => "meta",
            Self::Connection(_) => "ct",
            Self::Mask(_) => "bitwise",
            Self::Compare(..) => "cmp",
            Self::Payload { .. } | Self::Store { .. } => "payload",
            Self::Port(_) | Self::Accept | Self::Drop => "immediate",
            Self::Lookup(_) => "lookup",
            Self::Redirect => "redir",
            Self::Update { .. } | Self::Delete(_) => "dynset",
        }
    }

    fn write_data(&self, data: &mut Attributes<'_>) {
        match self {
            Self::Meta(key) => meta(data, *key),
            Self::Connection(key) => connection(data, *key),
            Self::Mask(bits) => mask(data, bits),
            Self::Compare(how, value) => compare(data, *how, value),
            Self::Payload { header, offset, length, register } => {
                payload(data, *header, *offset, *length, *register);
            }
            Self::Store { header, offset, length, checksum } => {
                store(data, *header, *offset, *length, *checksum);
            }
            Self::Port(port) => immediate(data, FIRST, |value| value.octets(VALUE, &port.to_be_bytes())),
            Self::Lookup(map) => lookup(data, *map),
            Self::Redirect => redirect(data),
            Self::Update { map, key, value, milliseconds } => {
                dynamic(data, *map, UPDATE, *key, *value);
                data.long(6, *milliseconds);
            }
            Self::Delete(map) => dynamic(data, *map, DELETE, Register::First, Register::Second),
            Self::Accept => verdict(data, NF_ACCEPT),
            Self::Drop => verdict(data, NF_DROP),
        }
    }
}

/// Verdicts of netfilter.
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// `NFTA_META_*`.
fn meta(data: &mut Attributes<'_>, key: Meta) {
    data.number(2, key as u32);
    data.number(1, FIRST);
}

/// `NFTA_CT_*`.
fn connection(data: &mut Attributes<'_>, key: Connection) {
    const ORIGINAL: u8 = 0;
    data.number(2, key as u32);
    data.number(1, FIRST);
    if key == Connection::OriginalPort {
        data.octets(3, &[ORIGINAL]);
    }
}

/// `NFTA_BITWISE_*`.
fn mask(data: &mut Attributes<'_>, bits: &[u8]) {
    data.number(1, FIRST);
    data.number(2, FIRST);
    data.number(3, bits.len() as u32);
    data.nested(4, |mask| mask.octets(VALUE, bits));
    data.nested(5, |flipped| flipped.octets(VALUE, &vec![0; bits.len()]));
}

/// `NFTA_CMP_*`.
fn compare(data: &mut Attributes<'_>, how: Compare, value: &[u8]) {
    data.number(1, FIRST);
    data.number(2, how as u32);
    data.nested(3, |operand| operand.octets(VALUE, value));
}

/// `NFTA_PAYLOAD_*`.
fn payload(data: &mut Attributes<'_>, header: Header, offset: u32, length: u32, register: Register) {
    data.number(1, register.number());
    data.number(2, header as u32);
    data.number(3, offset);
    data.number(4, length);
}

fn store(data: &mut Attributes<'_>, header: Header, offset: u32, length: u32, checksum: Checksum) {
    /// `NFT_PAYLOAD_CSUM_INET`.
    const INTERNET: u32 = 1;
    data.number(2, header as u32);
    data.number(3, offset);
    data.number(4, length);
    data.number(5, FIRST);
    if checksum == Checksum::Kept {
        data.number(6, INTERNET);
        data.number(7, UDP_CHECKSUM);
    }
}

/// `NFTA_IMMEDIATE_*`.
fn immediate(data: &mut Attributes<'_>, register: u32, fill: impl FnOnce(&mut Attributes<'_>)) {
    data.number(1, register);
    data.nested(2, fill);
}

fn verdict(data: &mut Attributes<'_>, code: u32) {
    immediate(data, VERDICT_REGISTER, |value| {
        value.nested(VERDICT, |verdict| verdict.number(VERDICT_CODE, code));
    });
}

/// `NFTA_LOOKUP_*`.
fn lookup(data: &mut Attributes<'_>, map: MapName) {
    data.name(1, map.name);
    data.number(2, FIRST);
    data.number(3, FIRST);
    data.number(4, map.id);
}

/// `NFTA_REDIR_*`.
fn redirect(data: &mut Attributes<'_>) {
    data.number(1, FIRST);
    data.number(3, PORT_SPECIFIED);
}

/// Operations of a rule on a map (`NFT_DYNSET_OP_*`). An update has the time of an element that is there begin anew.
const UPDATE: u32 = 1;
const DELETE: u32 = 2;

fn dynamic(data: &mut Attributes<'_>, map: MapName, operation: u32, key: Register, value: Register) {
    data.name(1, map.name);
    data.number(2, map.id);
    data.number(3, operation);
    data.number(4, key.number());
    data.number(5, value.number());
}
