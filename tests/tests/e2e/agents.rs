//! Who may be an agent, and what one may reach: a hand-made one keeps no rule.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use tpd_api::agent::{
    AGENT_PATH, AGENT_UPGRADE, AUDIENCE, Config, Entry, Hello, SERVER_NAME, ToAgent, ToManager,
};
use tpd_api::inject::INJECT;
use tpd_api::{STREAM_PORT, overlay};
use tpd_netstack::control::{self, Message};
use tpd_netstack::key::{PrivateKey, PublicKey};
use tpd_netstack::packet::{IpHeader, header, protocol, segment};
use tpd_netstack::tunnel::{Opened, Responder, Tunnel};
use tpd_tests::{Agent, Cluster, Laptop, Running, Workload, inside, until};

use crate::store::{ALL, connected, intercepted, web};

/// Large enough for every datagram here.
const BUFFER: usize = 2048;

/// The status with which a manager answers who asks to be taken for an agent.
fn answer(laptop: &Laptop, token: &str) -> String {
    let manager = address_of(laptop.cluster, "tpd-manager-0");
    // An agent that is welcome is answered with 101, and then curl waits.
    let run = laptop.cluster.node(&format!(
        "curl -sk --http1.1 --max-time 2 -o /dev/null -w '%{{http_code}}' -H 'Connection: upgrade' \
         -H 'Upgrade: {AGENT_UPGRADE}' -H 'Authorization: Bearer {token}' https://{manager}:{STREAM_PORT}{AGENT_PATH}"
    ));
    run.out().to_owned()
}

/// First address of a manager.
fn address_of(cluster: &Cluster, manager: &str) -> IpAddr {
    let pod = cluster.object(&format!("pod {manager} -n tpd-system"));
    pod["status"]["podIP"].as_str().and_then(|ip| ip.parse().ok()).expect("a running manager has an address")
}

/// A token of the ServiceAccount that pods in `store` have by default.
fn token(cluster: &Cluster, arguments: &str) -> String {
    let run = cluster.kubectl(&format!("-n store create token default {arguments}"));
    run.ok().out().to_owned()
}

/// The token that the kubelet would give to an agent in this pod.
fn token_of(cluster: &Cluster, pod: &str) -> String {
    token(cluster, &format!("--audience {AUDIENCE} --bound-object-kind Pod --bound-object-name {pod}"))
}

/// The same claims but for a change, signed with another key (JWT, RFC 7519, with ES256).
fn forged(cluster: &Cluster, token: &str, key: &str, change: impl FnOnce(&mut Value)) -> String {
    let (header, rest) = token.split_once('.').expect("a token has three parts");
    let (claims, _) = rest.split_once('.').expect("a token has three parts");
    let mut claims: Value =
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).expect("base64")).expect("claims are JSON");
    change(&mut claims);
    let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()));
    let run = cluster
        .machine(&format!("printf %s {signed} | openssl dgst -sha256 -sign {key} -binary | base64 -w0"))
        .run();
    let der = STANDARD.decode(run.ok().out()).expect("base64");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature(&der)))
}

/// The two numbers of an ECDSA signature over P-256, side by side (RFC 7518, 3.4), from their ASN.1.
fn signature(der: &[u8]) -> Vec<u8> {
    let (mut both, mut rest) = (Vec::new(), &der[2..]);
    for _ in 0..2 {
        let length = usize::from(rest[1]);
        let number: Vec<u8> = rest[2..2 + length].iter().copied().skip_while(|byte| *byte == 0).collect();
        both.extend(vec![0; 32 - number.len()]);
        both.extend(number);
        rest = &rest[2 + length..];
    }
    both
}

