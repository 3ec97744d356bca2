//! The agents' overlay addresses: derived from the UIDs of their pods, so that every replica knows them without asking.

use std::net::Ipv6Addr;

use ipnet::Ipv6Net;

use crate::manager::pool::fnv1a;

/// The half of the pool that agents are numbered from: the host part's top bit is set. Sessions have host numbers of at most
/// 24 bits, and a pool at least 32 of them, so that the two never meet.
#[must_use]
pub fn range(pool: Ipv6Net) -> Ipv6Net {
    let top = 1 << (127 - pool.prefix_len());
    Ipv6Net::new(Ipv6Addr::from(u128::from(pool.network()) | top), pool.prefix_len() + 1)
        .expect("one bit longer than a pool's prefix, which leaves 32")
}

/// The address of the agent in a pod. Of a /64, 63 bits tell agents apart: a thousand of them meet by chance once in 10^13
/// clusters.
#[must_use]
pub fn of(pool: Ipv6Net, pod_uid: &str) -> Ipv6Addr {
    let range = range(pool);
    let host = u128::from(fnv1a(pod_uid)) & u128::from(range.hostmask());
    Ipv6Addr::from(u128::from(range.network()) | host)
}

#[cfg(test)]
mod tests {
    use tpd_api::overlay::DEFAULT_POOL_V6;

    use super::{of, range};

    #[test]
    fn the_same_pod_has_the_same_address() {
        let uid = "0a6c3b4e-5f0d-4d52-9d0c-3f8a4c3f7c11";
        assert_eq!(of(DEFAULT_POOL_V6, uid), of(DEFAULT_POOL_V6, uid));
        assert_ne!(of(DEFAULT_POOL_V6, uid), of(DEFAULT_POOL_V6, "another"));
    }

    #[test]
    fn agents_and_sessions_never_meet() {
        assert_eq!(range(DEFAULT_POOL_V6).to_string(), "fd74:7064:0:0:8000::/65");
        for pool in ["fd74:7064::/64", "fd09::/16", "fd09::/96"] {
            let pool = pool.parse().unwrap();
            for uid in ["a", "b", "0a6c3b4e-5f0d-4d52-9d0c-3f8a4c3f7c11"] {
                let address = of(pool, uid);
                assert!(pool.contains(&address) && range(pool).contains(&address), "{address}");
                assert!(u128::from(address) - u128::from(pool.network()) > 1 << 24, "{address}");
            }
        }
    }
}
