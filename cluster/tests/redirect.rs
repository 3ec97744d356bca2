//! The redirect on the kernel itself, in network namespaces that vanish with the test's threads. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, and sleep: nobody waits for its threads"
)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use rustix::process::{Uid, geteuid};
use rustix::thread::{UnshareFlags, gettid, set_thread_uid};
use tpd_api::agent::Protocol;
use tpd_api::inject::AGENT_UID;
use tpd_cluster::agent::heartbeat::{Beat, Heartbeats, PERIOD};
use tpd_cluster::agent::redirect::apply::apply;
use tpd_cluster::agent::redirect::table::StandIn;

const APP: u16 = 8080;
const ENTRY: u16 = 19_901;
const UDP_ENTRY: u16 = 19_902;
const STAND_IN: StandIn = StandIn { port: 19_950, app: APP };

const POD_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const POD_V6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 2);

/// What `nft` reads the redirect as.
const RULES: &str = r#"table inet tpd {
	map tcp_live {
		type inet_service : inet_service
		size 64
		flags dynamic,timeout
		timeout 2s
	}

	map udp_live {
		type inet_service : inet_service
		size 64
		flags dynamic,timeout
		timeout 2s
	}

	map udp_back {
		type inet_service : inet_service
		size 64
		flags dynamic,timeout
		timeout 1m7s
	}

	chain datagrams {
		type filter hook prerouting priority mangle; policy accept;
		iif "lo" accept
		ct direction original udp checksum 0 udp dport set udp dport map @udp_live
		ct direction original udp dport set udp dport map @udp_live
	}

	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		iif "lo" accept
		tcp dport 19950 redirect to :8080
		meta l4proto tcp redirect to :tcp dport map @tcp_live
	}

	chain output {
		type filter hook output priority filter; policy accept;
		oif "lo" ip daddr 127.0.0.1 meta skuid 1337 udp sport 19901-19949 update @tcp_live { udp dport timeout 2s : udp sport } drop
		oif "lo" ip daddr 127.0.0.2 meta skuid 1337 udp sport 19901-19949 update @udp_live { udp dport timeout 2s : udp sport } update @udp_back { udp sport timeout 1m7s : udp dport } drop
		udp sport 19901-19949 udp sport set udp sport map @udp_back
		tcp sport 19901-19949 tcp flags & rst == rst ct direction reply ct status ! assured delete @tcp_live { ct original proto-dst : tcp sport }
	}
}
"#;

#[test]
fn the_kernel_redirects_what_the_agent_claims_and_for_as_long_as_it_does() {
    if !geteuid().is_root() {
        println!("NOT TESTED: network namespaces need root");
        return;
    }
    let pod = Namespace::new();
    let client = Namespace::new();
    connect(&pod, &client);
    pod.run(|| {
        serve("app", APP, APP);
        serve("agent", ENTRY, UDP_ENTRY);
    });

    for run in ["a first", "a second"] {
        pod.run(|| apply(&[STAND_IN])).unwrap();
        assert_eq!(pod.run(|| command("nft list ruleset")), RULES, "after {run} run");
    }
    everything_comes_from(&client, "app");

    let stranger = Claims::start(&pod, AGENT_UID + 1);
    sleep(2 * PERIOD);
    everything_comes_from(&client, "app");
    assert_eq!(stranger.stop(), Beat::Ignored);

    let agent = Claims::start(&pod, AGENT_UID);
    sleep(2 * PERIOD);
    everything_comes_from(&client, "agent");
    for address in [IpAddr::from(POD_V4), POD_V6.into()] {
        assert_eq!(client.run(move || ask_tcp((address, STAND_IN.port).into())), "app", "a probe");
    }
    assert_eq!(pod.run(|| ask_tcp((POD_V4, APP).into())), "app", "the pod itself");
    // A table replaced under a living agent is found again by its next heartbeat.
    pod.run(|| apply(&[STAND_IN])).unwrap();
    sleep(2 * PERIOD);
    everything_comes_from(&client, "agent");

    assert_eq!(agent.stop(), Beat::Taken);
    let stopped = Instant::now();
    while client.run(|| ask_tcp((POD_V4, APP).into())) != "app" {
        assert!(stopped.elapsed() < Duration::from_millis(2_500), "a dead agent kept its traffic");
        sleep(Duration::from_millis(50));
    }
    everything_comes_from(&client, "app");

    // An agent whose sockets vanished with it: one connection is refused, and no other.
    for address in [IpAddr::from(POD_V4), POD_V6.into()] {
        pod.run(|| thread::spawn(claim_for_nobody).join().unwrap());
        assert!(client.run(move || TcpStream::connect((address, APP)).is_err()), "nobody listens");
        assert_eq!(client.run(move || ask_tcp((address, APP).into())), "app", "after a refusal");
    }
}

