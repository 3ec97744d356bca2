//! Uplinks reach each other through a real manager's lane, over sockets of this machine.

use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
    task::spawn_local,
    time::{sleep, timeout},
};

use super::{Config, Uplink, Way};
use crate::{
    control::Hello,
    flow::{DialCause, Limits, Policy, Protocol, Route},
    key::PrivateKey,
    packet::icmp::Unreachable,
    server::{self, Hub, Lane, Pair},
};

const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 1);
const AGENT: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0x8000, 0, 0, 1);
const LAPTOP: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 2);

const OPEN: u16 = 20_000;
const CLOSED: u16 = 20_001;
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves [`OPEN`], dials UDP to the port of the test's echo socket, and refuses the rest.
struct Ends(u16);

impl Policy for Ends {
    fn route(&self, protocol: Protocol, _: std::net::IpAddr, destination: SocketAddr) -> Route {
        match (protocol, destination.port()) {
            (Protocol::Tcp, OPEN) => Route::Serve,
            (Protocol::Udp, OPEN) => Route::Dial((Ipv4Addr::LOCALHOST, self.0).into()),
            _ => Route::Prohibited,
        }
    }
}

/// A policy that refuses whatever comes: a manager's, to overlay addresses.
struct Nothing;

impl Policy for Nothing {
    fn route(&self, _: Protocol, _: std::net::IpAddr, _: SocketAddr) -> Route {
        Route::Prohibited
    }
}

fn hello() -> Hello {
    Hello { name: "test".into(), version: "0".into(), instance: 1, features: Vec::new() }
}

struct Manager {
    lane: Lane,
    key: PrivateKey,
    udp: SocketAddr,
    stream: SocketAddr,
}

impl Manager {
    async fn start() -> Self {
        let udp = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        udp.set_nonblocking(true).unwrap();
        let address = udp.local_addr().unwrap();
        let key = PrivateKey::generate().unwrap();
        let lane = Lane::spawn(server::Config {
            private_key: key.clone(),
            udp,
            gateway: vec![GATEWAY.into()],
            control_port: 1,
            policy: Arc::new(Nothing),
            limits: Limits::default(),
            hello: hello(),
        });
        let lane = lane.unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let stream = listener.local_addr().unwrap();
        spawn_local(take_streams(listener, lane.clone()));
        Self { lane, key, udp: address, stream }
    }

    /// An uplink whose UDP goes to `udp`, and which the manager knows.
    fn uplink(&self, address: Ipv6Addr, udp: SocketAddr, port: u16) -> (Uplink, crate::key::PublicKey) {
        let private_key = PrivateKey::generate().unwrap();
        let public_key = private_key.public();
        self.lane.upsert_peer(public_key, vec![address.into()]);
        let uplink = Uplink::start(Config {
            private_key,
            manager_key: self.key.public(),
            address,
            gateway: GATEWAY,
            control_port: 1,
            udp,
            stream: self.stream,
            upgrade: ("/v1/stream", "tpd"),
            policy: Arc::new(Ends(port)),
            hello: hello(),
            limits: Limits::default(),
        });
        (uplink.unwrap(), public_key)
    }

    fn pair(&self) {
        let pair = Pair { agent: AGENT, laptop: LAPTOP, ports: vec![OPEN, CLOSED], services: vec![53] };
        self.lane.set_hub(Hub { pairs: vec![pair] });
    }
}

/// Answers every connection with 101 and hands it to the lane.
async fn take_streams(listener: TcpListener, lane: Lane) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            assert!(stream.read_buf(&mut request).await.unwrap() > 0);
        }
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").await.unwrap();
        lane.attach_stream(stream.into_std().unwrap(), Bytes::new());
    }
}

/// An address where UDP goes nowhere.
async fn hole() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// A UDP echo and its port.
async fn echo() -> u16 {
    let (socket, address) = hole().await;
    spawn_local(async move {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    });
    address.port()
}

async fn way(uplink: &Uplink, expected: Option<Way>) {
    let mut ready = uplink.ready();
    timeout(PATIENCE * 2, ready.wait_for(|way| *way == expected)).await.expect("in time").unwrap();
}

fn on_lane<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { timeout(Duration::from_secs(60), test).await.expect("the test hangs") };
    tokio::task::LocalSet::new().block_on(&runtime, limited)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index ^ index >> 8 ^ index >> 16) as u8).collect()
}

