//! The manager: sessions, networks, streams and health around one overlay lane.

pub mod agents;
pub mod ca;
pub mod cluster;
pub mod collect;
pub mod config;
pub mod controller;
pub mod endpoints;
pub mod health;
pub mod http;
pub mod intercepts;
pub mod keys;
pub mod lease;
pub mod liveness;
pub mod metrics;
pub mod networks;
pub mod overlay;
pub mod policy;
pub mod pool;
pub mod registry;
pub mod resolv;
pub mod status;
pub mod store;
pub mod stream;
pub mod tls;
pub mod watch;
pub mod webhook;
pub mod workload;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch as cell};
use tokio::time::{sleep, timeout};
use tpd_api::session::Networks;
use tpd_netstack::key::PrivateKey;
use tracing::{info, warn};

use self::agents::Agents;
use self::cluster::Cluster;
use self::config::Config;
use self::controller::Controller;
use self::health::Health;
use self::intercepts::configure::Facts;
use self::intercepts::controller::Controller as Interceptor;
use self::intercepts::events::journal::Journal;
use self::intercepts::question;
use self::intercepts::sessions::Sessions;
use self::intercepts::world::Known;
use self::lease::Election;
use self::metrics::Metrics;
use self::overlay::Overlay;
use self::resolv::Resolver;
use crate::process;

/// Pause before the API server is asked again for what the manager cannot start without.
const RETRY: Duration = Duration::from_millis(500);

/// For the lease to be given back and the streams' last bytes to leave: a replacement waits for this process to be gone.
const FAREWELL: Duration = Duration::from_millis(200);

/// What agents have said and the control loop has not heard yet. While it is full they wait, each with its own connection.
const EVENTS: usize = 256;

/// Runs until the process is told to end.
///
/// # Errors
/// Fails where a port is taken, or where there is no cluster to serve.
pub async fn run(config: Config) -> anyhow::Result<()> {
    if let Err(error) = process::raise_descriptor_limit() {
        warn!(%error, "the number of connections stays as limited as it is");
    }
    // The listeners first: whoever connects while the rest starts waits instead of being refused.
    let streams = http::listen(config.stream).await?;
    let health = http::listen(config.health).await?;
    let datagrams = overlay::bind(config.overlay)?;
    let client = client().await?;

    let (running, overlay) = cell::channel(None);
    let (awaiting, awaited) = cell::channel(Cluster::new(Networks::default(), config.watch_pods).awaited());
    let (knows, alive) = cell::channel(None);
    let (stop, stopped) = cell::channel(false);
    let metrics = Arc::new(Metrics::default());
    let secure = Arc::new(OnceLock::new());
    let (events, joining) = mpsc::channel(EVENTS);
    let agents = Agents::new(client.clone(), events, Arc::clone(&metrics));
    let (election, leads) = Election::new(client.clone(), &config, alive);
    let report = Health { overlay, awaited, leads: leads.clone(), metrics: Arc::clone(&metrics) };
    tokio::spawn(health::serve(health, report));
    let election = tokio::spawn(election.run(stopped));

    let serve = async {
        let key = key(&client, &config).await;
        let resolver = resolver(&config);
        let overlay = Arc::new(Overlay::start(&config, key.clone(), datagrams)?);
        running.send_replace(Some(Arc::clone(&overlay)));
        tokio::spawn(stream::serve(streams, Arc::clone(&overlay), Arc::clone(&secure)));
        let agents = Arc::new(agents);
        let (tells_installation, installation) = cell::channel(None);
        let (inquiry, questions) = question::inquiry();
        let webhooks = webhook::run(
            client.clone(),
            config.clone(),
            leads.clone(),
            secure,
            agents,
            tells_installation,
            inquiry,
        );
        tokio::spawn(webhooks);
        info!(pod = config.pod_name, key = %key.public(), version = env!("CARGO_PKG_VERSION"), "running");
        let facts = Facts::new(&config, key.public(), &resolver);
        let sessions = Sessions::new(config.pool_v6);
        let journal = Journal::start(client.clone(), config.pod_name.clone());
        let intercepts = Interceptor::new(
            client.clone(),
            Arc::clone(&overlay),
            Arc::clone(&metrics),
            facts,
            sessions,
            journal,
        );
        let (tells, known) = cell::channel(Known::default());
        tokio::spawn(intercepts.run(joining, known, leads.clone(), questions));
        let controller = Controller::new(config, &client, overlay, metrics, key.public(), resolver);
        controller.run(client, leads, installation, knows, awaiting, tells).await;
        anyhow::Ok(())
    };
    tokio::select! {
        result = serve => result?,
        result = told_to_end() => result?,
    }

    // The streams first: every laptop notices at once, and looks for another replica.
    if let Some(overlay) = running.borrow().as_ref() {
        overlay.shutdown();
    }
    stop.send_replace(true);
    if timeout(FAREWELL, election).await.is_err() {
        warn!("the election did not end in time");
    }
    info!("ended");
    Ok(())
}

/// No retries inside the client: every loop of the manager has its own, which are quicker.
async fn client() -> anyhow::Result<Client> {
    let mut config =
        kube::Config::infer().await.context("find the cluster: a service account, or a kubeconfig")?;
    config.default_retry = false;
    Client::try_from(config).context("set up the client of the API server")
}

async fn key(client: &Client, config: &Config) -> PrivateKey {
    loop {
        match keys::load(client.clone(), &config.namespace).await {
            Ok(key) => return key,
            Err(error) => warn!(error = format!("{error:#}"), "no key yet"),
        }
        sleep(RETRY).await;
    }
}

fn resolver(config: &Config) -> Resolver {
    let text = std::fs::read_to_string(&config.resolv_conf).unwrap_or_default();
    let resolver = resolv::parse(&text);
    let path = config.resolv_conf.display();
    if resolver.server.is_none() {
        warn!(%path, "names no resolver; laptops will have no cluster DNS");
    }
    if resolver.zone.is_none() && config.zone.is_none() {
        warn!(%path, "does not tell the cluster's zone; set TPD_ZONE");
    }
    resolver
}

async fn told_to_end() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
