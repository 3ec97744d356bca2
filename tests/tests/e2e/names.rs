//! Names, as programs look them up: with the C library, with Go's own resolver, and with dig.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::json;
use tpd_tests::{Block, Cluster, Laptop, until};

/// How soon a name that does not exist, or cannot be looked up, has to be said not to.
const SOON: Duration = Duration::from_secs(1);

fn strings(addresses: &[IpAddr]) -> Vec<String> {
    let mut strings: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    strings.sort_unstable();
    strings.dedup();
    strings
}

/// Looks a name up in both of the ways that programs have, and expects just these addresses.
#[track_caller]
fn resolves(laptop: &Laptop, name: &str, expected: &[IpAddr]) {
    let expected = strings(expected);
    let glibc = laptop.run(&format!("getent ahosts {name} | awk '{{ print $1 }}' | sort -u"));
    assert_eq!(glibc.lines(), expected, "the C library on {name}:\n{glibc}");
    let go = laptop.run(&format!("tpd-echo resolve {name} | sort -u"));
    assert_eq!(go.lines(), expected, "Go on {name}:\n{go}");
}

/// It does not exist, and every way of asking is told so at once.
#[track_caller]
fn is_nowhere(laptop: &Laptop, name: &str) {
    laptop.run(&format!("getent ahosts {name}")).ends_with(2).within(SOON);
    laptop.run(&format!("tpd-echo resolve {name}")).ends_with(1).says(&["no such host"]).within(SOON);
    laptop.run(&format!("dig {name}")).ok().says(&["status: NXDOMAIN"]).within(SOON);
}

#[track_caller]
fn digs(laptop: &Laptop, question: &str, expected: &[&str]) {
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    let run = laptop.run(&format!("dig +short {question}"));
    assert_eq!(run.ok().lines(), expected, "dig {question}:\n{run}");
}

#[test]
fn a_service_resolves_by_every_form_of_its_name() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let web = laptop.cluster.service("shop/web");
    assert_eq!(web.len(), 2, "the sample is dual stack");
    let forms =
        ["web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "web.shop.svc.cluster.local."];
    for form in forms {
        resolves(&laptop, form, &web);
    }
    for form in ["WEB", "Web.Shop", "web.SHOP.svc", "wEb.sHoP.sVc.ClUsTeR.lOcAl"] {
        resolves(&laptop, form, &web);
    }
    resolves(&laptop, "kubernetes.default", &laptop.cluster.service("default/kubernetes"));
    let dns = laptop.cluster.service("kube-system/kube-dns");
    resolves(&laptop, "kube-dns.kube-system.svc", &dns);
    is_nowhere(&laptop, "kube-dns.shop.svc.cluster.local");
}

#[test]
fn bare_names_are_those_of_the_connected_namespace() {
    let laptop = Laptop::take();
    let connection = laptop.up("--namespace default");
    resolves(&laptop, "kubernetes", &laptop.cluster.service("default/kubernetes"));
    laptop.run("getent ahosts web").ends_with(2);
    connection.down();
    let _connection = laptop.up("--namespace shop");
    resolves(&laptop, "web", &laptop.cluster.service("shop/web"));
    laptop.run("getent ahosts kubernetes").ends_with(2);
}

#[test]
fn headless_services_resolve_to_their_pods() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let pods = laptop.cluster.pods("shop", "app=ring");
    resolves(&laptop, "ring.shop", &pods.concat());
    let first = laptop.cluster.object("pod ring-0 -n shop");
    let ips = first["status"]["podIPs"].as_array().expect("a running pod has addresses");
    let ips: Vec<IpAddr> = ips.iter().filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect();
    resolves(&laptop, "ring-0.ring.shop", &ips);
    resolves(&laptop, "ring-0.ring", &ips);
    resolves(&laptop, "ring-0.ring.shop.svc.cluster.local", &ips);
}

