//! The overlay lane as the rest of the manager sees it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use anyhow::Context as _;
use bytes::Bytes;
use ipnet::Ipv6Net;
use socket2::{Domain, Protocol as Transport, Socket, Type};
use tokio::sync::watch;
use tokio::time::Instant;
use tpd_api::overlay::{CONTROL_PORT, MTU};
use tpd_netstack::control::Hello;
use tpd_netstack::flow::{self, Limits, Protocol, Route};
use tpd_netstack::key::{PrivateKey, PublicKey};
use tpd_netstack::server::{Config as LaneConfig, Hub, Lane, Pair};

use super::agents::address;
use super::collect::Report;
use super::config::Config;
use super::policy::Policy;

pub use tpd_netstack::server::Snapshot;

/// The lane, its policy, and what is remembered of its peers.
pub struct Overlay {
    lane: Lane,
    policy: Arc<Shared>,
    started: Instant,
    /// When each key last had a handshake. WireGuard forgets its session after nine minutes; this does not.
    heard: Mutex<HashMap<PublicKey, Instant>>,
}

impl fmt::Debug for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overlay").finish_non_exhaustive()
    }
}

/// Takes the UDP port, on every IPv4 address where the wildcard of IPv6 cannot be had.
///
/// # Errors
/// Fails where the port is taken.
pub fn bind(address: SocketAddr) -> anyhow::Result<UdpSocket> {
    let socket = match dual_stack(address) {
        Err(_) if address.ip().is_unspecified() => dual_stack((Ipv4Addr::UNSPECIFIED, address.port()).into()),
        result => result,
    };
    socket.with_context(|| format!("take UDP {address}"))
}

fn dual_stack(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Transport::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

impl Overlay {
    /// Starts the lane. Nobody may speak and nothing may be dialled yet.
    ///
    /// # Errors
    /// Fails where a thread cannot be had.
    pub fn start(config: &Config, private_key: PrivateKey, udp: UdpSocket) -> anyhow::Result<Self> {
        let gateway = config.gateway();
        let gateway = vec![IpAddr::V4(gateway.ipv4), IpAddr::V6(gateway.ipv6)];
        let policy = Arc::new(Shared { agents: address::range(config.pool_v6), policy: RwLock::default() });
        let hello = Hello {
            name: config.pod_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: RandomState::new().hash_one(&config.pod_uid),
            features: Vec::new(),
        };
        let lane = Lane::spawn(LaneConfig {
            private_key,
            udp,
            control_port: CONTROL_PORT,
            policy: Arc::clone(&policy) as Arc<dyn flow::Policy>,
            limits: Limits { mtu: MTU, reporters: gateway.clone(), ..Limits::default() },
            gateway,
            hello,
        });
        let lane = lane.context("start the overlay lane")?;
        Ok(Self { lane, policy, started: Instant::now(), heard: Mutex::default() })
    }

    /// What may be dialled from now on.
    pub fn set_policy(&self, policy: Policy) {
        let mut current = self.policy.policy.write().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref() != Some(&policy) {
            *current = Some(policy);
        }
    }

    /// Lets a peer speak, from these addresses only.
    pub fn admit(&self, key: PublicKey, addresses: Vec<IpAddr>) {
        self.lane.upsert_peer(key, addresses);
    }

    /// Ends a peer, with its flows and streams.
    pub fn dismiss(&self, key: PublicKey) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        self.lane.remove_peer(key);
    }

    /// What may pass between agents and laptops from now on; nothing else does.
    pub fn set_pairs(&self, pairs: Vec<Pair>) {
        self.lane.set_hub(Hub { pairs });
    }

    /// Keys of the laptops that are heard through this manager.
    #[must_use]
    pub fn carried(&self) -> watch::Receiver<BTreeSet<PublicKey>> {
        self.lane.carried()
    }

    /// Takes over a connection that carries frames from now on.
    pub fn attach(&self, stream: std::net::TcpStream, already_read: Bytes) {
        self.lane.attach_stream(stream, already_read);
    }

    /// What the lane counts; `None` when it has ended.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        self.lane.snapshot().await
    }

    /// Who has been heard, and when; `None` when the lane has ended.
    pub async fn report(&self) -> Option<Report> {
        let snapshot = self.snapshot().await?;
        let now = Instant::now();
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        for peer in &snapshot.peers {
            if let Some(at) = peer.handshake_age.and_then(|age| now.checked_sub(age)) {
                heard.insert(peer.key, at);
            }
        }
        let ages = heard.iter().map(|(key, at)| (key.to_string(), (now - *at).as_secs()));
        Some(Report { uptime: self.started.elapsed().as_secs(), handshakes: ages.collect() })
    }

    /// Closes every stream and ends the lane.
    pub fn shutdown(&self) {
        self.lane.shutdown();
    }
}

/// The policy in force. It is asked once a flow and replaced now and then, so the lock is next to never waited for.
struct Shared {
    /// Addresses of agents, which have no business with the cluster's networks: they are in them.
    agents: Ipv6Net,
    policy: RwLock<Option<Policy>>,
}

impl flow::Policy for Shared {
    fn route(&self, protocol: Protocol, source: IpAddr, destination: SocketAddr) -> Route {
        if matches!(source, IpAddr::V6(source) if self.agents.contains(&source)) {
            return Route::Prohibited;
        }
        match self.policy.read().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(policy) => policy.route(protocol, destination),
            // Nothing is known yet; the sender tries again.
            None => Route::Drop,
        }
    }
}
