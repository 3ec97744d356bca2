//! The data plane as the rest of the daemon sees it.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv6Net};
use tpd_api::exit::ExitCode;
use tpd_api::inject::AGENT_SERVICE_PORT;
use tpd_api::intercept::Protocol;
use tpd_api::local;
use tpd_api::overlay::{CONTROL_PORT, DNS_PORT, DualAddress, MTU};
use tpd_api::session::{ClientSessionStatus, Endpoint};
use tpd_netstack::client::{Config, Lane, Status};
use tpd_netstack::control::Hello;
use tpd_netstack::flow;
use tpd_netstack::key::PrivateKey;
use tpd_netstack::path::PathPolicy;
use tpd_netstack::tun::{self, OpenError, Tun};

pub(crate) use tpd_netstack::path::{BoxStream, DialError, PathKind, StreamDialer};

use crate::failure::Failure;
use crate::path::{Forward, Proxy, Replicas};

/// Name of the TUN device. There is one daemon per machine, and so one device.
pub(crate) const TUN_NAME: &str = "tpd0";

/// Time to resolve a load balancer's name. It delays the UDP path only.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) fn open_tun() -> Result<Tun, Failure> {
    tun::open(TUN_NAME, MTU).map_err(|error| {
        let help = match &error {
            OpenError::Missing => {
                "load the driver (modprobe tun), or give the container the device: --device /dev/net/tun"
            }
            OpenError::Forbidden => {
                "run tpd up with sudo; in a container add the capability: --cap-add NET_ADMIN"
            }
            OpenError::Other(_) => "check that no other program uses the device tpd0: ip link show tpd0",
        };
        Failure::new(ExitCode::NoTun, "this machine has no usable TUN device").caused_by(&error).help(help)
    })
}

/// What a lane is started with.
pub(crate) struct Start<'a> {
    pub(crate) tun: Tun,
    pub(crate) key: PrivateKey,
    pub(crate) status: &'a ClientSessionStatus,
    pub(crate) replicas: &'a Replicas,
    pub(crate) only: Option<local::PathKind>,
    pub(crate) udp: Vec<SocketAddr>,
}

/// Starts the lane; it dials at once.
pub(crate) fn start(start: Start<'_>) -> Result<Lane, Failure> {
    let corrupt = |what: &str| {
        Failure::new(ExitCode::Failure, format!("the manager's answer has {what}"))
            .help("use the same version of tpd on the laptop and in the cluster; tpd version shows both")
    };
    let manager_key = start.status.manager_key.parse().map_err(|_| corrupt("no valid WireGuard key"))?;
    let address = start.status.address.ok_or_else(|| corrupt("no address for us"))?;
    let gateway = start.status.gateway.ok_or_else(|| corrupt("no address of its own"))?;
    let policy = start.only.map_or(PathPolicy::Auto, |kind| PathPolicy::Only(from_api(kind)));
    let dialers: [Arc<dyn StreamDialer>; 2] =
        [Arc::new(Proxy(start.replicas.clone())), Arc::new(Forward(start.replicas.clone()))];
    Lane::spawn(Config {
        tun: start.tun,
        private_key: start.key,
        manager_key,
        address: both(address).to_vec(),
        gateway: both(gateway).to_vec(),
        control_port: CONTROL_PORT,
        allowed: allowed(start.status),
        agents: agents(start.status),
        kernel_ports: vec![DNS_PORT, AGENT_SERVICE_PORT],
        streams: dialers.into_iter().filter(|dialer| policy.allows(dialer.kind())).collect(),
        udp: if policy.allows(PathKind::Udp) { start.udp } else { Vec::new() },
        policy,
        hello: Hello {
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            version: env!("CARGO_PKG_VERSION").into(),
            instance: u64::from(std::process::id()),
            features: Vec::new(),
        },
    })
    .map_err(|error| Failure::new(ExitCode::Failure, "the data plane cannot be started").caused_by(&error))
}

pub(crate) fn both(address: DualAddress) -> [IpAddr; 2] {
    [address.ipv4.into(), address.ipv6.into()]
}

/// Whom the manager may speak for: pods, services and itself. The lane adds the agents.
pub(crate) fn allowed(status: &ClientSessionStatus) -> Vec<IpNet> {
    let gateway = status.gateway.into_iter().flat_map(both).map(IpNet::from);
    status.networks.all().chain(gateway).collect()
}

