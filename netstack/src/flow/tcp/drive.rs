//! The task of a connection that has a handle: it sends, keeps the timers, and wakes whoever waits at the handle.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::{
    Registration, Stage,
    splice::{self, End},
    stream::Splice,
};
use crate::flow::Outlet;

/// How long a connection whose handle is gone waits for the peer to take more of what was written, or to close its side too (Linux's
/// `tcp_fin_timeout`).
const ORPHAN: Duration = Duration::from_secs(60);

/// When a connection whose handle is gone is given up, and how much the peer still has to take, bytes.
type Orphan = Option<(Pin<Box<Sleep>>, usize)>;

/// Why the task has nothing to do any more.
enum Outcome {
    Ended(End),
    /// A kernel socket takes the handle's place.
    Splice(Splice),
}

impl<O: Outlet> Registration<O> {
    /// Keeps an open connection going until it has ended and its handle is gone.
    pub(super) async fn drive(self) {
        let Self { shared, flow, .. } = &self;
        let mut timer = pin!(sleep_until(Instant::now()));
        let mut orphan = None;
        let outcome = poll_fn(|context| self.poll(context, timer.as_mut(), &mut orphan)).await;
        match outcome {
            Outcome::Ended(End::Closed) => {}
            Outcome::Ended(End::Reset) => shared.count(|counters| counters.reset += 1),
            Outcome::Splice(Splice { stream, ended }) => {
                let end = splice::splice(shared, flow, stream).await;
                let _ = ended.send(end);
            }
        }
    }

    fn poll(&self, context: &mut Context<'_>, timer: Pin<&mut Sleep>, orphan: &mut Orphan) -> Poll<Outcome> {
        let Self { shared, flow, .. } = self;
        flow.task.park(context);
        let mut stage = flow.stage.borrow_mut();
        let Stage::Open(connection) = &mut *stage else { return Poll::Ready(Outcome::Ended(End::Reset)) };
        let mut handle = flow.handle.borrow_mut();
        if let Some(splice) = handle.splice.take() {
            return Poll::Ready(Outcome::Splice(splice));
        }
        let left = connection.unacknowledged();
        if handle.gone && orphan.as_ref().is_none_or(|(_, before)| *before != left) {
            *orphan = Some((Box::pin(sleep(ORPHAN)), left));
        }
        let overdue = orphan.as_mut().is_some_and(|(expiry, _)| expiry.as_mut().poll(context).is_ready());
        // What arrives for nobody is refused, as any host does.
        if flow.task.is_aborted() || overdue || (handle.gone && connection.can_receive()) {
            connection.abort();
            splice::send_regardless(shared, flow, connection);
            return Poll::Ready(Outcome::Ended(End::Reset));
        }

        connection.set_lossy(shared.outlet.is_lossy(flow.key.peer), shared.now());
        let blocked = splice::send(shared, flow, connection, context);
        handle.notify(connection);
        if connection.is_closed() {
            let end = if connection.is_torn() { End::Reset } else { End::Closed };
            return if handle.gone { Poll::Ready(Outcome::Ended(end)) } else { Poll::Pending };
        }
        if !blocked {
            splice::wait(shared, connection, context, timer);
        }
        Poll::Pending
    }
}
