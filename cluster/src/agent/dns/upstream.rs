//! Asks the pod's name servers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hickory_proto::op::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::answer::belongs;
use super::files::Resolver;

/// Asks one server after another, as often as the pod's resolver would, until one answers.
pub(super) async fn ask(resolver: &Resolver, question: &Message) -> io::Result<Message> {
    let octets = question.to_vec().map_err(io::Error::other)?;
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the pod has no name server");
    for _ in 0..resolver.attempts {
        for server in &resolver.servers {
            match timeout(resolver.timeout, ask_one(*server, question, &octets)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => failure = error,
                Err(_) => failure = io::ErrorKind::TimedOut.into(),
            }
        }
    }
    Err(failure)
}

async fn ask_one(server: SocketAddr, question: &Message, octets: &[u8]) -> io::Result<Message> {
    let answer = over_udp(server, question, octets).await?;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    // A server that has no TCP leaves the truncated answer, which is better than none.
    Ok(over_tcp(server, question, octets).await.unwrap_or(answer))
}

/// By a socket, and so a port, of its own, connected to the server: the kernel drops what others send.
async fn over_udp(server: SocketAddr, question: &Message, octets: &[u8]) -> io::Result<Message> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(octets).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(answer) = read(&buffer[..length], question) {
            return Ok(answer);
        }
    }
}

async fn over_tcp(server: SocketAddr, question: &Message, octets: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&framed(octets)).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    read(&answer, question).ok_or_else(|| io::Error::other("the answer is to another question"))
}

fn read(octets: &[u8], question: &Message) -> Option<Message> {
    Message::from_vec(octets).ok().filter(|answer| belongs(answer, question))
}

/// A message behind its length (RFC 1035, 4.2.2).
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}
