//! Kinds of traffic through an intercept that are no plain requests: datagrams, TLS, servers that speak first, upgrades to HTTP/2,
//! bodies that wait to be asked for; and many developers at once, or two at the same instant.

mod datagrams;
mod developers;

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tpd_api::inject::{ENABLED, INJECT};
use tpd_tests::{Laptop, Run, Workload, inside, is_laptop, is_pod};

use crate::store::{ALL, MARK, MARKED, ask, connected, curl, intercepted, pod_address, web};

/// Nothing that is asked at once takes longer, unless it hangs.
const SOON: Duration = Duration::from_secs(3);

/// Whether an application's name is one of those that are meant.
type Who = fn(&str) -> bool;

/// For curl, what the filter [`MARKED`] takes and what it leaves, and who is to answer that.
const EITHER: [(&str, Who); 2] = [("-H 'X-Intercept: dev'", is_laptop), ("", is_pod)];

/// What a server says that speaks first, after how long, and what it sends back of what it is `said`, before or after that.
fn greeting(laptop: &Laptop, server: SocketAddr, said: &[u8], first: bool) -> (String, Duration, Vec<u8>) {
    let talk = || {
        let mut stream = TcpStream::connect_timeout(&server, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        let connected = Instant::now();
        if first {
            stream.write_all(said)?;
        }
        let (mut line, mut echo) = (String::new(), Vec::new());
        let mut reader = BufReader::new(stream.try_clone()?);
        reader.read_line(&mut line)?;
        let took = connected.elapsed();
        if !first {
            stream.write_all(said)?;
        }
        stream.shutdown(Shutdown::Write)?;
        reader.read_to_end(&mut echo)?;
        io::Result::Ok((line.trim_end().to_owned(), took, echo))
    };
    inside(&laptop.cluster.netns("node"), talk).expect("a greeting, and what was said")
}

#[test]
fn tls_and_servers_that_speak_first_are_the_apps_on_a_filtered_port_and_the_laptops_on_any_other() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let changes = json!({
        "metadata": { "labels": { INJECT: ENABLED } },
        "spec": { "containers": [
            {
                "args": ["greet", ":2222"], "ports": [{ "containerPort": 2222 }],
                "readinessProbe": { "httpGet": null, "tcpSocket": { "port": 2222 } },
            },
            {
                "name": "secure", "image": "tpd-test/echo:1", "imagePullPolicy": "Never",
                "args": ["http", "-tls", "-name", "secure", ":8443"],
                "ports": [{ "name": "https", "containerPort": 8443 }],
                "readinessProbe": { "tcpSocket": { "port": 8443 }, "periodSeconds": 1 },
            },
        ] },
    });
    let reserved = Workload::deploy(laptop.cluster, "reserved", 1, &changes);
    reserved.until_ready(1);
    let _local = [
        laptop.start("exec tpd-echo greet -name laptop 127.0.0.1:9022"),
        laptop.start("exec tpd-echo http -tls -name laptop 127.0.0.1:9443"),
    ];
    let ports = "--port 9022:http --port 9443:https";
    let intercept = laptop.intercept("store", "reserved", &format!("{ports} --header {MARK}"));
    intercept.until_covered(1);
    let pod = reserved.ready().pop().expect("one pod");
    let address = pod_address(&reserved, &pod);
    let (server, url) = (SocketAddr::new(address, 2222), format!("https://{address}:8443/"));
    let over_tls = |http: &str| {
        let answer = ask(&laptop, &url, &format!("--insecure {http} -H 'X-Intercept: dev'"));
        (answer["server"].clone(), answer["protocol"].clone())
    };
    assert_eq!(over_tls("--http1.1"), (json!("secure"), json!("HTTP/1.1")));
    assert_eq!(over_tls("--http2"), (json!("secure"), json!("HTTP/2.0")));

    // As a handshake of TLS begins, and every byte that there is: as much as sockets hold while nobody reads.
    let said: Vec<u8> =
        b"\x16\x03\x01\x02\x00\x01".iter().copied().chain((0..=255).cycle().take(50_000)).collect();
    for first in [true, false] {
        let (line, _, echo) = greeting(&laptop, server, &said, first);
        assert_eq!(line, format!("SSH-2.0-tpd {pod}"));
        assert!(echo == said, "of {} bytes {} came back, or others", said.len(), echo.len());
    }
    let mut times: Vec<_> = (0..9).map(|_| greeting(&laptop, server, b"", false).1).collect();
    times.sort_unstable();
    println!("a greeting through a filtered port comes after {:?}, at most {:?}", times[4], times[8]);
    // Whoever waited for the client to speak would wait for a second.
    assert!(times[4] < Duration::from_millis(50), "greetings are held back: {times:?}");
    assert_eq!(intercept.status().traffic.to_laptop, 0, "what no filter can match went to the laptop");

    intercept.change(ports);
    assert_eq!(over_tls("--http2"), (json!("laptop"), json!("HTTP/2.0")));
    let (line, _, echo) = greeting(&laptop, server, &said, false);
    assert_eq!(line, "SSH-2.0-tpd laptop");
    assert!(echo == said, "of {} bytes {} came back, or others", said.len(), echo.len());
}