#[test]
fn a_client_whose_datagrams_never_pause_changes_side_with_the_heartbeats() {
    if !geteuid().is_root() {
        println!("NOT TESTED: network namespaces need root");
        return;
    }
    let pod = Namespace::new();
    let client = Namespace::new();
    connect(&pod, &client);
    pod.run(|| {
        serve("app", APP, APP);
        serve("agent", ENTRY, UDP_ENTRY);
        apply(&[]).unwrap();
    });
    let talkers: [Talker; 2] = [IpAddr::from(POD_V4), POD_V6.into()]
        .map(|address| client.run(move || Talker::start((address, APP).into())));
    let is_now = |who: &str, within: Duration| {
        for talker in &talkers {
            talker.until_by(who, within);
        }
        for sum in [Sum::Right, Sum::None] {
            let answer = client.run(move || ask_raw(sum));
            assert_eq!(answer.as_deref(), Some(who), "a checksum: {sum:?}");
        }
        assert_eq!(client.run(|| ask_raw(Sum::Wrong)), None, "a broken datagram was repaired");
    };
    for _ in 0..2 {
        is_now("app", Duration::from_millis(2_500));
        let agent = Claims::start(&pod, AGENT_UID);
        is_now("agent", Duration::from_secs(1));
        assert_eq!(agent.stop(), Beat::Taken);
    }
    is_now("app", Duration::from_millis(2_500));
    for talker in talkers {
        assert_eq!(talker.stop(), 0, "questions without an answer");
    }
}

