//! Bytes arrive, all of them, whatever the wire does and however the connection ends.

use std::{io, rc::Rc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::pair::{A, B, Pair, Weather, listen, on_lane, until};

/// `length` bytes that differ from place to place.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index ^ index >> 8 ^ index >> 16) as u8).collect()
}

/// Sends `data` from each end to the other at once, each closing its half when done.
async fn exchange(near: TcpStream, far: TcpStream, data: &[u8]) {
    async fn end(stream: TcpStream, data: &[u8]) {
        let (mut reader, mut writer) = stream.into_split();
        let write = async {
            writer.write_all(data).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let read = async {
            let mut received = Vec::with_capacity(data.len());
            reader.read_to_end(&mut received).await.unwrap();
            received
        };
        let ((), received) = tokio::join!(write, read);
        assert!(received == data, "{} of {} bytes received, or different ones", received.len(), data.len());
    }
    tokio::join!(end(near, data), end(far, data));
}

async fn connected(pair: &Pair, listener: &TcpListener, port: u16) -> (TcpStream, TcpStream) {
    let near = pair.connect(port).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

async fn both_ways(pair: Pair, length: usize) {
    let (listener, port) = listen().await;
    let (near, far) = connected(&pair, &listener, port).await;
    exchange(near, far, &pattern(length)).await;
    until(|| pair.a.counters().tcp_flows + pair.b.counters().tcp_flows == 0).await;
    let (a, b) = (pair.a.counters(), pair.b.counters());
    assert_eq!((a.dialed, a.reset, b.accepted, b.reset), (1, 0, 1, 0));
}

#[test]
fn much_arrives_both_ways_unsplit() {
    on_lane(async { both_ways(Pair::new(Weather::default()), 64 << 20).await });
}

#[test]
fn much_arrives_both_ways_cut() {
    on_lane(async { both_ways(Pair::new(Weather { cut: true, ..Weather::default() }), 16 << 20).await });
}

#[test]
fn ipv6_is_cut_just_as_well() {
    on_lane(async {
        let pair = Pair { version: 6, ..Pair::new(Weather { cut: true, ..Weather::default() }) };
        both_ways(pair, 16 << 20).await;
    });
}

#[test]
fn loss_is_made_good() {
    on_lane(async {
        let weather = Weather { cut: true, lose: Some(100), swap: None };
        both_ways(Pair::new(weather), 1 << 20).await;
    });
}

#[test]
fn order_is_restored() {
    on_lane(async {
        both_ways(Pair::new(Weather { cut: true, lose: None, swap: Some(20) }), 4 << 20).await;
    });
}

#[test]
fn either_half_may_close_first() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let (listener, port) = listen().await;
        for from_far in [false, true] {
            let (near, far) = connected(&pair, &listener, port).await;
            let (mut first, mut second) = if from_far { (far, near) } else { (near, far) };
            first.write_all(b"question").await.unwrap();
            first.shutdown().await.unwrap();
            let mut question = Vec::new();
            second.read_to_end(&mut question).await.unwrap();
            assert_eq!(question, b"question");

            tokio::time::sleep(Duration::from_millis(50)).await;
            second.write_all(&pattern(100_000)).await.unwrap();
            second.shutdown().await.unwrap();
            let mut answer = Vec::new();
            first.read_to_end(&mut answer).await.unwrap();
            assert!(answer == pattern(100_000));
        }
        until(|| pair.a.counters().tcp_flows + pair.b.counters().tcp_flows == 0).await;
    });
}

#[test]
fn a_reset_goes_through_to_the_other_end() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let (listener, port) = listen().await;
        for from_far in [false, true] {
            let (near, far) = connected(&pair, &listener, port).await;
            let (first, mut second) = if from_far { (far, near) } else { (near, far) };
            socket2::SockRef::from(&first).set_linger(Some(Duration::ZERO)).unwrap();
            drop(first);
            let error = second.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        until(|| pair.a.counters().tcp_flows + pair.b.counters().tcp_flows == 0).await;
    });
}

