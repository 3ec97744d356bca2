//! Addresses and routes through the kernel's route netlink.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::{Error, Handle, LinkUnspec, RouteMessageBuilder};

/// Marks every route of ours, so that they are found after a crash. Not in use by anyone in iproute2's `rt_protos`.
const OURS: RouteProtocol = RouteProtocol::Other(116);

/// The table that programs add routes to.
const MAIN_TABLE: u32 = 254;

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) network: IpNet,
    pub(crate) device: String,
    /// Lower is preferred.
    pub(crate) metric: u32,
    message: RouteMessage,
}

#[cfg(test)]
impl Route {
    pub(crate) fn example(network: IpNet, device: &str) -> Self {
        Self { network, device: device.into(), metric: 0, message: RouteMessage::default() }
    }
}

impl Route {
    fn is_ours(&self) -> bool {
        self.message.header.protocol == OURS
    }
}

/// A connection to the kernel. Its task ends with the runtime.
#[derive(Clone, Debug)]
pub(crate) struct Netlink(Handle);

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// The laptop's own routes: unicast, main table, neither ours nor on `tun`.
    pub(crate) async fn own_routes(&self, tun: Option<u32>) -> io::Result<Vec<Route>> {
        let routes = self.dump().await?;
        Ok(routes
            .into_iter()
            .filter(|route| !route.is_ours() && (tun.is_none() || device(&route.message) != tun))
            .collect())
    }

    async fn dump(&self) -> io::Result<Vec<Route>> {
        let names = self.device_names().await?;
        let mut routes = Vec::new();
        // One dump at a time: the kernel answers a second one on the same socket with EBUSY.
        for message in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let found: Vec<_> = self.0.route().get(message).execute().try_collect().await.map_err(to_io)?;
            routes.extend(found.into_iter().filter_map(|message| parse(message, &names)));
        }
        Ok(routes)
    }

    async fn device_names(&self) -> io::Result<HashMap<u32, String>> {
        let links: Vec<_> = self.0.link().get().execute().try_collect().await.map_err(to_io)?;
        let name = |attributes: Vec<LinkAttribute>| {
            attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            })
        };
        Ok(links.into_iter().filter_map(|link| Some((link.header.index, name(link.attributes)?))).collect())
    }

    /// Gives the TUN its addresses and switches it on. Answers those that the kernel would not take, with its reason:
    /// a machine may have IPv6 turned off.
    pub(crate) async fn configure(
        &self,
        index: u32,
        name: &str,
        addresses: &[IpAddr],
    ) -> io::Result<Vec<(IpAddr, io::Error)>> {
        // No link-local address and no router solicitations; where there is no IPv6 there is nothing to turn off.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/addr_gen_mode"), "1");
        self.0.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.map_err(to_io)?;
        let mut refused = Vec::new();
        for &address in addresses {
            let mut request = self.0.address().add(index, address, host_prefix(address));
            // Nobody shares the tunnel, so a check for duplicates would only delay the first packet by a second.
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            match request.execute().await.map_err(to_io) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) if address.is_ipv6() => refused.push((address, error)),
                Err(error) => return Err(error),
            }
        }
        Ok(refused)
    }

    /// Routes `network` to the TUN. Asks for bbr, which holds its rate where packets are lost; kernels without it keep
    /// their default.
    pub(crate) async fn add_tunnel_route(
        &self,
        index: u32,
        network: IpNet,
        source: IpAddr,
        mtu: u16,
    ) -> io::Result<()> {
        let mtu = RouteMetric::Mtu(u32::from(mtu));
        let bbr = RouteMetric::CcAlgo("bbr".into());
        let mut message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(network.addr(), network.prefix_len())
            .and_then(|builder| builder.pref_source(source))
            .map_err(io::Error::other)?
            .output_interface(index)
            .scope(if network.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe })
            .protocol(OURS)
            .build();
        message.attributes.push(RouteAttribute::Metrics(vec![mtu.clone(), bbr]));
        if self.replace(message.clone()).await.is_ok() {
            return Ok(());
        }
        message.attributes.pop();
        message.attributes.push(RouteAttribute::Metrics(vec![mtu]));
        self.replace(message).await
    }

    pub(crate) async fn remove_tunnel_route(&self, index: u32, network: IpNet) -> io::Result<()> {
        let message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(network.addr(), network.prefix_len())
            .map_err(io::Error::other)?
            .output_interface(index)
            .scope(RouteScope::NoWhere)
            .protocol(OURS)
            .build();
        ignore_missing(self.0.route().del(message).execute().await.map_err(to_io))
    }

    /// A host route that keeps `address` on the way it has now, whatever is routed to the tunnel.
    pub(crate) async fn add_exception(&self, address: IpAddr, way: &Route) -> io::Result<()> {
        let mut message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(address, host_prefix(address))
            .map_err(io::Error::other)?
            .protocol(OURS)
            .build();
        let hops = way.message.attributes.iter().filter(|attribute| is_hop(attribute));
        message.attributes.extend(hops.cloned());
        let direct = !message.attributes.iter().any(|attribute| {
            matches!(
                attribute,
                RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
            )
        });
        if direct && address.is_ipv4() {
            message.header.scope = RouteScope::Link;
        }
        self.replace(message).await
    }

    /// Removes every route of ours, also those of a daemon that was killed.
    pub(crate) async fn remove_ours(&self) -> io::Result<usize> {
        let mut removed = 0;
        for route in self.dump().await?.into_iter().filter(Route::is_ours) {
            ignore_missing(self.0.route().del(route.message).execute().await.map_err(to_io))?;
            removed += 1;
        }
        Ok(removed)
    }

    async fn replace(&self, message: RouteMessage) -> io::Result<()> {
        self.0.route().add(message).replace().execute().await.map_err(to_io)
    }
}

fn parse(message: RouteMessage, names: &HashMap<u32, String>) -> Option<Route> {
    if message.header.kind != RouteType::Unicast || table(&message) != MAIN_TABLE {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    let address = address.unwrap_or(match message.header.address_family {
        rtnetlink::packet_route::AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    });
    let network = IpNet::new(address, message.header.destination_prefix_length).ok()?;
    let metric = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    // Link-local and multicast networks are on every device and nobody's in particular.
    let everywhere = match network.addr() {
        IpAddr::V4(address) => address.is_link_local() || address.is_multicast(),
        IpAddr::V6(address) => address.is_unicast_link_local() || address.is_multicast(),
    };
    let device = device(&message).and_then(|index| names.get(&index).cloned()).unwrap_or_else(|| "?".into());
    (!everywhere).then_some(Route { network, device, metric: metric.unwrap_or(0), message })
}

fn table(message: &RouteMessage) -> u32 {
    let attribute = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or_else(|| u32::from(message.header.table))
}

fn device(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

fn is_hop(attribute: &RouteAttribute) -> bool {
    matches!(
        attribute,
        RouteAttribute::Gateway(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::Oif(_)
            | RouteAttribute::MultiPath(_)
    )
}

fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn to_io(error: Error) -> io::Error {
    match error {
        Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// ESRCH and ENODEV: somebody was quicker, or the device is gone and its routes with it.
fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    use rustix::io::Errno;
    match result {
        Err(error)
            if [Errno::SRCH, Errno::NODEV, Errno::NOENT]
                .iter()
                .any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) =>
        {
            Ok(())
        }
        other => other,
    }
}
