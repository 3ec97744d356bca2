//! Clients for one API server: one that is kept for calls, and a fresh one for each overlay stream.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt as _};
use tpd_api::exit::ExitCode;

use super::config::Target;
use super::credentials::{Credential, Plugin};
use super::errors;
use crate::failure::Failure;
use crate::invoker::Invoker;

/// Time for a TCP connection to the API server. Two retransmissions of the SYN (1 s, 3 s) fit in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes that may wait unsent in the kernel. At 20 Mb/s upstream they are a tenth of a second for whatever queues behind
/// them inside the tunnel; at 5 Gb/s they still last until the lane's next turn, four tenths of a millisecond later.
const UNSENT: u32 = 256 * 1024;

/// How soon a silent connection is probed, so that one whose far end is gone does not stay "open" for hours.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// First and longest pause before a credential plugin runs again that failed, or whose credential was refused. It may open a browser
/// in front of a person who is away; who has logged in anew waits a minute at most.
const PLUGIN_PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// An API server, with credentials that are renewed when they must be.
#[derive(Debug)]
pub(crate) struct Cluster {
    target: Target,
    invoker: Invoker,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Current>,
    /// Whether the API server did not accept the credentials.
    refused: bool,
    trouble: Option<Trouble>,
}

/// A credential plugin that has failed, or whose credential was refused.
#[derive(Debug)]
struct Trouble {
    failure: Option<Failure>,
    pause: Duration,
    until: Instant,
}

impl State {
    /// What is there, if it is good, or if there is nothing better at the moment.
    fn known(&self) -> Option<Result<Current, Failure>> {
        let current = self.current.as_ref();
        let good = current.filter(|current| !self.refused && current.is_fresh());
        let trouble = || self.trouble.as_ref().filter(|trouble| Instant::now() < trouble.until);
        good.cloned().map(Ok).or_else(|| match &trouble()?.failure {
            Some(failure) => Some(Err(failure.clone())),
            None => current.cloned().map(Ok),
        })
    }

    /// Takes note of what a plugin has answered.
    fn note(&mut self, failure: Option<Failure>) {
        if failure.is_none() && !self.refused {
            self.trouble = None;
            return;
        }
        let before = self.trouble.take();
        let pause =
            before.map_or(PLUGIN_PAUSE.0, |before| before.pause.saturating_mul(2).min(PLUGIN_PAUSE.1));
        self.trouble = Some(Trouble { failure, pause, until: Instant::now() + pause });
    }
}

#[derive(Clone)]
struct Current {
    config: Arc<Config>,
    client: Client,
    credential: Option<Credential>,
}

impl Current {
    fn is_fresh(&self) -> bool {
        self.credential.as_ref().is_none_or(Credential::is_fresh)
    }
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current").finish_non_exhaustive()
    }
}

impl Cluster {
    pub(crate) fn new(target: Target, invoker: &Invoker) -> Self {
        Self { target, invoker: invoker.clone(), state: Mutex::default() }
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// The client for calls. Its connections live on the runtime that asked first.
    pub(crate) async fn client(&self) -> Result<Client, Failure> {
        Ok(self.current().await?.client)
    }

    /// A client of its own, whose one connection lives on the runtime of the caller.
    pub(crate) async fn stream_client(&self) -> Result<Client, Failure> {
        let current = self.current().await?;
        build(&current.config).map_err(|error| errors::setup(&self.target.server, &error))
    }

    /// After a 401: the next call reads the kubeconfig and asks the plugin again.
    pub(crate) async fn forget_credential(&self) {
        self.state.lock().await.refused = true;
    }

    /// Every address that the tunnel itself needs: the API server's, or its proxy's.
    pub(crate) async fn addresses(&self) -> Result<Vec<IpAddr>, Failure> {
        let url = self.target.config.proxy_url.as_ref().unwrap_or(&self.target.config.cluster_url);
        let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
        let found = tokio::net::lookup_host((host, 0)).await.map_err(|error| {
            Failure::new(
                ExitCode::Unreachable,
                format!("the API server {} cannot be found", self.target.server),
            )
            .because(format!("the name {host:?} does not resolve"))
            .caused_by(&error)
            .help("check the network, a VPN that has to be up, and the server's URL in the kubeconfig")
        })?;
        Ok(found.map(|address| address.ip()).collect())
    }

    async fn current(&self) -> Result<Current, Failure> {
        let mut state = self.state.lock().await;
        if let Some(known) = state.known() {
            return known;
        }
        let reloaded = if state.refused { Some(self.target.reload(&self.invoker).await?) } else { None };
        let target = reloaded.as_ref().unwrap_or(&self.target);
        let connected = self.connect(target).await;
        if target.plugin.is_some() {
            state.note(connected.as_ref().err().cloned());
        }
        let current = connected?;
        state.refused = false;
        state.current = Some(current.clone());
        Ok(current)
    }

    async fn connect(&self, target: &Target) -> Result<Current, Failure> {
        let credential = match (target.plugin.clone(), &target.token_file) {
            (Some(exec), _) => Some(Plugin { exec, invoker: self.invoker.clone() }.run().await?),
            (None, Some(path)) => Some(Credential::of_file(path, &self.invoker).await?),
            (None, None) => None,
        };
        let mut config = target.config.clone();
        if let Some(credential) = &credential {
            credential.apply(&mut config.auth_info);
        }
        let client = build(&config).map_err(|error| errors::setup(&target.server, &error))?;
        Ok(Current { config: Arc::new(config), client, credential })
    }
}

/// kube's own stack, less its retries, with sockets that suit packets: a segment held back by Nagle would stall the
/// tunnel, and so would megabytes waiting in the kernel.
fn build(config: &Config) -> Result<Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_keepalive(Some(KEEPALIVE));
    let tcp = tcp.map_response(|stream: TokioIo<TcpStream>| {
        // Without it everything works, with more delay under load.
        let _ = SockRef::from(stream.inner()).set_tcp_notsent_lowat(UNSENT);
        stream
    });
    match &config.proxy_url {
        None => over(config, tcp),
        Some(proxy) if proxy.scheme_str() == Some("socks5") => over(config, SocksV5::new(proxy.clone(), tcp)),
        Some(proxy) if proxy.scheme_str() == Some("http") => over(config, Tunnel::new(proxy.clone(), tcp)),
        Some(proxy) => Err(kube::Error::ProxyProtocolUnsupported { proxy_url: Box::new(proxy.clone()) }),
    }
}

