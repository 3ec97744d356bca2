//! What nobody may do, though the network would let them try.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::json;
use tpd_api::local::PathKind;
use tpd_tests::{Held, Laptop, Outcome, Run, attempt, inside, pause, until};

use crate::peer::{Peer, echo_request, session};
use crate::samples::echo;

/// A WireGuard key of nobody.
const KEY: &str = "c29tZWJvZHkgZWxzZSdzIGtleSwgMzIgYnl0ZXMuLi4=";

/// Runs kubectl on the laptop as one of the developers.
fn kubectl(laptop: &Laptop, who: &str, arguments: &str, input: &str) -> Run {
    let script = format!("kubectl --kubeconfig {} -n tpd-system {arguments}", laptop.cluster.kubeconfig(who));
    laptop.script(&script).input(input).run()
}

#[test]
fn a_session_belongs_to_its_owner() {
    let laptop = Laptop::take();
    let _connection = laptop.up("");
    let name = laptop.session();

    let foreign = session("foreign", "dev", KEY).to_string();
    kubectl(&laptop, "developer2", "create -f -", &foreign).ends_with(1).says(&["spec.owner", "dev2"]);
    let takeover = json!({ "spec": { "publicKeys": [KEY] } });
    let patch = format!("patch clientsession {name} --type=merge -p '{takeover}'");
    kubectl(&laptop, "developer2", &patch, "").ends_with(1).says(&["belongs to", "dev2"]);
    let delete = format!("delete clientsession {name}");
    kubectl(&laptop, "developer2", &delete, "").ends_with(1).says(&["belongs to"]);
    let give = json!({ "spec": { "owner": "dev2" } });
    let patch = format!("patch clientsession {name} --type=merge -p '{give}'");
    kubectl(&laptop, "developer", &patch, "").ends_with(1).says(&["never changes"]);
    let forge = json!({ "status": { "managerKey": KEY } });
    let patch = format!("patch clientsession {name} --subresource=status --type=merge -p '{forge}'");
    kubectl(&laptop, "developer2", &patch, "").ends_with(1).says(&["forbidden"]);

    laptop.run("curl -sS --max-time 2 http://web.shop").ok();
}

#[test]
fn a_session_whose_key_is_no_key_is_not_accepted() {
    let laptop = Laptop::take();
    for key in ["", "short", "not base64 !!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!="] {
        kubectl(&laptop, "developer2", "create -f -", &session("bad", "dev2", key).to_string()).ends_with(1);
    }
    // Somebody else's public key is known to all who may read it: claiming it must not take their traffic.
    let _connection = laptop.up("--namespace shop");
    let name = laptop.session();
    let victim = laptop.cluster.object(&format!("clientsession {name} -n tpd-system"));
    let key = victim["spec"]["publicKeys"][0].as_str().expect("a key");
    kubectl(&laptop, "developer2", "create -f -", &session("thief", "dev2", key).to_string()).ok();
    pause(Duration::from_secs(2));
    laptop.run("curl -sS --max-time 2 http://web").ok();
    let thief = laptop.cluster.object("clientsession thief -n tpd-system");
    kubectl(&laptop, "developer2", "delete clientsession thief", "").ok();
    assert_ne!(thief["status"]["phase"], "Ready", "two sessions share a key: {thief}");
    laptop.run("curl -sS --max-time 2 http://web").ok();
}

