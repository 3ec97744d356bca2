//! Laptops that did not answer, and are left out until something is heard of them: production waits for none of them twice.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Who is left out.
#[derive(Debug, Default)]
pub struct Suspensions {
    /// Nothing came from there at all.
    laptops: BTreeSet<IpAddr>,
    /// Nothing listens there.
    ports: BTreeSet<SocketAddr>,
}

impl Suspensions {
    /// Whether a laptop's port is left out.
    #[must_use]
    pub fn is_suspended(&self, target: SocketAddr) -> bool {
        self.ports.contains(&target) || self.laptops.contains(&target.ip())
    }

    /// A laptop refused a connection to one of its ports.
    pub fn refused(&mut self, target: SocketAddr) {
        self.ports.insert(target);
    }

    /// A laptop did not answer in time.
    pub fn silent(&mut self, target: SocketAddr) {
        self.laptops.insert(target.ip());
    }

    /// A manager has begun to carry a laptop: it is tried again.
    pub fn heard(&mut self, laptop: Ipv6Addr) {
        self.laptops.remove(&laptop.into());
        self.ports.retain(|port| port.ip() != laptop);
    }

    /// A laptop has given a sign of life.
    pub fn answered(&mut self, laptop: Ipv6Addr) {
        self.laptops.remove(&laptop.into());
    }

    /// A connection was made.
    pub fn proved(&mut self, target: SocketAddr) {
        self.laptops.remove(&target.ip());
        self.ports.remove(&target);
    }

    /// Forgets all but these laptops.
    pub fn retain(&mut self, laptops: &BTreeSet<Ipv6Addr>) {
        let known = |address: IpAddr| matches!(address, IpAddr::V6(laptop) if laptops.contains(&laptop));
        self.laptops.retain(|laptop| known(*laptop));
        self.ports.retain(|port| known(port.ip()));
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, SocketAddr};

    use super::Suspensions;

    #[test]
    fn who_refuses_is_left_out_at_that_port_and_who_is_silent_at_all() {
        let laptop: Ipv6Addr = "fd74::2".parse().unwrap();
        let (one, two) = (SocketAddr::from((laptop, 1)), SocketAddr::from((laptop, 2)));
        let mut suspensions = Suspensions::default();
        suspensions.refused(one);
        assert!(suspensions.is_suspended(one) && !suspensions.is_suspended(two));
        suspensions.silent(two);
        assert!(suspensions.is_suspended(two));
        suspensions.proved(two);
        assert!(suspensions.is_suspended(one) && !suspensions.is_suspended(two));
        suspensions.silent(two);
        suspensions.answered(laptop);
        assert!(suspensions.is_suspended(one) && !suspensions.is_suspended(two));
        suspensions.silent(two);
        suspensions.heard(laptop);
        assert!(!suspensions.is_suspended(one) && !suspensions.is_suspended(two));
        suspensions.silent(one);
        suspensions.retain(&[laptop].into());
        assert!(suspensions.is_suspended(one));
        suspensions.retain(&["fd74::3".parse().unwrap()].into());
        assert!(!suspensions.is_suspended(one));
    }
}
