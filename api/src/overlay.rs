//! Addresses of the overlay itself: small fixed facts that both ends agree on.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Default IPv4 pool of the overlay: the top of the shared address space (RFC 6598), which neither
/// homes nor clusters number their hosts from.
pub const DEFAULT_POOL_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 127, 0, 0), 16);

/// Default IPv6 pool of the overlay: a unique local prefix (RFC 4193) that spells `tpd`.
pub const DEFAULT_POOL_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd74, 0x7064, 0, 0, 0, 0, 0, 0), 64);

/// MTU inside the overlay, bytes: 1500 less IPv6 (40), UDP (8) and WireGuard (32), as WireGuard itself sets it.
pub const MTU: u16 = 1420;

/// UDP port of the gateway address that speaks the control channel inside the tunnel.
pub const CONTROL_PORT: u16 = 1;

/// Port of the gateway address that answers DNS as the manager's pod would ask it.
pub const DNS_PORT: u16 = 53;

/// A pair of addresses, one per family, of one place in the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DualAddress {
    /// IPv4 address.
    pub ipv4: Ipv4Addr,
    /// IPv6 address.
    pub ipv6: Ipv6Addr,
}

/// The address of the manager within a pool: its first host address in either family.
#[must_use]
pub fn gateway(v4: Ipv4Net, v6: Ipv6Net) -> DualAddress {
    DualAddress {
        ipv4: Ipv4Addr::from(u32::from(v4.network()) + 1),
        ipv6: Ipv6Addr::from(u128::from(v6.network()) + 1),
    }
}
