//! Connections made to peers.

use std::{
    future::poll_fn,
    net::SocketAddr,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use thiserror::Error;
use tokio::{
    sync::oneshot,
    time::{Instant, Sleep, sleep, sleep_until},
};

use super::{FlowKey, Registration, Stage, Stream, splice};
use crate::{
    flow::{Outlet, PeerId, Protocol, Shared},
    packet::icmp::Unreachable,
    tcp::Connection,
};

/// Why a connection to a peer wasn't made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DialCause {
    /// The peer refused it.
    #[error("connection refused")]
    Refused,
    /// The peer reported that it can't be reached.
    #[error("unreachable: {0:?}")]
    Unreachable(Unreachable),
    /// The peer didn't answer in time.
    #[error("timed out")]
    TimedOut,
    /// The addresses are taken by another connection, or aren't of one family.
    #[error("addresses in use, or of different families")]
    Address,
    /// There are too many connections.
    #[error("too many connections")]
    Limit,
    /// The peer was removed.
    #[error("the peer was removed")]
    Removed,
}

impl<O: Outlet> Shared<O> {
    /// Connects to `remote` at `peer`; given up, and the peer told so, once the future is dropped.
    pub(in crate::flow) async fn connect_tcp(
        self: &Rc<Self>,
        peer: PeerId,
        local: SocketAddr,
        remote: SocketAddr,
        timeout: Duration,
    ) -> Result<Stream, DialCause> {
        let registration = self.prepare(peer, local, remote)?;
        let (outcome, receiver) = oneshot::channel();
        tokio::task::spawn_local(registration.connect(timeout, outcome));
        receiver.await.unwrap_or(Err(DialCause::Removed))
    }

    fn prepare(
        self: &Rc<Self>,
        peer: PeerId,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Result<Registration<O>, DialCause> {
        let key = FlowKey { peer, protocol: Protocol::Tcp, far: remote, near: local };
        let key = self.vacant(key, |key| self.tcp.flows.contains(key)).ok_or(DialCause::Address)?;
        let connection = Connection::connect(key.near, key.far, self.options(&key), self.now());
        self.register_tcp(key, Stage::Open(Box::new(connection))).ok_or(DialCause::Limit)
    }
}

impl<O: Outlet> Registration<O> {
    async fn connect(self, timeout: Duration, mut outcome: oneshot::Sender<Result<Stream, DialCause>>) {
        let mut expiry = pin!(sleep(timeout));
        let mut timer = pin!(sleep_until(Instant::now()));
        let connected = poll_fn(|context| {
            if outcome.poll_closed(context).is_ready() {
                return Poll::Ready(Err(DialCause::Removed));
            }
            if expiry.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(DialCause::TimedOut));
            }
            self.poll_established(context, timer.as_mut())
        })
        .await;
        if let Err(cause) = connected {
            self.give_up();
            let _ = outcome.send(Err(cause));
            return;
        }
        self.shared.count(|counters| counters.dialed += 1);
        // Where nobody waits for it any more, the handle is dropped here, which resets the connection.
        drop(outcome.send(Ok(Stream::new(&self.flow))));
        self.drive().await;
    }

    /// Makes the handshake go on until it is done.
    pub(super) fn poll_established(
        &self,
        context: &mut Context<'_>,
        timer: Pin<&mut Sleep>,
    ) -> Poll<Result<(), DialCause>> {
        let Self { shared, flow, .. } = self;
        flow.task.park(context);
        if flow.task.is_aborted() {
            return Poll::Ready(Err(DialCause::Removed));
        }
        if let Some(why) = flow.unreachable.take() {
            return Poll::Ready(Err(DialCause::Unreachable(why)));
        }
        let mut stage = flow.stage.borrow_mut();
        let Stage::Open(connection) = &mut *stage else { return Poll::Ready(Err(DialCause::Removed)) };
        if connection.is_established() {
            return Poll::Ready(Ok(()));
        }
        if connection.is_closed() {
            return Poll::Ready(Err(DialCause::Refused));
        }
        if !splice::send(shared, flow, connection, context) {
            splice::wait(shared, connection, context, timer);
        }
        Poll::Pending
    }

    /// Gives the attempt up; the peer is told, in case its answer is on the way.
    pub(super) fn give_up(&self) {
        let Self { shared, flow, .. } = self;
        if let Stage::Open(connection) = &mut *flow.stage.borrow_mut() {
            connection.abort();
            splice::send_regardless(shared, flow, connection);
        }
    }
}
