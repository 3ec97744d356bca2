//! From a kubeconfig to a connection that has proved itself, with no wait that could be had in parallel.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tpd_api::exit::ExitCode;
use tpd_api::local::{self, Excluded};
use tpd_api::overlay::MTU;
use tpd_api::session::{ClientSession, ClientSessionStatus};
use tpd_netstack::key::PrivateKey;

use super::board::Board;
use super::live::Live;
use super::prove;
use super::report::Reporter;
use crate::dns::{self, Dns};
use crate::failure::Failure;
use crate::intercept::{Keeper, Place};
use crate::kube::cluster::Cluster;
use crate::kube::errors;
use crate::kube::follow::{Change, Follow};
use crate::kube::identity;
use crate::kube::session::{self, CALL_TIMEOUT, Sessions};
use crate::net::network::Network;
use crate::net::{Netlink, overlap};
use crate::overlay;
use crate::path::Replicas;

/// A manager answers within milliseconds; one that is just being started or replaced has this long.
const READY_TIMEOUT: Duration = Duration::from_secs(15);

/// After this long without an answer a person is told what is being waited for.
const SILENCE: Duration = Duration::from_secs(1);

/// Changes of one session that may wait; the follower pauses when they do.
const CHANGES: usize = 8;

/// What a connection is made from; the same for every attempt.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) request: local::Request,
    pub(crate) uid: u32,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) board: Arc<Board>,
    pub(crate) keeper: Arc<Keeper>,
    pub(crate) reporter: Reporter,
}

/// A connection that works, as far as its parts need to be followed.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) changes: mpsc::Receiver<Change<ClientSession>>,
    pub(crate) status: ClientSessionStatus,
    pub(crate) replicas: Replicas,
    pub(crate) needs: Needs,
}

/// Addresses that the tunnel itself needs and that therefore never go into it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    pub(crate) api_server: Vec<IpAddr>,
    pub(crate) udp: Vec<SocketAddr>,
    pub(crate) resolvers: Vec<IpAddr>,
}

impl Needs {
    pub(crate) fn all(&self) -> Vec<IpAddr> {
        let udp = self.udp.iter().map(SocketAddr::ip);
        self.api_server.iter().chain(&self.resolvers).copied().chain(udp).collect()
    }
}

impl Setup {
    /// Connects. Whatever was set up is in `live`, also when it fails half-way.
    pub(crate) async fn connect(&self, live: &mut Live) -> Result<Connection, Failure> {
        self.reporter.step("contacting the API server");
        let tun = overlay::open_tun()?;
        let netlink =
            Netlink::open().map_err(|error| cannot("the kernel's routes cannot be reached", &error))?;
        let key = PrivateKey::generate().map_err(|error| cannot("no WireGuard key can be made", &error))?;
        let (owner, api_server) = tokio::try_join!(self.whoami(), self.cluster.addresses())?;

        self.reporter.step("registering with the manager");
        let mut changes = self.register(&owner, &key, live).await?;
        let status = self.await_ready(&mut changes).await?;
        let plan = self.plan(&netlink, tun.index(), &status).await?;

        self.reporter.step("opening the tunnel");
        let replicas = Replicas::new(
            Arc::clone(&self.cluster),
            &self.request.manager_namespace,
            status.endpoints.clone(),
        );
        let udp = overlay::udp_candidates(&status.endpoints, None).await;
        let (index, name) = (tun.index(), tun.name().to_owned());
        let described = local::Tun { name: name.clone(), mtu: MTU, offload: tun.offload().to_string() };
        self.board.update(|board| board.tun = Some(described));
        let lane = live.lane.insert(overlay::start(overlay::Start {
            tun,
            key,
            status: &status,
            replicas: &replicas,
            only: self.request.path,
            udp: udp.clone(),
        })?);
        let lane_status = lane.status();
        self.board.attach_lane(Some(lane_status.clone()));

        let mut needs = Needs { api_server, udp, resolvers: Vec::new() };
        let network = live.network.insert(self.configure(netlink, index, &name, &status).await?);
        let own = network.addresses.clone();
        self.route(network, &plan, &needs).await;

        let dns = live.dns.insert(self.start_dns(&status, own.clone(), index).await?);
        self.board.attach_dns(Some(dns.watch()));
        needs.resolvers = dns.upstreams();
        network.except(&needs.all(), &plan.routes).await;

        self.reporter.step("proving the connection");
        let proof = prove::Proof {
            lane: lane_status,
            request: &self.request,
            zone: &status.zone,
            own: &own,
            user: &owner,
        };
        proof.seek().await?;
        Ok(Connection { changes, status, replicas, needs })
    }

    async fn whoami(&self) -> Result<String, Failure> {
        let client = self.cluster.client().await?;
        let owner =
            identity::whoami(client, &self.request.server, &self.request.manager_namespace, CALL_TIMEOUT)
                .await?;
        self.board.update(|board| board.user = Some(owner.clone()));
        Ok(owner)
    }