#[test]
fn a_reader_that_stalls_holds_up_nobody_else() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let (listener, port) = listen().await;
        let (mut stalled, mut lazy) = connected(&pair, &listener, port).await;
        let data = pattern(64 << 20);
        let writer = async {
            stalled.write_all(&data).await.unwrap();
            stalled.shutdown().await.unwrap();
        };
        let others = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let (near, far) = connected(&pair, &listener, port).await;
            exchange(near, far, &pattern(8 << 20)).await;
            // All is delivered once the reader reads.
            let mut received = Vec::new();
            lazy.read_to_end(&mut received).await.unwrap();
            assert!(received == data);
        };
        tokio::join!(writer, others);
    });
}

#[test]
fn a_full_path_pauses_flows_and_loses_nothing() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let (listener, port) = listen().await;
        let (near, far) = connected(&pair, &listener, port).await;
        let pause = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                pair.from_a.set_blocked(true);
                pair.from_b.set_blocked(true);
                let before = pair.from_a.sent.get();
                tokio::time::sleep(Duration::from_millis(20)).await;
                assert_eq!(pair.from_a.sent.get(), before);
                pair.from_a.set_blocked(false);
                pair.from_b.set_blocked(false);
            }
        };
        let data = pattern(32 << 20);
        tokio::join!(exchange(near, far, &data), pause);
    });
}

/// Sends everything back that comes in, on every connection, until its end.
async fn echo(listener: TcpListener) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        tokio::task::spawn_local(async move {
            let (mut reader, mut writer) = stream.split();
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
        });
    }
}

#[test]
fn short_connections_on_a_bad_path_all_end_well() {
    on_lane(async {
        let pair = Rc::new(Pair::new(Weather { cut: true, lose: Some(30), swap: Some(25) }));
        let (listener, port) = listen().await;
        tokio::task::spawn_local(echo(listener));
        let one_after_the_other = |worker: usize| {
            let pair = Rc::clone(&pair);
            async move {
                for round in 0..5 {
                    let data = pattern((worker * 7919 + round * 104_729) % 60_000);
                    let (mut reader, mut writer) = pair.connect(port).await.unwrap().into_split();
                    let write = async {
                        writer.write_all(&data).await.unwrap();
                        writer.shutdown().await.unwrap();
                    };
                    let mut received = Vec::new();
                    let ((), result) = tokio::join!(write, reader.read_to_end(&mut received));
                    result.unwrap();
                    assert!(received == data);
                }
            }
        };
        let workers: Vec<_> = (0..30).map(one_after_the_other).map(tokio::task::spawn_local).collect();
        for worker in workers {
            worker.await.unwrap();
        }
        until(|| pair.a.counters().tcp_flows + pair.b.counters().tcp_flows == 0).await;
        let (a, b) = (pair.a.counters(), pair.b.counters());
        assert_eq!((a.dialed, a.reset, b.accepted, b.reset), (150, 0, 150, 0));
    });
}

#[test]
fn a_thousand_connections_at_once() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let (listener, port) = listen().await;
        tokio::task::spawn_local(echo(listener));
        let data = pattern(10_000);
        let mut streams = Vec::new();
        for _ in 0..1000 {
            streams.push(pair.connect(port).await.unwrap());
        }
        assert_eq!(pair.b.counters().tcp_flows, 1000);
        for stream in &mut streams {
            stream.write_all(&data).await.unwrap();
            stream.shutdown().await.unwrap();
        }
        for stream in &mut streams {
            let mut echo = Vec::new();
            stream.read_to_end(&mut echo).await.unwrap();
            assert!(echo == data);
        }
        until(|| pair.a.counters().tcp_flows + pair.b.counters().tcp_flows == 0).await;
    });
}

#[test]
fn removing_a_peer_ends_its_connections() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let (listener, port) = listen().await;
        let (mut near, mut far) = connected(&pair, &listener, port).await;
        pair.b.remove_peer(B);
        near.write_all(b"still here").await.unwrap();
        far.read_exact(&mut [0; 10]).await.unwrap();

        pair.b.remove_peer(A);
        assert_eq!(far.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(near.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        until(|| pair.a.counters().tcp_flows + pair.b.counters().tcp_flows == 0).await;
    });
}
