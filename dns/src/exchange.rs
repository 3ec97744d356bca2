//! One question to one server: over UDP with repetitions, or over TCP.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{Instant, timeout_at},
};

use crate::{answer::MAX_MESSAGE, wire};

/// When a question is repeated, counted from the one before. The first is more than the round trip of any usable tunnel.
const REPEAT: [Duration; 3] =
    [Duration::from_millis(500), Duration::from_millis(1000), Duration::from_millis(1500)];

/// How a question travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// A question on its way, as its server will see it.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) packet: Vec<u8>,
    /// The question section, which a reply has to repeat.
    pub(crate) question: Box<[u8]>,
    pub(crate) transport: Transport,
    /// A truncated answer over UDP is fetched again over TCP, and isn't left to the asker.
    pub(crate) complete: bool,
}

/// Asks `server` until it answers. The caller sets the time limit.
///
/// Each question has a socket, and so a port, of its own, connected to the server: the kernel drops what others send and reports
/// a refused port at once.
pub(crate) async fn ask(server: SocketAddr, request: &Request) -> io::Result<Vec<u8>> {
    match request.transport {
        Transport::Tcp => over_tcp(server, request).await,
        Transport::Udp => {
            let reply = over_udp(server, request).await?;
            if !(request.complete && wire::is_truncated(&reply)) {
                return Ok(reply);
            }
            // A server that has no TCP leaves the truncated answer, which is better than none.
            Ok(over_tcp(server, request).await.unwrap_or(reply))
        }
    }
}

async fn over_udp(server: SocketAddr, request: &Request) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;

    let mut reply = vec![0; MAX_MESSAGE];
    let mut repeats = REPEAT.into_iter();
    loop {
        socket.send(&request.packet).await?;
        let patience = repeats.next().map(|delay| Instant::now() + delay);
        if let Some(length) = receive(&socket, &mut reply, request, patience).await? {
            reply.truncate(length);
            return Ok(reply);
        }
    }
}

/// The length of the reply in `buffer`, `None` when it is time to ask again.
async fn receive(
    socket: &UdpSocket,
    buffer: &mut [u8],
    request: &Request,
    until: Option<Instant>,
) -> io::Result<Option<usize>> {
    let id = wire::be16(&request.packet, 0);
    loop {
        let length = match until {
            Some(until) => match timeout_at(until, socket.recv(buffer)).await {
                Ok(received) => received?,
                Err(_) => return Ok(None),
            },
            None => socket.recv(buffer).await?,
        };
        if wire::is_reply_to(&buffer[..length], id, &request.question) {
            return Ok(Some(length));
        }
    }
}

async fn over_tcp(server: SocketAddr, request: &Request) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&framed(&request.packet)).await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; length.into()];
    stream.read_exact(&mut reply).await?;
    if wire::is_reply_to(&reply, wire::be16(&request.packet, 0), &request.question) {
        Ok(reply)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "the reply is to another question"))
    }
}

/// `message` behind its length, as it travels over TCP (RFC 1035, 4.2.2), in one write.
pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    debug_assert!(message.len() <= MAX_MESSAGE);
    [&(message.len() as u16).to_be_bytes(), message].concat()
}
