//! A small HTTP/1.1 server, the same for streams and for health: bounded in connections, time and size.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

/// What is answered: a whole body, always short.
pub type Reply = Response<Full<Bytes>>;

/// For a client to send its request's head. The API server sends it with the connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest head of a request, bytes: the API server adds a handful of headers to the client's own.
const HEAD_SIZE: usize = 16 * 1024;

/// Pause after a failed accept: the process is out of descriptors, and only time frees some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listens on an address; on every IPv4 address where the wildcard of IPv6 cannot be had.
///
/// # Errors
/// Fails where the port is taken.
pub async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = match TcpListener::bind(address).await {
        Err(_) if address.ip().is_unspecified() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        result => result,
    };
    listener.with_context(|| format!("listen on TCP {address}"))
}

/// Serves requests for ever, at most `connections` at a time; more are closed at once. A connection that its handler
/// upgrades counts no longer.
pub async fn serve<H, F>(listener: TcpListener, connections: usize, handler: H)
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Reply> + Send + 'static,
{
    accept(listener, connections, move |stream| connection(stream, handler.clone())).await;
}

/// Accepts connections for ever, and serves at most `connections` at a time; more are closed at once.
pub async fn accept<C, F>(listener: TcpListener, connections: usize, connection: C)
where
    C: Fn(TcpStream) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(connections));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
        // Failing costs some latency and nothing else.
        let _ = stream.set_nodelay(true);
        let served = connection(stream);
        tokio::spawn(async move {
            served.await;
            drop(permit);
        });
    }
}

/// Serves one connection to its end, or until it is upgraded.
pub async fn connection<S, H, F>(stream: S, handler: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Incoming>) -> F + Send,
    F: Future<Output = Reply> + Send,
{
    let service = service_fn(move |request| {
        let reply = handler(request);
        async { Ok::<_, std::convert::Infallible>(reply.await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_SIZE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = served.await {
        debug!(%error, "http");
    }
}

/// A short text; the connection ends with it.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    typed(status, "text/plain; charset=utf-8", body)
}

/// A body of some type.
pub fn typed(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(body.into()));
    *reply.status_mut() = status;
    // One request is all that a connection carries. (hyper's own setting would say so in a 101, too.)
    reply.headers_mut().insert(http::header::CONNECTION, http::HeaderValue::from_static("close"));
    reply.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    reply
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::{StatusCode, listen, serve, text};

    async fn server(connections: usize) -> SocketAddr {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, connections, async |_| text(StatusCode::OK, "hello")));
        address
    }

    async fn exchange(stream: &mut TcpStream, request: &str) -> String {
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }

    #[tokio::test]
    async fn a_connection_carries_one_request() {
        let mut stream = TcpStream::connect(server(1).await).await.unwrap();
        let reply = exchange(&mut stream, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(reply.starts_with("HTTP/1.1 200") && reply.ends_with("hello"), "{reply}");
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_are_closed() {
        let address = server(1).await;
        let mut first = TcpStream::connect(address).await.unwrap();
        first.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let mut second = TcpStream::connect(address).await.unwrap();
        assert_eq!(second.read(&mut [0]).await.unwrap_or(0), 0);
        let reply = exchange(&mut first, "Host: x\r\n\r\n").await;
        assert!(reply.ends_with("hello"), "{reply}");
    }

    #[tokio::test]
    async fn a_head_that_is_too_large_is_refused() {
        let mut stream = TcpStream::connect(server(1).await).await.unwrap();
        let head = format!("GET / HTTP/1.1\r\nHost: x\r\nPadding: {}\r\n\r\n", "x".repeat(20_000));
        let reply = exchange(&mut stream, &head).await;
        assert!(reply.starts_with("HTTP/1.1 431"), "{reply}");
    }
}