#[test]
fn a_developer_may_do_nothing_else() {
    let laptop = Laptop::take();
    let may_not = [
        "list clientsessions.tpd.dev",
        "update clientsessions.tpd.dev",
        "deletecollection clientsessions.tpd.dev",
        "patch clientsessions.tpd.dev --subresource=status",
        "administer clientsessions.tpd.dev",
        "get secrets",
        "list pods",
        "get pods",
        "create pods",
        "create pods --subresource=exec",
        "get pods --subresource=proxy",
        "get pods/tpd-manager-0:8080 --subresource=proxy",
        "get services --subresource=proxy",
        "get pods --subresource=portforward",
    ];
    for what in may_not {
        let run = kubectl(&laptop, "developer", &format!("auth can-i {what}"), "");
        assert!(run.out().ends_with("no"), "a developer may {what}:\n{run}");
    }
    for what in ["pods", "secrets", "namespaces", "nodes"] {
        let script = format!("kubectl auth can-i list {what} --all-namespaces");
        let run = laptop.run(&script);
        assert!(run.out().ends_with("no"), "a developer may list {what} everywhere:\n{run}");
    }
}

#[test]
fn the_managers_pods_are_as_restricted_as_can_be() {
    let laptop = Laptop::take();
    let namespace = laptop.cluster.object("namespace tpd-system");
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "restricted");
    let pods = laptop.cluster.object("pods -n tpd-system -l app.kubernetes.io/name=tpd-manager");
    for pod in pods["items"].as_array().expect("a list has items") {
        let spec = &pod["spec"];
        assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
        for container in spec["containers"].as_array().expect("a pod has containers") {
            let context = &container["securityContext"];
            assert_eq!(context["readOnlyRootFilesystem"], true);
            assert_eq!(context["allowPrivilegeEscalation"], false);
            assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }));
        }
        assert!(spec["hostNetwork"].is_null() && spec["volumes"].to_string().find("hostPath").is_none());
        assert!(
            pod["status"]["containerStatuses"][0]["restartCount"].as_u64() == Some(0),
            "a manager has restarted: {}",
            pod["status"]["containerStatuses"]
        );
    }
    // The kernel agrees.
    let run = laptop
        .cluster
        .node("for p in $(pgrep tpd-manager); do grep -E '^(Uid|CapEff|CapBnd)' /proc/$p/status; done");
    for line in run.ok().out().lines() {
        let value = line.split_whitespace().nth(1);
        assert!(matches!(value, Some("65532" | "0000000000000000")), "{line}");
    }
}

#[test]
fn the_managers_say_how_they_are() {
    let laptop = Laptop::take();
    let _connection = laptop.up("");
    for pod in laptop.cluster.pods("tpd-system", "app.kubernetes.io/name=tpd-manager") {
        let get = |path: &str| {
            laptop.cluster.node(&format!("curl -sS --fail --max-time 3 http://{}:8080{path}", pod[0]))
        };
        get("/livez").ok();
        get("/readyz").ok();
        get("/metrics").ok().says(&["# EOF", "tpd_manager_sessions", "tpd_overlay_"]);
    }
}

#[test]
fn the_manager_dials_only_what_is_published() {
    let laptop = Laptop::take();
    let _connection = laptop.up_over(PathKind::Proxy);
    let manager = laptop.manager();
    let own = laptop.cluster.object(&format!("pod {manager} -n tpd-system"))["status"]["podIP"].clone();
    let own = own.as_str().expect("a running pod has an address");
    let forced =
        ["169.254.169.254", "192.0.2.53", "127.1.2.3", "2001:db8:2::2", "fd00:ec2::254", "100.127.200.1"];
    for address in forced {
        // Whoever has root on the laptop can send anything into the tunnel.
        laptop.run(&format!("ip route replace {address} dev tpd0; ip rule; true")).ok();
    }
    let targets = [
        "169.254.169.254:80",
        "192.0.2.53:53",
        "[2001:db8:2::2]:6443",
        "[2001:db8:2::2]:10250",
        "[fd00:ec2::254]:80",
        "100.127.200.1:22",
        "100.127.0.1:8443",
        "100.127.0.1:8080",
        "[fd74:7064::1]:8080",
        &format!("{own}:8080"),
        &format!("{own}:8443"),
    ];
    for target in targets {
        let address: SocketAddr = target.parse().expect("an address");
        let (outcome, took) = laptop.inside(|| attempt(address, Duration::from_secs(2)));
        assert!(
            matches!(outcome, Outcome::Unreachable | Outcome::Timeout),
            "{target} through the tunnel is {outcome:?} after {took:?}"
        );
    }
    for address in forced {
        let _ = laptop.run(&format!("ip route del {address} dev tpd0"));
    }
}