/// The overlay addresses of agents: those of the pool, a /64, whose interface identifier begins with a one.
pub(crate) fn agents(status: &ClientSessionStatus) -> Option<Ipv6Net> {
    let pool = status.gateway?.ipv6.to_bits() >> 64 << 64;
    Ipv6Net::new(Ipv6Addr::from_bits(pool | 1 << 63), 65).ok()
}

/// What is behind each overlay port, as the lane takes it.
pub(crate) fn targets(
    targets: &BTreeMap<(Protocol, u16), SocketAddr>,
) -> HashMap<(flow::Protocol, u16), SocketAddr> {
    let protocol = |protocol| match protocol {
        Protocol::Tcp => flow::Protocol::Tcp,
        Protocol::Udp => flow::Protocol::Udp,
    };
    targets.iter().map(|(&(transport, port), &local)| ((protocol(transport), port), local)).collect()
}

/// The addresses where a replica may be reached by UDP. A path to another replica would not have our flows, so only
/// those of the one that carries the session are of use; before there is one, those of the preferred one.
pub(crate) async fn udp_candidates(endpoints: &[Endpoint], pod: Option<&str>) -> Vec<SocketAddr> {
    let carrying = pod.and_then(|pod| endpoints.iter().find(|endpoint| endpoint.pod == pod));
    let Some(endpoint) = carrying.or_else(|| endpoints.first()) else { return Vec::new() };
    let mut found = Vec::new();
    for text in &endpoint.udp {
        if let Ok(address) = text.parse() {
            found.push(address);
        } else if let Ok(Ok(addresses)) =
            tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(text)).await
        {
            found.extend(addresses);
        }
    }
    found
}

fn from_api(kind: local::PathKind) -> PathKind {
    match kind {
        local::PathKind::Udp => PathKind::Udp,
        local::PathKind::Proxy => PathKind::Proxy,
        local::PathKind::Forward => PathKind::Forward,
    }
}

pub(crate) fn to_api(kind: PathKind) -> local::PathKind {
    match kind {
        PathKind::Udp => local::PathKind::Udp,
        PathKind::Proxy => local::PathKind::Proxy,
        PathKind::Forward => local::PathKind::Forward,
    }
}

/// The paths and the traffic as `tpd status` shows them.
pub(crate) fn describe(lane: &Status) -> (Vec<local::Path>, local::Traffic) {
    let paths = lane
        .paths
        .iter()
        .map(|path| local::Path {
            kind: to_api(path.kind),
            target: path.target.clone(),
            active: path.active,
            reason: path.reason.clone(),
            rtt_ms: path.rtt.map(|rtt| rtt.as_secs_f64() * 1000.0),
        })
        .collect();
    let drops = lane.drops;
    let traffic = local::Traffic {
        sent_bytes: lane.traffic.sent_bytes,
        received_bytes: lane.traffic.received_bytes,
        sent_packets: lane.traffic.sent_packets,
        received_packets: lane.traffic.received_packets,
        dropped_packets: drops.garbage
            + drops.forged
            + drops.replayed
            + drops.no_session
            + drops.under_load
            + drops.unknown_peer
            + drops.spoofed
            + drops.no_path
            + drops.unsent,
    };
    (paths, traffic)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(pod: &str, udp: &[&str]) -> Endpoint {
        Endpoint { pod: pod.into(), port: 8443, udp: udp.iter().map(|text| (*text).into()).collect() }
    }

    #[test]
    fn agents_have_the_upper_half_of_the_pool() {
        let gateway = DualAddress { ipv4: [100, 127, 0, 1].into(), ipv6: "fd74:7064::1".parse().unwrap() };
        let status = ClientSessionStatus { gateway: Some(gateway), ..ClientSessionStatus::default() };
        assert_eq!(agents(&status).unwrap().to_string(), "fd74:7064:0:0:8000::/65");
    }

    #[tokio::test]
    async fn udp_goes_to_the_replica_that_has_our_flows() {
        let endpoints = [endpoint("a", &["192.0.2.1:1", "[2001:db8::1]:1"]), endpoint("b", &["192.0.2.2:2"])];
        assert_eq!(udp_candidates(&endpoints, Some("b")).await, ["192.0.2.2:2".parse().unwrap()]);
        assert_eq!(udp_candidates(&endpoints, None).await.len(), 2);
        assert_eq!(udp_candidates(&endpoints, Some("gone")).await.len(), 2);
        assert!(udp_candidates(&[], None).await.is_empty());
    }
}
