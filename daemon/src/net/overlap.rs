//! Decides what to route to the cluster, before anything is changed.

use ipnet::IpNet;
use tpd_api::exit::ExitCode;
use tpd_api::local::Excluded;

use super::netlink::Route;
use crate::failure::Failure;

/// What the user chose about networks that both sides use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    /// These stay with the laptop.
    pub(crate) exclude: Vec<IpNet>,
    /// These go to the cluster even where the laptop has them too.
    pub(crate) prefer_cluster: Vec<IpNet>,
}

/// What will be routed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) routes: Vec<IpNet>,
    pub(crate) excluded: Vec<Excluded>,
}

/// A cluster network and a route of the laptop that claim the same addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Overlap {
    pub(crate) cluster: IpNet,
    pub(crate) own: IpNet,
    pub(crate) device: String,
}

/// Plans the routes, or finds the overlaps that the user has not decided about.
pub(crate) fn plan(cluster: &[IpNet], own: &[Route], choice: &Choice) -> Result<Plan, Vec<Overlap>> {
    let (mut plan, mut overlaps) = (Plan::default(), Vec::new());
    for &network in cluster {
        plan.excluded.extend(choice.exclude.iter().filter_map(|&excluded| {
            let network = intersection(network, excluded)?;
            Some(Excluded { network, reason: "--exclude".into() })
        }));
        for piece in subtract(network, &choice.exclude) {
            plan.routes.push(piece);
            for route in own.iter().filter(|route| !is_default(route.network)) {
                let Some(shared) = intersection(piece, route.network) else { continue };
                if !choice.prefer_cluster.iter().any(|preferred| preferred.contains(&shared)) {
                    overlaps.push(Overlap {
                        cluster: network,
                        own: route.network,
                        device: route.device.clone(),
                    });
                } else if route.network.prefix_len() == route.network.max_prefix_len() {
                    let reason = "this machine has a route to that very address".into();
                    plan.excluded.push(Excluded { network: route.network, reason });
                } else if piece.contains(&route.network) {
                    // The laptop's route is at least as specific and would win; its halves win over it.
                    plan.routes.extend(halves(route.network));
                }
            }
        }
    }
    plan.routes = plan.routes.into_iter().flat_map(|network| beside(network, own)).collect();
    plan.routes.sort_unstable();
    plan.routes.dedup();
    if overlaps.is_empty() { Ok(plan) } else { Err(overlaps) }
}

/// The overlaps as a person can decide about them.
pub(crate) fn failure(overlaps: &[Overlap]) -> Failure {
    let first = Failure::new(ExitCode::Overlap, "the cluster and this machine use the same addresses");
    let failure = overlaps.iter().fold(first, |failure, overlap| {
        failure.because(format!(
            "the cluster's network {} overlaps with this machine's route {} on {}",
            overlap.cluster, overlap.own, overlap.device
        ))
    });
    let shared = overlaps.iter().filter_map(|overlap| intersection(overlap.cluster, overlap.own));
    let flags = |flag: &str| shared.clone().map(|net| format!("{flag} {net}")).collect::<Vec<_>>().join(" ");
    failure.help(format!(
        "nothing was changed; choose with tpd up:
  {}
    these addresses stay with this machine, and the cluster's there cannot be reached
  {}
    these addresses go to the cluster while connected, and this machine's own hosts there cannot be reached",
        flags("--exclude"),
        flags("--prefer-cluster"),
    ))
}

/// A default route, whole or in the halves that VPNs set, is no claim to particular addresses.
fn is_default(network: IpNet) -> bool {
    // 2000::/3 is all of the IPv6 internet.
    let limit = if network.addr().is_ipv4() { 1 } else { 3 };
    network.prefix_len() <= limit
}

/// Of two networks that overlap, one holds the other.
fn intersection(a: IpNet, b: IpNet) -> Option<IpNet> {
    if a.contains(&b) {
        Some(b)
    } else if b.contains(&a) {
        Some(a)
    } else {
        None
    }
}

/// `network` in pieces to which the laptop has no route as they are. Of two routes to the same network the kernel keeps one, so ours would
/// take the place of the laptop's, and leave none when it goes.
fn beside(network: IpNet, own: &[Route]) -> Vec<IpNet> {
    if own.iter().any(|route| route.network == network) {
        halves(network).into_iter().flat_map(|half| beside(half, own)).collect()
    } else {
        vec![network]
    }
}

fn halves(network: IpNet) -> Vec<IpNet> {
    network.subnets(network.prefix_len() + 1).map(Iterator::collect).unwrap_or_default()
}

