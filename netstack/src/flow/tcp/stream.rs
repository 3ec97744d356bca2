//! The handle of a connection over the overlay that ends here.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::oneshot,
};

use super::{
    Flow, Stage,
    splice::{End, REFILL},
};
use crate::{flow::PeerId, tcp::Connection};

/// A TCP connection over the overlay.
///
/// Shutting it down closes its sending half; what was written before still arrives, even once the stream is dropped.
/// A stream that is dropped before, or with something unread, is reset.
pub struct Stream {
    flow: Rc<Flow>,
    /// Whether a kernel socket has taken this handle's place.
    spliced: bool,
}

/// What a stream and the task of its connection tell each other.
#[derive(Default)]
pub(super) struct Handle {
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// A socket that is to take the stream's place.
    pub(super) splice: Option<Splice>,
    /// Whether the stream was dropped in good order.
    pub(super) gone: bool,
}

/// A socket to join a connection with, and who waits for the end.
pub(super) struct Splice {
    pub(super) stream: TcpStream,
    pub(super) ended: oneshot::Sender<End>,
}

impl Handle {
    /// Wakes those who can go on.
    pub(super) fn notify(&mut self, connection: &Connection) {
        if connection.can_receive() || connection.is_ended() || connection.is_dead() {
            self.reader.take().into_iter().for_each(Waker::wake);
        }
        if connection.wants_filling(REFILL) || connection.is_dead() {
            self.writer.take().into_iter().for_each(Waker::wake);
        }
    }

    /// Wakes all who wait.
    pub(super) fn wake(self) {
        self.reader.into_iter().chain(self.writer).for_each(Waker::wake);
    }
}

impl Stream {
    pub(super) fn new(flow: &Rc<Flow>) -> Self {
        Self { flow: Rc::clone(flow), spliced: false }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> PeerId {
        self.flow.key.peer
    }

    /// The other end's address.
    #[must_use]
    pub fn peer_addr(&self) -> SocketAddr {
        self.flow.key.far
    }

    /// This end's address.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.flow.key.near
    }

    /// Bytes written that the other side's TCP has not acknowledged.
    #[must_use]
    pub fn unacknowledged(&self) -> usize {
        match &*self.flow.stage.borrow() {
            Stage::Open(connection) => connection.unacknowledged(),
            Stage::Held(_) | Stage::Gone => 0,
        }
    }

    /// Joins it with a kernel socket until both are closed, each half by itself. What was received and not yet read
    /// goes first. Both are reset if the future is dropped.
    ///
    /// # Errors
    ///
    /// `ConnectionReset` when either side ended otherwise.
    pub async fn splice(mut self, stream: TcpStream) -> io::Result<()> {
        self.spliced = true;
        let (ended, end) = oneshot::channel();
        if matches!(&*self.flow.stage.borrow(), Stage::Open(_)) {
            self.flow.handle.borrow_mut().splice = Some(Splice { stream, ended });
            self.flow.task.wake();
        } else {
            drop(ended);
        }
        match end.await {
            Ok(End::Closed) => Ok(()),
            Ok(End::Reset) | Err(_) => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Ends the connection at once, with a reset.
    pub fn reset(self) {
        self.flow.task.abort();
    }

    /// Calls `attempt` with the connection, and has the connection's task run if that did something.
    fn with<T>(
        &self,
        attempt: impl FnOnce(&mut Connection, &mut Handle) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let mut stage = self.flow.stage.borrow_mut();
        let Stage::Open(connection) = &mut *stage else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        let outcome = attempt(connection, &mut self.flow.handle.borrow_mut());
        if outcome.is_ready() {
            self.flow.task.wake();
        }
        outcome
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.with(|connection, handle| {
            if !connection.can_receive() && buffer.remaining() > 0 && !connection.is_ended() {
                if connection.is_dead() {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                handle.reader = Some(context.waker().clone());
                return Poll::Pending;
            }
            while connection.can_receive() && buffer.remaining() > 0 {
                connection.receive(|bytes| {
                    let count = bytes.len().min(buffer.remaining());
                    buffer.put_slice(&bytes[..count]);
                    Ok(count)
                })?;
            }
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|connection, handle| {
            if connection.is_finishing() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if connection.is_dead() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            let mut left = bytes;
            while !left.is_empty() && connection.wants_filling(1) {
                let count = connection.transmit(|room| {
                    let count = room.len().min(left.len());
                    room[..count].copy_from_slice(&left[..count]);
                    Ok(count)
                })?;
                left = &left[count..];
            }
            if left.len() == bytes.len() && !bytes.is_empty() {
                handle.writer = Some(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(Ok(bytes.len() - left.len()))
        })
    }

    /// What is written is on its way by itself.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|connection, _| {
            if connection.is_dead() && !connection.is_finishing() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            connection.close();
            Poll::Ready(Ok(()))
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let in_order = matches!(
            &*self.flow.stage.borrow(),
            Stage::Open(connection) if connection.is_finishing() && !connection.can_receive()
        );
        if self.spliced || !in_order {
            return self.flow.task.abort();
        }
        self.flow.handle.borrow_mut().gone = true;
        self.flow.task.wake();
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Stream")
            .field("local", &self.local_addr())
            .field("peer", &self.peer_addr())
            .finish_non_exhaustive()
    }
}
