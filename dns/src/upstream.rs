//! Questions that are none of the cluster's: for the resolver that the system used before.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use tokio::sync::watch;

use crate::{exchange::Transport, relay::Relay, servers::Failure, stats::Counters, wire::Query};

#[derive(Debug)]
pub(crate) struct Upstream {
    servers: watch::Receiver<Arc<[SocketAddr]>>,
    /// Where the proxy itself listens. A resolv.conf that a lost takeover left behind may name it.
    own: Vec<IpAddr>,
    counters: Arc<Counters>,
    relay: Relay,
}

impl Upstream {
    pub(crate) fn new(
        servers: watch::Receiver<Arc<[SocketAddr]>>,
        own: Vec<IpAddr>,
        counters: Arc<Counters>,
    ) -> Self {
        Self { servers, own, counters, relay: Relay::new() }
    }

    /// The old resolver's own reply to `query`.
    pub(crate) async fn relay(&self, query: &Query, transport: Transport) -> Result<Vec<u8>, Failure> {
        self.counters.upstream.fetch_add(1, Relaxed);
        self.relay.ask(&self.others(), query, transport).await
    }

    fn others(&self) -> Vec<SocketAddr> {
        self.servers.borrow().iter().filter(|server| !self.own.contains(&server.ip())).copied().collect()
    }
}