    /// Creates the session and begins to follow it.
    async fn register(
        &self,
        owner: &str,
        key: &PrivateKey,
        live: &mut Live,
    ) -> Result<mpsc::Receiver<Change<ClientSession>>, Failure> {
        let namespace = &self.request.manager_namespace;
        let sessions = Sessions { cluster: Arc::clone(&self.cluster), namespace: namespace.clone() };
        let wanted = session::wanted(owner, &key.public().to_string(), &self.request.namespace, self.uid);
        let name = wanted.metadata.name.clone().unwrap_or_default();
        // Before the call: should it be given up half-way, the session may exist all the same.
        live.session = Some((sessions.clone(), name.clone()));
        let created = match sessions.claim(&wanted).await {
            Err(failure) if failure.code != ExitCode::Unreachable => {
                live.session = None;
                return Err(failure);
            }
            other => other?,
        };
        self.board.update(|board| board.session = Some(format!("{namespace}/{name}")));
        self.keeper.connect(Place {
            cluster: Arc::clone(&self.cluster),
            owner: owner.to_owned(),
            namespace: namespace.clone(),
            session: name.clone(),
        });

        let (sender, changes) = mpsc::channel(CHANGES);
        let version = created.metadata.resource_version.clone();
        sender
            .try_send(Change::Applied(Box::new(created)))
            .expect("the channel is empty and its receiver is here");
        let follow = Follow {
            cluster: Arc::clone(&self.cluster),
            namespace: namespace.clone(),
            name,
            judge: errors::failure,
        };
        tokio::spawn(follow.run(version, sender));
        Ok(changes)
    }

    async fn await_ready(
        &self,
        changes: &mut mpsc::Receiver<Change<ClientSession>>,
    ) -> Result<ClientSessionStatus, Failure> {
        let deadline = Instant::now() + READY_TIMEOUT;
        let mut patience = Instant::now() + SILENCE;
        let namespace = &self.request.manager_namespace;
        loop {
            match timeout_at(patience, changes.recv()).await {
                Ok(Some(Change::Applied(session))) => {
                    if let Some(verdict) = session::verdict(&session, namespace) {
                        return verdict.map(|()| session.status.unwrap_or_default());
                    }
                }
                Ok(Some(Change::Deleted)) => {
                    return Err(Failure::new(
                        ExitCode::Failure,
                        "the session was deleted while it was being set up",
                    )
                    .help("try again; if it happens again, ask who deletes it: kubectl get events"));
                }
                Ok(Some(Change::Unknown(failure))) if is_final(&failure) => return Err(failure),
                Ok(Some(Change::Unknown(_))) => {}
                Err(_) if patience < deadline => {
                    self.reporter.step("waiting for the manager");
                    patience = deadline;
                }
                Ok(None) | Err(_) => return Err(session::silent(namespace, READY_TIMEOUT)),
            }
        }
    }

    /// What to route, or which overlaps to decide about first.
    pub(crate) async fn plan(
        &self,
        netlink: &Netlink,
        tun: u32,
        status: &ClientSessionStatus,
    ) -> Result<overlap::Plan, Failure> {
        let own = netlink
            .own_routes(Some(tun))
            .await
            .map_err(|error| cannot("this machine's routes cannot be read", &error))?;
        let choice = overlap::Choice {
            exclude: self.request.exclude.clone(),
            prefer_cluster: self.request.prefer_cluster.clone(),
        };
        let networks: Vec<IpNet> = status.networks.all().collect();
        let mut plan =
            overlap::plan(&networks, &own, &choice).map_err(|overlaps| overlap::failure(&overlaps))?;
        plan.routes.extend(status.gateway.into_iter().flat_map(overlay::both).map(IpNet::from));
        Ok(plan)
    }

    async fn configure(
        &self,
        netlink: Netlink,
        index: u32,
        name: &str,
        status: &ClientSessionStatus,
    ) -> Result<Network, Failure> {
        let mut addresses: Vec<IpAddr> = status.address.into_iter().flat_map(overlay::both).collect();
        let refused = netlink
            .configure(index, name, &addresses)
            .await
            .map_err(|error| cannot(&format!("the device {name} cannot be given its addresses"), &error))?;
        for (address, error) in refused {
            tracing::warn!(%address, %error, "address not taken by the kernel");
            addresses.retain(|other| *other != address);
        }
        self.board.update(|board| board.address = status.address);
        Ok(Network::new(netlink, index, MTU, addresses))
    }

    /// Routes what was planned and says so on the board.
    pub(crate) async fn route(&self, network: &mut Network, plan: &overlap::Plan, needs: &Needs) {
        let refused = network.route(&plan.routes, &needs.all()).await;
        // The manager's own addresses are no network that anyone would miss.
        let missed =
            refused.into_iter().filter(|(network, _)| network.prefix_len() < network.max_prefix_len());
        let missed = missed.map(|(network, error)| Excluded { network, reason: error.to_string() });
        let excluded = plan.excluded.iter().cloned().chain(missed).collect();
        self.board.update(|board| {
            board.networks = network.routed().to_vec();
            board.excluded = excluded;
        });
    }

    async fn start_dns(
        &self,
        status: &ClientSessionStatus,
        own: Vec<IpAddr>,
        device: u32,
    ) -> Result<Dns, Failure> {
        let config = &self.cluster.target().config;
        let hosts = [Some(&config.cluster_url), config.proxy_url.as_ref()];
        let never: BTreeSet<String> =
            hosts.into_iter().flatten().filter_map(|url| url.host()).map(str::to_owned).collect();
        // Where the kernel has no IPv6 for us, the gateway's IPv6 address is out of reach too.
        let gateways = status.gateway.into_iter().flat_map(overlay::both);
        let gateways =
            gateways.filter(|gateway| own.iter().any(|own| own.is_ipv4() == gateway.is_ipv4())).collect();
        Dns::start(dns::Start {
            zone: &status.zone,
            namespace: &self.request.namespace,
            networks: status.networks.all().collect(),
            never,
            own,
            gateways,
            device,
        })
        .await
    }
}

/// Whether waiting cannot help.
fn is_final(failure: &Failure) -> bool {
    matches!(failure.code, ExitCode::Forbidden | ExitCode::Unauthenticated | ExitCode::NotInstalled)
}

fn cannot(what: &str, error: &std::io::Error) -> Failure {
    Failure::new(ExitCode::Failure, what).caused_by(error)
}
