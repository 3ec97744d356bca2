//! Nothing is called connected before it has been seen to work.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tpd_api::exit::ExitCode;
use tpd_api::local::Request;
use tpd_dns::ProofError;
use tpd_netstack::client::Status;

use crate::failure::Failure;
use crate::kube::errors;
use crate::overlay::{PathKind, to_api};

/// Time for the first path to carry a handshake: the slowest one is a port-forward over a line of bad quality.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for a connection to the API server's own Service, through the tunnel.
const ROUND_TRIP_TIMEOUT: Duration = Duration::from_secs(5);

/// What is to be proved.
pub(crate) struct Proof<'a> {
    pub(crate) lane: watch::Receiver<Status>,
    pub(crate) request: &'a Request,
    pub(crate) zone: &'a str,
    /// Our overlay addresses.
    pub(crate) own: &'a [IpAddr],
    pub(crate) user: &'a str,
}

impl Proof<'_> {
    /// Seeks a handshake, a DNS answer through the system's own resolver, and a round trip through the data path.
    pub(crate) async fn seek(&self) -> Result<(), Failure> {
        tokio::try_join!(self.handshake(), takeover(self.zone, self.own))?;
        tracing::info!("handshake and takeover proved");
        let name = format!("kubernetes.default.svc.{}", self.zone);
        let found = tpd_dns::prove(&name).await.map_err(|error| dns_failure(&error))?;
        tracing::info!(name, ?found, "name proved");
        round_trip(&name, found.into_iter()).await
    }

    async fn handshake(&self) -> Result<(), Failure> {
        let mut lane = self.lane.clone();
        let decided = lane.wait_for(|status| is_carried(status) || self.is_hopeless(status));
        let carried = match timeout(HANDSHAKE_TIMEOUT, decided).await {
            Ok(Ok(status)) => is_carried(&status),
            Ok(Err(_)) => {
                return Err(
                    Failure::new(ExitCode::Failure, "the data plane ended").help("tpd logs tells more")
                );
            }
            Err(_) => false,
        };
        if carried { Ok(()) } else { Err(self.no_path(&self.lane.borrow())) }
    }

    /// Whether waiting cannot help: the one path that was asked for is forbidden.
    fn is_hopeless(&self, status: &Status) -> bool {
        self.request.path.is_some() && is_forbidden(status)
    }

    fn no_path(&self, status: &Status) -> Failure {
        let namespace = &self.request.manager_namespace;
        let forbidden = is_forbidden(status);
        let code = if forbidden { ExitCode::Forbidden } else { ExitCode::NoPath };
        let allowed =
            status.paths.iter().filter(|path| self.request.path.is_none_or(|only| only == to_api(path.kind)));
        let failure = Failure::new(code, "no path to the manager carries a handshake");
        let failure = allowed.fold(failure, |failure, path| {
            failure.because(format!("{} to {}: {}", path.kind, path.target, path.reason))
        });
        failure.help(if forbidden {
            errors::rules(namespace, self.user)
        } else {
            format!("check that the manager runs: kubectl -n {namespace} get pods\ntpd logs tells more; --path tries one path alone.")
        })
    }
}

fn is_carried(status: &Status) -> bool {
    status.active.is_some() && status.handshake_age.is_some()
}

/// Whether the API server said 403 to every path through it. Then the rules to add are of more use than anything else.
fn is_forbidden(status: &Status) -> bool {
    let mut streams = status.paths.iter().filter(|path| path.kind != PathKind::Udp).peekable();
    streams.peek().is_some() && streams.all(|path| path.reason.contains("answered 403"))
}

async fn takeover(zone: &str, own: &[IpAddr]) -> Result<(), Failure> {
    tpd_dns::prove_takeover(zone, own).await.map_err(|error| dns_failure(&error))
}

fn dns_failure(error: &ProofError) -> Failure {
    Failure::new(ExitCode::Dns, "cluster names do not resolve through the system's resolver")
        .caused_by(error)
        .help("another program may manage the resolver (a VPN client, a DHCP client); see /etc/resolv.conf and tpd logs")
}

/// Connects to the API server's Service, which every cluster has.
async fn round_trip(name: &str, addresses: impl Iterator<Item = IpAddr>) -> Result<(), Failure> {
    const PORT: u16 = 443;
    let mut failure =
        Failure::new(ExitCode::NoPath, format!("no connection to {name}:{PORT} comes through the tunnel"));
    for address in addresses.map(|address| SocketAddr::new(address, PORT)) {
        failure = match timeout(ROUND_TRIP_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => failure.because(format!("{address}: {error}")),
            Err(_) => {
                failure.because(format!("{address}: no answer within {} s", ROUND_TRIP_TIMEOUT.as_secs()))
            }
        };
    }
    Err(failure.help("a firewall on this machine may drop what tpd0 brings; tpd logs tells more"))
}
