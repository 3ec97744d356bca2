//! The task of a UDP or ping flow: answers back to the peer, and what had to wait out of the socket.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::{Context, Poll},
};

use tokio::{
    io::Interest,
    time::{Instant, Sleep, sleep_until},
};

use super::Registration;
use crate::flow::Outlet;

/// Most datagrams of a flow that are handled before others get their turn.
const TURN: usize = 64;

impl<O: Outlet> Registration<O> {
    /// Runs until the flow is unused for too long, or aborted.
    pub(super) async fn relay(self) {
        let idle = self.flow.codec.idle(&self.flow.key);
        let mut expiry = pin!(sleep_until(Instant::now() + idle));
        let mut failures = pin!(self.pass_failures_on());
        poll_fn(|context| {
            let _ = failures.as_mut().poll(context);
            self.poll(context, expiry.as_mut())
        })
        .await;
    }

    /// Reports what the socket learns of datagrams that were sent. Waiting to receive doesn't tell: an error
    /// isn't readable.
    async fn pass_failures_on(&self) {
        let Self { shared, flow, .. } = self;
        while flow.socket.ready(Interest::ERROR).await.is_ok() {
            if let Ok(Some(error)) = flow.socket.take_error() {
                shared.report_failure(flow, &error);
            }
            let handled = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
            let _ = flow.socket.try_io(Interest::ERROR, handled);
        }
    }

    fn poll(&self, context: &mut Context<'_>, expiry: Pin<&mut Sleep>) -> Poll<()> {
        self.flow.task.park(context);
        if self.flow.task.is_aborted() {
            return Poll::Ready(());
        }
        self.flush(context);
        self.receive(context);
        self.poll_expired(context, expiry)
    }

    /// Sends what the socket had no room for.
    fn flush(&self, context: &mut Context<'_>) {
        let Self { shared, flow, .. } = self;
        while let Some(length) = flow.queue.borrow().front().map(|datagram| datagram.len()) {
            if flow.socket.poll_send_ready(context).is_pending() {
                return;
            }
            let sent = flow.queue.borrow().front().map_or(Ok(0), |datagram| flow.socket.try_send(datagram));
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => {
                    shared.report_failure(flow, &error);
                    shared.count(|counters| counters.datagrams_dropped += 1);
                }
                Ok(_) => {}
            }
            flow.queue.borrow_mut().pop_front();
            flow.queued.set(flow.queued.get() - length);
        }
    }

    /// Passes on what the destination has sent, as long as the peer's path takes it.
    fn receive(&self, context: &mut Context<'_>) {
        let Self { shared, flow, .. } = self;
        for _ in 0..TURN {
            if flow.socket.poll_recv_ready(context).is_pending()
                || shared.outlet.poll_ready(flow.key.peer, context).is_pending()
            {
                return;
            }
            match self.receive_one() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => shared.report_failure(flow, &error),
                Ok(()) => flow.used.set(shared.now()),
            }
        }
        context.waker().wake_by_ref();
    }

    fn receive_one(&self) -> io::Result<()> {
        let Self { shared, flow, .. } = self;
        let mut scratch = shared.scratch.borrow_mut();
        let start = flow.codec.headroom(&flow.key);
        let length = flow.socket.try_recv(&mut scratch[start..])?;
        let packet = &mut scratch[..start + length];
        if flow.codec.finish(&flow.key, packet) {
            shared.send_cut(flow.key.peer, packet);
        }
        Ok(())
    }

    fn poll_expired(&self, context: &mut Context<'_>, mut expiry: Pin<&mut Sleep>) -> Poll<()> {
        let Self { shared, flow, .. } = self;
        while expiry.as_mut().poll(context).is_ready() {
            let unused = shared.now().saturating_sub(flow.used.get());
            let left = flow.codec.idle(&flow.key).saturating_sub(unused);
            if left.is_zero() {
                return Poll::Ready(());
            }
            expiry.as_mut().reset(Instant::now() + left);
        }
        Poll::Pending
    }
}
