//! The ways into the overlay: one to each manager, for as long as an intercept needs it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::{Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{Notify, mpsc};
use tokio::task::{AbortHandle, JoinSet, spawn_local};
use tokio::time::Instant;
use tpd_api::agent::{Config, Manager};
use tpd_api::overlay::{CONTROL_PORT, MTU};
use tpd_api::{STREAM_PATH, STREAM_UPGRADE};
use tpd_netstack::control::Hello;
use tpd_netstack::flow::{Limits, Policy, Stream};
use tpd_netstack::key::{PrivateKey, PublicKey};
use tpd_netstack::uplink::{self, Uplink, Way};
use tracing::warn;

use super::environment::{self, Environments};
use super::merge::Managers;
use super::parting::{Loss, Parting};
use super::policy::Grants;

/// Connections to laptops and from them, at most; as many as the agent takes from clients, and some for probes and resolvers.
const TCP_FLOWS: usize = 4096;

/// What the buffers of all those may use beyond their first 64 KiB, bytes: a quarter of the agent's memory.
pub(super) const TCP_MEMORY: usize = 16 << 20;

/// How long a laptop may say nothing at all before requests that wait for it are over: their clients are production. A laptop that
/// changes networks or managers is back within a few seconds; one at a breakpoint still answers, as its daemon does.
const TCP_PATIENCE: Duration = Duration::from_secs(20);

/// Associations of UDP, at most.
const DATAGRAM_FLOWS: usize = 1024;

/// Environments that are fetched at a time. Each is fetched once, when an intercept begins.
const EXCHANGES: usize = 8;

/// How long the ways stay open after the last intercept, and after the last that was under way with a laptop: managers let its
/// packets pass for as long.
const GRACE: Duration = Duration::from_secs(30);

/// One way in, and the tasks that watch it.
struct Open {
    address: Ipv6Addr,
    manager: Manager,
    uplink: Rc<Uplink>,
    tasks: [AbortHandle; 2],
    /// While its manager is lost.
    parting: Option<Parting>,
}

impl Open {
    /// Whether it is what a configuration describes.
    fn is_by(&self, config: &Config) -> bool {
        self.manager == config.manager && self.address == config.address
    }

    /// When it is to be closed, if nothing changes.
    fn end(&mut self, now: Instant) -> Option<Instant> {
        let leads = self.uplink.ready().borrow().is_some();
        self.parting.as_mut().map(|parting| parting.end(leads, now))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// The open ways, by the manager's own address: whichever was dialled, there is one way to a manager.
pub struct Uplinks {
    open: RefCell<BTreeMap<SocketAddr, Open>>,
    /// Since when no intercept needs them.
    unneeded: Cell<Option<Instant>>,
    key: PrivateKey,
    hello: Hello,
    grants: Arc<Grants>,
    environments: Rc<Environments>,
    changed: Rc<Notify>,
}

impl std::fmt::Debug for Uplinks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uplinks").finish_non_exhaustive()
    }
}

impl Uplinks {
    /// None yet. `changed` is told when a way opens or closes.
    #[must_use]
    pub fn new(
        key: PrivateKey,
        grants: Arc<Grants>,
        environments: Rc<Environments>,
        changed: Rc<Notify>,
    ) -> Self {
        let hello = Hello {
            name: "tpd-agent".into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: RandomState::new().hash_one(key.public()),
            features: Vec::new(),
        };
        Self {
            open: RefCell::default(),
            unneeded: Cell::default(),
            key,
            hello,
            grants,
            environments,
            changed,
        }
    }

