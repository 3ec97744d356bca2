//! TLS on the stream port: the API server's webhooks, and the agents.
//!
//! TLS and plain HTTP share one port, so that one port of the pods has to be reachable. The first byte tells them apart: a
//! TLS record of a handshake begins with 22 (RFC 8446, 5.1), a request with a letter.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tpd_api::agent::AGENT_PATH;
use tracing::debug;

use super::http::{self, Reply};

/// Content type of a TLS handshake.
const HANDSHAKE: u8 = 22;

/// For the first byte, and for the handshake. The API server itself waits two seconds for a webhook.
const PATIENCE: Duration = Duration::from_secs(2);

/// Prefix of the webhooks' paths.
pub const WEBHOOKS: &str = "/v1/webhook/";

/// What answers a kind of requests. To upgrade, it takes [`hyper::upgrade::on`] of the request and answers 101: what is
/// upgraded is the connection within TLS.
pub trait Handler: std::fmt::Debug + Send + Sync + 'static {
    /// Answers one request.
    fn answer(&self, request: Request<Incoming>) -> BoxFuture<'static, Reply>;
}

/// What is served behind TLS.
#[derive(Clone)]
pub struct Secure {
    acceptor: TlsAcceptor,
    webhooks: Arc<dyn Handler>,
    agents: Arc<dyn Handler>,
}

impl Secure {
    /// Requests below [`WEBHOOKS`] go to `webhooks`, those for [`AGENT_PATH`] to `agents`.
    #[must_use]
    pub fn new(
        config: Arc<rustls::ServerConfig>,
        webhooks: Arc<dyn Handler>,
        agents: Arc<dyn Handler>,
    ) -> Self {
        Self { acceptor: config.into(), webhooks, agents }
    }

    /// Serves a connection to its end, or until it is upgraded.
    pub async fn serve(&self, stream: TcpStream) {
        match timeout(PATIENCE, self.acceptor.accept(stream)).await {
            Ok(Ok(stream)) => http::connection(stream, |request| self.answer(request)).await,
            Ok(Err(error)) => debug!(%error, "tls"),
            Err(_) => debug!("a TLS handshake took too long"),
        }
    }

    fn answer(&self, request: Request<Incoming>) -> BoxFuture<'static, Reply> {
        match request.uri().path() {
            AGENT_PATH => self.agents.answer(request),
            path if path.starts_with(WEBHOOKS) => self.webhooks.answer(request),
            _ => {
                let text = format!("This is a tpd manager. There are {AGENT_PATH} and {WEBHOOKS}.\n");
                Box::pin(std::future::ready(http::text(StatusCode::NOT_FOUND, text)))
            }
        }
    }
}

impl std::fmt::Debug for Secure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secure").finish_non_exhaustive()
    }
}

/// Whether a connection begins with TLS; `None` if it says nothing in time, or has ended.
pub async fn is_tls(stream: &TcpStream) -> Option<bool> {
    let mut first = [0];
    match timeout(PATIENCE, stream.peek(&mut first)).await {
        Ok(Ok(1)) => Some(first[0] == HANDSHAKE),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::sync::Arc;

    use futures::future::BoxFuture;
    use hyper::body::Incoming;
    use hyper::{Request, StatusCode};
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, ServerName};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;
    use tpd_api::agent::SERVER_NAME;

    use super::{Handler, Reply, Secure, http, is_tls};
    use crate::manager::ca::Authority;

    #[derive(Debug)]
    struct Says(&'static str);

    impl Handler for Says {
        fn answer(&self, _: Request<Incoming>) -> BoxFuture<'static, Reply> {
            Box::pin(std::future::ready(http::text(StatusCode::OK, self.0)))
        }
    }

    async fn server() -> (SocketAddr, TlsConnector) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authority = Authority::generate().unwrap();
        let secure = Secure::new(
            authority.server_config("tpd-system").unwrap(),
            Arc::new(Says("webhooks")),
            Arc::new(Says("agents")),
        );
        let listener = http::listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(http::accept(listener, 8, move |stream| {
            let secure = secure.clone();
            async move {
                match is_tls(&stream).await {
                    Some(true) => secure.serve(stream).await,
                    _ => {
                        http::connection(stream, |_| std::future::ready(http::text(StatusCode::OK, "plain")))
                            .await;
                    }
                }
            }
        }));
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        (address, Arc::new(config).into())
    }

    async fn get(
        mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
        path: &str,
    ) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply).await;
        String::from_utf8(reply).unwrap()
    }

    #[tokio::test]
    async fn one_port_serves_tls_and_plain() {
        let (address, connector) = server().await;
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        for (path, expected) in
            [("/v1/agent", "agents"), ("/v1/webhook/pods", "webhooks"), ("/v1/stream", "404 Not Found")]
        {
            let stream = TcpStream::connect(address).await.unwrap();
            let reply = get(connector.connect(name.clone(), stream).await.unwrap(), path).await;
            assert!(reply.contains(expected), "{path}: {reply}");
        }
        let reply = get(TcpStream::connect(address).await.unwrap(), "/v1/stream").await;
        assert!(reply.ends_with("plain"), "{reply}");
    }

    #[tokio::test]
    async fn garbage_in_the_guise_of_tls_harms_nobody() {
        let (address, connector) = server().await;
        let mut garbage = TcpStream::connect(address).await.unwrap();
        garbage.write_all(&[22, 3, 1, 0, 5, 1, 2, 3, 4, 5]).await.unwrap();
        let mut rest = Vec::new();
        let _ = garbage.read_to_end(&mut rest).await;
        let name = ServerName::try_from("tpd-webhook.tpd-system.svc").unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        assert!(get(connector.connect(name, stream).await.unwrap(), "/v1/agent").await.ends_with("agents"));
    }
}
