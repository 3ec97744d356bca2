//! Connections that end here behave as a socket's do.

use std::{
    io::{self, ErrorKind},
    rc::Rc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::{sleep, timeout},
};

use super::pair::{A, B, Pair, SERVED, Weather, kernel_pair, listen, on_lane, until};
use crate::flow::{DialCause, Limits, Stream};

const PATIENCE: Duration = Duration::from_secs(15);

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index ^ index >> 8 ^ index >> 16) as u8).collect()
}

/// Both ends of a connection from A that B serves.
async fn connected(pair: &Pair, accepted: &mut mpsc::Receiver<Stream>) -> (Stream, Stream) {
    let near = pair.a.connect(B, pair.local(), pair.remote(SERVED), PATIENCE).await.unwrap();
    let far = accepted.recv().await.unwrap();
    assert_eq!((far.peer(), far.peer_addr(), far.local_addr()), (A, near.local_addr(), near.peer_addr()));
    (near, far)
}

/// Sends `data` from each end to the other at once, each closing its half when done.
async fn exchange(near: Stream, far: Stream, data: &[u8]) {
    async fn end(stream: Stream, data: &[u8]) {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let write = async {
            writer.write_all(data).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut received = Vec::with_capacity(data.len());
        let ((), result) = tokio::join!(write, reader.read_to_end(&mut received));
        result.unwrap();
        assert!(received == data, "{} of {} bytes received, or different ones", received.len(), data.len());
    }
    tokio::join!(end(near, data), end(far, data));
}

async fn all_gone(pair: &Pair) {
    until(|| pair.a.counters().tcp_flows + pair.b.counters().tcp_flows == 0).await;
}

fn kind<T: std::fmt::Debug>(result: io::Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

#[test]
fn much_arrives_both_ways_whatever_the_weather() {
    for (weather, length) in [
        (Weather::default(), 32 << 20),
        (Weather { cut: true, ..Weather::default() }, 8 << 20),
        (Weather { cut: true, lose: Some(100), swap: Some(50) }, 1 << 20),
    ] {
        on_lane(async {
            let pair = Pair { version: 6, ..Pair::new(weather) };
            let mut accepted = pair.b.serve();
            let (near, far) = connected(&pair, &mut accepted).await;
            exchange(near, far, &pattern(length)).await;
            all_gone(&pair).await;
            assert_eq!((pair.a.counters().reset, pair.b.counters().reset), (0, 0));
        });
    }
}

#[test]
fn either_half_may_close_first() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        for from_far in [false, true] {
            let (near, far) = connected(&pair, &mut accepted).await;
            let (mut first, mut second) = if from_far { (far, near) } else { (near, far) };
            first.write_all(b"question").await.unwrap();
            first.shutdown().await.unwrap();
            assert_eq!(kind(first.write_all(b"more").await), ErrorKind::BrokenPipe);
            let mut question = Vec::new();
            second.read_to_end(&mut question).await.unwrap();
            assert_eq!(question, b"question");

            second.write_all(&pattern(100_000)).await.unwrap();
            second.shutdown().await.unwrap();
            let mut answer = Vec::new();
            first.read_to_end(&mut answer).await.unwrap();
            assert!(answer == pattern(100_000));
        }
        all_gone(&pair).await;
    });
}

#[test]
fn a_reader_that_stalls_holds_the_writer_back() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        let (mut near, mut far) = connected(&pair, &mut accepted).await;
        let data = pattern(32 << 20);
        let all = timeout(Duration::from_millis(300), near.write_all(&data)).await;
        all.expect_err("buffers hold no more than 16 MiB");
        let stuck = near.unacknowledged();
        assert!(stuck > 0);
        near.shutdown().await.unwrap();
        let mut received = Vec::new();
        far.read_to_end(&mut received).await.unwrap();
        assert!(data.starts_with(&received) && received.len() >= stuck);
        until(|| near.unacknowledged() == 0).await;
    });
}

