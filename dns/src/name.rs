//! Domain names in wire form, lower-cased: the form that rules compare and the cache is keyed by.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Octets of the longest name, the root label included (RFC 1035, 2.3.4).
const MAX_NAME: usize = 255;
/// Octets of the longest label (RFC 1035, 2.3.4); the two bits above mark a compression pointer.
const MAX_LABEL: usize = 63;

/// A fully qualified domain name, lower-cased, as uncompressed labels that end in the root label.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Box<[u8]>);

/// A text that is no domain name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A label is empty.
    #[error("{0:?} is no domain name: it has an empty label")]
    EmptyLabel(String),
    /// A label is longer than 63 octets.
    #[error("{0:?} is no domain name: a label is longer than {MAX_LABEL} octets")]
    LongLabel(String),
    /// The name is longer than 255 octets.
    #[error("{0:?} is no domain name: it is longer than {MAX_NAME} octets")]
    LongName(String),
}

impl Name {
    /// Reads `web.shop` or `web.shop.`; the empty text and `.` are the root. Knows no escapes.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let mut wire = Vec::with_capacity(text.len() + 2);
        let trimmed = text.strip_suffix('.').unwrap_or(text);
        if !trimmed.is_empty() {
            for label in trimmed.split('.') {
                match label.len() {
                    0 => return Err(NameError::EmptyLabel(text.to_owned())),
                    1..=MAX_LABEL => wire.push(label.len() as u8),
                    _ => return Err(NameError::LongLabel(text.to_owned())),
                }
                wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
            }
        }
        wire.push(0);
        if wire.len() > MAX_NAME {
            return Err(NameError::LongName(text.to_owned()));
        }
        Ok(Self(wire.into()))
    }

    /// Reads the uncompressed name at the start of `wire`, whatever its letter case.
    ///
    /// The second part is how many octets it took. `None` when the name is cut short, too long, or compressed: a
    /// question has nothing before it that a pointer could point to.
    pub fn read(wire: &[u8]) -> Option<(Self, usize)> {
        let mut at = 0;
        loop {
            let length = usize::from(*wire.get(at)?);
            if length > MAX_LABEL {
                return None;
            }
            at += 1 + length;
            if at > MAX_NAME || at > wire.len() {
                return None;
            }
            if length == 0 {
                return Some((Self(wire[..at].to_ascii_lowercase().into()), at));
            }
        }
    }

    /// The name on the wire, uncompressed.
    pub fn wire(&self) -> &[u8] {
        &self.0
    }

    /// The labels from left to right, without the root.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        self.suffixes().map(|rest| &rest[1..=usize::from(rest[0])])
    }

    /// The label on the right, `None` for the root.
    pub fn last_label(&self) -> Option<&[u8]> {
        self.labels().last()
    }

    /// Is this `zone` itself, or a name below it?
    pub fn is_within(&self, zone: &Self) -> bool {
        zone.0.len() == 1 || self.suffixes().any(|rest| *rest == *zone.0)
    }

    /// The name without its first `count` labels; the root when there are no more.
    pub fn skip(&self, count: usize) -> Self {
        Self(self.suffixes().nth(count).unwrap_or(&[0]).into())
    }

    /// This name as seen from `zone`: `web.shop` in `svc.cluster.local` is `web.shop.svc.cluster.local`. `None` when that is
    /// too long for a name.
    pub fn within(&self, zone: &Self) -> Option<Self> {
        let own = &self.0[..self.0.len() - 1];
        (own.len() + zone.0.len() <= MAX_NAME).then(|| Self([own, &zone.0].concat().into()))
    }

    /// The addresses that a name of the reverse tree stands for: one address for a complete name, else the network whose
    /// names are below it. `None` outside `in-addr.arpa` and `ip6.arpa`, and for their apexes.
    ///
    /// Labels to the left that are no part of an address are passed over, so that everything below a network's name
    /// belongs to the network.
    pub fn reverse_network(&self) -> Option<IpNet> {
        let labels: Vec<_> = self.labels().collect();
        let (tree, own) = (labels.get(labels.len().checked_sub(2)?..)?, &labels[..labels.len() - 2]);
        match tree {
            [b"in-addr", b"arpa"] => {
                let octets: Vec<u8> = own.iter().rev().map_while(|label| decimal(label)).take(4).collect();
                let mut address = [0; 4];
                address[..octets.len()].copy_from_slice(&octets);
                let length = octets.len() as u8 * 8;
                let network = Ipv4Net::new(Ipv4Addr::from(address), length).ok()?;
                (length > 0).then_some(IpNet::V4(network))
            }
            [b"ip6", b"arpa"] => {
                let nibbles: Vec<u8> = own.iter().rev().map_while(|label| nibble(label)).take(32).collect();
                let bits = nibbles.iter().fold(0_u128, |bits, nibble| bits << 4 | u128::from(*nibble));
                let length = nibbles.len() as u8 * 4;
                let address = bits.checked_shl(128 - u32::from(length))?;
                let network = Ipv6Net::new(Ipv6Addr::from(address), length).ok()?;
                Some(IpNet::V6(network))
            }
            _ => None,
        }
    }

    /// The reverse zones whose names are exactly the addresses of `network`, one for each octet or nibble that a prefix
    /// leaves open: at most 128 for IPv4 and 8 for IPv6.
    pub fn reverse_zones(network: &IpNet) -> Vec<Self> {
        let texts: Vec<String> = match network {
            IpNet::V4(network) => {
                let length = network.prefix_len().max(1).next_multiple_of(8);
                network.subnets(length).into_iter().flatten().map(reverse_v4).collect()
            }
            IpNet::V6(network) => {
                let length = network.prefix_len().max(1).next_multiple_of(4);
                network.subnets(length).into_iter().flatten().map(reverse_v6).collect()
            }
        };
        texts.iter().filter_map(|text| Self::parse(text).ok()).collect()
    }

    /// What is left of the name after 0, 1, 2, ... labels, the root excluded.
    fn suffixes(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let current = rest;
            let length = usize::from(current[0]);
            rest = &current[1 + length..];
            (length > 0).then_some(current)
        })
        .fuse()
    }
}

