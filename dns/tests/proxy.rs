//! The proxy on real sockets, between a fake cluster and a fake internet.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use common::{Server, address, ask, ask_tcp, fresh_address, name, question, reply, send};
use hickory_proto::{
    op::{Edns, Message, ResponseCode},
    rr::{
        RData, Record, RecordType,
        rdata::{CNAME, PTR, SOA, SRV, TXT},
    },
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tpd_dns::{Config, Forward, Handle, Proxy, Scope};

const SERVICE: &str = "web.shop.svc.cluster.local.";

struct Bench {
    proxy: SocketAddr,
    cluster: Server,
    internet: Server,
    handle: Handle,
    scope: watch::Sender<Arc<Scope>>,
    _upstreams: watch::Sender<Arc<[SocketAddr]>>,
}

fn scope() -> Scope {
    Scope {
        zone: "cluster.local".into(),
        namespace: "shop".into(),
        networks: vec!["10.96.0.0/16".parse().unwrap()],
        never: ["api.dev".to_owned()].into(),
        ..Scope::default()
    }
}

impl Bench {
    async fn start() -> Self {
        Self::with(Server::start(cluster).await, Server::start(internet).await).await
    }

    async fn with(cluster: Server, internet: Server) -> Self {
        let servers = (vec![cluster.address], vec![internet.address]);
        Self::with_servers(cluster, internet, servers).await
    }

    async fn with_servers(
        cluster: Server,
        internet: Server,
        (gateways, upstreams): (Vec<SocketAddr>, Vec<SocketAddr>),
    ) -> Self {
        let (scope, receiver) = watch::channel(Arc::new(scope()));
        let (sender, upstreams) = watch::channel(Arc::from(upstreams));
        let listen = vec![fresh_address()];
        let proxy = Proxy::bind(Config { scope: receiver, gateways, listen, upstreams }).await.unwrap();
        let (address, handle) = (proxy.addresses()[0], proxy.handle());
        tokio::spawn(proxy.run(CancellationToken::new()));
        Self { proxy: address, cluster, internet, handle, scope, _upstreams: sender }
    }

    async fn addresses(&self, text: &str) -> Vec<String> {
        let reply = ask(self.proxy, text, RecordType::A).await;
        reply.answers.iter().filter_map(|record| record.data.ip_addr()).map(|ip| ip.to_string()).collect()
    }

    async fn code(&self, text: &str) -> ResponseCode {
        ask(self.proxy, text, RecordType::A).await.metadata.response_code
    }

    /// Questions that the cluster got, the loop guard's own excluded.
    fn cluster_saw(&self) -> Vec<String> {
        self.cluster.seen().into_iter().filter(|question| !question.starts_with("tpd-loop-")).collect()
    }
}

/// What CoreDNS would say.
fn cluster(question: &Message, tcp: bool) -> Option<Message> {
    let asked = question.queries[0].name().to_ascii().to_lowercase();
    let kind = question.queries[0].query_type();
    let good = |data: Vec<RData>| Some(reply(question, ResponseCode::NoError, data));
    match (asked.as_str(), kind) {
        (SERVICE, RecordType::A) => good(vec![address("10.96.0.7")]),
        ("web.dev.svc.cluster.local.", RecordType::A) => good(vec![address("10.96.0.8")]),
        ("pg-0.pgsql.shop.svc.cluster.local.", RecordType::A) => good(vec![address("10.244.0.9")]),
        (SERVICE | "web.dev.svc.cluster.local." | "pg-0.pgsql.shop.svc.cluster.local.", _) => {
            good(vec![]).map(with_soa)
        }
        ("_http._tcp.web.shop.svc.cluster.local.", RecordType::SRV) => {
            good(vec![RData::SRV(SRV::new(0, 100, 80, name(SERVICE)))])
        }
        ("7.0.96.10.in-addr.arpa.", RecordType::PTR) => good(vec![RData::PTR(PTR(name(SERVICE)))]),
        ("dns-version.cluster.local.", RecordType::TXT) => {
            good(vec![RData::TXT(TXT::new(vec!["1.1.0".into()]))])
        }
        ("many.shop.svc.cluster.local.", RecordType::A) if tcp => {
            good((0..100).map(|last| address(&format!("10.244.0.{last}"))).collect())
        }
        ("many.shop.svc.cluster.local.", RecordType::A) => {
            let mut reply = reply(question, ResponseCode::NoError, []);
            reply.metadata.truncation = true;
            Some(reply)
        }
        ("ext.shop.svc.cluster.local.", RecordType::A) => {
            let mut reply =
                reply(question, ResponseCode::NoError, [RData::CNAME(CNAME(name("example.org.")))]);
            reply.add_answer(Record::from_rdata(name("example.org."), 30, address("192.0.2.44")));
            Some(reply)
        }
        ("broken.shop.svc.cluster.local.", _) => Some(reply(question, ResponseCode::ServFail, [])),
        ("silent.shop.svc.cluster.local." | "silent.dev.svc.cluster.local.", _) => None,
        _ => Some(with_soa(reply(question, ResponseCode::NXDomain, []))),
    }
}

fn with_soa(mut reply: Message) -> Message {
    let soa = SOA::new(name("ns.dns.cluster.local."), name("admin.cluster.local."), 1, 2, 3, 4, 30);
    reply.add_authority(Record::from_rdata(name("cluster.local."), 30, RData::SOA(soa)));
    reply
}

fn internet(question: &Message, _tcp: bool) -> Option<Message> {
    let asked = question.queries[0].name().to_ascii().to_lowercase();
    match asked.as_str() {
        "example.com." | "web.dev." | "www.web.dev." | "golang.page." | "api.dev." | "web.shop." => {
            Some(reply(question, ResponseCode::NoError, [address("203.0.113.1")]))
        }
        "silent.example.com." => None,
        _ => Some(reply(question, ResponseCode::NXDomain, [])),
    }
}

#[tokio::test]
async fn names_of_every_length_resolve() {
    let bench = Bench::start().await;
    for text in [SERVICE, "web.shop.svc.", "web.shop.", "web."] {
        assert_eq!(bench.addresses(text).await, ["10.96.0.7"], "{text}");
    }
    assert_eq!(bench.addresses("pg-0.pgsql.").await, ["10.244.0.9"]);
    assert_eq!(bench.addresses("pg-0.pgsql.shop.").await, ["10.244.0.9"]);
    assert!(
        bench.internet.seen().iter().all(|question| !question.starts_with("web.shop ")),
        "web.shop leaked"
    );
}

#[tokio::test]
async fn every_record_type_passes() {
    let bench = Bench::start().await;
    let first = |reply: Message| reply.answers[0].data.clone();
    let srv = ask(bench.proxy, "_http._tcp.web.shop.svc.cluster.local.", RecordType::SRV).await;
    assert_eq!(first(srv), RData::SRV(SRV::new(0, 100, 80, name(SERVICE))));
    let short = ask(bench.proxy, "_http._tcp.web.", RecordType::SRV).await;
    assert_eq!(short.answers[1].data, RData::SRV(SRV::new(0, 100, 80, name(SERVICE))));
    let ptr = ask(bench.proxy, "7.0.96.10.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(first(ptr), RData::PTR(PTR(name(SERVICE))));
    let txt = ask(bench.proxy, "dns-version.cluster.local.", RecordType::TXT).await;
    assert_eq!(first(txt), RData::TXT(TXT::new(vec!["1.1.0".into()])));
    let external = ask(bench.proxy, "ext.", RecordType::A).await;
    assert_eq!(external.answers.len(), 3, "alias, external name, its address");
}

#[tokio::test]
async fn aaaa_of_a_v4_only_name_is_nodata() {
    let bench = Bench::start().await;
    for text in [SERVICE, "web.shop.", "web.", "web.dev."] {
        let reply = ask(bench.proxy, text, RecordType::AAAA).await;
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError, "{text}");
        assert!(reply.answers.iter().all(|record| record.record_type() == RecordType::CNAME), "{text}");
    }
}

#[tokio::test]
async fn the_internet_is_left_alone() {
    let bench = Bench::start().await;
    assert_eq!(bench.addresses("example.com.").await, ["203.0.113.1"]);
    assert_eq!(bench.addresses("www.web.dev.").await, ["203.0.113.1"]);
    assert_eq!(bench.addresses("api.dev.").await, ["203.0.113.1"]);
    assert_eq!(bench.code("nowhere.example.com.").await, ResponseCode::NXDomain);
    assert_eq!(bench.cluster_saw(), [""; 0]);
}

#[tokio::test]
async fn a_name_that_both_have_is_the_clusters() {
    let bench = Bench::start().await;
    assert_eq!(bench.addresses("web.dev.").await, ["10.96.0.8"]);
    assert_eq!(bench.addresses("golang.page.").await, ["203.0.113.1"]);
    assert_eq!(bench.code("nowhere.page.").await, ResponseCode::NXDomain);
}

#[tokio::test]
async fn the_letter_case_of_the_question_comes_back() {
    let bench = Bench::start().await;
    for text in ["WeB.ShoP.svc.Cluster.LOCAL.", "wEb.shOp.", "LocalHost.", "Example.COM."] {
        let reply = ask(bench.proxy, text, RecordType::A).await;
        assert_eq!(reply.queries[0].name().to_ascii(), text);
        assert_eq!(reply.answers[0].name.to_ascii(), text);
    }
}

#[tokio::test]
async fn nothing_resolves_to_nxdomain() {
    let bench = Bench::start().await;
    for text in ["nowhere.shop.svc.cluster.local.", "nowhere.shop.svc.", "nowhere.shop.", "nowhere.", "wpad."]
    {
        assert_eq!(bench.code(text).await, ResponseCode::NXDomain, "{text}");
    }
}

#[tokio::test]
async fn large_answers_come_over_tcp() {
    let bench = Bench::start().await;
    let short = ask(bench.proxy, "many.shop.svc.cluster.local.", RecordType::A).await;
    assert!(
        short.metadata.truncation && short.answers.len() > 20,
        "as many whole records as fit into 512 octets"
    );
    let whole = ask_tcp(bench.proxy, "many.shop.svc.cluster.local.", RecordType::A).await;
    assert!(!whole.metadata.truncation && whole.answers.len() == 100);
    let alias = ask_tcp(bench.proxy, "many.", RecordType::A).await;
    assert_eq!(alias.answers.len(), 101);
}

#[tokio::test]
async fn edns_is_answered_with_edns() {
    let bench = Bench::start().await;
    let mut question = question(SERVICE, RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    question.set_edns(edns);
    let reply = Message::from_vec(&send(bench.proxy, &question.to_vec().unwrap()).await.unwrap()).unwrap();
    assert_eq!(reply.max_payload(), 1232);
    question.edns.as_mut().unwrap().set_version(1);
    let reply = Message::from_vec(&send(bench.proxy, &question.to_vec().unwrap()).await.unwrap()).unwrap();
    assert_eq!(u16::from(reply.metadata.response_code), 16, "BADVERS");
    assert!(ask(bench.proxy, SERVICE, RecordType::A).await.edns.is_none());
}

#[tokio::test]
async fn the_cache_answers_a_second_question() {
    let bench = Bench::start().await;
    for _ in 0..5 {
        bench.addresses(SERVICE).await;
        bench.code("nowhere.shop.svc.cluster.local.").await;
    }
    assert_eq!(bench.cluster_saw().len(), 2);
    let stats = bench.handle.stats();
    assert_eq!((stats.queries, stats.cluster, stats.cache_hits), (10, 2, 8));
    bench.handle.flush();
    bench.addresses(SERVICE).await;
    assert_eq!(bench.cluster_saw().len(), 3);
}

#[tokio::test]
async fn the_same_question_is_asked_once() {
    let slow = Server::start(|question, tcp| {
        if !question.queries[0].name().to_ascii().starts_with("tpd-loop-") {
            #[allow(clippy::disallowed_methods)] // the server is to be slow, for all
            std::thread::sleep(Duration::from_millis(200));
        }
        cluster(question, tcp)
    });
    let bench = Bench::with(slow.await, Server::start(internet).await).await;
    let asked = (0..20).map(|_| bench.addresses(SERVICE));
    let all = futures::future::join_all(asked).await;
    assert!(all.iter().all(|addresses| addresses == &["10.96.0.7"]));
    assert_eq!(bench.cluster_saw().len(), 1);
}

#[tokio::test]
async fn a_silent_cluster_is_servfail_within_four_seconds_and_delays_nobody() {
    let bench = Bench::start().await;
    let started = Instant::now();
    let (silent, _) =
        tokio::join!(ask(bench.proxy, "silent.shop.svc.cluster.local.", RecordType::A), async {
            let started = Instant::now();
            assert_eq!(bench.addresses("example.com.").await, ["203.0.113.1"]);
            assert_eq!(bench.addresses(SERVICE).await, ["10.96.0.7"]);
            assert!(started.elapsed() < Duration::from_millis(200));
        });
    assert_eq!(silent.metadata.response_code, ResponseCode::ServFail);
    assert!(
        started.elapsed() > Duration::from_millis(3500) && started.elapsed() < Duration::from_millis(4600)
    );
    assert_eq!(bench.handle.stats().failures, 1);
    assert!(
        bench.cluster_saw().iter().filter(|question| question.starts_with("silent")).count() >= 3,
        "repeated"
    );
}

#[tokio::test]
async fn a_silent_internet_delays_no_cluster_name() {
    let bench = Bench::with(Server::start(cluster).await, Server::start(|_, _| None).await).await;
    let started = Instant::now();
    for text in [SERVICE, "web.shop.", "web.dev.", "web.", "web.shop.svc."] {
        assert!(!bench.addresses(text).await.is_empty(), "{text}");
    }
    assert!(started.elapsed() < Duration::from_millis(300));
    assert_eq!(bench.code("example.com.").await, ResponseCode::ServFail);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn many_questions_to_a_dead_internet_leave_the_cluster_reachable() {
    let bench = Bench::with(Server::start(cluster).await, Server::start(|_, _| None).await).await;
    for index in 0..600 {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let packet = question(&format!("n{index}.example.com."), RecordType::A).to_vec().unwrap();
        socket.send_to(&packet, bench.proxy).await.unwrap();
    }
    let started = Instant::now();
    assert_eq!(bench.addresses("web.shop.").await, ["10.96.0.7"]);
    assert!(started.elapsed() < Duration::from_millis(500));
    assert!(bench.handle.stats().overloaded > 0);
}

#[tokio::test]
async fn a_dead_cluster_leaves_two_label_names_to_the_internet() {
    let bench = Bench::with(Server::start(|_, _| None).await, Server::start(internet).await).await;
    let started = Instant::now();
    assert_eq!(bench.addresses("golang.page.").await, ["203.0.113.1"]);
    assert!(started.elapsed() < Duration::from_millis(800));
    assert_eq!(
        bench.code("web.shop.").await,
        ResponseCode::ServFail,
        "of the connected namespace: nobody else's answer will do"
    );
}

#[tokio::test]
async fn a_dead_server_hands_over_to_the_next() {
    let (dead, refused) = (Server::start(|_, _| None).await, "127.0.0.1:1".parse().unwrap());
    let (cluster, internet) = (Server::start(cluster).await, Server::start(internet).await);
    let servers = (vec![dead.address, cluster.address], vec![refused, internet.address]);
    let bench = Bench::with_servers(cluster, internet, servers).await;
    let started = Instant::now();
    assert_eq!(bench.addresses("example.com.").await, ["203.0.113.1"]);
    assert!(started.elapsed() < Duration::from_millis(100), "a refused port is no reason to wait");
    assert_eq!(bench.addresses(SERVICE).await, ["10.96.0.7"]);
    let before = Instant::now();
    assert_eq!(bench.addresses("web.dev.").await, ["10.96.0.8"]);
    assert!(before.elapsed() < Duration::from_millis(300), "the living one is asked first from now on");
}

#[tokio::test]
async fn the_proxy_never_asks_itself() {
    let (_scope, scope) = watch::channel(Arc::new(scope()));
    let listen: SocketAddr = (fresh_address().ip(), 15_353).into();
    let (_upstreams, upstreams) = watch::channel(Arc::from([listen]));
    let proxy =
        Proxy::bind(Config { scope, gateways: vec![], listen: vec![listen], upstreams }).await.unwrap();
    let handle = proxy.handle();
    tokio::spawn(proxy.run(CancellationToken::new()));
    let reply = ask(listen, "example.com.", RecordType::A).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(handle.stats().queries, 1);
}

#[tokio::test]
async fn servfail_of_the_cluster_is_passed_on_and_not_kept() {
    let bench = Bench::start().await;
    for _ in 0..2 {
        assert_eq!(bench.code("broken.shop.svc.cluster.local.").await, ResponseCode::ServFail);
    }
    assert_eq!(bench.cluster_saw().len(), 2);
}

#[tokio::test]
async fn forged_replies_are_ignored() {
    let attempts = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&attempts);
    let forger = Server::start(move |question, tcp| {
        let mut reply = cluster(question, tcp)?;
        match counted.fetch_add(1, Ordering::Relaxed) {
            0 => reply.metadata.id = reply.metadata.id.wrapping_add(1),
            1 => {
                reply.queries[0].set_name(name("web.other.svc.cluster.local."));
            }
            _ => {}
        }
        Some(reply)
    });
    let bench = Bench::with(forger.await, Server::start(internet).await).await;
    assert_eq!(bench.addresses(SERVICE).await, ["10.96.0.7"]);
}

#[tokio::test]
async fn garbage_is_dropped_and_counted() {
    let bench = Bench::start().await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut answer = question("web.", RecordType::A).to_vec().unwrap();
    answer[2] |= 0x80;
    for packet in [&b""[..], b"x", &[0xff; 40], &answer] {
        socket.send_to(packet, bench.proxy).await.unwrap();
    }
    assert_eq!(bench.addresses(SERVICE).await, ["10.96.0.7"]);
    assert_eq!(bench.handle.stats().garbage, 4);
}

#[tokio::test]
async fn a_storm_of_broken_questions_changes_nothing() {
    let bench = Bench::start().await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let good = question("_http._tcp.web.shop.svc.cluster.local.", RecordType::SRV).to_vec().unwrap();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..3000 {
        let mut packet = good.clone();
        for _ in 0..=random() % 4 {
            let at = random() as usize % packet.len();
            packet[at] = random() as u8;
        }
        packet.truncate(good.len() - (random() % 8) as usize);
        socket.send_to(&packet, bench.proxy).await.unwrap();
        if round % 300 == 0 {
            let mut stream = tokio::net::TcpStream::connect(bench.proxy).await.unwrap();
            common::write(&mut stream, &packet).await;
        }
    }
    assert_eq!(bench.addresses(SERVICE).await, ["10.96.0.7"]);
    assert!(bench.handle.stats().garbage > 100);
}

#[tokio::test]
async fn the_scope_is_followed() {
    let bench = Bench::start().await;
    assert_eq!(bench.code("web.").await, ResponseCode::NoError);
    bench.scope.send_replace(Arc::new(Scope { namespace: "dev".into(), ..scope() }));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bench.addresses("web.").await, ["10.96.0.8"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_forwards_to_this_machine_makes_no_loop() {
    let home: Arc<OnceLock<SocketAddr>> = Arc::default();
    let proxy = Arc::clone(&home);
    let forwarding = Server::start(move |question, _| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        socket.send_to(&question.to_vec().unwrap(), proxy.wait()).unwrap();
        let mut buffer = [0; 1500];
        let length = tokio::task::block_in_place(|| socket.recv(&mut buffer)).ok()?;
        Message::from_vec(&buffer[..length]).ok()
    });
    let bench = Bench::with(forwarding.await, Server::start(internet).await).await;
    home.set(bench.proxy).unwrap();
    let started = Instant::now();
    while !bench.handle.is_recursive() {
        assert!(started.elapsed() < Duration::from_secs(3), "the loop is noticed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let reply = ask(bench.proxy, "9.0.96.10.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    assert!(bench.cluster_saw().len() <= 2, "{:?}", bench.cluster_saw());
}

#[tokio::test]
async fn the_proof_is_the_proxys_own_address() {
    let bench = Bench::start().await;
    assert_eq!(bench.addresses("tpd-proof.cluster.local.").await, [bench.proxy.ip().to_string()]);
    assert_eq!(bench.cluster_saw(), [""; 0]);
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let taken = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (_scope, scope) = watch::channel(Arc::new(scope()));
    let (_upstreams, upstreams) = watch::channel(Arc::from([]));
    let listen = vec![taken.local_addr().unwrap()];
    let error = Proxy::bind(Config { scope, gateways: vec![], listen, upstreams }).await.unwrap_err();
    assert!(error.to_string().contains("the port is taken"), "{error}");
}

#[tokio::test]
async fn a_domain_with_servers_of_its_own_is_asked_of_the_next_when_one_is_gone() {
    let bench = Bench::start().await;
    let pod =
        Server::start(|question, _| Some(reply(question, ResponseCode::NoError, [address("10.1.2.3")])))
            .await;
    assert_eq!(bench.code("db.corp.example").await, ResponseCode::NXDomain);

    let servers = [SocketAddr::from(([127, 0, 0, 1], 9)), pod.address].into();
    let forward = Forward { domain: "corp.example".into(), servers };
    bench.scope.send_modify(|scope| Arc::make_mut(scope).forwards = vec![forward]);
    tokio::task::yield_now().await;
    assert_eq!(bench.addresses("db.corp.example").await, ["10.1.2.3"]);
    assert_eq!(bench.addresses("example.com").await, ["203.0.113.1"]);

    bench.scope.send_modify(|scope| Arc::make_mut(scope).forwards.clear());
    tokio::task::yield_now().await;
    assert_eq!(bench.code("db.corp.example").await, ResponseCode::NXDomain);
}