#[test]
fn what_answers_the_apps_own_datagrams_reaches_the_app() {
    if !geteuid().is_root() {
        println!("NOT TESTED: network namespaces need root");
        return;
    }
    let pod = Namespace::new();
    let client = Namespace::new();
    connect(&pod, &client);
    pod.run(|| {
        serve("agent", ENTRY, UDP_ENTRY);
        apply(&[]).unwrap();
    });
    client.run(|| serve("peer", APP, APP));
    let agent = Claims::start(&pod, AGENT_UID);
    sleep(2 * PERIOD);
    assert_eq!(client.run(|| ask_udp((POD_V4, APP).into())), "agent");
    let answer = pod.run(|| {
        let socket = UdpSocket::bind((POD_V4, APP)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        socket.send_to(b"?", ("10.9.0.1", APP)).unwrap();
        let mut answer = [0; 16];
        socket.recv(&mut answer).map(|length| String::from_utf8_lossy(&answer[..length]).into_owned())
    });
    assert_eq!(answer.expect("an answer"), "peer");
    agent.stop();
}

/// Asks by datagrams from one port, every 10 ms.
struct Talker {
    stop: Arc<AtomicBool>,
    heard: mpsc::Receiver<String>,
    thread: thread::JoinHandle<u32>,
}

impl Talker {
    fn start(server: SocketAddr) -> Self {
        let socket = udp_socket(server);
        let stop = Arc::new(AtomicBool::new(false));
        let (told, (says, heard)) = (Arc::clone(&stop), mpsc::channel());
        let thread = thread::spawn(move || {
            let (mut lost, mut answer) = (0, [0; 16]);
            while !told.load(Ordering::Relaxed) {
                socket.send(b"?").unwrap();
                match socket.recv(&mut answer) {
                    Ok(length) => drop(says.send(String::from_utf8_lossy(&answer[..length]).into_owned())),
                    Err(_) => lost += 1,
                }
                sleep(Duration::from_millis(10));
            }
            lost
        });
        Self { stop, heard, thread }
    }

    fn until_by(&self, who: &str, within: Duration) {
        let begun = Instant::now();
        // What was said before this was asked.
        while self.heard.try_recv().is_ok() {}
        while self.heard.recv().unwrap() != who {
            assert!(begun.elapsed() < within, "{who} does not answer");
        }
    }

    /// How many questions were not answered.
    fn stop(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// What a datagram says of its own integrity.
#[derive(Clone, Copy, Debug)]
enum Sum {
    Right,
    Wrong,
    /// Nothing.
    None,
}

/// Who answers a datagram that no kernel has put together, and whose checksum no network card is to fill in.
fn ask_raw(sum: Sum) -> Option<String> {
    let answers = udp_socket((POD_V4, APP).into());
    let (source, payload) = (answers.local_addr().unwrap().port(), b"?!");
    let length = 8 + payload.len() as u16;
    let header = [source, APP, length, 0].map(u16::to_be_bytes).concat();
    let mut datagram = [&header[..], payload].concat();
    let pseudo = [&[10, 9, 0, 1][..], &POD_V4.octets(), &[0, 17], &length.to_be_bytes()].concat();
    let whole: u32 = [&pseudo[..], &datagram]
        .concat()
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    // Zero would say that there is none.
    let right = (!((whole & 0xffff) + (whole >> 16)) as u16).max(1);
    let sum = match sum {
        Sum::Right => right,
        Sum::Wrong => right.wrapping_add(2).max(1),
        Sum::None => 0,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    let raw = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(socket2::Protocol::UDP));
    raw.unwrap().send_to(&datagram, &SocketAddr::from((POD_V4, 0)).into()).unwrap();
    let mut answer = [0; 16];
    let length = answers.recv(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// Leads the app's port once to one where nothing listens.
fn claim_for_nobody() {
    set_thread_uid(Uid::from_raw(AGENT_UID)).unwrap();
    Heartbeats::default().beat(Protocol::Tcp, APP, UDP_ENTRY + 1).unwrap();
}

fn everything_comes_from(client: &Namespace, who: &str) {
    for address in [IpAddr::from(POD_V4), POD_V6.into()] {
        assert_eq!(client.run(move || ask_tcp((address, APP).into())), who, "TCP by {address}");
        assert_eq!(client.run(move || ask_udp((address, APP).into())), who, "UDP by {address}");
    }
}

/// A network namespace, and the thread that lives in it.
struct Namespace {
    tasks: mpsc::Sender<Box<dyn FnOnce() + Send>>,
    thread: i32,
}

impl Namespace {
    fn new() -> Self {
        let (tasks, queue) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (number, told) = mpsc::channel();
        thread::spawn(move || {
            // Safe for this flag: no memory or descriptor is concerned.
            #[allow(deprecated)]
            rustix::thread::unshare(UnshareFlags::NEWNET).unwrap();
            number.send(gettid().as_raw_nonzero().get()).unwrap();
            queue.into_iter().for_each(|task| task());
        });
        Self { tasks, thread: told.recv().unwrap() }
    }

    fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, returned) = mpsc::channel();
        self.tasks.send(Box::new(move || result.send(task()).unwrap())).unwrap();
        returned.recv().expect("the task panicked")
    }
}

/// Joins both by a cable.
fn connect(pod: &Namespace, client: &Namespace) {
    let other = client.thread;
    pod.run(move || {
        command("ip link set lo up");
        command(&format!("ip link add eth0 type veth peer name eth0 netns {other}"));
        command("ip address add 10.9.0.2/24 dev eth0");
        command("ip address add fd09::2/64 dev eth0 nodad");
        command("ip link set eth0 up");
    });
    client.run(|| {
        command("ip address add 10.9.0.1/24 dev eth0");
        command("ip address add fd09::1/64 dev eth0 nodad");
        command("ip link set eth0 up");
    });
}

fn command(line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Answers with its name at both ports, on every address.
fn serve(name: &'static str, tcp: u16, udp: u16) {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, tcp)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.and_then(|mut stream| stream.write_all(name.as_bytes()));
        }
    });
    // As the heartbeats' sockets on 127.0.0.1 stand beside it.
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, udp)).into()).unwrap();
    let socket = UdpSocket::from(socket);
    thread::spawn(move || {
        while let Ok((_, peer)) = socket.recv_from(&mut [0; 16]) {
            let _ = socket.send_to(name.as_bytes(), peer);
        }
    });
}

fn ask_tcp(server: SocketAddr) -> String {
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(1)).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn ask_udp(server: SocketAddr) -> String {
    let socket = udp_socket(server);
    socket.send(b"?").unwrap();
    let mut answer = [0; 16];
    let length = socket.recv(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

fn udp_socket(server: SocketAddr) -> UdpSocket {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    socket.connect(server).unwrap();
    socket
}

/// Heartbeats for both protocols, by some user.
struct Claims {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Beat>,
}

impl Claims {
    fn start(pod: &Namespace, user: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = pod.run(move || thread::spawn(move || claim(user, &told)));
        Self { stop, thread }
    }

    /// What became of the last heartbeat.
    fn stop(self) -> Beat {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn claim(user: u32, stop: &AtomicBool) -> Beat {
    set_thread_uid(Uid::from_raw(user)).unwrap();
    let mut heartbeats = Heartbeats::default();
    loop {
        heartbeats.beat(Protocol::Tcp, APP, ENTRY).unwrap();
        let beat = heartbeats.beat(Protocol::Udp, APP, UDP_ENTRY).unwrap();
        if stop.load(Ordering::Relaxed) {
            return beat;
        }
        sleep(PERIOD);
    }
}
