//! UDP: datagrams sealed side by side in one buffer and sent with one system call (GSO).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    task::{Context, Poll, Waker},
};

use quinn_udp::{Transmit, UdpSocketState};
use tokio::{io::Interest, net::UdpSocket};

use super::Room;
use crate::tunnel;

/// Most payload of one UDP send over IPv4, bytes; the kernel holds a GSO batch to it too.
const MAX_BATCH: usize = 65_507;

/// The sending half.
#[derive(Debug)]
pub(crate) struct Output {
    state: UdpSocketState,
    v6: bool,
    buffer: Vec<u8>,
    used: usize,
    /// Size of every datagram in the batch but the last.
    segment: usize,
    segments: usize,
    /// A shorter datagram ends a batch.
    complete: bool,
    destination: Option<SocketAddr>,
    blocked: bool,
    producers: Vec<Waker>,
    /// Datagrams that could not be sent.
    pub(crate) dropped: u64,
}

impl Output {
    pub(crate) fn new(socket: &UdpSocket, room: &Room) -> io::Result<Self> {
        let state = UdpSocketState::new(socket.into())?;
        // As much as the kernel allows; a smaller buffer costs speed, nothing else.
        let _ = state.set_send_buffer_size(socket.into(), room.udp_send);
        let _ = state.set_recv_buffer_size(socket.into(), room.udp_receive);
        Ok(Self {
            state,
            v6: socket.local_addr()?.is_ipv6(),
            buffer: vec![0; MAX_BATCH + tunnel::MIN_OUTPUT],
            used: 0,
            segment: 0,
            segments: 0,
            complete: false,
            destination: None,
            blocked: false,
            producers: Vec::new(),
            dropped: 0,
        })
    }

    /// `address` as this socket wants to hear it.
    pub(crate) fn native(&self, address: SocketAddr) -> SocketAddr {
        match address.ip() {
            IpAddr::V4(ip) if self.v6 => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
            IpAddr::V4(_) | IpAddr::V6(_) => address,
        }
    }

    /// Whether segmentation is done by the kernel.
    pub(crate) fn offload(&self) -> bool {
        self.state.max_gso_segments() > 1
    }

    /// Appends a datagram of at most `length` bytes that `seal` writes. A batch that it does not fit is sent first.
    pub(crate) fn push(
        &mut self,
        socket: &UdpSocket,
        destination: SocketAddr,
        length: usize,
        seal: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> bool {
        if !self.fits(destination, length) {
            self.flush(socket);
            if self.used > 0 {
                self.dropped += 1;
                return false;
            }
        }
        let Some(written) = seal(&mut self.buffer[self.used..]) else { return false };
        if self.segments == 0 {
            self.segment = written;
            self.destination = Some(destination);
        }
        self.complete = written < self.segment;
        self.used += written;
        self.segments += 1;
        true
    }

    fn fits(&self, destination: SocketAddr, length: usize) -> bool {
        self.segments == 0
            || (!self.complete
                && self.destination == Some(destination)
                && length <= self.segment
                && self.segments < self.state.max_gso_segments()
                && self.used + length <= MAX_BATCH)
    }

    /// Sends what waits. What the socket has no room for stays, and producers pause.
    pub(crate) fn flush(&mut self, socket: &UdpSocket) {
        let Some(destination) = self.destination.filter(|_| self.used > 0) else { return };
        let result = self.send(socket, destination, &self.buffer[..self.used], self.segments > 1);
        match result {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.blocked = true;
                return;
            }
            // The kernel or the card refused the batch; quinn-udp has turned batches off by now.
            Err(_) if self.segments > 1 && !self.offload() => self.send_one_by_one(socket, destination),
            Err(error) => {
                tracing::debug!(%destination, %error, "datagrams not sent");
                self.dropped += self.segments as u64;
            }
        }
        self.used = 0;
        self.segments = 0;
        self.complete = false;
        self.unblock();
    }

    fn send(
        &self,
        socket: &UdpSocket,
        destination: SocketAddr,
        contents: &[u8],
        batch: bool,
    ) -> io::Result<()> {
        let segment_size = batch.then_some(self.segment);
        let transmit = Transmit { destination, ecn: None, contents, segment_size, src_ip: None };
        socket.try_io(Interest::WRITABLE, || self.state.try_send(socket.into(), &transmit))
    }

    fn send_one_by_one(&mut self, socket: &UdpSocket, destination: SocketAddr) {
        let mut dropped = 0;
        for datagram in self.buffer[..self.used].chunks(self.segment) {
            if self.send(socket, destination, datagram, false).is_err() {
                dropped += 1;
            }
        }
        self.dropped += dropped;
    }

    fn unblock(&mut self) {
        self.blocked = false;
        for waker in self.producers.drain(..) {
            waker.wake();
        }
    }

    /// Whether datagrams wait for the socket to have room.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Whether producers may go on; keeps the waker if not.
    pub(crate) fn poll_room(&mut self, cx: &Context<'_>) -> Poll<()> {
        if !self.blocked {
            return Poll::Ready(());
        }
        if !self.producers.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.producers.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// The receiving half: buffers for a few coalesced reads (GRO).
#[derive(Debug)]
pub(crate) struct Input {
    state: UdpSocketState,
    buffers: Vec<Vec<u8>>,
}

impl Input {
    /// Most reads in one system call.
    const MOST_READS: usize = 8;

    pub(crate) fn new(socket: &UdpSocket, room: &Room) -> io::Result<Self> {
        let state = UdpSocketState::new(socket.into())?;
        Ok(Self { state, buffers: vec![vec![0; 1 << 16]; room.udp_reads.min(Self::MOST_READS)] })
    }

    /// Takes what has arrived, datagram by datagram, and answers how many there were; `WouldBlock` when nothing has.
    pub(crate) fn receive(
        &mut self,
        socket: &UdpSocket,
        mut take: impl FnMut(SocketAddr, &[u8]),
    ) -> io::Result<usize> {
        let mut metas = [quinn_udp::RecvMeta::default(); Self::MOST_READS];
        let reads = self.buffers.len();
        let mut slices = self.buffers.iter_mut();
        let mut slices: [io::IoSliceMut<'_>; Self::MOST_READS] =
            std::array::from_fn(|_| io::IoSliceMut::new(slices.next().map_or(&mut [], Vec::as_mut_slice)));
        let state = &self.state;
        let receive = || state.recv(socket.into(), &mut slices[..reads], &mut metas[..reads]);
        let received = socket.try_io(Interest::READABLE, receive)?;
        let mut count = 0;
        for (meta, buffer) in metas.iter().zip(&self.buffers).take(received) {
            // An empty datagram has a stride of zero, and means nothing.
            for datagram in buffer[..meta.len].chunks(meta.stride.max(1)) {
                take(meta.addr, datagram);
                count += 1;
            }
        }
        Ok(count)
    }
}
