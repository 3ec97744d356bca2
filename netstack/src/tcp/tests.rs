//! Two ends and a path between them, in virtual time.

mod windows;

use std::{collections::VecDeque, net::SocketAddr, time::Duration};

use proptest::prelude::*;

use super::{Budget, Connection, Options};
use crate::packet::IpHeader;

const MS: Duration = Duration::from_millis(1);

/// One direction of a path.
#[derive(Clone, Debug)]
struct Path {
    delay: Duration,
    /// Bytes per second.
    rate: f64,
    /// Bytes that queue before the bottleneck; what exceeds them is lost.
    queue: usize,
    /// One packet in so many is lost.
    lose: Option<u64>,
    /// One packet in so many is late by a quarter of the delay.
    late: Option<u64>,
    random: u64,
    free_at: Duration,
    flying: VecDeque<(Duration, Vec<u8>)>,
    sent: u64,
}

impl Path {
    fn new(delay: Duration, rate: f64) -> Self {
        Self {
            delay,
            rate,
            queue: 8 << 20,
            lose: None,
            late: None,
            random: 0x9e37_79b9_7f4a_7c15,
            free_at: Duration::ZERO,
            flying: VecDeque::new(),
            sent: 0,
        }
    }

    fn chance(&mut self, one_in: Option<u64>) -> bool {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        one_in.is_some_and(|one_in| (self.random >> 33).is_multiple_of(one_in))
    }

    fn put(&mut self, now: Duration, packet: Vec<u8>) {
        self.sent += 1;
        let start = self.free_at.max(now);
        let queued = (start - now).as_secs_f64() * self.rate;
        if self.chance(self.lose) || queued as usize + packet.len() > self.queue {
            return;
        }
        self.free_at = start + Duration::from_secs_f64(packet.len() as f64 / self.rate);
        let late = if self.chance(self.late) { self.delay / 4 } else { Duration::ZERO };
        let arrival = self.free_at + self.delay + late;
        let at = self.flying.partition_point(|(other, _)| *other <= arrival);
        self.flying.insert(at, (arrival, packet));
    }
}

/// Cuts what was sent as the path would.
fn segments(packet: &[u8], mss: Option<std::num::NonZeroU16>) -> Vec<Vec<u8>> {
    let Some(mss) = mss else { return vec![packet.to_vec()] };
    let mss = usize::from(mss.get());
    let start = IpHeader::parse(packet).unwrap().payload;
    let data = start + usize::from(packet[start + 12] >> 4) * 4;
    let sequence = u32::from_be_bytes(*packet[start + 4..].first_chunk().unwrap());
    let cut = |(index, chunk): (usize, &[u8])| {
        let mut segment = packet[..data].to_vec();
        segment.extend_from_slice(chunk);
        let total = segment.len() as u16;
        segment[2..4].copy_from_slice(&total.to_be_bytes());
        let sequence = sequence.wrapping_add((index * mss) as u32);
        segment[start + 4..start + 8].copy_from_slice(&sequence.to_be_bytes());
        if data + (index + 1) * mss < packet.len() {
            segment[start + 13] &= !1;
        }
        segment
    };
    packet[data..].chunks(mss).enumerate().map(cut).collect()
}

struct End {
    connection: Option<Connection>,
    out: Path,
    to_send: usize,
    sent: usize,
    received: usize,
    /// Bytes per turn that are passed on; models a slow reader.
    appetite: usize,
    closed: bool,
}

impl End {
    fn new(connection: Option<Connection>, out: Path, to_send: usize) -> Self {
        Self { connection, out, to_send, sent: 0, received: 0, appetite: usize::MAX, closed: false }
    }

