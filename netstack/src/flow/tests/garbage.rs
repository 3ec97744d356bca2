//! Whatever a peer sends: no panic, and no state that it wasn't entitled to.

use proptest::prelude::*;

use super::pair::{A, B, DROPPED, Pair, UNREACHABLE, listen, on_lane};
use crate::{
    flow::Limits,
    packet::{IpHeader, header, protocol},
};

const LIMIT: usize = 16;

fn limits() -> Limits {
    Limits { tcp_flows_per_peer: LIMIT, datagram_flows_per_peer: LIMIT, ..Limits::default() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Headers that are right as far as the protocol number, and noise from there on.
    #[test]
    fn noise_is_bounded(
        packets in proptest::collection::vec(
            (any::<bool>(), 0usize..4, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..120)), 0..200,
        ),
    ) {
        on_lane(async {
            let pair = Pair::one_sided(limits());
            for (is_v4, protocol, cut, noise) in packets {
                let number = [protocol::TCP, protocol::UDP, protocol::ICMP, protocol::ICMPV6][protocol];
                let version = if is_v4 { 4 } else { 6 };
                let (source, destination) = super::datagrams::addresses(version);
                let start = header::length(source);
                let mut packet = vec![0; start];
                packet.extend_from_slice(&noise);
                header::write(&mut packet, source, destination, number, noise.len());
                // Nothing that would be dialed: the noise is not to reach the machine's own ports.
                if let Some(port) = packet.get_mut(start + 2..start + 4) {
                    port.copy_from_slice(&(if noise[0] & 1 == 0 { UNREACHABLE } else { DROPPED }).to_be_bytes());
                }
                if cut && is_v4 {
                    packet[6..8].copy_from_slice(&0x2003u16.to_be_bytes());
                }
                pair.b.ingest(A, &packet);
                pair.b.ingest(A, &noise);
            }
            tokio::task::yield_now().await;
            assert_eq!(pair.b.counters().tcp_flows + pair.b.counters().udp_flows, 0);
        });
    }

    /// Segments of an open connection, with fields changed at random.
    #[test]
    fn a_connection_survives_or_ends_but_never_panics(
        changes in proptest::collection::vec((20usize..60, any::<u8>()), 1..200),
    ) {
        on_lane(async {
            let pair = Pair::new(super::pair::Weather::default());
            let (listener, port) = listen().await;
            let near = pair.connect(port).await.unwrap();
            let (_far, _) = listener.accept().await.unwrap();
            near.try_write(b"hello").unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            let segment = pair.from_a.last.borrow().clone();
            assert_eq!(IpHeader::parse(&segment).unwrap().protocol, protocol::TCP);
            for (at, value) in changes {
                let mut segment = segment.clone();
                // Ports stay: the segment belongs to the connection.
                if at >= 24 && at < segment.len() {
                    segment[at] = value;
                }
                pair.b.ingest(A, &segment);
                pair.a.ingest(B, &segment);
                tokio::task::yield_now().await;
            }
            assert!(pair.b.counters().tcp_flows <= 1);
        });
    }
}
