//! Listening sockets that outlive a worker: the supervisor holds them too, and hands them to the next one. So a client that comes
//! while no worker runs waits for a moment, where it would be refused.
//!
//! Worker and supervisor are joined by a socket that is the worker's standard input. Each message is about one socket, which comes
//! with it where it is put on the shelf.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tpd_api::agent::Protocol;
use tpd_api::inject::ENTRY_PORTS;

use super::listeners::AppPort;

/// Most sockets that are held: as many as there are entry ports, and named ports of a pod (a pod with more keeps the others open
/// for as long as its worker lives).
const ROOM: usize = 64;

/// Octets of a message: what is to be done, the protocol, and both ports.
const LENGTH: usize = 6;

const PUT: u8 = 1;
const REMOVE: u8 = 2;

/// A socket, and what it is for.
#[derive(Debug)]
pub struct Held {
    /// The port of the app.
    pub app: AppPort,
    /// The port where its traffic comes in.
    pub entry: u16,
    /// Where it is listened on.
    pub socket: OwnedFd,
}

/// The supervisor's side.
#[derive(Debug, Default)]
pub struct Shelf(BTreeMap<AppPort, (u16, OwnedFd)>);

/// The supervisor's end of the socket to a worker.
#[derive(Debug)]
pub struct Counter(UnixDatagram);

impl Shelf {
    /// A socket for a new worker, with all that is held in it, and our end of it.
    ///
    /// # Errors
    /// Fails where there are no more descriptors.
    pub fn hand_over(&self) -> io::Result<(OwnedFd, Counter)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        for (app, (entry, socket)) in &self.0 {
            send(&ours, PUT, *app, *entry, Some(socket.as_fd()))?;
        }
        Ok((theirs, Counter(UnixDatagram::from_std(ours.into())?)))
    }

    /// Does what a worker asks, for as long as it lives.
    ///
    /// # Errors
    /// Fails where its messages cannot be read.
    pub async fn serve(&mut self, counter: &Counter) -> io::Result<()> {
        let socket = &counter.0;
        while let Some(message) = socket.async_io(Interest::READABLE, || receive(socket)).await? {
            self.note(message);
        }
        Ok(())
    }

    fn note(&mut self, message: Message) {
        match (message.kind, message.socket) {
            (PUT, Some(socket)) if self.0.len() < ROOM || self.0.contains_key(&message.app) => {
                self.0.insert(message.app, (message.entry, socket));
            }
            (REMOVE, _) => drop(self.0.remove(&message.app)),
            _ => {}
        }
    }
}

/// The worker's side: its standard input, if a supervisor has started it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Desk;

impl Desk {
    /// What workers before this one have left.
    #[must_use]
    pub fn take_over(self) -> Vec<Held> {
        let mut held = Vec::new();
        while held.len() < ROOM {
            let Ok(Some(message)) = receive(io::stdin()) else { break };
            if let (PUT, Some(socket)) = (message.kind, message.socket) {
                held.push(Held { app: message.app, entry: message.entry, socket });
            }
        }
        held
    }

    /// Leaves a socket to those that come after. Without a supervisor there are none.
    pub fn put(self, app: AppPort, entry: u16, socket: BorrowedFd<'_>) {
        let _ = send(io::stdin(), PUT, app, entry, Some(socket));
    }

    /// Has one forgotten.
    pub fn remove(self, app: AppPort, entry: u16) {
        let _ = send(io::stdin(), REMOVE, app, entry, None);
    }
}

#[derive(Debug)]
struct Message {
    kind: u8,
    app: AppPort,
    entry: u16,
    socket: Option<OwnedFd>,
}

fn send(
    to: impl AsFd,
    kind: u8,
    (protocol, port): AppPort,
    entry: u16,
    socket: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let [port, entry] = [port.to_be_bytes(), entry.to_be_bytes()];
    let octets = [kind, u8::from(protocol == Protocol::Udp), port[0], port[1], entry[0], entry[1]];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let sockets = socket.map(|socket| [socket]);
    if let Some(sockets) = &sockets {
        control.push(SendAncillaryMessage::ScmRights(sockets));
    }
    sendmsg(to, &[IoSlice::new(&octets)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next message; `None` at the end, and where it is none of ours.
fn receive(from: impl AsFd) -> io::Result<Option<Message>> {
    let mut octets = [0; LENGTH];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(from, &mut [IoSliceMut::new(&mut octets)], &mut control, flags)?;
    let socket = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    let [kind, protocol, port @ .., high, low] = octets;
    let protocol = if protocol == 0 { Protocol::Tcp } else { Protocol::Udp };
    let message = Message {
        kind,
        app: (protocol, u16::from_be_bytes(port)),
        entry: u16::from_be_bytes([high, low]),
        socket,
    };
    Ok((received.bytes == LENGTH).then_some(message))
}

// What is held fits the room for it.
const _: () = assert!(ROOM > (*ENTRY_PORTS.end() - *ENTRY_PORTS.start()) as usize);

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    use tpd_api::agent::Protocol;

    use super::{PUT, REMOVE, Shelf, receive, send};

    #[tokio::test]
    async fn a_client_that_comes_while_no_worker_runs_is_served_by_the_next() {
        let mut shelf = Shelf::default();
        let (worker, counter) = shelf.hand_over().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        send(&worker, PUT, (Protocol::Tcp, 80), 19_901, Some(listener.as_fd())).unwrap();
        send(&worker, PUT, (Protocol::Udp, 80), 19_902, Some(listener.as_fd())).unwrap();
        send(&worker, REMOVE, (Protocol::Udp, 80), 19_902, None).unwrap();
        drop((worker, listener));
        shelf.serve(&counter).await.unwrap();

        let mut client = TcpStream::connect(address).unwrap();
        let (worker, _counter) = shelf.hand_over().unwrap();
        let message = receive(&worker).unwrap().unwrap();
        assert_eq!((message.app, message.entry), ((Protocol::Tcp, 80), 19_901));
        assert!(receive(&worker).is_err(), "there is nothing else");
        let listener = TcpListener::from(message.socket.unwrap());
        listener.accept().unwrap().0.write_all(b"hello").unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");
    }
}