    fn pump(&mut self, now: Duration) {
        let Some(connection) = &mut self.connection else { return };
        let mut appetite = self.appetite;
        while connection.can_receive() && appetite > 0 {
            let count = connection
                .receive(|bytes| {
                    let count = bytes.len().min(appetite);
                    let expected = |(index, byte): (usize, &u8)| *byte == pattern(self.received + index);
                    assert!(bytes[..count].iter().enumerate().all(expected), "wrong bytes");
                    Ok(count)
                })
                .unwrap();
            self.received += count;
            appetite -= count;
        }
        while self.sent < self.to_send && connection.wants_filling(1) {
            let count = connection
                .transmit(|room| {
                    let count = room.len().min(self.to_send - self.sent);
                    room[..count]
                        .iter_mut()
                        .enumerate()
                        .for_each(|(index, byte)| *byte = pattern(self.sent + index));
                    Ok(count)
                })
                .unwrap();
            self.sent += count;
        }
        if self.sent == self.to_send && connection.is_established() && !self.closed {
            connection.close();
            self.closed = true;
        }
        let mut buffer = vec![0; 65_535];
        let out = &mut self.out;
        let mut send = |packet: &mut [u8], mss: Option<std::num::NonZeroU16>| {
            assert!(mss.is_some() || packet.len() <= 1420);
            segments(packet, mss).into_iter().for_each(|segment| out.put(now, segment));
        };
        for _ in 0..1000 {
            if !connection.egress(now, &mut buffer, &mut send) {
                return;
            }
        }
        panic!("it never stops sending");
    }

    fn is_done(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.is_closed() && !connection.can_receive())
    }
}

fn pattern(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16) as u8
}

fn options(lossy: bool) -> Options {
    Options {
        mtu: 1420,
        batch: 45 * 1380,
        lossy,
        sequence: u32::MAX - 5000,
        budget: Budget::new(1 << 30),
        patience: Duration::from_secs(20),
    }
}

/// Has `a` connect to `b`, send so many bytes and be sent so many, over the two paths. Returns how long that took.
struct Run {
    a: End,
    b: End,
    lossy: bool,
    /// Whether the SYNs' offer of selective acknowledgements is taken out on the way.
    plain: bool,
    /// How patient `b` is, if not as `a` is.
    patience: Option<Duration>,
    now: Duration,
}

impl Run {
    fn new(there: Path, back: Path, up: usize, down: usize, lossy: bool) -> Self {
        let local: SocketAddr = "100.127.0.1:4000".parse().unwrap();
        let remote: SocketAddr = "100.127.0.2:80".parse().unwrap();
        let a = Connection::connect(local, remote, options(lossy), Duration::ZERO);
        Self {
            a: End::new(Some(a), there, up),
            b: End::new(None, Path { random: 7, ..back }, down),
            lossy,
            plain: false,
            patience: None,
            now: Duration::ZERO,
        }
    }

    fn deliver(&mut self) {
        while self.a.out.flying.front().is_some_and(|(at, _)| *at <= self.now) {
            let (_, mut packet) = self.a.out.flying.pop_front().unwrap();
            if self.plain && packet[33] & 2 != 0 {
                // The option stands last, behind MSS and scale.
                assert_eq!(packet[48..52], [1, 1, 4, 2]);
                packet[50..52].fill(1);
            }
            match &mut self.b.connection {
                Some(connection) => connection.ingest(&packet, self.now),
                None => {
                    let options = options(self.lossy);
                    let patience = self.patience.unwrap_or(options.patience);
                    let options = Options { patience, ..options };
                    self.b.connection = Connection::accept(&packet, options, self.now);
                }
            }
        }
        while self.b.out.flying.front().is_some_and(|(at, _)| *at <= self.now) {
            let (_, packet) = self.b.out.flying.pop_front().unwrap();
            self.a.connection.as_mut().unwrap().ingest(&packet, self.now);
        }
    }

