//! The socket where clients' datagrams come in. It tells which of the pod's addresses each was sent to, and answers from there: a
//! client takes an answer from no other, and a pod may have more than one.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket as Socket};
use std::os::fd::AsRawFd as _;

use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::socket::sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, RecvMsg, SockaddrStorage, recvmsg, sendmsg, setsockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Room for what the kernel says of a datagram (`CMSG_SPACE` of an `in6_pktinfo`, the larger of the two, is 40), where a `cmsghdr`
/// may be.
#[repr(align(8))]
struct Control([u8; 64]);

/// Who sends, and where to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Call {
    pub(super) client: SocketAddr,
    /// `None` where the kernel does not say.
    pub(super) local: Option<IpAddr>,
}

/// The socket.
#[derive(Debug)]
pub(super) struct Entry(UdpSocket);

impl Entry {
    /// Has a socket, which may listen on any address, tell where datagrams are sent to.
    pub(super) fn new(socket: UdpSocket) -> Self {
        // Where it cannot, answers come from where routing has it.
        let _ = match socket.local_addr() {
            Ok(SocketAddr::V4(_)) => setsockopt(&socket, Ipv4PacketInfo, &true),
            _ => setsockopt(&socket, Ipv6RecvPacketInfo, &true),
        };
        Self(socket)
    }

    /// Receives one datagram.
    pub(super) async fn recv(&self, buffer: &mut [u8]) -> io::Result<(usize, Call)> {
        self.0.async_io(Interest::READABLE, || self.try_recv(buffer)).await
    }

    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<(usize, Call)> {
        let (mut parts, mut control) = ([IoSliceMut::new(buffer)], Control([0; 64]));
        let (descriptor, flags) = (self.0.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        let received = recvmsg::<SockaddrStorage>(descriptor, &mut parts, Some(&mut control.0), flags)?;
        let client = received.address.as_ref().and_then(address).ok_or(io::ErrorKind::InvalidData)?;
        Ok((received.bytes, Call { client, local: local(&received) }))
    }

    /// The way back to a client.
    pub(super) fn back(&self, call: Call) -> Back {
        let routed = source(unmapped(call.client)).ok();
        let is_routed = |local: &IpAddr| routed.is_none_or(|routed| routed == local.to_canonical());
        Back { client: call.client, odd: call.local.filter(|local| !is_routed(local)) }
    }

    /// Sends an answer, if the kernel takes it at once.
    pub(super) fn try_send(&self, datagram: &[u8], back: &Back) -> io::Result<()> {
        let Some(local) = back.odd else { return self.0.try_send_to(datagram, back.client).map(drop) };
        self.0.try_io(Interest::WRITABLE, || self.send_from(local, datagram, back.client))
    }

    fn send_from(&self, local: IpAddr, datagram: &[u8], client: SocketAddr) -> io::Result<()> {
        let (parts, to) = ([IoSlice::new(datagram)], SockaddrStorage::from(client));
        let send = |control: ControlMessage<'_>| {
            sendmsg(self.0.as_raw_fd(), &parts, &[control], MsgFlags::MSG_DONTWAIT, Some(&to))
        };
        match local {
            IpAddr::V4(local) => {
                let source = in_addr { s_addr: u32::from_ne_bytes(local.octets()) };
                let any = in_addr { s_addr: 0 };
                send(ControlMessage::Ipv4PacketInfo(&in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: source,
                    ipi_addr: any,
                }))
            }
            IpAddr::V6(local) => {
                let source = in6_addr { s6_addr: local.octets() };
                send(ControlMessage::Ipv6PacketInfo(&in6_pktinfo { ipi6_addr: source, ipi6_ifindex: 0 }))
            }
        }?;
        Ok(())
    }
}

/// Where answers to one client go, and where from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Back {
    client: SocketAddr,
    /// The address that they have to come from, where routing would have them come from another.
    odd: Option<IpAddr>,
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| Some(SocketAddr::V6(SocketAddrV6::from(*storage.as_sockaddr_in6()?))))
}

/// Which address of this host a datagram was sent to.
fn local(received: &RecvMsg<'_, '_, SockaddrStorage>) -> Option<IpAddr> {
    received.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(info.ipi_addr.s_addr.to_ne_bytes().into()),
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into()),
        _ => None,
    })
}

/// The address that routing has packets to a destination come from; nothing is sent.
///
/// # Errors
/// Fails where no route leads there.
pub fn source(destination: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match destination {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = Socket::bind((any, 0))?;
    socket.connect(destination)?;
    Ok(socket.local_addr()?.ip())
}

/// A client of IPv4 as it is, where a socket of both families names it.
fn unmapped(client: SocketAddr) -> SocketAddr {
    match client.ip().to_canonical() {
        IpAddr::V4(ip) => (ip, client.port()).into(),
        // With its scope.
        IpAddr::V6(_) => client,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use tokio::net::UdpSocket;
    use tokio::time::{Duration, timeout};

    use super::Entry;

    /// Answers one question to `to`, and returns where the answer comes from and goes to.
    async fn answered(entry: &str, to: &str, client: &str) -> (IpAddr, usize) {
        let socket = UdpSocket::bind(entry).await.unwrap();
        let to = SocketAddr::new(to.parse().unwrap(), socket.local_addr().unwrap().port());
        let entry = Entry::new(socket);
        let client = UdpSocket::bind(client).await.unwrap();
        client.send_to(b"question", to).await.unwrap();
        let mut buffer = [0; 100];
        let (length, call) = entry.recv(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"question");
        assert_eq!(call.client.port(), client.local_addr().unwrap().port());
        assert_eq!(call.local.map(|local| local.to_canonical()), Some(to.ip()));
        entry.try_send(b"answer", &entry.back(call)).unwrap();
        let received = timeout(Duration::from_secs(5), client.recv_from(&mut buffer)).await;
        let (length, from) = received.expect("an answer comes").unwrap();
        (from.ip(), length)
    }

    #[tokio::test]
    async fn an_answer_comes_from_where_the_question_went_to() {
        for to in ["127.0.0.1", "127.0.0.9"] {
            let ip: IpAddr = to.parse().unwrap();
            assert_eq!(answered("[::]:0", to, "127.0.0.1:0").await, (ip, 6));
            assert_eq!(answered("0.0.0.0:0", to, "127.0.0.1:0").await, (ip, 6));
        }
        let ip: IpAddr = "::1".parse().unwrap();
        assert_eq!(answered("[::]:0", "::1", "[::1]:0").await, (ip, 6));
    }
}
