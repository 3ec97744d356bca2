//! Cluster DNS as the rest of the daemon sees it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tpd_api::exit::ExitCode;
use tpd_api::local;
use tpd_api::overlay::DNS_PORT;
use tpd_dns::takeover::{Files, Guard, Hold, Link, System, TakeoverError};
use tpd_dns::{BindError, Forward, Handle, Proxy, Scope};

use crate::failure::Failure;
use crate::net::listener::listeners;

/// Where the way back to the old resolver is kept; it has to survive a reboot.
pub(crate) const STATE: &str = "/var/lib/tpd";

/// What cluster DNS is started with.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    pub(crate) zone: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) networks: Vec<IpNet>,
    /// Host names that the tunnel itself needs.
    pub(crate) never: BTreeSet<String>,
    /// Our overlay addresses, which the system will ask.
    pub(crate) own: Vec<IpAddr>,
    /// The manager's overlay addresses, which answer for the cluster.
    pub(crate) gateways: Vec<IpAddr>,
    /// The TUN's index.
    pub(crate) device: u32,
}

/// Running cluster DNS.
#[derive(Debug)]
pub(crate) struct Dns {
    scope: watch::Sender<Arc<Scope>>,
    stop: CancellationToken,
    server: JoinHandle<()>,
    takeover: Guard,
    upstreams: watch::Receiver<Arc<[SocketAddr]>>,
    watch: Watch,
}

/// How cluster DNS does, for `tpd status`.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    method: String,
    listen: Vec<IpAddr>,
    zone: String,
    handle: Handle,
    hold: watch::Receiver<Hold>,
}

impl Watch {
    pub(crate) fn describe(&self) -> local::Dns {
        let stats = self.handle.stats();
        local::Dns {
            method: self.method.clone(),
            listen: self.listen.clone(),
            zone: self.zone.clone(),
            queries: stats.queries,
            failures: stats.failures + stats.overloaded,
            problem: self.problem().map(str::to_owned),
        }
    }
}

impl Watch {
    fn problem(&self) -> Option<&'static str> {
        if *self.hold.borrow() == Hold::Yielded {
            Some("another program keeps changing the resolver's settings; they are left to it for now")
        } else if self.handle.is_recursive() {
            Some("the cluster's resolver forwards to this machine's; only cluster names are asked there")
        } else if self.handle.cluster_is_silent() {
            Some("the cluster's DNS does not answer")
        } else {
            None
        }
    }
}

impl Dns {
    /// Answers on our own addresses and becomes the system's resolver.
    pub(crate) async fn start(start: Start<'_>) -> Result<Self, Failure> {
        let (scope, followed) = watch::channel(Arc::new(Scope {
            zone: start.zone.into(),
            namespace: start.namespace.into(),
            namespaces: BTreeSet::new(),
            networks: start.networks,
            never: start.never,
            forwards: Vec::new(),
        }));
        let system = System::detect(Files::system(STATE)).await.map_err(|error| cannot_take(&error))?;
        let (method, upstreams) = (system.backend().to_string(), system.upstreams());
        let proxy = Proxy::bind(tpd_dns::Config {
            scope: followed.clone(),
            gateways: start.gateways.into_iter().map(|address| SocketAddr::new(address, DNS_PORT)).collect(),
            listen: start.own.iter().map(|&address| SocketAddr::new(address, DNS_PORT)).collect(),
            upstreams: upstreams.clone(),
        })
        .await
        .map_err(|error| cannot_listen(&error))?;
        let handle = proxy.handle();
        let stop = CancellationToken::new();
        let server = tokio::spawn(proxy.run(stop.clone()));
        // IPv4 first: a resolver that knows no IPv6 is more common than one that knows no IPv4.
        let Some(&address) = start.own.first() else {
            stop.cancel();
            return Err(Failure::new(ExitCode::Dns, "this machine took no overlay address to serve DNS on"));
        };
        match system.take(Link { index: start.device, server: address }, followed).await {
            Ok(takeover) => {
                let (zone, hold) = (start.zone.into(), takeover.hold());
                let watch = Watch { method, listen: start.own, zone, handle, hold };
                Ok(Self { scope, stop, server, takeover, upstreams, watch })
            }
            Err(error) => {
                stop.cancel();
                Err(cannot_take(&error))
            }
        }
    }

    pub(crate) fn watch(&self) -> Watch {
        self.watch.clone()
    }

    /// The resolvers that the system used before. They stay outside of the tunnel.
    pub(crate) fn upstreams(&self) -> Vec<IpAddr> {
        self.upstreams.borrow().iter().map(SocketAddr::ip).collect()
    }

    /// Networks whose reverse names the cluster answers from now on.
    pub(crate) fn set_networks(&self, networks: Vec<IpNet>) {
        self.scope.send_modify(|scope| Arc::make_mut(scope).networks = networks);
    }

    /// Domains that others answer from now on. Where nothing changes the system's settings are left alone.
    pub(crate) fn set_forwards(&self, forwards: Vec<Forward>) {
        self.scope.send_if_modified(|scope| {
            let news = scope.forwards != forwards;
            if news {
                Arc::make_mut(scope).forwards = forwards;
            }
            news
        });
    }

    /// Gives the system its resolver back.
    pub(crate) async fn restore(self) -> Result<(), TakeoverError> {
        let reverted = self.takeover.revert().await;
        self.stop.cancel();
        let _ = self.server.await;
        reverted.map(drop)
    }
}

fn cannot_listen(error: &BindError) -> Failure {
    let failure =
        Failure::new(ExitCode::Dns, "cluster DNS cannot be served on this machine").caused_by(error);
    if !matches!(error, BindError::Taken { .. }) {
        return failure;
    }
    let programs = listeners(DNS_PORT);
    let failure = if programs.is_empty() {
        failure
    } else {
        failure.because(format!("port {DNS_PORT} is used by {}", programs.join(", ")))
    };
    failure.help("stop that program while connected, or have it listen on its own addresses only")
}

fn cannot_take(error: &TakeoverError) -> Failure {
    Failure::new(ExitCode::Dns, "the system's resolver cannot be taken over").caused_by(error)
}

/// Undoes the takeover of a daemon that was killed, also before a reboot.
pub(crate) fn recover() -> Result<(), TakeoverError> {
    tpd_dns::takeover::recover(Path::new(STATE)).map(drop)
}

/// Blocks until the daemon that started this process is gone, then undoes its takeover.
pub(crate) fn restore_when_gone() -> Result<(), TakeoverError> {
    tpd_dns::takeover::watchdog::restore_when_gone(Path::new(STATE), std::io::stdin()).map(drop)
}
