//! TCP flows: connections that end here and continue on a kernel socket.

mod connect;
mod drive;
mod serve;
mod splice;
mod stream;

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    task::Poll,
};

use tokio::{net::TcpStream, sync::mpsc};

pub use self::{connect::DialCause, stream::Stream};
use super::{
    FlowKey, Outlet, PeerId, Protocol, Route, Shared,
    table::{Serial, Table},
    task::Task,
};
use crate::{
    packet::{IpHeader, header, icmp::Unreachable, reset::reset},
    tcp::{self, Connection, Options},
};

/// Largest payload of a UDP datagram, which carries one batch of sealed segments, and what WireGuard puts
/// around each of them (header 16, tag 16), bytes.
const MAX_BATCH: usize = 65_507;
const SEAL: usize = 32;

/// The TCP flows of an engine.
#[derive(Default)]
pub(super) struct Connections {
    flows: Table<Flow>,
    /// Who takes the connections that end here.
    acceptor: RefCell<Option<mpsc::Sender<Stream>>>,
}

/// A connection.
struct Flow {
    key: FlowKey,
    stage: RefCell<Stage>,
    /// What an ICMP error said of it while it was being made.
    unreachable: Cell<Option<Unreachable>>,
    handle: RefCell<stream::Handle>,
    task: Task,
}

enum Stage {
    /// The SYN waits for the destination to accept.
    Held(Box<[u8]>),
    Open(Box<Connection>),
    Gone,
}

impl Connections {
    pub(super) fn remove_peer(&self, peer: PeerId) {
        self.flows.visit(peer, |_, flow| {
            flow.task.abort();
            true
        });
    }

    /// Notes that what was sent as part of the flow `key` did not arrive.
    pub(super) fn unreachable(&self, key: &FlowKey, why: Unreachable) {
        if let Some(flow) = self.flows.get(key) {
            flow.unreachable.set(Some(why));
            flow.task.wake();
        }
    }
}

impl Flow {
    /// The output of `future`, or `None` if the flow is aborted before it has one.
    async fn unless_aborted<F: Future>(&self, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        poll_fn(|context| {
            self.task.park(context);
            if self.task.is_aborted() {
                return Poll::Ready(None);
            }
            future.as_mut().poll(context).map(Some)
        })
        .await
    }
}

impl<O: Outlet> Shared<O> {
    pub(super) fn ingest_tcp(self: &Rc<Self>, peer: PeerId, header: &IpHeader, packet: &[u8]) {
        let Some((far, near)) = header.sockets(packet) else {
            return self.count(|counters| counters.malformed += 1);
        };
        let key = FlowKey { peer, protocol: Protocol::Tcp, far, near };
        let Some(flow) = self.tcp.flows.get(&key) else { return self.ingest_stray(key, packet) };
        match &mut *flow.stage.borrow_mut() {
            Stage::Open(connection) => {
                connection.ingest(packet, self.now());
                flow.task.wake();
            }
            // Of the SYNs that came while the destination was asked, the last is the one that still waits for
            // its answer.
            Stage::Held(syn) if tcp::opens(packet) => *syn = packet.into(),
            Stage::Held(_) | Stage::Gone => {}
        }
    }

    fn ingest_stray(self: &Rc<Self>, key: FlowKey, packet: &[u8]) {
        if !tcp::opens(packet) {
            return self.answer_stray(key.peer, reset(packet));
        }
        match self.policy.route(Protocol::Tcp, key.far.ip(), key.near) {
            Route::Dial(destination) => {
                let Some(registration) = self.register_tcp(key, Stage::Held(packet.into())) else {
                    return self.answer_stray(key.peer, reset(packet));
                };
                drop(tokio::task::spawn_local(registration.accept(destination)));
            }
            Route::Serve => self.serve_tcp(key, packet),
            Route::Prohibited => {
                self.count(|counters| counters.prohibited += 1);
                self.report_stray(key.peer, packet, Unreachable::Prohibited);
            }
            Route::Unreachable => {
                self.count(|counters| counters.unreachable += 1);
                self.report_stray(key.peer, packet, Unreachable::Host);
            }
            Route::Drop => {}
        }
    }

