//! What a client's connection is joined with: the app, or a laptop.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;

use super::buffer::Buffer;
use super::rules::{Port, Rule};

/// A connection, whatever carries it. Bytes that it has taken leave without a flush.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {
    /// Has it end in a reset when it is dropped, so that the other side cannot take what it has got for all there is.
    fn abort(&mut self);

    /// Bytes written that the other side has not acknowledged, where that is known.
    fn unacknowledged(&self) -> usize {
        0
    }
}

impl Transport for TcpStream {
    fn abort(&mut self) {
        // It fails only on a socket that is no more.
        let _ = SockRef::from(&*self).set_linger(Some(Duration::ZERO));
    }
}

/// Ways to the app and to the laptops.
pub trait Upstreams: 'static {
    /// A connection to the app.
    type App: Transport + 'static;
    /// A connection to a laptop.
    type Laptop: Transport + 'static;

    /// Connects to the app.
    fn app(&self) -> impl Future<Output = io::Result<Self::App>>;

    /// Connects to the laptop that a rule names, within the time that production may wait for it.
    fn laptop(&self, rule: &Rule) -> impl Future<Output = Result<Self::Laptop, Refusal>>;

    /// Whether the laptop that a rule names did not answer others just now, so that it is not to be asked, on open connections
    /// neither.
    fn is_left_out(&self, rule: &Rule) -> bool;

    /// Says that a laptop left a request unanswered on a connection that it had accepted.
    fn lost(&self, rule: &Rule);
}

/// Why there is no way to a laptop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It was not asked, because it did not answer others just now.
    #[error("it has been left out since it last did not answer")]
    Suspended,
    /// It did not answer in time.
    #[error("it did not answer in time")]
    Timeout,
    /// It refused: nothing listens there.
    #[error("it refused the connection")]
    Refused,
}

/// Who talks to whom.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The client.
    pub client: SocketAddr,
    /// The app, as the client called it.
    pub server: SocketAddr,
}

impl Addresses {
    /// Header of the PROXY protocol, version 1.
    pub(super) fn proxy_header(&self) -> String {
        let (from, to) = (self.client.ip().to_canonical(), self.server.ip().to_canonical());
        let family = match (from.is_ipv4(), to.is_ipv4()) {
            (true, true) => "TCP4",
            (false, false) => "TCP6",
            _ => return "PROXY UNKNOWN\r\n".into(),
        };
        format!("PROXY {family} {from} {to} {} {}\r\n", self.client.port(), self.server.port())
    }
}

/// What all that is done for one client shares.
#[derive(Debug)]
pub(super) struct Passage<U> {
    pub(super) port: Rc<Port>,
    pub(super) upstreams: Rc<U>,
    pub(super) addresses: Addresses,
}

impl<U> Clone for Passage<U> {
    fn clone(&self) -> Self {
        Self { port: self.port.clone(), upstreams: self.upstreams.clone(), addresses: self.addresses }
    }
}

impl<U: Upstreams> Passage<U> {
    /// Connects to a laptop, and says what is to be written first.
    pub(super) async fn laptop(&self, rule: &Rule) -> Result<(U::Laptop, Vec<u8>), Refusal> {
        let stream = self.upstreams.laptop(rule).await?;
        let header = if rule.proxy_protocol { self.addresses.proxy_header() } else { String::new() };
        Ok((stream, header.into_bytes()))
    }

    /// Connects to the laptop, or to the app where there is no rule or no laptop.
    pub(super) async fn side(&self, rule: Option<&Rc<Rule>>) -> io::Result<Side<U>> {
        if let Some(rule) = rule
            && let Ok((stream, header)) = self.laptop(rule).await
        {
            return Ok(Side::Laptop(rule.clone(), stream, header));
        }
        Ok(Side::App(self.upstreams.app().await?))
    }
}

/// The app, or the laptop that a rule names.
pub(super) enum Side<U: Upstreams> {
    App(U::App),
    /// With what must be written before anything else.
    Laptop(Rc<Rule>, U::Laptop, Vec<u8>),
}

impl<U: Upstreams> AsyncRead for Side<U> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::App(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Laptop(_, stream, _) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

/// A stream whose first bytes were read before, and are read again.
#[derive(Debug)]
pub(super) struct Rewound<T> {
    first: Buffer,
    stream: T,
}

impl<T> Rewound<T> {
    pub(super) fn new(first: Buffer, stream: T) -> Self {
        Self { first, stream }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewound<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let count = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first.filled()[..count]);
        self.first.consume(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewound<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<T: Transport> Transport for Rewound<T> {
    fn abort(&mut self) {
        self.stream.abort();
    }

    fn unacknowledged(&self) -> usize {
        self.stream.unacknowledged()
    }
}

/// Ends a connection in good order: says that nothing follows.
pub(super) async fn close(mut stream: impl Transport) {
    // A stream that fails here is closed already.
    let _ = stream.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::Addresses;

    #[test]
    fn the_proxy_header_names_both_ends_in_one_family() {
        for (client, server, header) in [
            ("10.0.0.1:5", "10.0.0.2:80", "PROXY TCP4 10.0.0.1 10.0.0.2 5 80\r\n"),
            ("[::ffff:10.0.0.1]:5", "10.0.0.2:80", "PROXY TCP4 10.0.0.1 10.0.0.2 5 80\r\n"),
            ("[fd00::1]:5", "[fd00::2]:80", "PROXY TCP6 fd00::1 fd00::2 5 80\r\n"),
            ("[fd00::1]:5", "10.0.0.2:80", "PROXY UNKNOWN\r\n"),
        ] {
            let addresses = Addresses { client: client.parse().unwrap(), server: server.parse().unwrap() };
            assert_eq!(addresses.proxy_header(), header);
        }
    }
}
