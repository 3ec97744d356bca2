//! What the TUN carries, and what must stay out of it.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Netlink, way};

/// The TUN's addresses and routes, and the exceptions from them.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) netlink: Netlink,
    pub(crate) index: u32,
    pub(crate) mtu: u16,
    /// Our addresses that the kernel took.
    pub(crate) addresses: Vec<IpAddr>,
    routed: Vec<IpNet>,
    /// Networks beside those, each for as long as it is wanted.
    reached: Vec<IpNet>,
}

impl Network {
    pub(crate) fn new(netlink: Netlink, index: u32, mtu: u16, addresses: Vec<IpAddr>) -> Self {
        Self { netlink, index, mtu, addresses, routed: Vec::new(), reached: Vec::new() }
    }

    /// Routes exactly these networks to the TUN, except for `needed`. Answers those that could not be routed.
    pub(crate) async fn route(&mut self, networks: &[IpNet], needed: &[IpAddr]) -> Vec<(IpNet, io::Error)> {
        // First the exceptions, so that not one packet of the tunnel's own goes astray.
        self.except(needed, networks).await;
        for &gone in self.routed.iter().filter(|network| !networks.contains(network)) {
            if let Err(error) = self.netlink.remove_tunnel_route(self.index, gone).await {
                tracing::warn!(network = %gone, %error, "route not removed");
            }
        }
        let mut refused = Vec::new();
        for &network in networks {
            if let Err(error) = self.add(network).await {
                refused.push((network, error));
            }
        }
        self.routed = networks
            .iter()
            .copied()
            .filter(|network| refused.iter().all(|(other, _)| other != network))
            .collect();
        refused
    }

    async fn add(&self, network: IpNet) -> io::Result<()> {
        let source = self.addresses.iter().find(|address| address.is_ipv4() == network.addr().is_ipv4());
        let Some(&source) = source else {
            return Err(io::Error::other("IPv6 is turned off on this machine"));
        };
        self.netlink.add_tunnel_route(self.index, network, source, self.mtu).await
    }

    /// Routes one more network of the overlay's own to the TUN for as long as it is `wanted`.
    pub(crate) async fn reach(&mut self, network: IpNet, wanted: bool) {
        let changed = match (wanted, self.reached.contains(&network)) {
            (true, false) => self.add(network).await,
            (false, true) => self.netlink.remove_tunnel_route(self.index, network).await,
            _ => return,
        };
        match changed {
            Ok(()) if wanted => self.reached.push(network),
            Ok(()) => self.reached.retain(|other| *other != network),
            Err(error) => tracing::warn!(%network, wanted, %error, "route not changed"),
        }
    }

    /// Keeps what the tunnel needs out of it. Called again when the way changes: another Wi-Fi, a VPN.
    pub(crate) async fn except(&self, needed: &[IpAddr], networks: &[IpNet]) {
        let swallowed: Vec<_> = way::swallowed(needed, networks).collect();
        if swallowed.is_empty() {
            return;
        }
        let routes = match self.netlink.own_routes(Some(self.index)).await {
            Ok(routes) => routes,
            Err(error) => {
                tracing::warn!(%error, "routes cannot be read");
                return;
            }
        };
        for address in swallowed {
            let way = way::way(address, &routes).filter(|way| !way::wins(way, address, networks));
            let Some(way) = way else { continue };
            match self.netlink.add_exception(address, way).await {
                Ok(()) => tracing::info!(%address, device = way.device, "kept out of the tunnel"),
                Err(error) => tracing::warn!(%address, %error, "not kept out of the tunnel"),
            }
        }
    }

    pub(crate) fn routed(&self) -> &[IpNet] {
        &self.routed
    }
}
