//! Overlay addresses: which are taken, and which one a new session gets.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use tpd_api::overlay::DualAddress;

/// The overlay's addresses. A session's IPv4 and IPv6 address carry the same host number, so that
/// one can be told from the other at sight, and one allocation serves both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    v4: Ipv4Net,
    v6: Ipv6Net,
}

/// First host number that a session may have: 0 is the network, 1 the gateway.
const FIRST: u32 = 2;

impl Pool {
    /// A pool over two networks, the second with room for every host number of the first.
    #[must_use]
    pub fn new(v4: Ipv4Net, v6: Ipv6Net) -> Self {
        Self { v4, v6 }
    }

    /// How many sessions it can hold. The last number would be the network's broadcast address.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        u32::from(self.v4.broadcast()) - u32::from(self.v4.network()) - FIRST
    }

    /// The host number of an address of this pool that a session may have.
    #[must_use]
    pub fn host(&self, address: DualAddress) -> Option<u32> {
        let host = u32::from(address.ipv4).checked_sub(u32::from(self.v4.network()))?;
        (self.holds(host) && self.address(host) == address).then_some(host)
    }

    /// The addresses of a host number.
    #[must_use]
    pub fn address(&self, host: u32) -> DualAddress {
        DualAddress {
            ipv4: Ipv4Addr::from(u32::from(self.v4.network()) + host),
            ipv6: Ipv6Addr::from(u128::from(self.v6.network()) + u128::from(host)),
        }
    }

    /// A free host number for a session with this identity: always the same one as long as nobody else has it,
    /// so a laptop that comes back finds its old address. `None` when all are taken.
    #[must_use]
    pub fn choose(&self, identity: &str, taken: &BTreeSet<u32>) -> Option<u32> {
        let capacity = self.capacity();
        let start = u32::try_from(fnv1a(identity) % u64::from(capacity)).expect("less than a u32");
        (0..capacity).map(|step| FIRST + (start + step) % capacity).find(|host| !taken.contains(host))
    }

    fn holds(&self, host: u32) -> bool {
        (FIRST..FIRST + self.capacity()).contains(&host)
    }
}

/// FNV-1a: the standard library's hash may change between releases, addresses should not.
pub(super) fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tpd_api::overlay::{DEFAULT_POOL_V4, DEFAULT_POOL_V6, DualAddress};

    use super::Pool;

    fn small() -> Pool {
        Pool::new("10.9.8.0/24".parse().unwrap(), "fd09::/64".parse().unwrap())
    }

    #[test]
    fn every_host_number_is_given_once_and_none_is_special() {
        let pool = small();
        let mut taken = BTreeSet::new();
        while let Some(host) = pool.choose("somebody", &taken) {
            assert!(taken.insert(host));
        }
        assert_eq!(taken.len(), 253);
        assert_eq!((taken.first(), taken.last()), (Some(&2), Some(&254)));
    }

    #[test]
    fn the_same_identity_gets_the_same_address() {
        let pool = Pool::new(DEFAULT_POOL_V4, DEFAULT_POOL_V6);
        let none = BTreeSet::new();
        assert_eq!(pool.choose("alice", &none), pool.choose("alice", &none));
        assert_ne!(pool.choose("alice", &none), pool.choose("bob", &none));
    }

    #[test]
    fn both_families_carry_the_same_number() {
        let address = small().address(0x11);
        assert_eq!(
            (address.ipv4.to_string(), address.ipv6.to_string()),
            ("10.9.8.17".into(), "fd09::11".into())
        );
        assert_eq!(small().host(address), Some(0x11));
    }

    #[test]
    fn foreign_and_special_addresses_are_not_the_pools() {
        let pool = small();
        for (v4, v6) in [
            ("10.9.8.1", "fd09::1"),
            ("10.9.8.0", "fd09::"),
            ("10.9.8.255", "fd09::ff"),
            ("10.9.7.5", "fd09::5"),
            ("10.9.8.5", "fd09::6"),
            ("10.9.9.5", "fd09::105"),
        ] {
            let address = DualAddress { ipv4: v4.parse().unwrap(), ipv6: v6.parse().unwrap() };
            assert_eq!(pool.host(address), None, "{v4} {v6}");
        }
    }
}
