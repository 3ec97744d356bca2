//! Which networks are the cluster's: what its nodes and ServiceCIDRs declare, what its pods show, what was configured.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

/// Most networks of one kind and family that are published. Adjacent networks merge, so a cluster that numbers its nodes
/// from one range needs a handful; the bound keeps a session's status, and a laptop's routing table, small in
/// one that does not.
const MOST: usize = 256;

/// Blocks that pods were seen in: /24 for IPv4, /64 for IPv6.
///
/// A block stays once a pod was seen in it, for as long as the manager runs: a rollout that empties
/// a block for a moment should not take routes away from laptops.
#[derive(Clone, Debug, Default)]
pub struct Blocks(BTreeSet<IpNet>);

impl Blocks {
    /// Notes a pod's address; tells whether that made a new block.
    pub fn observe(&mut self, address: IpAddr) -> bool {
        let prefix = match address {
            IpAddr::V4(_) => 24,
            IpAddr::V6(_) => 64,
        };
        let block = IpNet::new(address, prefix).expect("a prefix that fits its family");
        self.0.insert(block.trunc())
    }

    /// The networks of pods: those declared, and the blocks that no declared one covers.
    #[must_use]
    pub fn complete(&self, declared: impl IntoIterator<Item = IpNet>) -> Vec<IpNet> {
        let mut networks: Vec<_> = declared.into_iter().collect();
        let uncovered =
            self.0.iter().filter(|block| !networks.iter().any(|network| network.contains(*block)));
        let uncovered: Vec<_> = uncovered.copied().collect();
        networks.extend(uncovered);
        compact(&networks)
    }
}

/// The same networks in the fewest, sorted, at most `MOST` of either family.
#[must_use]
pub fn compact(networks: &[IpNet]) -> Vec<IpNet> {
    let family = |v4: bool| {
        let networks = networks.iter().filter(|network| network.addr().is_ipv4() == v4);
        bound(IpNet::aggregate(&networks.copied().collect()))
    };
    let mut all = family(true);
    all.extend(family(false));
    all
}

/// Widens the narrowest networks until there are few enough. What this adds belongs to the neighbourhood
/// of pods, and the policy still refuses nodes.
fn bound(mut networks: Vec<IpNet>) -> Vec<IpNet> {
    while networks.len() > MOST {
        let narrowest = networks.iter().map(IpNet::prefix_len).max().unwrap_or_default();
        let widened = networks.iter().map(|network| match network.supernet() {
            Some(wider) if network.prefix_len() == narrowest => wider,
            _ => *network,
        });
        networks = IpNet::aggregate(&widened.collect());
    }
    networks.sort_unstable();
    networks
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::{Blocks, MOST, compact};

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn networks_merge_and_sort() {
        for (given, expected) in [
            (vec!["10.244.1.0/24", "10.244.0.0/24"], vec!["10.244.0.0/23"]),
            (vec!["10.0.0.0/8", "10.244.0.0/24"], vec!["10.0.0.0/8"]),
            (
                vec!["fd00::/64", "10.1.0.0/24", "10.3.0.0/24"],
                vec!["10.1.0.0/24", "10.3.0.0/24", "fd00::/64"],
            ),
            (vec![], vec![]),
        ] {
            assert_eq!(compact(&nets(&given)), nets(&expected), "{given:?}");
        }
    }

    #[test]
    fn pods_outside_what_is_declared_are_covered() {
        let mut blocks = Blocks::default();
        for address in ["10.244.0.9", "192.168.7.4", "192.168.7.5", "fd00:10:244::9", "fd99::1:0:0:0:1"] {
            blocks.observe(address.parse().unwrap());
        }
        let declared = nets(&["10.244.0.0/24", "fd00:10:244::/64"]);
        assert_eq!(
            blocks.complete(declared),
            nets(&["10.244.0.0/24", "192.168.7.0/24", "fd00:10:244::/64", "fd99:0:0:1::/64"]),
        );
    }

    #[test]
    fn only_a_new_block_is_news() {
        let mut blocks = Blocks::default();
        assert!(blocks.observe("192.168.7.4".parse().unwrap()));
        assert!(!blocks.observe("192.168.7.200".parse().unwrap()));
    }

    #[test]
    fn there_is_a_bound_and_it_loses_nothing() {
        let scattered: Vec<IpNet> =
            (0..2000u32).map(|n| format!("10.{}.{}.0/24", n / 100, (n % 100) * 2).parse().unwrap()).collect();
        let bounded = compact(&scattered);
        assert!(bounded.len() <= MOST, "{}", bounded.len());
        assert!(scattered.iter().all(|net| bounded.iter().any(|wide| wide.contains(net))));
    }
}
