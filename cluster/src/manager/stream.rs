//! The stream port: an HTTP/1.1 Upgrade turns a connection into a stream of overlay frames.
//!
//! What begins with TLS is something else, and told apart by its first byte (see [`tls`]).

use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tpd_api::{STREAM_PATH, STREAM_UPGRADE};
use tracing::debug;

use super::http::{self, Reply};
use super::overlay::Overlay;
use super::tls::{self, Secure};

/// Connections that have not been upgraded yet, those of webhooks among them. A laptop's is upgraded within a millisecond, an
/// agent's once the API server has reviewed its token; a thousand agents come at once where a manager has been restarted.
const CONNECTIONS: usize = 1024;

/// A peer that vanished without a word is noticed by WireGuard's timers; this frees the socket after it.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(std::time::Duration::from_secs(30))
    .with_interval(std::time::Duration::from_secs(10))
    .with_retries(3);

/// Accepts streams for ever, and what comes by TLS once there is a certificate for it.
pub async fn serve(listener: TcpListener, overlay: Arc<Overlay>, secure: Arc<OnceLock<Secure>>) {
    http::accept(listener, CONNECTIONS, move |stream| {
        let (overlay, secure) = (Arc::clone(&overlay), Arc::clone(&secure));
        async move {
            match (tls::is_tls(&stream).await, secure.get()) {
                (Some(true), Some(secure)) => secure.serve(stream).await,
                (Some(false), _) => {
                    let handler = |request| std::future::ready(answer(request, Arc::clone(&overlay)));
                    http::connection(stream, handler).await;
                }
                (Some(true), None) | (None, _) => {}
            }
        }
    })
    .await;
}

fn answer(mut request: Request<Incoming>, overlay: Arc<Overlay>) -> Reply {
    let refusal = refusal(request.method(), request.uri().path(), request.headers().get(UPGRADE));
    if let Some(refusal) = refusal {
        return refusal;
    }
    tokio::spawn(hand_over(hyper::upgrade::on(&mut request), overlay));
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    upgrade_headers(reply.headers_mut(), "upgrade");
    reply
}

/// What is wrong with a request, if anything is.
fn refusal(method: &Method, path: &str, upgrade: Option<&HeaderValue>) -> Option<Reply> {
    if path != STREAM_PATH {
        let text =
            format!("This is a tpd manager. Overlay streams are at {STREAM_PATH}; connect with `tpd up`.\n");
        return Some(http::text(StatusCode::NOT_FOUND, text));
    }
    if method != Method::GET {
        return Some(http::text(StatusCode::METHOD_NOT_ALLOWED, "Overlay streams begin with GET.\n"));
    }
    let upgrade = upgrade.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let asked = upgrade.split(',').any(|token| token.trim().eq_ignore_ascii_case(STREAM_UPGRADE));
    (!asked).then(|| {
        let text = format!(
            "An overlay stream needs `Upgrade: {STREAM_UPGRADE}`. \
             If you sent it, something between you and this pod removed it.\n"
        );
        let mut reply = http::text(StatusCode::UPGRADE_REQUIRED, text);
        upgrade_headers(reply.headers_mut(), "upgrade, close");
        reply
    })
}

fn upgrade_headers(headers: &mut hyper::HeaderMap, connection: &'static str) {
    headers.insert(CONNECTION, HeaderValue::from_static(connection));
    headers.insert(UPGRADE, HeaderValue::from_static(STREAM_UPGRADE));
}

async fn hand_over(upgrade: OnUpgrade, overlay: Arc<Overlay>) {
    let handed_over = match upgrade.await {
        Ok(upgraded) => detach(upgraded).map(|(stream, read)| overlay.attach(stream, read)),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = handed_over {
        debug!(error = format!("{error:#}"), "stream");
    }
}

/// The bare socket, and what was read from it past the request.
fn detach(upgraded: Upgraded) -> anyhow::Result<(std::net::TcpStream, Bytes)> {
    let parts = upgraded.downcast::<TokioIo<TcpStream>>().map_err(|_| anyhow!("not a TCP connection"))?;
    let stream = parts.io.into_inner().into_std().context("leave the runtime")?;
    SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE).context("keepalive")?;
    Ok((stream, parts.read_buf))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use hyper::{Method, StatusCode};

    use super::refusal;

    #[test]
    fn only_an_upgrade_of_the_right_path_becomes_a_stream() {
        for (method, path, upgrade, expected) in [
            (Method::GET, "/v1/stream", Some("tpd"), None),
            (Method::GET, "/v1/stream", Some("websocket, TPD"), None),
            (Method::GET, "/v1/stream", Some("websocket"), Some(StatusCode::UPGRADE_REQUIRED)),
            (Method::GET, "/v1/stream", None, Some(StatusCode::UPGRADE_REQUIRED)),
            (Method::POST, "/v1/stream", Some("tpd"), Some(StatusCode::METHOD_NOT_ALLOWED)),
            (Method::GET, "/", Some("tpd"), Some(StatusCode::NOT_FOUND)),
            (Method::GET, "/metrics", None, Some(StatusCode::NOT_FOUND)),
        ] {
            let upgrade = upgrade.map(HeaderValue::from_static);
            let status = refusal(&method, path, upgrade.as_ref()).map(|reply| reply.status());
            assert_eq!(status, expected, "{method} {path} {upgrade:?}");
        }
    }
}