/// Much goes from the agent to the laptop and comes back.
async fn exchange(agent: &Uplink, laptop: &Uplink) {
    let mut accepted = laptop.serve();
    let near = agent.connect((LAPTOP, OPEN).into(), PATIENCE).await.unwrap();
    let far = accepted.recv().await.unwrap();
    assert_eq!(far.peer_addr().ip(), AGENT);
    let (mut reader, mut writer) = tokio::io::split(far);
    spawn_local(async move {
        tokio::io::copy(&mut reader, &mut writer).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let data = pattern(4 << 20);
    let (mut reader, mut writer) = tokio::io::split(near);
    let write = async {
        writer.write_all(&data).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let ((), result) = tokio::join!(write, reader.read_to_end(&mut received));
    result.unwrap();
    assert!(received == data, "{} bytes", received.len());
}

#[test]
fn an_agent_reaches_a_laptop_by_any_two_paths() {
    for (agent_by_udp, laptop_by_udp) in [(true, true), (false, true), (true, false), (false, false)] {
        on_lane(async {
            let manager = Manager::start().await;
            manager.pair();
            let (_hole, nowhere) = hole().await;
            let choose = |by_udp| if by_udp { manager.udp } else { nowhere };
            let port = echo().await;
            let (agent, _) = manager.uplink(AGENT, choose(agent_by_udp), 9);
            let (laptop, _) = manager.uplink(LAPTOP, choose(laptop_by_udp), port);
            for (uplink, by_udp) in [(&agent, agent_by_udp), (&laptop, laptop_by_udp)] {
                way(uplink, Some(if by_udp { Way::Udp } else { Way::Stream })).await;
            }
            exchange(&agent, &laptop).await;

            let datagrams = agent.open_datagrams((LAPTOP, OPEN).into()).unwrap();
            let mut buffer = vec![0; 65_536];
            for length in [3, 1372, 30_000] {
                datagrams.send(&pattern(length)).await.unwrap();
                let received = timeout(PATIENCE, datagrams.recv(&mut buffer)).await.unwrap().unwrap();
                assert!(buffer[..received] == pattern(length));
            }
        });
    }
}

#[test]
fn what_may_not_be_reached_is_refused_at_once() {
    on_lane(async {
        let manager = Manager::start().await;
        let (agent, key) = manager.uplink(AGENT, manager.udp, 9);
        way(&agent, Some(Way::Udp)).await;
        let prohibited = DialCause::Unreachable(Unreachable::Prohibited);
        let connect = |port| agent.connect((LAPTOP, port).into(), PATIENCE);
        assert_eq!(connect(OPEN).await.unwrap_err(), prohibited, "no such laptop");
        let (laptop, _) = manager.uplink(LAPTOP, manager.udp, 9);
        way(&laptop, Some(Way::Udp)).await;
        assert_eq!(connect(OPEN).await.unwrap_err(), prohibited, "no pair");
        manager.pair();
        assert_eq!(connect(22).await.unwrap_err(), prohibited, "no port of the pair's");
        assert_eq!(connect(CLOSED).await.unwrap_err(), prohibited, "the laptop's own policy");
        assert_eq!(connect(OPEN).await.unwrap_err(), DialCause::Refused, "nobody takes connections");

        // A pair that ends takes its connections with it.
        let mut accepted = laptop.serve();
        let mut near = connect(OPEN).await.unwrap();
        let _far = accepted.recv().await.unwrap();
        manager.lane.set_hub(Hub::default());
        near.write_all(b"still there?").await.unwrap();
        near.read(&mut [0]).await.unwrap_err();
        manager.lane.remove_peer(key);
        way(&agent, None).await;
    });
}

#[test]
fn carried_are_those_who_say_so() {
    on_lane(async {
        let manager = Manager::start().await;
        let mut carried = manager.lane.carried();
        let (agent, agent_key) = manager.uplink(AGENT, manager.udp, 9);
        let (laptop, laptop_key) = manager.uplink(LAPTOP, manager.udp, 9);
        let both = BTreeSet::from([agent_key, laptop_key]);
        timeout(PATIENCE, carried.wait_for(|carried| *carried == both)).await.unwrap().unwrap();
        drop(laptop);
        let left = BTreeSet::from([agent_key]);
        timeout(Duration::from_millis(1_500), carried.wait_for(|carried| *carried == left))
            .await
            .unwrap()
            .unwrap();
        drop(agent);
    });
}

#[test]
fn a_manager_that_vanishes_is_noticed_within_about_a_second() {
    on_lane(async {
        let manager = Manager::start().await;
        let (agent, _) = manager.uplink(AGENT, manager.udp, 9);
        way(&agent, Some(Way::Udp)).await;
        let attempt = agent.connect((LAPTOP, OPEN).into(), PATIENCE);
        manager.lane.shutdown();
        let gone = Instant::now();
        way(&agent, None).await;
        assert!(gone.elapsed() < Duration::from_millis(1_200), "{:?}", gone.elapsed());
        drop(attempt);
    });
}

#[test]
fn a_manager_that_forgot_the_session_is_greeted_again() {
    on_lane(async {
        let manager = Manager::start().await;
        let (agent, key) = manager.uplink(AGENT, manager.udp, 9);
        way(&agent, Some(Way::Udp)).await;
        manager.lane.remove_peer(key);
        way(&agent, None).await;
        manager.lane.upsert_peer(key, vec![AGENT.into()]);
        let back = Instant::now();
        let mut ready = agent.ready();
        ready.wait_for(Option::is_some).await.unwrap();
        // WireGuard by itself would take five seconds to try again, and then more.
        assert!(back.elapsed() < Duration::from_secs(4), "{:?}", back.elapsed());
        // A stream may have been quicker.
        way(&agent, Some(Way::Udp)).await;
    });
}

/// Passes datagrams on to `manager` and back, while it is open.
async fn relay(manager: SocketAddr, open: Rc<Cell<bool>>) -> SocketAddr {
    let (front, address) = hole().await;
    let (back, _) = hole().await;
    spawn_local(async move {
        let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((length, from)) = front.recv_from(&mut there) => {
                    client = Some(from);
                    if open.get() {
                        let _ = back.send_to(&there[..length], manager).await;
                    }
                }
                Ok(length) = back.recv(&mut here) => {
                    if let Some(client) = client.filter(|_| open.get()) {
                        let _ = front.send_to(&here[..length], client).await;
                    }
                }
            }
        }
    });
    address
}

#[test]
fn connections_outlive_a_change_of_ways() {
    on_lane(async {
        let manager = Manager::start().await;
        manager.pair();
        let open = Rc::new(Cell::new(false));
        let front = relay(manager.udp, Rc::clone(&open)).await;
        let (agent, _) = manager.uplink(AGENT, front, 9);
        let (laptop, _) = manager.uplink(LAPTOP, manager.udp, 9);
        let started = Instant::now();
        way(&agent, Some(Way::Stream)).await;
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());

        let mut accepted = laptop.serve();
        let mut near = agent.connect((LAPTOP, OPEN).into(), PATIENCE).await.unwrap();
        let mut far = accepted.recv().await.unwrap();
        let mut received = [0; 3];
        for by_udp in [true, false] {
            open.set(by_udp);
            way(&agent, Some(if by_udp { Way::Udp } else { Way::Stream })).await;
            near.write_all(b"one").await.unwrap();
            far.read_exact(&mut received).await.unwrap();
            far.write_all(b"two").await.unwrap();
            near.read_exact(&mut received).await.unwrap();
        }
    });
}

#[test]
fn a_dropped_uplink_resets_its_connections() {
    on_lane(async {
        let manager = Manager::start().await;
        manager.pair();
        let (agent, _) = manager.uplink(AGENT, manager.udp, 9);
        let (laptop, _) = manager.uplink(LAPTOP, manager.udp, 9);
        way(&agent, Some(Way::Udp)).await;
        way(&laptop, Some(Way::Udp)).await;
        let mut accepted = laptop.serve();
        let near = agent.connect((LAPTOP, OPEN).into(), PATIENCE).await.unwrap();
        let mut far = accepted.recv().await.unwrap();
        drop(agent);
        let told = timeout(Duration::from_secs(1), far.read(&mut [0])).await.expect("at once");
        assert_eq!(told.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!(near.unacknowledged(), 0);
        sleep(Duration::from_millis(1)).await;
    });
}
