//! The agent's work: everything in one thread, and this is what holds it together.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep_until};
use tpd_api::agent::{Hello, InterceptReport, MAX_HELD, Proof, ToAgent};
use tpd_netstack::key::PrivateKey;
use tracing::{info, warn};

use super::config::Config;
use super::control::{self, Dialer, Event, Standing, What};
use super::dns;
use super::drain::Drain;
use super::duty::{self, Duty};
use super::environment::Environments;
use super::laptop::Laptops;
use super::listeners::Listeners;
use super::merge::Managers;
use super::parting::Loss;
use super::policy::Grants;
use super::ready::{self, Readiness};
use super::room::Room;
use super::uplinks::Uplinks;
use crate::process;

/// How often what changes by itself is looked at while an intercept concerns the agent: counters, heartbeats, probes.
const TICK: Duration = Duration::from_millis(250);

/// How often otherwise.
const IDLE_TICK: Duration = Duration::from_secs(1);

/// Messages of managers, and results of probes, that wait to be worked off.
const QUEUE: usize = 64;

/// Runs until told to end, and until what is open then is done.
///
/// # Errors
/// Fails where the configuration makes no sense, or a port that the pod depends on is taken.
pub async fn run(config: Config) -> anyhow::Result<()> {
    if let Err(error) = process::raise_descriptor_limit() {
        warn!(%error, "the number of connections stays as limited as it is");
    }
    let terminate = signal(SignalKind::terminate()).context("wait for signals")?;
    let worker = Worker::new(config)?;
    spawn_local(async {
        if let Err(error) = dns::serve(dns::ADDRESS, dns::Files::default()).await {
            warn!(error = format!("{error:#}"), "laptops cannot resolve names as this pod does");
        }
    });
    worker.work(terminate).await;
    info!("ended");
    Ok(())
}

/// The result of a probe: the intercept's UID, and what was probed.
type Probed = (String, Vec<SocketAddr>, Proof);

struct Worker {
    dialer: Rc<Dialer>,
    managers: Managers,
    /// Tasks that keep a connection to each manager.
    connections: BTreeMap<SocketAddr, AbortHandle>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    probed: (mpsc::Sender<Probed>, mpsc::Receiver<Probed>),
    /// Told when a way to a laptop opens or closes.
    changed: Rc<Notify>,
    standing: watch::Sender<Standing>,
    grants: Arc<Grants>,
    uplinks: Rc<Uplinks>,
    laptops: Rc<Laptops>,
    duty: Duty,
    readiness: Readiness,
    is_ready: bool,
    /// When a way is to be closed.
    due: Option<Instant>,
    draining: Option<Drain>,
}

