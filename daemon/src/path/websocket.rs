//! A WebSocket as a byte stream: the handshake, and messages of a protocol that is told apart.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::{Sink as _, Stream as _};
use http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION,
    UPGRADE,
};
use http::{HeaderMap, HeaderName, Request};
use kube::client::Body;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{Refusal, upgrade};

/// Longest message taken. API servers and container runtimes send what one read of theirs gave, 32 KiB.
const MAX_TAKEN: usize = 1 << 20;

/// Bytes read at once. TLS gives a record, 16 KiB; tungstenite zeroes the room for all of them before each read.
const READ: usize = 16 * 1024;

/// What messages mean, without the WebSocket that carries them.
pub(super) trait Protocol {
    /// Most data of one message.
    const MAX_DATA: usize;

    /// The next message: what the protocol wants said first, and `data`.
    fn message(&mut self, data: &[u8]) -> Vec<u8>;

    /// Takes something, but not necessarily all, of a message, which is not empty.
    fn take(&mut self, message: &mut Bytes) -> io::Result<Taken>;
}

/// What a message brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// The stream's next bytes, if any.
    Data(Bytes),
    /// The far end is done with the stream.
    End,
}

/// A WebSocket that has just been opened, and the protocol chosen for it.
pub(super) struct Opened {
    pub(super) protocol: String,
    socket: upgrade::Upgraded,
}

/// Asks for a WebSocket at `path`, in one of `protocols`, the first that the server knows.
pub(super) async fn open(client: &kube::Client, path: &str, protocols: &[&str]) -> Result<Opened, Refusal> {
    let key = generate_key();
    let response =
        client.send(request(path, protocols, &key)).await.map_err(|error| Refusal::from(&error))?;
    let protocol = text(response.headers(), &SEC_WEBSOCKET_PROTOCOL).to_owned();
    let is_websocket = text(response.headers(), &SEC_WEBSOCKET_ACCEPT) == derive_accept_key(key.as_bytes());
    let socket = upgrade::switched(response).await?;
    if !is_websocket || !protocols.contains(&&*protocol) {
        return Err(Refusal::of(format!("it answered with no WebSocket of ours (protocol {protocol:?})")));
    }
    Ok(Opened { protocol, socket })
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn request(path: &str, protocols: &[&str], key: &str) -> Request<Body> {
    Request::get(path)
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "websocket")
        .header(SEC_WEBSOCKET_VERSION, "13")
        .header(SEC_WEBSOCKET_KEY, key)
        .header(SEC_WEBSOCKET_PROTOCOL, protocols.join(", "))
        .body(Body::empty())
        .expect("pod names, ports and names of protocols make valid requests")
}

impl Opened {
    /// The stream that `protocol` makes of its messages.
    pub(super) async fn speak<P: Protocol>(self, protocol: P) -> WebSocketStream<upgrade::Upgraded, P> {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ)
            .max_message_size(Some(MAX_TAKEN))
            .max_frame_size(Some(MAX_TAKEN));
        let inner =
            tokio_tungstenite::WebSocketStream::from_raw_socket(self.socket, Role::Client, Some(config))
                .await;
        WebSocketStream::new(inner, protocol)
    }
}

/// The bytes of a stream that a protocol carries in messages.
pub(super) struct WebSocketStream<S, P> {
    inner: tokio_tungstenite::WebSocketStream<S>,
    protocol: P,
    /// What the protocol has not taken of the last message.
    message: Bytes,
    unread: Bytes,
    ended: bool,
}

impl<S, P> WebSocketStream<S, P> {
    fn new(inner: tokio_tungstenite::WebSocketStream<S>, protocol: P) -> Self {
        Self { inner, protocol, message: Bytes::new(), unread: Bytes::new(), ended: false }
    }
}

impl<S, P> WebSocketStream<S, P>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Protocol,
{
    /// Waits until there is something unread, or nothing to come.
    fn poll_unread(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() && !self.ended {
            if self.message.is_empty() {
                match ready!(Pin::new(&mut self.inner).poll_next(cx)) {
                    Some(Ok(Message::Binary(message))) => self.message = message,
                    Some(Ok(Message::Close(_))) | None => self.ended = true,
                    // Pings are answered by tungstenite itself.
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                }
            } else {
                match self.protocol.take(&mut self.message)? {
                    Taken::Data(bytes) => self.unread = bytes,
                    Taken::End => self.ended = true,
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S, P> AsyncRead for WebSocketStream<S, P>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Protocol + Unpin,
{
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_unread(cx))?;
        let length = this.unread.len().min(buf.remaining());
        buf.put_slice(&this.unread.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<S, P> AsyncWrite for WebSocketStream<S, P>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Protocol + Unpin,
{
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // Flushed before the next message, so that at most one waits here and back-pressure is felt.
        ready!(Pin::new(&mut this.inner).poll_flush(cx)).map_err(broken)?;
        let length = buf.len().min(P::MAX_DATA);
        let message = this.protocol.message(&buf[..length]);
        Pin::new(&mut this.inner).start_send(Message::Binary(message.into())).map_err(broken)?;
        // What does not fit the socket now goes with the next write or flush.
        if let Poll::Ready(Err(error)) = Pin::new(&mut this.inner).poll_flush(cx) {
            return Poll::Ready(Err(broken(error)));
        }
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx).map_err(broken)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_close(cx).map_err(broken)
    }
}

fn broken(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use futures::{SinkExt as _, StreamExt as _};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;

    /// A message is as many bytes as its first one says, and then others; `!` is a mistake, and `.` is the end.
    #[derive(Default)]
    struct Toy;

    impl Protocol for Toy {
        const MAX_DATA: usize = 10;

        fn message(&mut self, data: &[u8]) -> Vec<u8> {
            [b"<", data, b">"].concat()
        }

        fn take(&mut self, message: &mut Bytes) -> io::Result<Taken> {
            match message.split_to(1)[0] {
                b'!' => Err(io::Error::other("a mistake")),
                b'.' => Ok(Taken::End),
                length => Ok(Taken::Data(message.split_to(length.into()))),
            }
        }
    }

    async fn pair() -> (WebSocketStream<DuplexStream, Toy>, tokio_tungstenite::WebSocketStream<DuplexStream>)
    {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let client = tokio_tungstenite::WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
        let server = tokio_tungstenite::WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
        (WebSocketStream::new(client, Toy), server)
    }

    #[tokio::test]
    async fn a_message_is_read_piece_by_piece() {
        let (mut client, mut server) = pair().await;
        server.send(Message::binary(b"\x02hi\x00\x06 there".as_slice())).await.unwrap();
        server.send(Message::binary(b"\x01!.".as_slice())).await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hi there!");
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_mistake_ends_the_stream_and_so_does_a_close() {
        let (mut client, mut server) = pair().await;
        server.send(Message::binary(b"!".as_slice())).await.unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap_err().to_string(), "a mistake");
        server.close(None).await.unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn large_writes_become_messages_of_what_the_protocol_allows() {
        let (mut client, mut server) = pair().await;
        client.write_all(b"0123456789abc").await.unwrap();
        client.flush().await.unwrap();
        assert_eq!(server.next().await.unwrap().unwrap().into_data(), "<0123456789>");
        assert_eq!(server.next().await.unwrap().unwrap().into_data(), "<abc>");
    }
}