    /// Until both ends are closed.
    fn run(mut self) -> Self {
        for _ in 0..5_000_000 {
            self.deliver();
            self.a.pump(self.now);
            self.b.pump(self.now);
            if self.a.is_done() && self.b.is_done() {
                assert_eq!((self.a.received, self.b.received), (self.b.to_send, self.a.to_send));
                return self;
            }
            let now = self.now;
            // Timers tick in milliseconds, as tokio's do.
            let timer = |end: &mut End| {
                let connection = end.connection.as_mut()?;
                let reader = connection.can_receive().then_some(Duration::ZERO);
                let deadline = connection.deadline(now).into_iter().chain(reader).min();
                deadline.map(|deadline| now + Duration::from_millis(deadline.as_millis() as u64 + 1))
            };
            let timers = [timer(&mut self.a), timer(&mut self.b)].into_iter().flatten();
            let arrivals =
                [&self.a, &self.b].into_iter().filter_map(|end| end.out.flying.front().map(|(at, _)| *at));
            // A lane takes what has arrived within its turn, some tens of microseconds.
            let arrivals = arrivals.map(|at| at.max(now + Duration::from_micros(50)));
            let Some(next) = timers.chain(arrivals).min() else { panic!("it hangs at {now:?}") };
            self.now = next;
            assert!(self.now < Duration::from_secs(3600), "it takes forever");
        }
        panic!("too many steps");
    }

    fn gigabits(&self) -> f64 {
        (self.a.to_send + self.b.to_send) as f64 * 8e-9 / self.now.as_secs_f64()
    }
}

const GIGABIT: f64 = 125e6;

fn path(delay: Duration) -> Path {
    Path::new(delay, GIGABIT)
}

#[test]
fn a_few_bytes_take_few_round_trips() {
    let run = Run::new(path(10 * MS), path(10 * MS), 100, 100, true).run();
    assert!(run.now < 65 * MS, "{:?}", run.now);
}

#[test]
fn much_fills_a_clean_path() {
    for lossy in [false, true] {
        let run = Run::new(path(2 * MS), path(2 * MS), 20 << 20, 0, lossy).run();
        assert!(run.gigabits() > 0.8);
    }
}

#[test]
fn one_percent_of_loss_costs_little() {
    for (delay, least) in [(Duration::from_micros(50), 0.7), (10 * MS, 0.25), (50 * MS, 0.05)] {
        let lose = |path: Path| Path { lose: Some(100), ..path };
        let run = Run::new(lose(path(delay)), lose(path(delay)), 20 << 20, 0, true).run();
        assert!(run.gigabits() > least, "{:?}: {:.3} Gb/s", delay * 2, run.gigabits());
    }
}

#[test]
fn five_percent_of_loss_is_survived() {
    let lose = |path: Path| Path { lose: Some(20), ..path };
    let run = Run::new(lose(path(5 * MS)), lose(path(5 * MS)), 20 << 20, 20 << 20, true).run();
    assert!(run.gigabits() > 0.1);
}

#[test]
fn without_a_measured_rate_loss_is_made_good_too() {
    let lose = |path: Path| Path { lose: Some(100), ..path };
    let run = Run::new(lose(path(5 * MS)), lose(path(5 * MS)), 10 << 20, 0, false).run();
    assert!(run.gigabits() > 0.1);
}

#[test]
fn a_peer_without_selective_acknowledgements_gets_everything_too() {
    for lossy in [false, true] {
        let lose = |path: Path| Path { lose: Some(100), ..path };
        let mut run = Run::new(lose(path(5 * MS)), lose(path(5 * MS)), 2 << 20, 2 << 20, lossy);
        run.plain = true;
        let run = run.run();
        assert!(run.gigabits() > 0.005);
    }
}

#[test]
fn a_shallow_queue_is_not_flooded() {
    let shallow = Path { queue: 64 << 10, ..Path::new(10 * MS, GIGABIT / 10.0) };
    let run = Run::new(shallow, path(10 * MS), 8 << 20, 0, true).run();
    let needed = (8u64 << 20) / 1380;
    assert!(run.gigabits() > 0.05);
    assert!(run.a.out.sent < needed * 11 / 10);
}

#[test]
fn segments_that_overtake_each_other_are_not_taken_for_lost() {
    let late = Path { late: Some(50), ..path(10 * MS) };
    let run = Run::new(late, path(10 * MS), 20 << 20, 0, true).run();
    let needed = (20u64 << 20) / 1380;
    assert!(run.a.out.sent < needed * 11 / 10);
}