impl Worker {
    fn new(config: Config) -> anyhow::Result<Self> {
        let key = PrivateKey::generate().context("make a key")?;
        let hello = Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            public_key: key.public().to_string(),
            entry: config.entry.clone(),
        };
        let dialer = Rc::new(Dialer::new(&config.ca, config.token, hello)?);
        let environments = Rc::new(Environments::gather(&config.containers, std::env::vars_os()));
        let (changed, grants, now) = (Rc::new(Notify::new()), Arc::new(Grants::default()), Instant::now());
        let uplinks = Uplinks::new(key, Arc::clone(&grants), environments, Rc::clone(&changed));
        let uplinks = Rc::new(uplinks);
        let laptops = Rc::new(Laptops::new(Rc::clone(&uplinks), Rc::clone(&changed)));
        let room = Room::of_container(config.memory);
        let listeners = Listeners::new(config.entry, Rc::clone(&laptops), config.manager, room);
        let listeners = listeners.context("listen on the ports that were taken over")?;
        Ok(Self {
            dialer,
            managers: Managers::new(config.manager),
            connections: BTreeMap::new(),
            events: mpsc::channel(QUEUE),
            probed: mpsc::channel(QUEUE),
            changed,
            standing: watch::Sender::new(Standing::default()),
            grants,
            uplinks,
            duty: Duty::new(listeners, Rc::clone(&laptops), room, now),
            laptops,
            readiness: Readiness::new(now),
            is_ready: false,
            due: None,
            draining: None,
        })
    }

    async fn work(mut self, mut terminate: Signal) {
        self.keep_connections();
        while !self.is_over() {
            let pause = if self.duty.is_led() || self.draining.is_some() { TICK } else { IDLE_TICK };
            let next = Instant::now() + pause;
            tokio::select! {
                Some(event) = self.events.1.recv() => self.hear(event),
                Some((uid, targets, proof)) = self.probed.1.recv() => {
                    self.duty.settle(&uid, &targets, proof, Instant::now());
                }
                () = self.changed.notified() => {}
                () = sleep_until(self.due.map_or(next, |due| due.min(next))) => {}
                _ = terminate.recv() => self.drain(),
            }
            self.look();
        }
    }

    /// A connection to each manager, and no other.
    fn keep_connections(&mut self) {
        let wanted = self.managers.wanted();
        for (manager, connection) in &self.connections {
            if !wanted.contains(manager) {
                connection.abort();
                self.managers.lost(*manager);
            }
        }
        self.connections.retain(|manager, _| wanted.contains(manager));
        for manager in wanted {
            self.connections.entry(manager).or_insert_with(|| {
                let (standing, events) = (self.standing.subscribe(), self.events.0.clone());
                spawn_local(control::keep(Rc::clone(&self.dialer), manager, standing, events)).abort_handle()
            });
        }
    }

    fn hear(&mut self, event: Event) {
        let manager = event.manager;
        if !self.connections.contains_key(&manager) {
            // The last words of one that was let go.
            return;
        }
        let mut loss = Loss::Closed;
        match event.what {
            What::Said(ToAgent::Config(config)) => self.managers.configured(manager, *config),
            What::Said(ToAgent::Carried { laptops }) => {
                let new = self.managers.carried(manager, laptops);
                new.into_iter().for_each(|laptop| self.laptops.heard(laptop));
            }
            What::Said(ToAgent::Beat | ToAgent::Refused { .. }) => {}
            What::Lost(how) => {
                loss = how;
                self.managers.lost(manager);
            }
        }
        self.keep_connections();
        self.follow(loss);
    }

    /// Puts into force what the managers, taken together, say. One that is missing now was lost in this way.
    fn follow(&mut self, loss: Loss) {
        let (config, now) = (self.managers.in_force(), Instant::now());
        self.grants.replace(config.map(|config| &**config));
        self.uplinks.follow(&self.managers, loss, now);
        self.laptops.follow(&self.managers);
        self.duty.take_over(config, now);
    }

    /// Does what is due, and tells managers and kubelet how things stand.
    fn look(&mut self) {
        let now = Instant::now();
        self.duty.tick(now);
        let held = self.duty.held();
        self.due = self.uplinks.sweep(self.duty.is_busy() || !held.is_empty(), now);
        for (uid, targets) in self.duty.probes(now) {
            let (laptops, probed) = (Rc::clone(&self.laptops), self.probed.0.clone());
            spawn_local(async move {
                let proof = laptops.prove(&targets).await;
                // Nobody waits for it once the worker has ended.
                let _ = probed.send((uid, targets, proof)).await;
            });
        }
        let intercepts = self.duty.report();
        if !self.is_ready
            && self.readiness.is_ready(self.managers.in_force().is_some(), duty::is_settled(&intercepts), now)
        {
            self.is_ready = true;
            spawn_local(ready::answer());
        }
        self.tell(intercepts, held.into_iter().take(MAX_HELD).collect());
    }

    fn tell(&self, intercepts: Arc<[InterceptReport]>, held: Arc<[SocketAddr]>) {
        let applied =
            self.managers.connected().map(|(address, manager)| (*address, manager.config.generation));
        let standing = Standing { applied: applied.collect(), intercepts, held };
        self.standing.send_if_modified(|current| {
            let is_new = *current != standing;
            *current = standing;
            is_new
        });
    }

    /// Told again, it goes on as before.
    fn drain(&mut self) {
        info!(connections = self.duty.connections(), "told to end");
        self.draining.get_or_insert_with(|| Drain::new(Instant::now()));
    }

    fn is_over(&mut self) -> bool {
        let (led, connections, activity) =
            (self.duty.is_led(), self.duty.connections(), self.duty.activity());
        self.draining.as_mut().is_some_and(|drain| drain.is_over(led, connections, activity, Instant::now()))
    }
}
