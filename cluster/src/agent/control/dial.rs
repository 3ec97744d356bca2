//! Dials a manager: TLS that trusts one authority, and the token that says which pod this is.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONNECTION, HOST, HeaderValue, RETRY_AFTER, UPGRADE};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tpd_api::agent::{AGENT_PATH, AGENT_UPGRADE, Hello, SERVER_NAME};

/// For a manager to take a connection: a TokenReview is part of it, which an API server that starts makes wait.
const PATIENCE: Duration = Duration::from_secs(5);

/// For a host to answer a SYN: two of them, as one may be lost.
const CONNECT: Duration = Duration::from_millis(1_500);

/// Longest text of a refusal, bytes. It goes into a log line.
const MAX_REASON: usize = 512;

/// A connection that carries lines from now on.
pub(super) type Stream = TokioIo<Upgraded>;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody answers there in time.
    #[error("it does not answer")]
    Timeout,
    /// The connection fails, or is none of a manager of ours.
    #[error("{0}")]
    Connection(#[from] io::Error),
    /// It does not speak HTTP as it should.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// The token cannot be read.
    #[error("read the token {}: {cause}", path.display())]
    Token {
        /// Its file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The manager does not want this agent.
    #[error("{status}: {reason}")]
    Refused {
        /// Its status code.
        status: StatusCode,
        /// What it says.
        reason: String,
        /// Seconds that it asks to be left alone.
        retry_after: Option<u64>,
    },
}

impl DialError {
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => retry_after.map(Duration::from_secs),
            _ => None,
        }
    }
}

/// What it takes to connect to a manager.
#[derive(Debug)]
pub struct Dialer {
    tls: Arc<ClientConfig>,
    name: ServerName<'static>,
    token: PathBuf,
    greeting: Hello,
}

impl Dialer {
    /// Trusts the authority in `ca` (PEM), whatever address a manager has.
    ///
    /// # Errors
    /// Fails where there is no certificate in it.
    pub fn new(ca: &str, token: PathBuf, greeting: Hello) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
            roots.add(certificate.context("read the managers' certificate")?)?;
        }
        anyhow::ensure!(!roots.is_empty(), "TPD_CA holds no certificate");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name =
            ServerName::try_from(SERVER_NAME).map_err(|error: InvalidDnsNameError| anyhow::anyhow!(error))?;
        Ok(Self { tls: Arc::new(tls), name, token, greeting })
    }

    pub(super) fn greeting(&self) -> Hello {
        self.greeting.clone()
    }

    pub(super) async fn dial(&self, manager: SocketAddr) -> Result<Stream, DialError> {
        timeout(PATIENCE, self.connect(manager)).await.unwrap_or(Err(DialError::Timeout))
    }

    async fn connect(&self, manager: SocketAddr) -> Result<Stream, DialError> {
        // The kubelet renews it now and then. It is in memory, so nobody waits for it.
        let token = std::fs::read_to_string(&self.token);
        let token = token.map_err(|cause| DialError::Token { path: self.token.clone(), cause })?;
        let stream = timeout(CONNECT, TcpStream::connect(manager)).await;
        let stream = stream.map_err(|_| DialError::Timeout)??;
        // Without, heartbeats would wait for acknowledgements of each other.
        stream.set_nodelay(true)?;
        let tls = TlsConnector::from(Arc::clone(&self.tls));
        let stream = tls.connect(self.name.clone(), stream).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the exchange, or hands the stream over.
        tokio::task::spawn_local(async move {
            let _ = connection.with_upgrades().await;
        });
        let response = sender.send_request(request(token.trim())?).await?;
        match response.status() {
            StatusCode::SWITCHING_PROTOCOLS => Ok(TokioIo::new(hyper::upgrade::on(response).await?)),
            status => Err(refusal(status, response).await),
        }
    }
}

fn request(token: &str) -> Result<Request<Empty<Bytes>>, io::Error> {
    let mut authorization = HeaderValue::try_from(format!("Bearer {token}")).map_err(io::Error::other)?;
    authorization.set_sensitive(true);
    let request = Request::get(AGENT_PATH)
        .header(HOST, SERVER_NAME)
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, AGENT_UPGRADE)
        .header(AUTHORIZATION, authorization);
    request.body(Empty::new()).map_err(io::Error::other)
}

async fn refusal(status: StatusCode, response: Response<Incoming>) -> DialError {
    let retry_after = retry_after(response.headers());
    let body = Limited::new(response.into_body(), MAX_REASON).collect().await;
    let reason = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).trim().to_owned());
    DialError::Refused { status, reason: reason.unwrap_or_default(), retry_after }
}

fn retry_after(headers: &HeaderMap) -> Option<u64> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()
}