#[test]
fn a_peer_that_vanishes_is_given_up_as_soon_as_patience_has_it_and_one_that_is_silent_is_not() {
    for (vanishes, busy) in [(true, false), (true, true), (false, false)] {
        let mut run = Run::new(path(MS), path(MS), 0, 0, true);
        // Neither end closes.
        (run.a.closed, run.b.closed) = (true, true);
        let step = |run: &mut Run, pause| {
            run.deliver();
            run.a.pump(run.now);
            run.b.pump(run.now);
            run.now += pause;
        };
        (0..100).for_each(|_| step(&mut run, MS));
        let begun = run.now;
        if busy {
            run.a.to_send = 100;
        }
        while run.now < begun + Duration::from_secs(21) {
            if vanishes {
                run.a.out.flying.clear();
            }
            step(&mut run, 10 * MS);
            let is_dead = run.a.connection.as_ref().unwrap().is_dead();
            assert!(!is_dead || (vanishes && run.now > begun + Duration::from_secs(19)), "{:?}", run.now);
        }
        assert_eq!(run.a.connection.as_ref().unwrap().is_torn(), vanishes, "busy: {busy}");
    }
}

#[test]
fn an_answer_acknowledges_its_question() {
    let mut run = Run::new(path(MS), path(MS), 0, 0, true);
    // Neither end closes.
    (run.a.closed, run.b.closed) = (true, true);
    let step = |run: &mut Run| {
        run.deliver();
        run.a.pump(run.now);
        run.b.pump(run.now);
        run.now += MS / 10;
    };
    for _ in 0..10 {
        run.a.to_send += 100;
        while run.b.received < run.a.to_send {
            step(&mut run);
        }
        run.b.to_send += 100;
        while run.a.received < run.b.to_send {
            step(&mut run);
        }
    }
    // SYN, its answer, and an acknowledgement of the first question and the first answer each.
    assert!(run.a.out.sent <= 10 + 3, "{}", run.a.out.sent);
    assert!(run.b.out.sent <= 10 + 3, "{}", run.b.out.sent);

    // An answer that takes its time doesn't hold the acknowledgement up.
    run.a.to_send += 100;
    (0..30).for_each(|_| step(&mut run));
    let before = run.b.out.sent;
    run.a.to_send += 100;
    (0..15).for_each(|_| step(&mut run));
    assert_eq!(run.b.out.sent, before + 1);
}

#[test]
fn a_slow_reader_is_waited_for() {
    let mut run = Run::new(path(MS), path(MS), 3 << 20, 0, false);
    run.b.appetite = 3000;
    let run = run.run();
    assert!(run.now < Duration::from_secs(100), "{:?}", run.now);
}

#[test]
fn the_loss_of_the_last_segment_costs_no_timeout() {
    // The client's request is its third packet: after SYN and ACK.
    for lost in 0..6 {
        let mut run = Run::new(path(5 * MS), path(5 * MS), 1000, 1000, true);
        run.a.out.lose = None;
        run.a.out.random = 0;
        let mut count = 0;
        while !(run.a.is_done() && run.b.is_done()) {
            run.deliver();
            run.a.pump(run.now);
            run.b.pump(run.now);
            while run.a.out.sent > count {
                if count == lost {
                    run.a.out.flying.pop_back();
                }
                count += 1;
            }
            run.now += MS;
            assert!(run.now < Duration::from_secs(5), "packet {lost} lost: it hangs");
        }
        let limit = if lost == 0 { 1200 } else { 400 };
        assert!(run.now < limit * MS, "packet {lost} lost: {:?}", run.now);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_path_does_all_arrives(
        up in 0usize..300_000,
        down in 0usize..300_000,
        delay in 0u64..40,
        rate in 1e5f64..1e8,
        queue in 5_000usize..500_000,
        lose in proptest::option::of(4u64..200),
        late in proptest::option::of(2u64..100),
        random in any::<u64>(),
        lossy in any::<bool>(),
        appetite in 500usize..100_000,
    ) {
        let path = Path { queue, lose, late, random, ..Path::new(MS * delay as u32, rate) };
        let mut run = Run::new(path.clone(), path, up, down, lossy);
        run.b.appetite = appetite;
        run.run();
    }
}
