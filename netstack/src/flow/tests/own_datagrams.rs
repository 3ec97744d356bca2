//! Associations that are opened here send, receive and fail as a connected socket does.

use std::{io::ErrorKind, time::Duration};

use tokio::{net::UdpSocket, time::timeout};

use super::pair::{B, PROHIBITED, Pair, Weather, on_lane, until};
use crate::flow::{DialCause, Limits};

async fn server() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind(("127.0.0.1", 0)).await.unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

#[test]
fn datagrams_of_all_sizes_go_there_and_back() {
    for version in [4, 6] {
        on_lane(async {
            let pair = Pair { version, ..Pair::new(Weather::default()) };
            let (server, port) = server().await;
            let datagrams = pair.a.open_datagrams(B, pair.local(), pair.remote(port)).unwrap();
            assert_eq!(datagrams.peer_addr(), pair.remote(port));
            let mut buffer = vec![0; 65_536];
            for length in [0, 1, 1372, 1400, 9000, 65_507] {
                let payload: Vec<u8> = (0..length).map(|index| (index * 7) as u8).collect();
                datagrams.send(&payload).await.unwrap();
                let (received, client) = server.recv_from(&mut buffer).await.unwrap();
                assert!(buffer[..received] == payload, "{received} bytes instead of {length}");
                server.send_to(&payload, client).await.unwrap();
                let received = datagrams.recv(&mut buffer).await.unwrap();
                assert!(buffer[..received] == payload, "{received} bytes instead of {length}");
            }
            let error = datagrams.send(&vec![0; 65_508]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            drop(datagrams);
            assert_eq!(pair.a.counters().udp_flows, 0);
        });
    }
}

#[test]
fn a_closed_port_and_a_forbidden_one_are_told() {
    on_lane(async {
        let pair = Pair { version: 6, ..Pair::new(Weather::default()) };
        let (closed, port) = server().await;
        drop(closed);
        for (port, expected) in
            [(port, ErrorKind::ConnectionRefused), (PROHIBITED, ErrorKind::PermissionDenied)]
        {
            let datagrams = pair.a.open_datagrams(B, pair.local(), pair.remote(port)).unwrap();
            datagrams.send(&[0; 3000]).await.unwrap();
            assert_eq!(datagrams.recv(&mut [0; 8]).await.unwrap_err().kind(), expected);
            let silence = timeout(Duration::from_millis(10), datagrams.recv(&mut [0; 8])).await;
            silence.expect_err("an error is told once");
        }
    });
}

#[test]
fn what_is_not_received_is_dropped_beyond_a_bound() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let (server, port) = server().await;
        let datagrams = pair.a.open_datagrams(B, pair.local(), pair.remote(port)).unwrap();
        datagrams.send(b"hello").await.unwrap();
        let (_, client) = server.recv_from(&mut [0; 8]).await.unwrap();
        for index in 0..100 {
            server.send_to(&[index], client).await.unwrap();
        }
        until(|| pair.a.counters().datagrams_dropped == 36).await;
        let mut byte = [0];
        for index in 0..64 {
            assert_eq!(datagrams.recv(&mut byte).await.unwrap(), 1);
            assert_eq!(byte, [index]);
        }
    });
}

#[test]
fn addresses_limits_and_removed_peers_are_errors() {
    on_lane(async {
        let limits = Limits { datagram_flows_per_peer: 2, ..Limits::default() };
        let pair = Pair::with(Weather::default(), limits);
        let open = |local| pair.a.open_datagrams(B, local, pair.remote(9));
        let first = open(pair.local()).unwrap();
        assert_eq!(open(first.local_addr()).unwrap_err(), DialCause::Address);
        assert_eq!(open("[::1]:0".parse().unwrap()).unwrap_err(), DialCause::Address);
        let second = open(pair.local()).unwrap();
        assert_eq!(open(pair.local()).unwrap_err(), DialCause::Limit);
        drop(second);
        pair.a.remove_peer(B);
        assert_eq!(first.recv(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
        assert_eq!(first.send(b"x").await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
    });
}

#[test]
fn a_full_path_makes_the_sender_wait() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let (server, port) = server().await;
        let datagrams = pair.a.open_datagrams(B, pair.local(), pair.remote(port)).unwrap();
        pair.from_a.set_blocked(true);
        timeout(Duration::from_millis(20), datagrams.send(b"early")).await.unwrap_err();
        pair.from_a.set_blocked(false);
        datagrams.send(b"late").await.unwrap();
        let mut buffer = [0; 8];
        let (length, _) = server.recv_from(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"late");
    });
}
