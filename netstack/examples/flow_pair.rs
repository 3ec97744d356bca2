//! How fast two flow engines move one TCP connection: `flow_pair [MEBIBYTES] [LOSS] [RTT_MS]`.
//!
//! Both engines and their wire, which cuts super-packets into segments, loses one in `LOSS` of them (0: none)
//! and delays them by half of `RTT_MS`, run on one thread; source and sink run on another.
#![allow(clippy::print_stdout, missing_docs)]

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    num::NonZeroU16,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::time::Instant;
use tpd_netstack::{
    flow::{Engine, Limits, Outlet, PeerId, Policy, Protocol, Route},
    packet::IpHeader,
};

const PEER: PeerId = PeerId(1);

/// Most bytes on the wire in one direction that back-pressure allows.
const ROOM: usize = 4 << 20;

struct Wire {
    queue: RefCell<VecDeque<(Instant, Vec<u8>)>>,
    bytes: Cell<usize>,
    writers: RefCell<Vec<Waker>>,
    arrival: tokio::sync::Notify,
    delay: Duration,
    loss: u32,
    random: Cell<u32>,
    packets: Cell<u64>,
    lost: Cell<u64>,
}

impl Wire {
    fn new(delay: Duration, loss: u32, seed: u32) -> Rc<Self> {
        Rc::new(Self {
            queue: RefCell::default(),
            bytes: Cell::new(0),
            writers: RefCell::default(),
            arrival: tokio::sync::Notify::new(),
            delay,
            loss,
            random: Cell::new(seed),
            packets: Cell::new(0),
            lost: Cell::new(0),
        })
    }

    fn lose(&self) -> bool {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.random.set(x);
        self.loss > 0 && x.is_multiple_of(self.loss)
    }

    fn put(&self, packet: Vec<u8>) {
        self.packets.set(self.packets.get() + 1);
        if self.lose() {
            return self.lost.set(self.lost.get() + 1);
        }
        self.bytes.set(self.bytes.get() + packet.len());
        self.queue.borrow_mut().push_back((Instant::now() + self.delay, packet));
        self.arrival.notify_one();
    }

    async fn deliver(self: Rc<Self>, engine: Engine<Self>) {
        loop {
            let due = self.queue.borrow().front().map(|(due, _)| *due);
            match due {
                None => self.arrival.notified().await,
                Some(due) if due > Instant::now() => tokio::time::sleep_until(due).await,
                Some(_) => {
                    for _ in 0..64 {
                        let mut queue = self.queue.borrow_mut();
                        if queue.front().is_none_or(|(due, _)| *due > Instant::now()) {
                            break;
                        }
                        let Some((_, packet)) = queue.pop_front() else { break };
                        drop(queue);
                        self.bytes.set(self.bytes.get() - packet.len());
                        engine.ingest(PEER, &packet);
                    }
                    self.writers.borrow_mut().drain(..).for_each(Waker::wake);
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}

impl Outlet for Wire {
    fn is_lossy(&self, _: PeerId) -> bool {
        std::env::var_os("FLOW_PAIR_LOSSLESS").is_none()
    }

    fn poll_ready(&self, _: PeerId, context: &mut Context<'_>) -> Poll<()> {
        if self.bytes.get() >= ROOM {
            self.writers.borrow_mut().push(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn send(&self, _: PeerId, packet: &mut [u8], gso: Option<NonZeroU16>) {
        let Some(mss) = gso.filter(|_| self.loss > 0) else { return self.put(packet.to_vec()) };
        let Some(header) = IpHeader::parse(packet) else { return };
        let data = header.payload + usize::from(packet[header.payload + 12] >> 4) * 4;
        let at = header.payload + 4;
        let sequence = u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
        for (index, chunk) in packet[data..].chunks(usize::from(mss.get())).enumerate() {
            let mut segment = packet[..data].to_vec();
            segment.extend_from_slice(chunk);
            let total = segment.len() as u16;
            segment[2..4].copy_from_slice(&total.to_be_bytes());
            let sequence = sequence.wrapping_add((index * usize::from(mss.get())) as u32);
            segment[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
            self.put(segment);
        }
    }
}

struct Everything;

impl Policy for Everything {
    fn route(&self, _: Protocol, _: IpAddr, destination: SocketAddr) -> Route {
        Route::Dial((Ipv4Addr::LOCALHOST, destination.port()).into())
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse().expect("a number"));
    let mebibytes: usize = arguments.next().unwrap_or(1024);
    let loss = arguments.next().unwrap_or(0) as u32;
    let delay = Duration::from_millis(arguments.next().unwrap_or(0) as u64) / 2;

    let sink = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let port = sink.local_addr().expect("bound").port();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = sink.accept().expect("accept");
        let mut buffer = vec![0; 1 << 20];
        let mut total = 0;
        loop {
            match stream.read(&mut buffer).expect("read") {
                0 => return total,
                count => total += count,
            }
        }
    });

    let front = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let mut source = TcpStream::connect(front.local_addr().expect("bound")).expect("connect");
    let (joined, _) = front.accept().expect("accept");
    joined.set_nonblocking(true).expect("nonblocking");
    std::thread::spawn(move || {
        let chunk = vec![7; 1 << 20];
        (0..mebibytes).for_each(|_| source.write_all(&chunk).expect("write"));
    });

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let limits = Limits::default();
        let (up, down) = (Wire::new(delay, loss, 0x9e37_79b9), Wire::new(delay, loss, 0x85eb_ca6b));
        let a = Engine::new(Rc::clone(&up), Arc::new(Everything), limits.clone());
        let b = Engine::new(Rc::clone(&down), Arc::new(Everything), limits);
        tokio::task::spawn_local(Rc::clone(&up).deliver(b.clone()));
        tokio::task::spawn_local(Rc::clone(&down).deliver(a.clone()));

        let stream = tokio::net::TcpStream::from_std(joined).expect("register");
        let (local, remote) = ((Ipv4Addr::new(100, 127, 0, 1), 0), (Ipv4Addr::new(100, 127, 0, 2), port));
        let started = Instant::now();
        let connected = a.connect(PEER, local.into(), remote.into(), Duration::from_secs(5)).await;
        tokio::task::spawn_local(connected.expect("connected").splice(stream));
        while a.counters().tcp_flows > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let elapsed = started.elapsed().as_secs_f64();
        let total = receiver.join().expect("receiver");
        println!(
            "{:.0} MiB in {elapsed:.2} s: {:.2} Gb/s; {} packets out ({} lost), {} back",
            total as f64 / f64::from(1 << 20),
            total as f64 * 8e-9 / elapsed,
            up.packets.get(),
            up.lost.get(),
            down.packets.get(),
        );
    });
}