#[test]
fn an_offer_to_go_over_to_http2_leads_no_request_past_a_filter() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, MARKED);
    // At /http1 an application does as those do that have never heard of HTTP/2.
    let answered = |path: &str, version: &str, field: &str, who: Who| {
        let url = format!("{}{path}", web.url());
        for body in ["", "-d hello"] {
            // Twice on one connection: what comes after an upgrade goes where it was made.
            let arguments = format!("--http2 {field} {body} -w '%{{http_version}}\n' '{url}'");
            let run = curl(&laptop, &url, &arguments);
            run.ok().within(SOON);
            let lines: Vec<_> = run.out().lines().collect();
            assert_eq!(lines.len(), 4, "two answers, each with its version:\n{run}");
            for answer in lines.chunks(2) {
                let said: Value = serde_json::from_str(answer[0]).expect("an answer of ours");
                assert!(said["server"].as_str().is_some_and(who), "{field} is answered by {said}");
                assert_eq!(said["body"].as_str().unwrap_or_default(), body.trim_start_matches("-d "));
                assert_eq!(answer[1], version, "the answer of {said}");
            }
        }
    };
    for path in ["/", "/http1"] {
        for (field, who) in EITHER {
            answered(path, "1.1", field, who);
        }
    }
    // Where everything goes to one side, that side may take it.
    intercept.change(ALL);
    for (path, version) in [("/", "2"), ("/http1", "1.1")] {
        answered(path, version, "", is_laptop);
    }
}

#[test]
fn a_body_that_waits_to_be_asked_for_is_asked_for_by_whoever_gets_the_request() {
    /// Longer than any of this may take: who is not asked waits as long.
    const WAIT: &str = "--expect100-timeout 20 -H 'Expect: 100-continue'";
    const SIZE: u32 = 20_000_000;
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (local, _intercept) = intercepted(&laptop, &web, MARKED);
    let url = web.url();
    let upload = |arguments: &str| -> Run {
        let curl = format!("curl -sSv --max-time 15 {WAIT} {arguments} {url}/");
        laptop.cluster.node(&format!("head -c {SIZE} /dev/zero | {curl}"))
    };
    let arrives = |field: &str, who: Who| {
        // In chunks, and with its length.
        for body in ["-T -", "--data-binary @-"] {
            let run = upload(&format!("{field} {body}"));
            run.ok().says(&["< HTTP/1.1 100 Continue"]).within(Duration::from_secs(10));
            let said: Value = serde_json::from_str(run.out()).expect("an answer of ours");
            assert_eq!(said["length"], SIZE, "{run}");
            assert!(said["server"].as_str().is_some_and(who), "{run}");
        }
    };
    for (field, who) in EITHER {
        arrives(field, who);
        // A request that makes no sense is refused by its head.
        let arguments = format!("{WAIT} {field} -d body -w '%{{http_code}}'");
        let run = curl(&laptop, &format!("{url}/?delay=nonsense"), &arguments);
        assert!(run.ok().within(SOON).out().ends_with("400"), "{run}");
    }
    drop(local);
    arrives(EITHER[0].0, is_pod);
}
