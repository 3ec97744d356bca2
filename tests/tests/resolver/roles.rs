//! The other processes of a test: the world outside the laptop, the daemon on it, and the daemon's watchdog.

use std::{
    collections::BTreeSet,
    env,
    io::stdin,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Stdio,
    sync::Arc,
    time::Instant,
};

use common::{Server, address, name, reply};
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        RData, Record, RecordType,
        rdata::{AAAA, CNAME, PTR, SOA, SRV, TXT},
    },
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use tpd_dns::{
    Config, Proxy, Scope, prove, prove_takeover,
    takeover::{Files, Link, System, watchdog},
};

use crate::lab;

#[allow(dead_code, reason = "the proxy's own tests use more of it")]
#[path = "../../../dns/tests/common/mod.rs"]
mod common;

const STATE: &str = "/var/lib/tpd-resolver-test";
const WEB: &str = "web.shop.svc.cluster.local.";

/// Plays the part that the environment names; none in a plain run of the tests.
pub(crate) fn play() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let arguments = env::var("TPD_RESOLVER_ARGUMENTS").unwrap_or_default();
    match env::var("TPD_RESOLVER_ROLE").as_deref() {
        Ok("world") => runtime().block_on(world()),
        Ok("daemon") => runtime().block_on(daemon(arguments.split_whitespace())),
        Ok("watchdog") => drop(watchdog::restore_when_gone(Path::new(STATE), stdin()).unwrap()),
        _ => {}
    }
}

/// What the daemon of tpd does about DNS, and nothing else.
async fn daemon(namespaces: impl Iterator<Item = &str>) {
    let mut command = lab::role("watchdog", "");
    command.stdout(Stdio::null());
    let watchdog = watchdog::spawn(command).unwrap();
    let started = Instant::now();
    let own: IpAddr = "100.127.0.5".parse().unwrap();
    let scope = Scope {
        zone: "cluster.local".into(),
        namespace: "shop".into(),
        namespaces: namespaces.map(str::to_owned).collect::<BTreeSet<_>>(),
        networks: ["10.96.0.0/16", "10.244.0.0/16"].map(|text| text.parse().unwrap()).into(),
        never: BTreeSet::new(),
        forwards: Vec::new(),
    };
    let (_sender, scope) = watch::channel(Arc::new(scope));

    let system = System::detect(Files::system(STATE)).await.unwrap();
    let config = Config {
        scope: scope.clone(),
        gateways: vec!["100.127.0.1:53".parse().unwrap()],
        listen: vec![SocketAddr::new(own, 53)],
        upstreams: system.upstreams(),
    };
    let proxy = Proxy::bind(config).await.unwrap();
    let (handle, stop) = (proxy.handle(), CancellationToken::new());
    let running = tokio::spawn(proxy.run(stop.clone()));
    let guard = system.take(Link { index: interface("tpd0"), server: own }, scope).await.unwrap();
    prove_takeover("cluster.local", &[own]).await.unwrap();
    prove(WEB).await.unwrap();
    println!("\nready {} {} {}", guard.backend(), started.elapsed().as_millis(), watchdog.id());

    signal(SignalKind::terminate()).unwrap().recv().await;
    println!("{:?} {:?}", guard.revert().await.unwrap(), handle.stats());
    stop.cancel();
    running.await.unwrap();
    watchdog.end().unwrap();
}

fn interface(name: &str) -> u32 {
    std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).unwrap().trim().parse().unwrap()
}

async fn world() {
    let start = |address: &str, answers: fn(&Message, bool) -> Option<Message>| {
        Server::start_at(address.parse().unwrap(), answers)
    };
    let _internet = start("192.0.2.53:53", |question, _| internet(question, "203.0.113.53")).await;
    let _second = start("198.51.100.54:53", |question, _| internet(question, "203.0.113.54")).await;
    let _cluster = start("100.127.0.1:53", cluster).await;
    std::future::pending::<()>().await;
}