    /// Opens a way to every manager, if an intercept needs any. One to a manager that was lost, in this way, stays open for a
    /// while, for what is in flight through it, and for good if the manager is back by then.
    pub fn follow(&self, managers: &Managers, loss: Loss, now: Instant) {
        let connected: BTreeMap<_, _> =
            managers.connected().map(|(_, manager)| (manager.own_address(), &manager.config)).collect();
        let mut open = self.open.borrow_mut();
        open.retain(|address, open| connected.get(address).is_none_or(|config| open.is_by(config)));
        for (address, open) in &mut *open {
            let parting = || open.parting.unwrap_or_else(|| Parting::new(loss, now));
            open.parting = (!connected.contains_key(address)).then(parting);
        }
        if managers.intercepts().is_empty() {
            return;
        }
        for (address, config) in connected {
            if open.contains_key(&address) {
                continue;
            }
            match self.start(config) {
                Ok(way) => drop(open.insert(address, way)),
                Err(error) => {
                    warn!(manager = %address, error = format!("{error:#}"), "no way into the overlay")
                }
            }
        }
    }

    /// Closes those whose managers stay away, and all of them once they have not been needed for a while. Says when to look
    /// again, if nothing happens until then.
    pub fn sweep(&self, needed: bool, now: Instant) -> Option<Instant> {
        let unneeded = (!needed).then(|| self.unneeded.get().unwrap_or(now));
        self.unneeded.set(unneeded);
        let mut open = self.open.borrow_mut();
        if unneeded.is_some_and(|since| now >= since + GRACE) {
            open.clear();
        }
        open.retain(|_, open| open.end(now).is_none_or(|end| now < end));
        open.values_mut().filter_map(|open| open.end(now)).min()
    }

    /// The way by the manager that has this address, if it leads there at the moment.
    pub fn ready(&self, manager: SocketAddr) -> Option<(Way, Rc<Uplink>)> {
        let open = self.open.borrow();
        let uplink = &open.get(&manager)?.uplink;
        let way = *uplink.ready().borrow();
        Some((way?, Rc::clone(uplink)))
    }

    fn start(&self, config: &Config) -> anyhow::Result<Open> {
        let manager = config.manager.clone();
        let manager_key: PublicKey = manager.key.parse().ok().context("the manager's key is none")?;
        let uplink = Uplink::start(uplink::Config {
            private_key: self.key.clone(),
            manager_key,
            address: config.address,
            gateway: manager.gateway,
            control_port: CONTROL_PORT,
            udp: manager.udp,
            stream: manager.stream,
            upgrade: (STREAM_PATH, STREAM_UPGRADE),
            policy: Arc::clone(&self.grants) as Arc<dyn Policy>,
            hello: self.hello.clone(),
            limits: Limits {
                mtu: MTU,
                tcp_flows: TCP_FLOWS,
                tcp_flows_per_peer: TCP_FLOWS,
                tcp_memory: TCP_MEMORY,
                tcp_patience: TCP_PATIENCE,
                datagram_flows: DATAGRAM_FLOWS,
                datagram_flows_per_peer: DATAGRAM_FLOWS,
                reporters: vec![config.address.into()],
            },
        })?;
        let tasks = [self.watch(&uplink), self.serve(&uplink)];
        Ok(Open { address: config.address, manager, uplink: Rc::new(uplink), tasks, parting: None })
    }

    fn watch(&self, uplink: &Uplink) -> AbortHandle {
        let (mut ready, changed) = (uplink.ready(), Rc::clone(&self.changed));
        let task = spawn_local(async move {
            while ready.changed().await.is_ok() {
                changed.notify_one();
            }
        });
        task.abort_handle()
    }

    fn serve(&self, uplink: &Uplink) -> AbortHandle {
        let (streams, grants) = (uplink.serve(), Arc::clone(&self.grants));
        spawn_local(serve(streams, grants, Rc::clone(&self.environments))).abort_handle()
    }
}