    /// Enters a new flow, which stays entered as long as the registration lives; `None` if there are too many.
    fn register_tcp(self: &Rc<Self>, key: FlowKey, stage: Stage) -> Option<Registration<O>> {
        let flows = &self.tcp.flows;
        if flows.len() >= self.limits.tcp_flows || flows.len_of(key.peer) >= self.limits.tcp_flows_per_peer {
            self.count(|counters| counters.over_limit += 1);
            return None;
        }
        let flow = Rc::new(Flow {
            key,
            stage: RefCell::new(stage),
            unreachable: Cell::new(None),
            handle: RefCell::default(),
            task: Task::default(),
        });
        let serial = flows.insert(key, Rc::clone(&flow));
        self.count(|counters| counters.tcp_flows += 1);
        Some(Registration { shared: Rc::clone(self), flow, serial })
    }

    fn options(&self, key: &FlowKey) -> Options {
        let mtu = self.limits.mtu;
        let segments = (MAX_BATCH / (usize::from(mtu) + SEAL)).max(1);
        let mss = usize::from(mtu) - header::length(key.far.ip()) - 20;
        Options {
            mtu,
            batch: segments * mss,
            lossy: self.outlet.is_lossy(key.peer),
            sequence: self.seed(key) as u32,
            budget: self.budget.clone(),
            patience: self.limits.tcp_patience,
        }
    }
}

/// A flow's place in the table.
struct Registration<O: Outlet> {
    shared: Rc<Shared<O>>,
    flow: Rc<Flow>,
    serial: Serial,
}

impl<O: Outlet> Drop for Registration<O> {
    fn drop(&mut self) {
        let Self { shared, flow, serial } = self;
        *flow.stage.borrow_mut() = Stage::Gone;
        flow.handle.take().wake();
        shared.tcp.flows.remove(&flow.key, *serial);
        shared.count(|counters| counters.tcp_flows -= 1);
    }
}

impl<O: Outlet> Registration<O> {
    /// Carries a connection that a peer has asked for on to `destination`.
    async fn accept(self, destination: SocketAddr) {
        let Self { shared, flow, .. } = &self;
        let Some(connected) = flow.unless_aborted(TcpStream::connect(destination)).await else { return };
        let stage = flow.stage.replace(Stage::Gone);
        let Stage::Held(syn) = stage else { return };
        let stream = match connected {
            Ok(stream) => stream,
            Err(error) => return self.refuse(&syn, &error),
        };
        let Some(connection) = Connection::accept(&syn, shared.options(&flow.key), shared.now()) else {
            return shared.count(|counters| counters.malformed += 1);
        };
        flow.stage.replace(Stage::Open(Box::new(connection)));
        shared.count(|counters| counters.accepted += 1);
        splice::splice(shared, flow, stream).await;
    }

    /// Tells the peer in its own terms why its destination can't be had.
    fn refuse(&self, syn: &[u8], error: &io::Error) {
        let Self { shared, flow, .. } = self;
        let peer = flow.key.peer;
        tracing::debug!(destination = %flow.key.near, %error, "connect");
        match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {
                shared.count(|counters| counters.refused += 1);
                shared.answer(peer, reset(syn));
            }
            io::ErrorKind::HostUnreachable => {
                shared.count(|counters| counters.unreachable += 1);
                shared.report(peer, syn, Unreachable::Host);
            }
            io::ErrorKind::NetworkUnreachable => {
                shared.count(|counters| counters.unreachable += 1);
                shared.report(peer, syn, Unreachable::Network);
            }
            io::ErrorKind::PermissionDenied => {
                shared.count(|counters| counters.prohibited += 1);
                shared.report(peer, syn, Unreachable::Prohibited);
            }
            io::ErrorKind::TimedOut => shared.count(|counters| counters.timed_out += 1),
            // Out of descriptors or ports: that may pass, and the peer will send its SYN again.
            _ => shared.count(|counters| counters.no_socket += 1),
        }
    }
}