fn internet(question: &Message, second: &str) -> Option<Message> {
    let asked = question.queries[0].name().to_ascii().to_lowercase();
    let kind = question.queries[0].query_type();
    let good = |data: Vec<RData>| Some(reply(question, ResponseCode::NoError, data));
    match (asked.as_str(), kind) {
        ("example.com.", RecordType::A) => good(vec![address("203.0.113.1")]),
        ("www.example.com.", RecordType::A) => good(vec![address("203.0.113.2")]),
        ("both.example.com.", RecordType::A) => good(vec![address("203.0.113.3")]),
        ("both.example.com.", RecordType::AAAA) => good(vec![address_v6("2001:db8::3")]),
        ("site.dev." | "www.site.dev.", RecordType::A) => good(vec![address("203.0.113.4")]),
        ("second.example.com." | "second.dev.", RecordType::A) => good(vec![address(second)]),
        ("80.2.0.192.in-addr.arpa.", RecordType::PTR) => {
            good(vec![RData::PTR(PTR(name("host.example.com.")))])
        }
        (known, _) if known.ends_with("example.com.") && known != "nowhere.example.com." => {
            good(vec![]).map(|reply| with_soa(reply, "example.com."))
        }
        ("site.dev." | "www.site.dev." | "second.dev.", _) => {
            good(vec![]).map(|reply| with_soa(reply, "dev."))
        }
        _ => Some(with_soa(reply(question, ResponseCode::NXDomain, []), ".")),
    }
}

fn cluster(question: &Message, tcp: bool) -> Option<Message> {
    let asked = question.queries[0].name().to_ascii().to_lowercase();
    let kind = question.queries[0].query_type();
    let good = |data: Vec<RData>| Some(reply(question, ResponseCode::NoError, data));
    let hosts = [
        (WEB, "10.96.0.7"),
        ("web.dev.svc.cluster.local.", "10.96.0.8"),
        ("dual.shop.svc.cluster.local.", "10.96.0.9"),
        ("pg-0.pgsql.shop.svc.cluster.local.", "10.244.0.9"),
        ("10-244-0-9.shop.pod.cluster.local.", "10.244.0.9"),
    ];
    let host = hosts.iter().find(|(name, _)| *name == asked);
    match (asked.as_str(), kind, host) {
        (_, RecordType::A, Some((_, found))) => good(vec![address(found)]),
        ("dual.shop.svc.cluster.local.", RecordType::AAAA, _) => good(vec![address_v6("fd00:10:96::9")]),
        ("_http._tcp.web.shop.svc.cluster.local.", RecordType::SRV, _) => {
            good(vec![RData::SRV(SRV::new(0, 100, 80, name(WEB)))])
        }
        ("7.0.96.10.in-addr.arpa.", RecordType::PTR, _) => good(vec![RData::PTR(PTR(name(WEB)))]),
        ("dns-version.cluster.local.", RecordType::TXT, _) => {
            good(vec![RData::TXT(TXT::new(vec!["1.1.0".into()]))])
        }
        ("many.shop.svc.cluster.local.", RecordType::A, _) if tcp => {
            good((0..100).map(|last| address(&format!("10.244.1.{last}"))).collect())
        }
        ("many.shop.svc.cluster.local.", RecordType::A, _) => {
            let mut reply = reply(question, ResponseCode::NoError, []);
            reply.metadata.truncation = true;
            Some(reply)
        }
        ("many.shop.svc.cluster.local.", _, _) => good(vec![]).map(|reply| with_soa(reply, "cluster.local.")),
        ("ext.shop.svc.cluster.local.", kind, _) => {
            let mut reply =
                reply(question, ResponseCode::NoError, [RData::CNAME(CNAME(name("www.example.com.")))]);
            if kind == RecordType::A {
                reply.add_answer(Record::from_rdata(name("www.example.com."), 5, address("203.0.113.2")));
            }
            Some(reply)
        }
        (_, _, Some(_)) => good(vec![]).map(|reply| with_soa(reply, "cluster.local.")),
        _ => Some(with_soa(reply(question, ResponseCode::NXDomain, []), "cluster.local.")),
    }
}

fn address_v6(text: &str) -> RData {
    RData::AAAA(AAAA(text.parse().unwrap()))
}

fn with_soa(mut reply: Message, zone: &str) -> Message {
    let soa = SOA::new(name("ns.invalid."), name("admin.invalid."), 1, 2, 3, 4, 5);
    reply.add_authority(Record::from_rdata(name(zone), 5, RData::SOA(soa)));
    reply
}