/// Hands environments to the laptops that may have them, a few at a time.
async fn serve(mut streams: mpsc::Receiver<Stream>, grants: Arc<Grants>, environments: Rc<Environments>) {
    let mut exchanges = JoinSet::new();
    while let Some(stream) = streams.recv().await {
        while exchanges.len() >= EXCHANGES {
            exchanges.join_next().await;
        }
        let container = grants.container(stream.peer_addr().ip());
        let environments = Rc::clone(&environments);
        exchanges.spawn_local(async move { environment::serve(stream, &environments, container).await });
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::task::LocalSet;
    use tokio::time::Instant;
    use tpd_api::agent::Config;
    use tpd_netstack::key::PrivateKey;
    use tpd_netstack::uplink::Uplink;

    use super::{Grants, Loss, Managers, Uplinks};
    use crate::agent::environment::Environments;
    use crate::agent::merge::tests::{config, intercept};

    const SERVICE: &str = "127.0.0.9:443";
    const OWN: &str = "127.0.0.1:9";

    struct Scene {
        uplinks: Uplinks,
        managers: Managers,
        config: Config,
    }

    impl Scene {
        /// Ways to a manager that does not answer; it has been dialled by the Service's address.
        fn new() -> Self {
            let environments = Environments::gather(&[], std::iter::empty());
            let key = || PrivateKey::generate().unwrap();
            let uplinks =
                Uplinks::new(key(), Arc::new(Grants::default()), environments.into(), Rc::default());
            let mut config = config(1, OWN, &[]);
            config.manager.key = key().public().to_string();
            config.intercepts.push(intercept("i", "fd74::2"));
            let mut scene = Self { uplinks, managers: Managers::new(SERVICE.parse().unwrap()), config };
            scene.connected(SERVICE, Instant::now());
            scene
        }

        fn connected(&mut self, dialled: &str, now: Instant) {
            self.managers.configured(dialled.parse().unwrap(), self.config.clone());
            self.uplinks.follow(&self.managers, Loss::Closed, now);
        }

        fn lost(&mut self, dialled: &str, loss: Loss, now: Instant) {
            self.managers.lost(dialled.parse().unwrap());
            self.uplinks.follow(&self.managers, loss, now);
        }

        /// The way to the manager, to be told from another.
        fn way(&self) -> Option<Rc<Uplink>> {
            Some(Rc::clone(&self.uplinks.open.borrow().get(&OWN.parse().unwrap())?.uplink))
        }
    }

    fn is_same(one: Option<&Rc<Uplink>>, other: Option<&Rc<Uplink>>) -> bool {
        matches!((one, other), (Some(one), Some(other)) if Rc::ptr_eq(one, other))
    }

    fn play(scene: impl FnOnce(Scene, Instant)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async { scene(Scene::new(), Instant::now()) });
    }

    #[test]
    fn a_manager_that_is_back_by_another_address_has_its_way_still() {
        play(|mut scene, start| {
            let way = scene.way();
            scene.lost(SERVICE, Loss::Silent, start);
            let moment = start + Duration::from_millis(500);
            assert!(scene.uplinks.sweep(true, moment).is_some_and(|due| due > moment));
            scene.connected(OWN, moment);
            assert_eq!(scene.uplinks.sweep(true, start + Duration::from_secs(20)), None);
            assert!(is_same(scene.way().as_ref(), way.as_ref()));
        });
    }

    #[test]
    fn a_manager_that_stays_away_loses_its_way() {
        play(|mut scene, start| {
            scene.lost(SERVICE, Loss::Silent, start);
            let due = scene.uplinks.sweep(true, start).unwrap();
            assert!(scene.way().is_some());
            assert_eq!(scene.uplinks.sweep(true, due), None);
            assert!(scene.way().is_none());
        });
    }

    #[test]
    fn a_way_that_leads_nowhere_does_not_outlive_a_manager_that_has_hung_up() {
        play(|mut scene, start| {
            scene.lost(SERVICE, Loss::Closed, start);
            let due = scene.uplinks.sweep(true, start).unwrap();
            assert!(due < start + Duration::from_millis(200));
            scene.uplinks.sweep(true, due);
            assert!(scene.way().is_none());
        });
    }

    #[test]
    fn an_agent_with_another_address_takes_another_way() {
        play(|mut scene, start| {
            let way = scene.way();
            scene.config.address = "fd74::8000:0:0:2".parse().unwrap();
            scene.connected(OWN, start);
            scene.lost(SERVICE, Loss::Closed, start);
            assert!(scene.way().is_some() && !is_same(scene.way().as_ref(), way.as_ref()));
        });
    }
}