#[test]
fn every_record_type_is_what_a_pod_sees() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let web = strings(&laptop.cluster.service("shop/web"));
    let questions = [
        "_http._tcp.ring.shop.svc.cluster.local SRV",
        "_http._tcp.web.shop.svc.cluster.local SRV",
        "partner.shop.svc.cluster.local A",
        "partner.shop.svc.cluster.local CNAME",
        "dns-version.cluster.local TXT",
        "web.shop.svc.cluster.local A",
        "web.shop.svc.cluster.local AAAA",
        "nosuch.shop.svc.cluster.local A",
        &format!("-x {}", web[0]),
        &format!("-x {}", web[1]),
    ];
    for question in questions {
        let ours = laptop.run(&format!("dig +short {question} | sort"));
        let pods = laptop.cluster.kubectl(&format!("-n shop exec toolbox -- dig +short {question}"));
        assert_eq!(ours.ok().lines(), pods.ok().lines(), "dig {question}, on the laptop and in a pod");
    }
    digs(&laptop, "dns-version.cluster.local TXT", &["\"1.1.0\""]);
    digs(&laptop, &format!("-x {}", web[0]), &["web.shop.svc.cluster.local."]);

    let srv = laptop.run("tpd-echo resolve _http._tcp.ring.shop.svc.cluster.local srv");
    assert_eq!(srv.ok().lines().len(), 2, "one target for each pod:\n{srv}");
    laptop.run("tpd-echo resolve dns-version.cluster.local txt").ok().says(&["1.1.0"]);
    laptop.run(&format!("getent hosts {}", web[0])).ok().says(&["web.shop.svc.cluster.local"]);
    laptop.run(&format!("tpd-echo resolve {} ptr", web[1])).ok().says(&["web.shop.svc.cluster.local"]);
}

#[test]
fn an_external_name_leads_outside() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let example: [IpAddr; 2] = ["192.0.2.10".parse().unwrap(), "2001:db8:99::10".parse().unwrap()];
    resolves(&laptop, "partner", &example);
    resolves(&laptop, "partner.shop.svc.cluster.local", &example);
}

#[test]
fn what_does_not_exist_is_said_not_to_at_once() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    for name in ["nosuch.shop.svc.cluster.local", "nosuch.shop", "web.nosuch", "nosuch", "nosuch.example.com"]
    {
        is_nowhere(&laptop, name);
    }
}

#[test]
fn a_missing_family_is_no_error_and_no_delay() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let web = laptop.cluster.service("shop/web-v4");
    assert_eq!(web.len(), 1, "the sample has one family");
    resolves(&laptop, "web-v4", &web);
    resolves(&laptop, "web-v4.shop.svc.cluster.local", &web);
    laptop.run("getent ahosts web-v4.shop").ok().within(SOON);
    laptop
        .run("dig web-v4.shop.svc.cluster.local AAAA")
        .ok()
        .says(&["status: NOERROR", "ANSWER: 0"])
        .within(SOON);
    laptop.run("curl -sS --max-time 2 http://web-v4.shop").ok().says(&["Hello from web-"]);
}

#[test]
fn large_answers_come_whole() {
    let laptop = Laptop::take();
    let _big = BigService::create(laptop.cluster);
    let _connection = laptop.up("--namespace shop");
    until(Duration::from_secs(20), "the big Service is in the cluster's DNS", || {
        let run = laptop.run("dig +short +tcp big.shop.svc.cluster.local | wc -l");
        if run.out() == "200" { Ok(()) } else { Err(run) }
    });
    for name in ["big.shop.svc.cluster.local", "many.example.com"] {
        let count = if name.starts_with("big") { "200" } else { "100" };
        for how in ["", "+tcp", "+bufsize=512", "+noedns"] {
            let run = laptop.run(&format!("dig +short {how} {name} | grep -c '^[0-9]'"));
            assert_eq!(run.out(), count, "dig {how} {name}:\n{run}");
        }
        laptop.run(&format!("dig +ignore +noedns {name}")).ok().says(&[" tc "]);
        let glibc = laptop.run(&format!("getent ahostsv4 {name} | awk '{{ print $1 }}' | sort -u | wc -l"));
        assert_eq!(glibc.out(), count, "the C library on {name}");
        let go = laptop.run(&format!("tpd-echo resolve {name} a | sort -u | wc -l"));
        assert_eq!(go.out(), count, "Go on {name}");
    }
    let text = laptop.run("dig +short large.example.com TXT");
    assert_eq!(text.ok().out().matches('"').count(), 24, "twelve strings:\n{text}");
}

