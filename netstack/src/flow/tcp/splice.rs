//! Moving bytes between a user-space connection and a kernel socket, straight from ring to socket and back.

use std::{
    future::poll_fn,
    io,
    net::Shutdown,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};

use super::{Flow, Stage};
use crate::{
    flow::{Outlet, Shared},
    tcp::Connection,
};

/// Most that a flow moves in one direction before others get their turn: four super-packets, which are 250 KB, 0.6 ms
/// at 3.2 Gb/s. What takes its turn behind ten busy flows waits for 6 ms.
const TURN_PACKETS: usize = 4;
const TURN_BYTES: usize = 256 << 10;

/// The send buffer is filled when it has this much room, bytes: a system call for less isn't worth it.
pub(super) const REFILL: usize = 16 << 10;

/// How often the kernel asks an idle destination for a sign of life, and after how many unanswered questions it
/// is given up: two minutes after its node died.
const KEEP_ALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);

/// Timers are no finer than tokio's wheel.
const TICK: Duration = Duration::from_millis(1);

/// Joins `flow`, whose connection is open or about to be, with `stream` until both are closed.
pub(super) async fn splice<O: Outlet>(shared: &Rc<Shared<O>>, flow: &Rc<Flow>, stream: TcpStream) -> End {
    // Failing to set an option costs speed, or time to notice; the connection itself works without.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(&stream).set_tcp_keepalive(&KEEP_ALIVE);

    let mut timer = pin!(sleep_until(Instant::now()));
    let saw_end = matches!(&*flow.stage.borrow(), Stage::Open(connection) if connection.is_finishing());
    let mut splice = Splice { shared, flow, stream: &stream, told_end: false, saw_end };
    let end = poll_fn(|context| splice.poll(context, timer.as_mut())).await;
    if end == End::Reset {
        shared.count(|counters| counters.reset += 1);
        // Closing a socket that doesn't linger resets its connection.
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    }
    end
}

/// How a connection came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Closed,
    Reset,
}

struct Splice<'a, O: Outlet> {
    shared: &'a Rc<Shared<O>>,
    flow: &'a Flow,
    stream: &'a TcpStream,
    /// Whether the stream has been told that the peer sends no more.
    told_end: bool,
    /// Whether the stream has said that it sends no more, or nobody asks it.
    saw_end: bool,
}

impl<O: Outlet> Splice<'_, O> {
    fn poll(&mut self, context: &mut Context<'_>, timer: Pin<&mut Sleep>) -> Poll<End> {
        self.flow.task.park(context);
        let mut stage = self.flow.stage.borrow_mut();
        let Stage::Open(connection) = &mut *stage else { return Poll::Ready(End::Reset) };

        if self.flow.task.is_aborted() {
            connection.abort();
            // Without waiting for room: the peer is as good as gone.
            send_regardless(self.shared, self.flow, connection);
            return Poll::Ready(End::Reset);
        }
        // The path may have changed since the flow last ran.
        connection.set_lossy(self.shared.outlet.is_lossy(self.flow.key.peer), self.shared.now());
        if let Err(error) = self.transfer(context, connection) {
            tracing::debug!(flow = ?self.flow.key, %error, "stream");
            connection.abort();
            send_regardless(self.shared, self.flow, connection);
            return Poll::Ready(End::Reset);
        }
        let blocked = send(self.shared, self.flow, connection, context);
        if connection.is_torn() && connection.is_closed() {
            return Poll::Ready(End::Reset);
        }
        if connection.is_closed() && self.told_end && self.saw_end {
            return Poll::Ready(End::Closed);
        }
        if !blocked {
            wait(self.shared, connection, context, timer);
        }
        Poll::Pending
    }

    /// Moves what can be moved in either direction.
    fn transfer(&mut self, context: &mut Context<'_>, connection: &mut Connection) -> io::Result<()> {
        self.deliver(context, connection)?;
        self.collect(context, connection)
    }

    fn deliver(&mut self, context: &mut Context<'_>, connection: &mut Connection) -> io::Result<()> {
        let mut turn = TURN_BYTES;
        while connection.can_receive() {
            if turn == 0 {
                context.waker().wake_by_ref();
                return Ok(());
            }
            let Poll::Ready(ready) = self.stream.poll_write_ready(context) else { return Ok(()) };
            ready?;
            match connection.receive(|bytes| self.stream.try_write(bytes)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => turn = turn.saturating_sub(result?),
            }
        }
        if connection.is_ended() && !self.told_end {
            self.told_end = true;
            // It fails only if the stream has failed, which reading from it tells.
            let _ = SockRef::from(self.stream).shutdown(Shutdown::Write);
        }
        Ok(())
    }

    fn collect(&mut self, context: &mut Context<'_>, connection: &mut Connection) -> io::Result<()> {
        let mut turn = TURN_BYTES;
        while !self.saw_end && connection.wants_filling(REFILL) {
            if turn == 0 {
                context.waker().wake_by_ref();
                return Ok(());
            }
            let Poll::Ready(ready) = self.stream.poll_read_ready(context) else { return Ok(()) };
            ready?;
            match connection.transmit(|room| self.stream.try_read(room)) {
                Ok(0) => {
                    self.saw_end = true;
                    connection.close();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => turn = turn.saturating_sub(result?),
            }
        }
        Ok(())
    }
}

/// Sends what `flow` has to send, as far as its turn goes. `true` if the path is full; the task is woken when
/// it no longer is.
pub(super) fn send<O: Outlet>(
    shared: &Rc<Shared<O>>,
    flow: &Flow,
    connection: &mut Connection,
    context: &mut Context<'_>,
) -> bool {
    for _ in 0..TURN_PACKETS {
        if connection.deadline(shared.now()) != Some(Duration::ZERO) {
            return false;
        }
        if shared.outlet.poll_ready(flow.key.peer, context).is_pending() {
            return true;
        }
        send_regardless(shared, flow, connection);
    }
    false
}

/// Sends one packet, if one is due, without asking whether there is room.
pub(super) fn send_regardless<O: Outlet>(shared: &Rc<Shared<O>>, flow: &Flow, connection: &mut Connection) {
    let peer = flow.key.peer;
    let mut buffer = shared.scratch.borrow_mut();
    connection.egress(shared.now(), &mut buffer, &mut |packet, mss| shared.outlet.send(peer, packet, mss));
}

/// Has the task woken when `connection` has something to do by itself.
pub(super) fn wait<O: Outlet>(
    shared: &Rc<Shared<O>>,
    connection: &mut Connection,
    context: &mut Context<'_>,
    mut timer: Pin<&mut Sleep>,
) {
    let Some(delay) = connection.deadline(shared.now()) else { return };
    if delay.is_zero() {
        return context.waker().wake_by_ref();
    }
    let at = Instant::now() + delay.max(TICK);
    // A timer that fires early is harmless, while moving it costs: time-outs move with every packet.
    if timer.is_elapsed() || at < timer.deadline() {
        timer.as_mut().reset(at);
    }
    while let Poll::Ready(()) = timer.as_mut().poll(context) {
        timer.as_mut().reset(Instant::now() + delay.max(TICK));
    }
}