#[test]
fn a_peer_sends_only_from_its_own_address() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let victim = laptop.status().address.expect("a connected laptop has addresses").ipv4;
    let mut peer = Peer::connect(&laptop, "by-hand");
    let (own, gateway) = (peer.address, peer.gateway);
    assert_ne!(own, victim);
    assert!(peer.ping(own, gateway), "a ping from the peer's own address is not answered");

    let pod = laptop.cluster.pods("shop", "app=echo")[0][0];
    let pod: Ipv4Addr = pod.to_string().parse().expect("pods have IPv4 first");
    let before = laptop.status().traffic.received_packets;
    for source in [victim, gateway, pod, Ipv4Addr::LOCALHOST, Ipv4Addr::new(198, 51, 100, 2)] {
        for destination in [gateway, pod, victim] {
            assert!(!peer.ping(source, destination), "a ping from {source} to {destination} is answered");
        }
    }
    assert!(!peer.ping(own, victim), "one session reaches another");
    let heard = laptop.status().traffic.received_packets - before;
    // Heartbeats go on all the while; forty-five forged pings would show.
    println!("the other laptop heard {heard} packets meanwhile");
    assert!(peer.ping(own, gateway), "after forged packets the peer's own are not answered");
    laptop.run("curl -sS --max-time 2 http://web").ok();
}

#[test]
fn what_was_sent_once_counts_once() {
    let laptop = Laptop::take();
    let mut peer = Peer::connect(&laptop, "by-hand");
    let (own, gateway) = (peer.address, peer.gateway);
    let sealed = peer.seal(&echo_request(own, gateway));
    let initiation = peer.initiation();
    let manager = peer.manager;
    let thief = laptop.inside(|| UdpSocket::bind("0.0.0.0:0")).expect("a UDP socket");
    thief.set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
    thief.send_to(&sealed, manager).expect("UDP goes out");
    assert!(
        thief.recv(&mut [0; 2048]).is_ok(),
        "the first to send a valid datagram is answered, wherever it is"
    );
    assert!(peer.ping(own, gateway), "the peer roams back with its next datagram");
    for _ in 0..100 {
        thief.send_to(&sealed, manager).expect("UDP goes out");
    }
    assert!(thief.recv(&mut [0; 2048]).is_err(), "a datagram that was seen before is answered");
    for _ in 0..5 {
        thief.send_to(&initiation, manager).expect("UDP goes out");
    }
    let answers = std::iter::from_fn(|| thief.recv(&mut [0; 2048]).ok()).count();
    assert!(answers <= 1, "a handshake that was seen before is answered {answers} times");
    assert!(peer.ping(own, gateway), "replays took the peer's traffic away");
}

#[test]
fn garbage_at_the_udp_port_disturbs_nobody() {
    let laptop = Laptop::take();
    let _connection = laptop.up_over(PathKind::Udp);
    let held = Held::start(&laptop, echo(&laptop, 7));
    let session = laptop.cluster.object("clientsessions -n tpd-system");
    let ports: Vec<SocketAddr> = session["items"][0]["status"]["endpoints"]
        .as_array()
        .expect("endpoints")
        .iter()
        .filter_map(|endpoint| endpoint["udp"][0].as_str()?.parse().ok())
        .collect();
    assert!(!ports.is_empty(), "{session}");
    laptop.inside(|| {
        let socket = UdpSocket::bind("[::]:0").expect("a UDP socket");
        let v4 = UdpSocket::bind("0.0.0.0:0").expect("a UDP socket");
        let mut random = fs::File::open("/dev/urandom").expect("it is always there");
        let mut bytes = [0; 1500];
        let began = Instant::now();
        let mut sent = 0_u64;
        while began.elapsed() < Duration::from_secs(4) {
            random.read_exact(&mut bytes).expect("it never ends");
            for (kind, size) in [
                (0, 0),
                (1, 148),
                (2, 92),
                (3, 64),
                (4, 32),
                (4, 1452),
                (1, 147),
                (255, 1500),
                (4, 16),
                (1, 4),
            ] {
                bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
                for port in &ports {
                    let socket = if port.is_ipv4() { &v4 } else { &socket };
                    sent += u64::from(socket.send_to(&bytes[..size], port).is_ok());
                }
            }
        }
        println!("{sent} datagrams of garbage");
    });
    let gap = held.longest_gap();
    assert!(gap < Duration::from_secs(1), "under garbage an echo takes {gap:?}");
    laptop.run("tpd down && tpd up --namespace shop --path udp && curl -sS --max-time 2 http://web").ok();
    no_restarts(&laptop);
}

