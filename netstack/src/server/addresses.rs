//! Which peer an overlay address belongs to. Pure.

use std::{collections::HashMap, net::IpAddr};

use crate::peers::PeerId;

/// Peers by address. An address can have several: a laptop's lanes share theirs, and an agent that was restarted has a
/// new key before its old one is gone.
#[derive(Debug, Default)]
pub(super) struct Addresses(HashMap<IpAddr, Vec<PeerId>>);

impl Addresses {
    /// `peer` has these addresses, and no others.
    pub(super) fn assign(&mut self, peer: PeerId, addresses: &[IpAddr]) {
        self.retain(|address, owner| owner != peer || addresses.contains(address));
        for address in addresses {
            let owners = self.0.entry(*address).or_default();
            if !owners.contains(&peer) {
                owners.push(peer);
            }
        }
    }

    pub(super) fn remove(&mut self, peer: PeerId) {
        self.retain(|_, owner| owner != peer);
    }

    /// The peers that have `address`, the newest first.
    pub(super) fn owners(&self, address: &IpAddr) -> impl Iterator<Item = PeerId> {
        self.0.get(address).into_iter().flatten().rev().copied()
    }

    fn retain(&mut self, keep: impl Fn(&IpAddr, PeerId) -> bool) {
        self.0.retain(|address, owners| {
            owners.retain(|owner| keep(address, *owner));
            !owners.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: PeerId = PeerId(1);
    const NEW: PeerId = PeerId(2);

    fn owners(addresses: &Addresses, address: &str) -> Vec<PeerId> {
        addresses.owners(&address.parse().unwrap()).collect()
    }

    #[test]
    fn the_newest_peer_of_an_address_comes_first_until_it_is_removed() {
        let mut addresses = Addresses::default();
        let (first, second) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        addresses.assign(OLD, &[first]);
        addresses.assign(NEW, &[first, second]);
        addresses.assign(OLD, &[first]);
        assert_eq!(owners(&addresses, "fd00::1"), [NEW, OLD]);
        addresses.assign(NEW, &[second]);
        assert_eq!(owners(&addresses, "fd00::1"), [OLD]);
        assert_eq!(owners(&addresses, "fd00::2"), [NEW]);
        addresses.remove(NEW);
        addresses.remove(OLD);
        assert!(addresses.0.is_empty());
    }
}
