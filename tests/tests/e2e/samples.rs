//! Addresses of the sample workloads (`tests/kubernetes/manifests/samples/`), as sockets want them.

use std::net::{IpAddr, SocketAddr};

use tpd_api::local::PathKind;
use tpd_tests::Laptop;

/// Every kind of path.
pub(crate) const PATHS: [PathKind; 3] = [PathKind::Proxy, PathKind::Forward, PathKind::Udp];

/// A port of the Service `shop/echo`, IPv4.
pub(crate) fn echo(laptop: &Laptop, port: u16) -> SocketAddr {
    SocketAddr::new(echo_addresses(laptop)[0], port)
}

/// The addresses of the Service `shop/echo`, IPv4 first.
pub(crate) fn echo_addresses(laptop: &Laptop) -> Vec<IpAddr> {
    laptop.cluster.service("shop/echo")
}

/// The addresses of one pod behind it, IPv4 first.
pub(crate) fn echo_pod(laptop: &Laptop) -> Vec<IpAddr> {
    laptop.cluster.pods("shop", "app=echo").remove(0)
}