#[test]
fn garbage_at_the_stream_port_disturbs_nobody() {
    let laptop = Laptop::take();
    let _connection = laptop.up_over(PathKind::Proxy);
    let held = Held::start(&laptop, echo(&laptop, 7));
    let pods = laptop.cluster.pods("tpd-system", "app.kubernetes.io/name=tpd-manager");
    let upgrade = "GET /v1/stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tpd\r\n\r\n";
    let openings: [Vec<u8>; 9] = [
        Vec::new(),
        b"\0\xff\0\xff\r\n\r\n".to_vec(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"GET /v1/stream HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"POST /v1/stream HTTP/1.1\r\nContent-Length: 1000000000000\r\n\r\nx".to_vec(),
        vec![b'x'; 200_000],
        // Frames that are too long, empty, and random.
        [upgrade.as_bytes(), &u32::MAX.to_be_bytes(), &[7; 4096]].concat(),
        [upgrade.as_bytes(), &[0; 4096]].concat(),
        [upgrade.as_bytes(), &148_u32.to_be_bytes(), &[1; 148]].concat(),
    ];
    let node = laptop.cluster.netns("node");
    for pod in pods.concat() {
        inside(&node, || {
            for opening in &openings {
                let mut stream = TcpStream::connect_timeout(&(pod, 8443).into(), Duration::from_secs(2))
                    .expect("the stream port");
                stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a time-out");
                // It may well be closed before all is written.
                let _ = stream.write_all(opening);
                let _ = stream.read(&mut [0; 4096]);
            }
            // Slow loris: as many as may be, each with half a request.
            let slow: Vec<_> = (0..400)
                .filter_map(|_| {
                    let mut stream =
                        TcpStream::connect_timeout(&(pod, 8443).into(), Duration::from_secs(2)).ok()?;
                    stream.write_all(b"GET /v1/stream HTTP/1.1\r\nHost: x\r\nX-Slow: ").ok()?;
                    Some(stream)
                })
                .collect();
            assert!(!slow.is_empty(), "the stream port takes no connection");
            pause(Duration::from_secs(1));
        });
    }
    let gap = held.longest_gap();
    assert!(gap < Duration::from_secs(1), "under garbage an echo takes {gap:?}");
    let (_, took) = until(Duration::from_secs(15), "a laptop connects after all that", || {
        let run = laptop
            .run("tpd down && tpd up --namespace shop --path proxy && curl -sS --max-time 2 http://web");
        if run.code == Some(0) { Ok(()) } else { Err(run) }
    });
    println!("connected again after {took:?}");
    no_restarts(&laptop);
}

#[track_caller]
fn no_restarts(laptop: &Laptop) {
    let pods = laptop.cluster.object("pods -n tpd-system -l app.kubernetes.io/name=tpd-manager");
    for pod in pods["items"].as_array().expect("a list has items") {
        let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
        assert_eq!(*restarts, 0, "a manager has restarted: {}", pod["status"]["containerStatuses"]);
    }
}
