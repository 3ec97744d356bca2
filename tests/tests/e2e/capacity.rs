//! More connections than an agent has memory for: none of them may cost another its own.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::json;
use tpd_api::inject::{ENABLED, INJECT};
use tpd_tests::{Laptop, Workload, inside, is_laptop, is_pod, until};

use crate::store::{ALL, answered_by, connected, intercepted, pod_address};

/// An agent of 64 MiB has room for 3,072 connections on which nothing waits, and passes new ones by from half of that on.
const ROOM: usize = 3_072;

/// How many more may come in before it is noticed.
const SLACK: usize = 100;

/// For an answer of an agent that has room, be it one with a tenth of a processor.
const PATIENCE: Duration = Duration::from_secs(3);

/// Connections from the node that stay open.
struct Crowd {
    streams: Vec<TcpStream>,
}

impl Crowd {
    /// So many, one after another, each of which has been answered once by those; or as many as were, and the one that was not.
    fn gather(
        laptop: &Laptop,
        server: SocketAddr,
        most: usize,
        who: fn(&str) -> bool,
    ) -> (Self, Option<TcpStream>) {
        inside(&laptop.cluster.netns("node"), || {
            let mut streams = Vec::with_capacity(most);
            while streams.len() < most {
                let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                match ask(&stream) {
                    Ok(name) if who(&name) => streams.push(stream),
                    Ok(name) => panic!("{name} answers on connection {}", streams.len()),
                    Err(_) => return Ok((Self { streams }, Some(stream))),
                }
            }
            io::Result::Ok((Self { streams }, None))
        })
        .expect("connections")
    }

    /// Asks again on each.
    #[track_caller]
    fn all_answered(&self, who: impl Fn(&str) -> bool) {
        for (number, stream) in self.streams.iter().enumerate() {
            let name = ask(stream).unwrap_or_else(|error| panic!("connection {number}: {error}"));
            assert!(who(&name), "{name} answers on connection {number}");
        }
    }
}

/// Who answers a request on a connection.
fn ask(mut stream: &TcpStream) -> io::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: capacity\r\n\r\n")?;
    answer(stream)
}

fn answer(mut stream: &TcpStream) -> io::Result<String> {
    let (mut read, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read.extend(&buffer[..count]);
        let text = String::from_utf8_lossy(&read);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let length: usize = field("Content-Length").and_then(|length| length.parse().ok()).expect("a length");
        if body.len() == length {
            return Ok(field("X-Served-By").expect("a name").to_owned());
        }
    }
}

#[test]
fn a_crowd_beyond_an_agents_memory_goes_to_the_app_and_nobody_loses_a_connection() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = Workload::deploy(laptop.cluster, "crowded", 1, &json!({}));
    web.until_ready(1);
    let (_local, _intercept) = intercepted(&laptop, &web, ALL);
    let (pod, restarts) = (web.ready().remove(0), web.restarts());
    let server = SocketAddr::new(pod_address(&web, &pod), 8080);
    let (crowd, late) = Crowd::gather(&laptop, server, ROOM / 2 + SLACK, is_laptop);
    assert!(late.is_none(), "of {} connections one was not answered", crowd.streams.len() + 1);
    until(Duration::from_secs(4), "new connections are passed by", || {
        match answered_by(&laptop, &format!("http://{server}"), "") {
            name if is_pod(&name) => Ok(()),
            name => Err(name),
        }
    });
    let (passed, late) = Crowd::gather(&laptop, server, ROOM, is_pod);
    assert!(late.is_none(), "of {} connections one was not answered", passed.streams.len() + 1);
    crowd.all_answered(is_laptop);
    passed.all_answered(is_pod);
    drop(crowd);
    until(
        Duration::from_secs(4),
        "the laptop gets new connections when there is room",
        || match answered_by(&laptop, &format!("http://{server}"), "") {
            name if is_laptop(&name) => Ok(()),
            name => Err(name),
        },
    );
    passed.all_answered(is_pod);
    assert_eq!((web.ready(), web.restarts()), (vec![pod], restarts));
}

/// There nothing can be passed by: all connections go through the agent, whether or not anybody intercepts them.
#[test]
fn where_an_agent_stands_in_for_a_port_connections_beyond_its_memory_wait() {
    let laptop = Laptop::take();
    let shop = Workload::deploy_in(
        laptop.cluster,
        "locked",
        "narrow",
        0,
        &json!({
            "metadata": { "labels": { INJECT: ENABLED } },
            "spec": {
                "securityContext": { "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } },
                "containers": [{
                    "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                    // Guaranteed, so that the agent has no more memory than it pays for.
                    "resources": {
                        "requests": { "cpu": "300m", "memory": "256Mi" },
                        "limits": { "cpu": "300m", "memory": "256Mi" },
                    },
                }],
            },
        }),
    );
    // The Service is there before the pod.
    shop.scale(1);
    shop.until_ready(1);
    assert_eq!(shop.injected().len(), 1, "{}", shop.pods()[0]["metadata"]["annotations"]);
    let server = SocketAddr::new(shop.address(), 80);
    let (mut crowd, late) = Crowd::gather(&laptop, server, ROOM + SLACK, is_pod);
    let late = late.expect("a connection that waits");
    let fit = crowd.streams.len();
    assert!((ROOM * 9 / 10..=ROOM).contains(&fit), "{fit} connections");
    crowd.all_answered(is_pod);
    crowd.streams.truncate(ROOM / 2);
    assert!(is_pod(&answer(&late).expect("an answer when there is room")));
    crowd.all_answered(is_pod);
    assert_eq!(shop.restarts(), 0);
}