/// What is left of a network without the excluded ones: at most one piece per bit of each.
fn subtract(network: IpNet, excluded: &[IpNet]) -> Vec<IpNet> {
    if excluded.iter().any(|other| other.contains(&network)) {
        return Vec::new();
    }
    if !excluded.iter().any(|other| network.contains(other)) {
        return vec![network];
    }
    halves(network).into_iter().flat_map(|half| subtract(half, excluded)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| net(text)).collect()
    }

    fn own(networks: &[(&str, &str)]) -> Vec<Route> {
        networks.iter().map(|(network, device)| Route::example(net(network), device)).collect()
    }

    #[test]
    fn networks_of_their_own_are_routed() {
        let cluster = nets(&["10.244.0.0/16", "10.96.0.0/16", "fd00:10:96::/112"]);
        let own = own(&[
            ("0.0.0.0/0", "eth0"),
            ("0.0.0.0/1", "vpn"),
            ("2000::/3", "vpn"),
            ("192.168.1.0/24", "eth0"),
        ]);
        let plan = plan(&cluster, &own, &Choice::default()).unwrap();
        assert_eq!(plan.routes, nets(&["10.96.0.0/16", "10.244.0.0/16", "fd00:10:96::/112"]));
        assert!(plan.excluded.is_empty());
    }

    #[test]
    fn overlaps_name_both_networks_and_the_device_whichever_is_wider() {
        let own = own(&[("10.0.0.0/8", "corp0"), ("10.96.4.0/24", "eth1")]);
        let overlaps = plan(&nets(&["10.96.0.0/16"]), &own, &Choice::default()).unwrap_err();
        assert_eq!(overlaps.len(), 2);
        assert_eq!(
            overlaps[1],
            Overlap { cluster: net("10.96.0.0/16"), own: net("10.96.4.0/24"), device: "eth1".into() }
        );
        let failure = failure(&overlaps);
        assert_eq!(failure.code, ExitCode::Overlap);
        assert!(failure.causes[0].contains("10.0.0.0/8 on corp0"));
        assert!(failure.help.unwrap().contains("--exclude 10.96.0.0/16 --exclude 10.96.4.0/24"));
    }

    #[test]
    fn excluded_addresses_are_cut_out() {
        let choice = Choice { exclude: nets(&["10.96.0.0/18"]), ..Choice::default() };
        let own = own(&[("10.96.4.0/24", "eth1")]);
        let plan = plan(&nets(&["10.96.0.0/16"]), &own, &choice).unwrap();
        assert_eq!(plan.routes, nets(&["10.96.64.0/18", "10.96.128.0/17"]));
        assert_eq!(plan.excluded, [Excluded { network: net("10.96.0.0/18"), reason: "--exclude".into() }]);
    }

    #[test]
    fn a_network_that_is_excluded_whole_is_not_routed() {
        let choice = Choice { exclude: nets(&["10.0.0.0/8"]), ..Choice::default() };
        let plan = plan(&nets(&["10.96.0.0/16"]), &[], &choice).unwrap();
        assert!(plan.routes.is_empty());
        assert_eq!(plan.excluded[0].network, net("10.96.0.0/16"));
    }

    #[test]
    fn preferring_the_cluster_beats_a_route_that_is_as_specific() {
        let choice = Choice { prefer_cluster: nets(&["10.96.0.0/16"]), ..Choice::default() };
        let own = own(&[("10.96.0.0/16", "eth1"), ("10.0.0.0/8", "corp0")]);
        let plan = plan(&nets(&["10.96.0.0/16"]), &own, &choice).unwrap();
        assert_eq!(plan.routes, nets(&["10.96.0.0/17", "10.96.128.0/17"]));
    }

    #[test]
    fn no_route_of_ours_takes_the_place_of_one_of_the_laptops() {
        let choice = Choice { prefer_cluster: nets(&["10.0.0.0/8"]), ..Choice::default() };
        let own = own(&[
            ("10.96.0.0/16", "br0"),
            ("10.96.0.0/17", "br1"),
            ("10.96.0.0/18", "br2"),
            ("10.96.0.9/32", "br3"),
        ]);
        let plan = plan(&nets(&["10.96.0.0/16"]), &own, &choice).unwrap();
        assert_eq!(plan.routes, nets(&["10.96.0.0/19", "10.96.32.0/19", "10.96.64.0/18", "10.96.128.0/17"]));
        assert_eq!(plan.excluded[0].network, net("10.96.0.9/32"), "nothing is more specific than that");
    }
}