#[test]
fn who_has_no_pods_token_is_no_agent() {
    let laptop = Laptop::take();
    let cluster = laptop.cluster;
    let web = web(&laptop, 1);
    let pod = web.ready().pop().expect("one pod");
    let own = token_of(cluster, &pod);
    assert_eq!(answer(&laptop, &own), "101", "a pod's token is not accepted: the rest proves nothing");
    let key = cluster.service_account_key();
    let same = forged(cluster, &own, &key, |_| {});
    assert_eq!(answer(&laptop, &same), "101", "the tests cannot sign: the rest proves nothing");

    let other = std::env::temp_dir().join(format!("tpd-test-{}.key", std::process::id()));
    let make =
        format!("openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {}", other.display());
    cluster.machine(&make).run().ok();
    let gone = Workload::deploy(cluster, "gone", 1, &json!({}));
    let of_gone = token_of(cluster, &gone.until_ready(1)[0]);
    drop(gone);
    let bound = format!("--bound-object-kind Pod --bound-object-name {pod}");
    let (claims, signature) = own.rsplit_once('.').expect("a token has three parts");
    let strangers = [
        ("nothing", String::new()),
        ("no token", "garbage".to_owned()),
        ("an unsigned one", format!("{claims}.")),
        ("a signature of other claims", {
            let (header, _) = claims.split_once('.').expect("a token has three parts");
            let others =
                URL_SAFE_NO_PAD.encode(json!({ "sub": "system:serviceaccount:store:default" }).to_string());
            format!("{header}.{others}.{signature}")
        }),
        ("another cluster's", forged(cluster, &own, &other.display().to_string(), |_| {})),
        (
            "an expired one",
            forged(cluster, &own, &key, |claims| {
                for time in ["exp", "iat", "nbf"] {
                    claims[time] = json!(claims[time].as_i64().expect("seconds") - 7200);
                }
            }),
        ),
        (
            "one of a pod that never was",
            forged(cluster, &own, &key, |claims| {
                claims["kubernetes.io"]["pod"]["uid"] = json!("11111111-2222-3333-4444-555555555555");
            }),
        ),
        ("one for the API server", token(cluster, &bound)),
        ("one of no pod", token(cluster, &format!("--audience {AUDIENCE}"))),
    ];
    for (what, token) in strangers {
        assert_eq!(answer(&laptop, &token), "401", "{what} is taken for an agent's token");
    }
    let _ = fs::remove_file(other);
    until(Duration::from_secs(20), "a pod that is gone has no agent", || {
        let status = answer(&laptop, &of_gone);
        if status == "401" { Ok(()) } else { Err(status) }
    });
}

/// An agent by hand: the pod's own token, and packets as one likes.
struct Impostor {
    config: Config,
    tunnel: Tunnel,
    socket: UdpSocket,
    _control: Running,
}

impl Impostor {
    /// Takes the part of the agent of a pod, with one of the managers.
    fn of(cluster: &'static Cluster, pod: &str, manager: &str) -> Self {
        let key = PrivateKey::generate().expect("the kernel has random numbers");
        let hello = ToManager::Hello(Box::new(Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            public_key: key.public().to_string(),
            entry: Entry::Redirect,
        }));
        let request = format!(
            "GET {AGENT_PATH} HTTP/1.1\r\nHost: {SERVER_NAME}\r\nConnection: upgrade\r\nUpgrade: {AGENT_UPGRADE}\r\n\
             Authorization: Bearer {}\r\n\r\n{}\n",
            token_of(cluster, pod),
            json!(hello)
        );
        let connect = format!(
            "openssl s_client -quiet -servername {SERVER_NAME} -connect {}",
            SocketAddr::new(address_of(cluster, manager), STREAM_PORT)
        );
        // What the manager says it says again to who comes with the same key; this time only to be read.
        let heard = cluster.node_script(&format!("timeout 2 {connect}; true")).input(&request).run();
        let config = heard.out().lines().find_map(|line| match serde_json::from_str(line).ok()? {
            ToAgent::Config(config) => Some(*config),
            _ => None,
        });
        let config =
            config.unwrap_or_else(|| panic!("a manager gives a pod's agent no configuration:\n{heard}"));
        let control = cluster.node_script(&format!("exec {connect}")).input(&request);
        let control = control.limit(Duration::from_secs(300)).start();
        let public: PublicKey = config.manager.key.parse().expect("a WireGuard key");
        let udp = config.manager.udp;
        let socket = inside(&cluster.netns("node"), || {
            let any: IpAddr = if udp.is_ipv4() { [0; 4].into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(udp)?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            std::io::Result::Ok(socket)
        });
        let tunnel = Responder::new(&key).tunnel(public, 1);
        let socket = socket.expect("a UDP socket");
        let mut impostor = Self { config, tunnel, socket, _control: control };
        until(Duration::from_secs(10), "a manager shakes hands with the agent", || impostor.handshake());
        impostor
    }

    fn handshake(&mut self) -> Result<(), String> {
        let mut buffer = [0; BUFFER];
        let length = self.tunnel.initiate(&mut buffer).expect("a handshake can always be begun");
        self.socket.send(&buffer[..length]).map_err(|error| error.to_string())?;
        let _ = self.receive();
        self.tunnel.handshake_age().map(drop).ok_or_else(|| "no answer".to_owned())
    }