fn over<C>(config: &Config, tcp: C) -> Result<Client, kube::Error>
where
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: Connection + hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: std::error::Error + Send + Sync + 'static,
{
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new()).build(tls);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::kube::config;

    /// A cluster whose plugin notes each of its runs in a file before it goes on with `script`, and the directory of both.
    async fn cluster(name: &str, script: &str) -> (Cluster, PathBuf) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let directory = std::env::temp_dir().join(format!("tpd-plugin-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let script = format!("echo >> {}/runs; {script}", directory.display());
        let exec = serde_json::json!({
            "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never",
            "command": "/bin/sh", "args": ["-c", script],
        });
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": "http://127.0.0.1:9" } }],
            "users": [{ "name": "c", "user": { "exec": exec } }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "c" } }],
        });
        let file = directory.join("config");
        fs::write(&file, kubeconfig.to_string()).unwrap();
        let invoker = Invoker { uid: 0, gid: 0, environment: [].into(), directory: "/".into() };
        let target = config::load_for(&invoker, &[file], None).await.unwrap();
        (Cluster::new(target, &invoker), directory)
    }

    fn runs(directory: &Path) -> usize {
        fs::read_to_string(directory.join("runs")).unwrap().lines().count()
    }

    async fn end_pause(cluster: &Cluster) -> Duration {
        let mut state = cluster.state.lock().await;
        let trouble = state.trouble.as_mut().unwrap();
        trouble.until = Instant::now();
        trouble.pause
    }

    #[tokio::test]
    async fn a_plugin_that_fails_is_left_alone_for_a_while() {
        let (cluster, directory) = cluster("fails", "echo log in >&2; exit 1").await;
        let first = cluster.client().await.err().unwrap();
        assert_eq!(first.code, ExitCode::Unauthenticated);
        assert_eq!(cluster.client().await.err(), Some(first));
        assert_eq!(runs(&directory), 1);
        assert_eq!(end_pause(&cluster).await, PLUGIN_PAUSE.0);
        assert!(cluster.client().await.is_err());
        assert_eq!((runs(&directory), end_pause(&cluster).await), (2, 2 * PLUGIN_PAUSE.0));
        fs::remove_dir_all(directory).unwrap();
    }

    #[tokio::test]
    async fn a_plugin_whose_credentials_are_refused_runs_again_at_once_and_then_now_and_then() {
        let (cluster, directory) = cluster("refused", r#"echo '{"status": {"token": "t"}}'"#).await;
        for expected in [1, 2, 2, 2] {
            cluster.client().await.unwrap();
            assert_eq!(runs(&directory), expected);
            cluster.forget_credential().await;
        }
        end_pause(&cluster).await;
        cluster.client().await.unwrap();
        assert_eq!(runs(&directory), 3);
        fs::remove_dir_all(directory).unwrap();
    }
}