/// A headless Service of two hundred addresses.
struct BigService(&'static Cluster);

impl BigService {
    fn create(cluster: &'static Cluster) -> Self {
        let guard = Self(cluster);
        let meta = |name: &str| json!({ "name": name, "namespace": "shop", "labels": { "kubernetes.io/service-name": "big" } });
        let endpoints: Vec<_> = (1..=100)
            .map(|n| json!({ "addresses": [format!("192.0.2.{n}")], "conditions": { "ready": true } }))
            .collect();
        let slice = |name: &str, endpoints: &[serde_json::Value]| {
            json!({ "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": meta(name),
                "addressType": "IPv4", "ports": [{ "port": 80 }], "endpoints": endpoints })
        };
        let more: Vec<_> = (101..=200)
            .map(|n| json!({ "addresses": [format!("192.0.2.{n}")], "conditions": { "ready": true } }))
            .collect();
        cluster.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": [
            { "apiVersion": "v1", "kind": "Service", "metadata": meta("big"),
                "spec": { "clusterIP": "None", "ports": [{ "port": 80 }] } },
            slice("big-a", &endpoints), slice("big-b", &more),
        ] }));
        guard
    }
}

impl Drop for BigService {
    fn drop(&mut self) {
        let _ = self
            .0
            .kubectl("-n shop delete service/big endpointslice/big-a endpointslice/big-b --ignore-not-found");
    }
}

#[test]
fn everything_else_is_left_to_the_resolver_that_was_there() {
    let laptop = Laptop::take();
    let questions = [
        "www.example.com A",
        "example.com MX",
        "example.com TXT",
        "v6only.example.com AAAA",
        "intranet.corp.example A",
        "wiki.corp.example A",
        "web.corp.example A",
        "_sip._tcp.corp.example SRV",
        "nosuch.corp.example A",
    ];
    let ask = |question: &str| {
        let run = laptop.run(&format!("dig {question} | grep -v -e '^;; .*\\(time\\|WHEN\\|SERVER\\|MSG\\|flags\\|HEADER\\)' -e COOKIE -e '^; <<>>' -e EDNS | sed 's/\\t[0-9]*\\tIN/ IN/' | sort"));
        run.ok().stdout.clone()
    };
    let before: Vec<_> = questions.iter().map(|question| ask(question)).collect();
    let _connection = laptop.up("--namespace shop");
    for (question, before) in questions.iter().zip(before) {
        assert_eq!(ask(question), before, "the answer to {question} became another one");
    }
    resolves(&laptop, "web.corp.example", &["192.0.2.81".parse().unwrap()]);
}

#[test]
fn a_dead_resolver_on_the_laptops_side_stops_no_cluster_name() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let web = laptop.cluster.service("shop/web");
    {
        let _dead = Block::upstream_dns(laptop.cluster);
        let outside = laptop.start("getent ahosts www.example.com");
        for _ in 0..5 {
            laptop.run("getent ahosts web.shop.svc.cluster.local").ok().within(SOON);
            laptop.run("getent ahosts web").ok().within(SOON);
        }
        resolves(&laptop, "web.shop", &web);
        outside.finish().ends_with(2).within(Duration::from_secs(25));
    }
    until(Duration::from_secs(5), "ordinary names resolve again", || {
        let run = laptop.run("getent ahosts v4only.example.com");
        if run.code == Some(0) { Ok(()) } else { Err(run) }
    });
}