#[test]
fn a_stream_dropped_before_it_is_shut_down_is_reset() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        for explicit in [false, true] {
            let (near, mut far) = connected(&pair, &mut accepted).await;
            if explicit {
                near.reset()
            } else {
                drop(near)
            }
            assert_eq!(kind(far.read(&mut [0]).await), ErrorKind::ConnectionReset);
            assert_eq!(kind(far.write_all(b"x").await), ErrorKind::ConnectionReset);
            drop(far);
            all_gone(&pair).await;
        }
    });
}

#[test]
fn what_was_written_before_a_shutdown_arrives_though_the_stream_is_dropped() {
    on_lane(async {
        let pair = Pair::new(Weather { cut: true, lose: Some(100), swap: None });
        let mut accepted = pair.b.serve();
        let (mut near, mut far) = connected(&pair, &mut accepted).await;
        near.write_all(&pattern(50_000)).await.unwrap();
        near.shutdown().await.unwrap();
        drop(near);
        let mut received = Vec::new();
        far.read_to_end(&mut received).await.unwrap();
        assert!(received == pattern(50_000));
        // What comes for the dropped end is refused.
        far.write_all(b"too late").await.unwrap();
        assert_eq!(kind(far.read_exact(&mut [0]).await), ErrorKind::UnexpectedEof);
        until(|| pair.a.counters().tcp_flows == 0).await;
        sleep(Duration::from_millis(20)).await;
        assert_eq!(kind(far.write_all(b"x").await), ErrorKind::ConnectionReset);
    });
}

#[test]
fn what_arrived_before_a_reset_can_be_read() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        let (mut near, mut far) = connected(&pair, &mut accepted).await;
        near.write_all(b"last words").await.unwrap();
        until(|| near.unacknowledged() == 0).await;
        near.reset();
        all_but_one(&pair).await;
        let mut words = [0; 10];
        far.read_exact(&mut words).await.unwrap();
        assert_eq!(&words, b"last words");
        assert_eq!(kind(far.read(&mut words).await), ErrorKind::ConnectionReset);
    });
}

async fn all_but_one(pair: &Pair) {
    until(|| pair.a.counters().tcp_flows == 0).await;
    sleep(Duration::from_millis(5)).await;
}

#[test]
fn a_spliced_stream_carries_on_from_where_it_was() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        let (mut near, mut far) = connected(&pair, &mut accepted).await;
        near.write_all(b"head,body").await.unwrap();
        let mut head = [0; 5];
        far.read_exact(&mut head).await.unwrap();
        let (mut outside, inside) = kernel_pair().await;
        let joined = tokio::task::spawn_local(far.splice(inside));
        let mut body = [0; 4];
        outside.read_exact(&mut body).await.unwrap();
        assert_eq!(&body, b"body");

        near.shutdown().await.unwrap();
        assert_eq!(outside.read(&mut body).await.unwrap(), 0);
        outside.write_all(&pattern(1 << 20)).await.unwrap();
        drop(outside);
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await.unwrap();
        assert!(answer == pattern(1 << 20));
        joined.await.unwrap().unwrap();
    });
}

#[test]
fn a_splice_that_is_given_up_resets_both_sides() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        let (mut near, far) = connected(&pair, &mut accepted).await;
        let (mut outside, inside) = kernel_pair().await;
        timeout(Duration::from_millis(20), far.splice(inside)).await.unwrap_err();
        assert_eq!(kind(near.read(&mut [0]).await), ErrorKind::ConnectionReset);
        assert_eq!(kind(outside.read(&mut [0]).await), ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_reset_of_either_side_ends_a_splice() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        let (near, far) = connected(&pair, &mut accepted).await;
        let (mut outside, inside) = kernel_pair().await;
        let joined = tokio::task::spawn_local(far.splice(inside));
        near.reset();
        assert_eq!(kind(outside.read(&mut [0]).await), ErrorKind::ConnectionReset);
        assert_eq!(kind(joined.await.unwrap()), ErrorKind::ConnectionReset);

        let (near, far) = connected(&pair, &mut accepted).await;
        far.reset();
        until(|| pair.b.counters().tcp_flows == 0).await;
        sleep(Duration::from_millis(5)).await;
        let (_outside, inside) = kernel_pair().await;
        assert_eq!(kind(near.splice(inside).await), ErrorKind::ConnectionReset);
    });
}