fn reverse_v4(subnet: Ipv4Net) -> String {
    let octets = &subnet.network().octets()[..usize::from(subnet.prefix_len() / 8)];
    let labels: String = octets.iter().rev().map(|octet| format!("{octet}.")).collect();
    labels + "in-addr.arpa"
}

fn reverse_v6(subnet: Ipv6Net) -> String {
    let bits = subnet.network().to_bits();
    let nibbles = (0..subnet.prefix_len() / 4).map(|index| bits >> (124 - 4 * u32::from(index)) & 0xf);
    let labels: String = nibbles.rev().map(|nibble| format!("{nibble:x}.")).collect();
    labels + "ip6.arpa"
}

fn decimal(label: &[u8]) -> Option<u8> {
    let digits = label.len() <= 3 && label.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(label).ok()?.parse().ok()).flatten()
}

fn nibble(label: &[u8]) -> Option<u8> {
    match label {
        [digit] => char::from(*digit).to_digit(16).map(|value| value as u8),
        _ => None,
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.len() == 1 {
            return f.write_str(".");
        }
        for (index, label) in self.labels().enumerate() {
            if index > 0 {
                f.write_str(".")?;
            }
            for byte in label {
                match byte {
                    b'.' | b'\\' => write!(f, "\\{}", char::from(*byte))?,
                    b'!'..=b'~' => write!(f, "{}", char::from(*byte))?,
                    _ => write!(f, "\\{byte:03}")?,
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn reads_text_and_writes_it_back() {
        for (text, shown) in [("Web.Shop", "web.shop"), ("web.shop.", "web.shop"), ("", "."), (".", ".")] {
            assert_eq!(name(text).to_string(), shown);
        }
        assert!(matches!(Name::parse("a..b"), Err(NameError::EmptyLabel(_))));
        assert!(matches!(Name::parse(&"a".repeat(64)), Err(NameError::LongLabel(_))));
        assert!(matches!(Name::parse(&"a.".repeat(128)), Err(NameError::LongName(_))));
    }

    #[test]
    fn is_within_keeps_to_label_boundaries() {
        let zone = name("cluster.local");
        for inside in ["cluster.local", "a.cluster.local", "a.b.svc.CLUSTER.local"] {
            assert!(name(inside).is_within(&zone), "{inside}");
        }
        for outside in ["local", "mycluster.local", "cluster.local.example", "."] {
            assert!(!name(outside).is_within(&zone), "{outside}");
        }
        assert!(name("anything").is_within(&name(".")));
    }

    #[test]
    fn joins_and_skips() {
        assert_eq!(
            name("web.shop").within(&name("svc.cluster.local")),
            Some(name("web.shop.svc.cluster.local"))
        );
        assert_eq!(name(&"a.".repeat(120)).within(&name("svc.cluster.local")), None);
        assert_eq!(name("a.b.c").skip(2), name("c"));
        assert_eq!(name("a").skip(5), name("."));
    }

    #[test]
    fn reverse_names_stand_for_networks() {
        for (text, network) in [
            ("4.3.96.10.in-addr.arpa", Some("10.96.3.4/32")),
            ("96.10.in-addr.arpa", Some("10.96.0.0/16")),
            ("x.y.96.10.in-addr.arpa", Some("10.96.0.0/16")),
            ("in-addr.arpa", None),
            ("300.10.in-addr.arpa", Some("10.0.0.0/8")),
            ("d.f.ip6.arpa", Some("fd00::/8")),
            ("example.com", None),
        ] {
            let network: Option<IpNet> = network.map(|text| text.parse().unwrap());
            assert_eq!(name(text).reverse_network(), network, "{text}");
        }
    }

    #[test]
    fn reverse_zones_cover_exactly_the_network() {
        let zones = |text: &str| Name::reverse_zones(&text.parse().unwrap());
        assert_eq!(zones("10.96.0.0/16"), [name("96.10.in-addr.arpa")]);
        assert_eq!(zones("10.96.0.0/12").len(), 16);
        assert_eq!(zones("10.96.0.0/15"), [name("96.10.in-addr.arpa"), name("97.10.in-addr.arpa")]);
        assert_eq!(zones("fd00:10::/30").len(), 4);
        assert_eq!(zones("fd00::/16"), [name("0.0.d.f.ip6.arpa")]);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(wire in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some((name, taken)) = Name::read(&wire) {
                prop_assert_eq!(name.wire().len(), taken);
                prop_assert!(name.is_within(&name));
                let _ = (name.to_string(), name.reverse_network(), name.last_label().is_some(), name.skip(1));
            }
        }

        #[test]
        fn text_survives(labels in proptest::collection::vec("[a-z0-9_-]{1,20}", 1..8)) {
            let text = labels.join(".");
            prop_assert_eq!(&name(&text).to_string(), &text);
            prop_assert_eq!(Name::read(name(&text).wire()).unwrap().0, name(&text));
        }
    }
}
