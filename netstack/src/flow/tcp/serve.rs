//! Connections from peers that end here.

use std::{future::poll_fn, pin::pin, rc::Rc};

use tokio::{
    sync::mpsc::{self, OwnedPermit, error::TrySendError},
    time::{Instant, sleep_until},
};

use super::{Connections, FlowKey, Registration, Stage, Stream};
use crate::{
    flow::{Outlet, Shared},
    packet::reset::reset,
    tcp::Connection,
};

/// Connections that are being made, or wait to be taken: whoever takes them is on the same lane and does so in its
/// next turn, and a turn's batch holds fewer.
const BACKLOG: usize = 128;

impl Connections {
    pub(in crate::flow) fn serve(&self) -> mpsc::Receiver<Stream> {
        let (acceptor, connections) = mpsc::channel(BACKLOG);
        self.acceptor.replace(Some(acceptor));
        connections
    }
}

impl<O: Outlet> Shared<O> {
    /// Answers the SYN in `packet`, if somebody takes connections.
    pub(super) fn serve_tcp(self: &Rc<Self>, key: FlowKey, packet: &[u8]) {
        let acceptor = self.tcp.acceptor.borrow().clone();
        let place = acceptor.map(mpsc::Sender::try_reserve_owned);
        let place = match place {
            Some(Ok(place)) => place,
            // The peer asks again; there may be room by then.
            Some(Err(TrySendError::Full(_))) => return self.count(|counters| counters.over_limit += 1),
            Some(Err(TrySendError::Closed(_))) | None => {
                self.count(|counters| counters.refused += 1);
                return self.answer_stray(key.peer, reset(packet));
            }
        };
        let Some(connection) = Connection::accept(packet, self.options(&key), self.now()) else {
            return self.count(|counters| counters.malformed += 1);
        };
        match self.register_tcp(key, Stage::Open(Box::new(connection))) {
            Some(registration) => drop(tokio::task::spawn_local(registration.serve(place))),
            None => self.answer_stray(key.peer, reset(packet)),
        }
    }
}

impl<O: Outlet> Registration<O> {
    /// Hands the connection over once the peer has acknowledged the answer.
    async fn serve(self, place: OwnedPermit<Stream>) {
        let mut timer = pin!(sleep_until(Instant::now()));
        let established = poll_fn(|context| self.poll_established(context, timer.as_mut())).await;
        if established.is_err() {
            return self.give_up();
        }
        self.shared.count(|counters| counters.accepted += 1);
        if place.send(Stream::new(&self.flow)).is_closed() {
            self.flow.task.abort();
        }
        self.drive().await;
    }
}