#[test]
fn nobody_who_takes_connections_means_refused() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let connect = || pair.a.connect(B, pair.local(), pair.remote(SERVED), PATIENCE);
        assert_eq!(connect().await.unwrap_err(), DialCause::Refused);
        drop(pair.b.serve());
        assert_eq!(connect().await.unwrap_err(), DialCause::Refused);
    });
}

#[test]
fn connections_that_nobody_takes_are_bounded_and_end_with_whoever_would() {
    on_lane(async {
        let pair = Rc::new(Pair::new(Weather::default()));
        let accepted = pair.b.serve();
        let mut waiting = Vec::new();
        while let Ok(stream) =
            pair.a.connect(B, pair.local(), pair.remote(SERVED), Duration::from_millis(200)).await
        {
            waiting.push(stream);
        }
        assert_eq!(waiting.len(), 128);
        assert_eq!(pair.b.counters().over_limit, 1);
        drop(accepted);
        for stream in &mut waiting {
            assert_eq!(kind(stream.read(&mut [0]).await), ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn removing_a_peer_ends_its_streams() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        let (mut near, mut far) = connected(&pair, &mut accepted).await;
        pair.b.remove_peer(A);
        assert_eq!(kind(far.read(&mut [0]).await), ErrorKind::ConnectionReset);
        assert_eq!(kind(near.read(&mut [0]).await), ErrorKind::ConnectionReset);
        until(|| pair.b.counters().tcp_flows == 0).await;
    });
}

#[test]
fn a_full_path_pauses_streams_and_loses_nothing() {
    on_lane(async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        let (near, far) = connected(&pair, &mut accepted).await;
        let pause = async {
            for _ in 0..5 {
                sleep(Duration::from_millis(10)).await;
                pair.from_a.set_blocked(true);
                pair.from_b.set_blocked(true);
                sleep(Duration::from_millis(10)).await;
                pair.from_a.set_blocked(false);
                pair.from_b.set_blocked(false);
            }
        };
        let data = pattern(16 << 20);
        tokio::join!(exchange(near, far, &data), pause);
    });
}

#[test]
fn what_was_written_arrives_even_if_the_peer_takes_its_time() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let pair = Pair::new(Weather::default());
        let mut accepted = pair.b.serve();
        let (mut near, mut far) = connected(&pair, &mut accepted).await;
        let data = pattern(120_000);
        near.write_all(&data).await.unwrap();
        near.shutdown().await.unwrap();
        drop(near);
        let mut received = vec![0; data.len()];
        for piece in received.chunks_mut(10_000) {
            sleep(Duration::from_secs(20)).await;
            far.read_exact(piece).await.unwrap();
        }
        assert!(received == data);
        assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
        // Who takes nothing, or does not close, is not waited for.
        let (mut near, _silent) = connected(&pair, &mut accepted).await;
        near.write_all(&data).await.unwrap();
        near.shutdown().await.unwrap();
        drop(near);
        assert_eq!(pair.a.counters().tcp_flows, 1, "the first has waited long enough already");
        sleep(Duration::from_secs(70)).await;
        assert_eq!(pair.a.counters().tcp_flows, 0);
    });
}

#[test]
fn limits_hold_for_connections_of_ours() {
    on_lane(async {
        let limits = Limits { tcp_flows_per_peer: 1, ..Limits::default() };
        let pair = Pair::with(Weather::default(), limits);
        let (_listener, port) = listen().await;
        let connect = || pair.a.connect(B, pair.local(), pair.remote(port), PATIENCE);
        let first = connect().await.unwrap();
        assert_eq!(connect().await.unwrap_err(), DialCause::Limit);
        drop(first);
        until(|| pair.a.counters().tcp_flows == 0).await;
        connect().await.unwrap();
    });
}
