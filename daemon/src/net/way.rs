//! How the laptop reaches an address without the tunnel, so that what the tunnel needs never goes into it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::netlink::Route;

/// The addresses among `needed` that the tunnel's routes would swallow.
pub(crate) fn swallowed<'a>(needed: &'a [IpAddr], routed: &'a [IpNet]) -> impl Iterator<Item = IpAddr> + 'a {
    needed.iter().copied().filter(|address| routed.iter().any(|network| network.contains(address)))
}

/// The route that would carry `address`: the longest prefix, then the lowest metric.
pub(crate) fn way(address: IpAddr, routes: &[Route]) -> Option<&Route> {
    routes
        .iter()
        .filter(|route| route.network.contains(&address))
        .max_by_key(|route| (route.network.prefix_len(), u32::MAX - route.metric))
}

/// Whether `address` goes that way by itself, whatever of `routed` it lies in. An exception would then be of no use, and would take the
/// place of a route to that very address, which would be gone when it goes.
pub(crate) fn wins(way: &Route, address: IpAddr, routed: &[IpNet]) -> bool {
    let own = way.network.prefix_len();
    routed.iter().filter(|network| network.contains(&address)).all(|network| network.prefix_len() < own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_of_the_laptops_that_wins_by_itself_is_left_alone() {
        let address = "10.96.0.10".parse().unwrap();
        let routed = ["10.96.0.0/16".parse().unwrap(), "10.96.0.0/25".parse().unwrap()];
        for (own, expected) in [("10.96.0.10/32", true), ("10.96.0.0/24", false), ("0.0.0.0/0", false)] {
            let way = Route::example(own.parse().unwrap(), "eth0");
            assert_eq!(wins(&way, address, &routed), expected, "{own}");
        }
    }

    #[test]
    fn only_what_lies_in_a_routed_network_is_swallowed() {
        let needed = ["10.96.0.10".parse().unwrap(), "203.0.113.2".parse().unwrap()];
        let routed = ["10.96.0.0/16".parse().unwrap()];
        assert_eq!(swallowed(&needed, &routed).collect::<Vec<_>>(), [needed[0]]);
    }

    #[test]
    fn the_most_specific_route_with_the_lowest_metric_is_the_way() {
        let mut wifi = Route::example("0.0.0.0/0".parse().unwrap(), "wlan0");
        wifi.metric = 600;
        let mut cable = Route::example("0.0.0.0/0".parse().unwrap(), "eth0");
        cable.metric = 100;
        let lan = Route::example("10.96.0.0/24".parse().unwrap(), "eth1");
        let routes = [wifi, cable, lan];
        assert_eq!(way("10.96.0.10".parse().unwrap(), &routes).unwrap().device, "eth1");
        assert_eq!(way("10.96.1.10".parse().unwrap(), &routes).unwrap().device, "eth0");
        assert!(way("fd00::1".parse().unwrap(), &routes).is_none());
    }
}