    fn send(&mut self, packet: &[u8]) {
        let mut buffer = [0; BUFFER];
        let length = self.tunnel.seal(packet, &mut buffer).expect("hands were shaken");
        self.socket.send(&buffer[..length]).expect("UDP goes out");
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let (mut datagram, mut packet) = ([0; BUFFER], [0; BUFFER]);
        loop {
            let length = match self.socket.recv(&mut datagram) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) => panic!("UDP from the manager: {error}"),
            };
            match self.tunnel.open(self.config.manager.udp.ip(), &datagram[..length], &mut packet) {
                Ok(Opened::Packet(length)) => return Some(packet[..length].to_vec()),
                Ok(Opened::Reply(length)) => drop(self.socket.send(&packet[..length])),
                Ok(Opened::Nothing) | Err(_) => {}
            }
        }
    }

    /// Whether the manager answers through the tunnel.
    fn is_heard(&mut self) -> bool {
        let source = SocketAddr::new(self.config.address.into(), overlay::CONTROL_PORT);
        let gateway = SocketAddr::new(self.config.manager.gateway.into(), overlay::CONTROL_PORT);
        let ping = Message::Ping { sequence: 7, select: false, hello: control::Hello::default() };
        self.send(&control::encode(source, gateway, &ping, 0));
        std::iter::from_fn(|| self.receive()).any(|packet| {
            control::decode(&packet, overlay::CONTROL_PORT)
                .is_some_and(|received| matches!(received.message, Message::Pong { sequence: 7, .. }))
        })
    }

    /// Whether something at this address answers a SYN (RFC 9293) from `source` with a SYN of its own.
    fn connects(&mut self, source: Ipv6Addr, target: SocketAddr) -> bool {
        let mut packet = vec![0; 40 + 20];
        header::write(&mut packet, source.into(), target.ip(), protocol::TCP, 20);
        packet[40..42].copy_from_slice(&40_000_u16.to_be_bytes());
        packet[42..44].copy_from_slice(&target.port().to_be_bytes());
        packet[44..48].copy_from_slice(&1_u32.to_be_bytes());
        packet[52..56].copy_from_slice(&[5 << 4, 0x02, 0xff, 0xff]);
        segment::finish(&mut packet);
        (0..3).any(|_| {
            self.send(&packet);
            std::iter::from_fn(|| self.receive()).any(|packet| {
                IpHeader::parse(&packet).is_some_and(|header| {
                    header.protocol == protocol::TCP && packet[header.payload + 13] & 0x12 == 0x12
                })
            })
        })
    }
}

#[test]
fn an_agent_reaches_a_laptop_only_through_an_intercept_of_its_pod() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let name = intercept.now().request.name.expect("it has one");
    let object = laptop.cluster.object(&format!("intercept {name} -n store"));
    let port = object["spec"]["ports"][0]["overlayPort"].as_u64().and_then(|port| u16::try_from(port).ok());
    let victim = laptop.status().address.expect("a connected laptop has addresses").ipv6;
    let target = SocketAddr::new(victim.into(), port.expect("a port"));

    let manager = laptop.manager();
    let changes = json!({ "metadata": { "labels": { INJECT: "disabled" } } });
    let bystander = Workload::deploy(laptop.cluster, "bystander", 1, &changes);
    let mut impostor = Impostor::of(laptop.cluster, &bystander.until_ready(1)[0], &manager);
    assert!(impostor.is_heard(), "a hand-made agent's tunnel does not work: the rest proves nothing");
    let own = impostor.config.address;
    assert!(!impostor.connects(own, target), "an agent reaches a laptop that does not intercept its pod");
    for port in [22, 9090] {
        let target = SocketAddr::new(victim.into(), port);
        assert!(!impostor.connects(own, target), "an agent reaches a laptop's port {port}");
    }
    let other = intercept.status().pods[0].address.expect("a connected agent has an address");
    assert!(!impostor.connects(other, target), "an agent speaks with the address of another");
    drop(impostor);

    // In the place of the pod's own agent it does: that is what makes the above mean something.
    let pod = web.ready().pop().expect("one pod");
    let agent = Agent::of(laptop.cluster, "store", &pod).expect("a supervisor and a worker");
    agent.signal(laptop.cluster, "STOP");
    let mut impostor = Impostor::of(laptop.cluster, &pod, &manager);
    let reached = (0..20).any(|_| impostor.connects(other, target));
    agent.signal(laptop.cluster, "CONT");
    assert!(reached, "the agent of an intercepted pod does not reach the laptop");
}
