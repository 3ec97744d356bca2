//! `tpd intercept` when all is well: who gets which request, in every state and with every protocol.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::exit::ExitCode;
use tpd_api::intercept::{InterceptStatus, State};
use tpd_tests::{
    Block, Laptop, Load, Local, Source, Stamp, Workload, inside, is_laptop, is_pod, pause, until,
};

use crate::store::{
    ALL, LOCAL, MARK, MARKED, answered_by, ask, connected, curl, intercepted, moment, pod_address,
    through_the_ingress, to_the_service, web, without_agents,
};

/// An Intercept as a developer could write it by hand.
fn by_hand(laptop: &Laptop, name: &str, workload: &str) -> Value {
    json!({
        "apiVersion": "tpd.dev/v1alpha1", "kind": "Intercept", "metadata": { "name": name, "namespace": "store" },
        "spec": {
            "owner": "dev", "session": laptop.session(), "workload": { "kind": "Deployment", "name": workload },
            "ports": [{ "port": "http", "overlayPort": 20_000 }],
        },
    })
}

/// Waits until an Intercept is in a state.
#[track_caller]
fn until_state(laptop: &Laptop, name: &str, limit: Duration, state: State) {
    let state = serde_json::to_value(state).expect("a word");
    until(limit, &format!("Intercept {name} is {state}"), || {
        let object = laptop.cluster.object(&format!("intercept {name} -n store"));
        if object["status"]["state"] == state { Ok(()) } else { Err(object["status"].to_string()) }
    });
}

#[test]
fn an_intercept_goes_from_no_agent_over_waiting_to_active_and_is_gone_when_it_is_deleted() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let states = Workload::deploy(laptop.cluster, "states", 0, &json!({}));
    let intercept = by_hand(&laptop, "states", "states").to_string();
    laptop.script("kubectl create -f -").input(intercept).run().ok();
    until_state(&laptop, "states", Duration::from_secs(5), State::NoAgent);
    {
        // No agent has a way to a laptop that nobody reaches.
        let _gone = Block::everything(laptop.cluster);
        states.scale(1);
        until_state(&laptop, "states", Duration::from_secs(20), State::Waiting);
    }
    until_state(&laptop, "states", Duration::from_secs(15), State::Active);
    states.scale(2);
    states.until_ready(2);
    until_state(&laptop, "states", Duration::ZERO, State::Active);
    states.scale(0);
    until_state(&laptop, "states", Duration::from_secs(15), State::NoAgent);
    laptop.run("kubectl delete intercept states -n store").ok();
    laptop.cluster.kubectl("get intercept states -n store").ends_with(1).says(&["not found"]);
}

#[test]
fn one_to_five_pods_hand_every_request_to_the_laptop() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (local, intercept) = intercepted(&laptop, &web, ALL);
    for replicas in 1..=5 {
        web.autoscale(replicas);
        let before = local.counts().requests;
        let record = Load::on(Source::Node, &web.url())
            .with("-close")
            .connections(8)
            .requests(100)
            .run(laptop.cluster);
        record.none_failed().all_by(is_laptop);
        assert_eq!(local.counts().requests - before, 100, "with {replicas} pods");
        let status = intercept.until_covered(u32::try_from(replicas).expect("five at most"));
        assert_eq!(status.state, State::Active);
    }
}

#[test]
fn four_replicas_and_two_hundred_requests_at_once_all_reach_the_laptop() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 4);
    let (local, intercept) = intercepted(&laptop, &web, ALL);
    let before = (local.counts().requests, intercept.status().traffic.to_laptop);
    let load = Load::on(Source::Node, &web.url()).with("-close").connections(200).requests(200);
    load.run(laptop.cluster).none_failed().all_by(is_laptop);
    assert_eq!(local.counts().requests - before.0, 200);
    let counted = |status: &InterceptStatus| status.traffic.to_laptop - before.1 == 200;
    intercept.until(Duration::from_secs(3), "the status counts 200 requests more", counted);
}

#[test]
fn a_filter_takes_its_tenth_of_the_requests_and_no_other() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 3);
    let (_local, intercept) = intercepted(&laptop, &web, MARKED);
    let load = through_the_ingress(&laptop);
    moment();
    moment();
    let record = load.finish();
    record.none_failed();
    println!("{}", record.summary());
    assert!(
        record.marked.len() == 1 && record.marked.keys().all(|name| is_laptop(name)),
        "{:?}",
        record.marked
    );
    assert!(record.unmarked.keys().all(|name| is_pod(name)), "{:?}", record.unmarked);
    assert_eq!(record.unmarked.len(), 3, "each pod serves its share: {:?}", record.unmarked);
    let (laptops, all) = (record.by(is_laptop), record.requests);
    assert!(laptops * 11 >= all && laptops * 9 <= all, "{laptops} of {all} is no tenth");
    let counted = |status: &InterceptStatus| {
        status.traffic.to_laptop == laptops && status.traffic.to_app == all - laptops
    };
    intercept.until(Duration::from_secs(6), "the status counts to the request", counted);
}

#[test]
fn every_kind_of_condition_takes_what_it_says() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, MARKED);
    // Arguments of the intercept; then arguments and path of requests that match, and of such as do not.
    type Cases = &'static [(&'static str, &'static str)];
    let cases: &[(&str, Cases, Cases)] = &[
        (
            "--path '/api/v2/*'",
            &[("", "/api/v2/users?x=1"), ("-d x", "/api/v2/")],
            &[("", "/api/v1/users"), ("", "/")],
        ),
        ("--method POST", &[("-d x", "/")], &[("", "/"), ("-X PUT", "/")]),
        ("--header user-agent^=test-", &[("-A test-client", "/")], &[("-A a-test-client", "/"), ("", "/")]),
        (
            "--header 'cookie~=(^|; )user=(ann|bob)(;|$)'",
            &[("-H 'Cookie: a=b; user=bob'", "/")],
            &[("-H 'Cookie: user=bobby'", "/"), ("", "/")],
        ),
        (
            "--header x-intercept=dev --path '/api/*' --method GET",
            &[("-H 'X-Intercept: dev'", "/api/x")],
            &[("-H 'X-Intercept: dev'", "/x"), ("", "/api/x"), ("-d x -H 'X-Intercept: dev'", "/api/x")],
        ),
    ];
    for (filter, matching, others) in cases {
        intercept.change(&format!("{ALL} {filter}"));
        for http in ["", "--http2-prior-knowledge"] {
            for (expected, requests) in [(true, matching), (false, others)] {
                for (arguments, path) in *requests {
                    let url = format!("{}{path}", web.url());
                    let who = answered_by(&laptop, &url, &format!("{http} {arguments}"));
                    assert_eq!(
                        is_laptop(&who),
                        expected,
                        "with {filter}, {http} {arguments} {path} is answered by {who}"
                    );
                }
            }
        }
    }
    intercept.change(&format!("{ALL} --grpc shop.Cart/Add"));
    for (method, expected) in
        [("shop.Cart/Add", true), ("shop.Cart/Remove", false), ("shop.Carts/Add", false)]
    {
        let run = laptop.cluster.node(&format!("tpd-echo grpc {}:80/{method} 3", web.url()));
        assert_eq!(is_laptop(run.ok().out()), expected, "{method} is answered by {}", run.out());
    }
}

#[test]
fn every_request_is_the_laptops_as_soon_as_it_is_said_to_be() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    // The pods that are replaced serve on after they are told to end, which is when Services may still lead to them.
    let patient = json!({ "spec": {
        "terminationGracePeriodSeconds": 8,
        "containers": [{ "lifecycle": { "preStop": { "sleep": { "seconds": 5 } } } }],
    } });
    let prompt = Workload::deploy(laptop.cluster, "prompt", 3, &patient);
    let _local = Local::start(&laptop, LOCAL);
    prompt.until_ready(3);
    laptop.try_intercept("store", "prompt", ALL).ok();
    let load = Load::on(Source::Node, &prompt.url()).with("-close").connections(20).requests(200);
    load.run(laptop.cluster).none_failed().all_by(is_laptop);
    laptop.run("tpd leave --all").ok();
}

#[test]
fn an_intercept_that_begins_changes_and_ends_fails_no_request_of_busy_connections() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 3);
    without_agents(&web);
    let local = Local::start(&laptop, LOCAL);
    let load = to_the_service(&web, 32);
    moment();
    // Every pod is replaced by one with an agent under load.
    let intercept = laptop.intercept("store", "web", ALL);
    intercept.until_covered(3);
    web.until_ready(3);
    moment();
    let begun = Stamp::now();
    moment();
    let filtering = Stamp::now();
    intercept.change(MARKED);
    moment();
    intercept.change(ALL);
    let unfiltered = Stamp::now();
    moment();
    let no_stragglers = |status: &InterceptStatus| status.pods.iter().all(|pod| pod.stragglers == 0);
    intercept.until(Duration::from_secs(2), "every connection has changed side", no_stragglers);
    let leaving = Stamp::now();
    intercept.leave();
    let left = Stamp::now();
    moment();
    let record = load.finish();
    drop(local);
    println!("{}", record.summary());
    record.none_failed();
    let settled = [
        record.settled_between(begun, filtering, is_laptop),
        record.settled_between(unfiltered, leaving, is_laptop),
        record.settled_after(left, is_pod),
    ];
    println!("every connection has changed side after {settled:?}");
    let soon = Duration::from_millis(300);
    assert!(settled.iter().all(|time| *time <= soon), "connections change side only after {settled:?}");
}

/// An agent with nothing to do is in nobody's way, and so cannot lead such a connection elsewhere later.
#[test]
fn connections_straight_to_the_app_that_are_older_than_an_intercept_are_counted() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    drop(intercepted(&laptop, &web, ALL));
    let load = to_the_service(&web, 16);
    moment();
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let stragglers = |status: &InterceptStatus| status.pods.iter().map(|pod| pod.stragglers).sum::<u64>();
    let what = "each connection has changed side, or is counted";
    let (status, _) = intercept.until(Duration::from_secs(3), what, |status| stragglers(status) <= 16);
    assert_eq!(answered_by(&laptop, &web.url(), ""), "laptop", "a new connection goes to the app");
    let asked = Stamp::now();
    moment();
    let record = load.finish();
    record.none_failed();
    let late = record.timeline.iter().filter(|moment| moment.at > asked);
    let apps = late.filter(|moment| moment.served.keys().any(|name| is_pod(name))).count();
    assert!(
        apps == 0 || stragglers(&status) > 0,
        "connections go to the app, and nobody says so: {status:?}"
    );
    intercept.until(Duration::from_secs(3), "they are closed, and none is counted", |s| stragglers(s) == 0);
}

#[test]
fn http2_grpc_and_websockets_reach_the_laptop_whole() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    for arguments in [ALL, MARKED] {
        let (_local, _intercept) = intercepted(&laptop, &web, arguments);
        let marked = arguments == MARKED;
        let load = Load::on(Source::Node, &web.url()).with("-http2 -method POST -body hello").connections(4);
        let load = if marked { load.with(&format!("-header {MARK}")) } else { load };
        load.requests(200).run(laptop.cluster).none_failed().all_by(is_laptop);
        let run = laptop.cluster.node(&format!("tpd-echo websocket {}:80/ws 20 {MARK}", web.url()));
        assert_eq!(run.ok().out(), "laptop 20 rounds");
        let run = laptop.cluster.node(&format!("tpd-echo websocket {}:80/ws 20", web.url()));
        assert_eq!(is_laptop(run.ok().out()), !marked, "{}", run.out());
        // A stream of messages in both directions, larger than any window, and trailers.
        let run = laptop.cluster.node(&format!("tpd-echo grpc {}:80/shop.Cart/Add 20 100000", web.url()));
        assert_eq!(is_laptop(run.ok().out()), !marked, "{}", run.out());
    }
}

#[test]
fn bodies_of_any_size_are_streamed() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    for arguments in [ALL, MARKED] {
        let (_local, _intercept) = intercepted(&laptop, &web, arguments);
        let mark = "-H 'X-Intercept: dev'";
        let upload =
            format!("head -c 20000000 /dev/zero | curl -sS --max-time 20 {mark} -T - {}/up", web.url());
        let answer = laptop.cluster.node(&upload);
        answer.ok().says(&["\"server\":\"laptop\"", "\"length\":20000000"]);
        let size = 20_000_000;
        let download = format!("curl -sS --max-time 20 {mark} '{}/?size={size}' | wc -c", web.url());
        assert_eq!(laptop.cluster.node(&download).ok().out().trim(), size.to_string());
        // The first of five chunks is there long before the last.
        let timing = "-o /dev/null -w '%{time_starttransfer} %{time_total}'";
        let url = format!("{}/?chunks=5&every=200ms", web.url());
        let run = curl(&laptop, &url, &format!("{mark} {timing}"));
        let times: Vec<f64> = run.ok().out().split(' ').filter_map(|time| time.parse().ok()).collect();
        assert!(times[0] < 0.5 && times[1] > 0.7, "an answer in pieces is held back: {times:?}");
    }
}

#[test]
fn requests_in_a_pipeline_go_each_their_way_and_are_answered_in_order() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, _intercept) = intercepted(&laptop, &web, MARKED);
    let address = SocketAddr::new(web.address(), 80);
    let request = |number: u32, last: bool| {
        let mark = if number.is_multiple_of(2) { "X-Intercept: dev\r\n" } else { "" };
        let end = if last { "Connection: close\r\n" } else { "" };
        format!("POST /{number} HTTP/1.1\r\nHost: web\r\n{mark}{end}Content-Length: 3\r\n\r\n{number:03}")
    };
    let pipeline: String = (0..10).map(|number| request(number, number == 9)).collect();
    let answers = inside(&laptop.cluster.netns("node"), || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).expect("the Service");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a time-out");
        stream.write_all(pipeline.as_bytes()).expect("it is written");
        let mut answers = String::new();
        stream.read_to_string(&mut answers).expect("an end after the last answer");
        answers
    });
    let bodies: Vec<Value> = answers.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(bodies.len(), 10, "{answers}");
    for (number, body) in bodies.iter().enumerate() {
        assert_eq!(body["target"], format!("/{number}"), "out of order: {answers}");
        assert_eq!(body["body"], format!("{number:03}"));
        let who = body["server"].as_str().unwrap_or_default();
        assert_eq!(is_laptop(who), number % 2 == 0, "request {number} is answered by {who}");
    }
}

#[test]
fn tcp_and_udp_of_one_number_go_each_their_way() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let udp = format!("tpd-echo udp-who {}:80", web.address());
    {
        let (_local, _intercept) = intercepted(&laptop, &web, ALL);
        assert!(
            is_pod(laptop.cluster.node(&udp).ok().out()),
            "UDP goes to the laptop, and only TCP was asked for"
        );
        assert_eq!(answered_by(&laptop, &web.url(), ""), "laptop");
    }
    let (_local, _intercept) = intercepted(&laptop, &web, "--port 9090:http-udp/udp");
    assert_eq!(laptop.cluster.node(&udp).ok().out(), "laptop");
    assert!(
        is_pod(&answered_by(&laptop, &web.url(), "")),
        "TCP goes to the laptop, and only UDP was asked for"
    );
}

#[test]
fn what_is_no_http_goes_whole_to_the_laptop_or_past_the_filter_to_the_app() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let raw = Workload::deploy(
        laptop.cluster,
        "raw",
        1,
        &json!({ "spec": { "containers": [{
            "args": ["serve"],
            "ports": [{ "name": "http", "containerPort": 7 }, { "name": "source", "containerPort": 19 }],
            "readinessProbe": { "httpGet": null, "tcpSocket": { "port": 7 } },
            "securityContext": { "runAsUser": 0, "capabilities": { "add": ["NET_BIND_SERVICE"] } },
        }] } }),
    );
    let pods = raw.until_ready(1);
    let mut server = laptop.start("exec tpd-echo serve");
    let intercept = laptop.intercept("store", "raw", "--port 7:7 --header x-intercept=dev");
    intercept.until_covered(1);
    let echo = format!("tpd-echo echo {}:80 5000000", raw.address());
    laptop.cluster.node(&echo).ok();
    assert_eq!(intercept.status().traffic.to_laptop, 0, "a filtered port's raw traffic went to the laptop");
    intercept.change("--port 7:7");
    laptop.cluster.node(&echo).ok();
    intercept
        .until(Duration::from_secs(3), "the connection is counted", |status| status.traffic.to_laptop == 1);
    // A server that speaks first, or never, is none that a proxy may wait for.
    intercept.change("--port 19:source");
    let pod = pod_address(&raw, &raw.ready().pop().expect("one pod"));
    laptop.cluster.node(&format!("tpd-echo receive {pod}:19 5000000")).ok();
    assert!(!server.ended(), "the local server is gone");
    drop(pods);
}

#[test]
fn the_local_process_knows_the_clients_address() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, _intercept) = intercepted(&laptop, &web, ALL);
    let toolbox = laptop.cluster.object("pod toolbox -n shop")["status"]["podIP"].clone();
    let url = web.url();
    let run = laptop.cluster.kubectl(&format!("-n shop exec toolbox -- curl -sS --max-time 5 {url}"));
    let answer: Value = serde_json::from_str(run.ok().out()).expect("an answer of ours");
    assert_eq!(answer["server"], "laptop");
    assert_eq!(answer["headers"]["X-Forwarded-For"][0], toolbox, "{answer}");
}

#[test]
fn a_connection_that_is_no_http_stays_with_the_laptop_until_it_closes() {
    let laptop = Laptop::take();
    let connection = connected(&laptop);
    let web = web(&laptop, 1);
    let _server = laptop.start("exec tpd-echo serve");
    let intercept = laptop.intercept("store", "web", "--port 7:http");
    intercept.until_covered(1);
    let pod = SocketAddr::new(pod_address(&web, &web.ready()[0]), 8080);
    let connect = || {
        let stream = TcpStream::connect_timeout(&pod, Duration::from_secs(2)).expect("the pod's port");
        stream.set_read_timeout(Some(Duration::from_secs(3))).expect("a time-out");
        stream
    };
    let mut stream = inside(&laptop.cluster.netns("node"), connect);
    let mut is_echoed = |line: &[u8]| {
        let mut answer = vec![0; line.len()];
        stream.write_all(line).and_then(|()| stream.read_exact(&mut answer)).is_ok() && answer == line
    };
    assert!(is_echoed(b"\x01one\n"), "what is no HTTP does not reach the laptop");
    intercept.leave();
    // Longer than anything lingers that nobody uses.
    for _ in 0..8 {
        pause(Duration::from_secs(5));
        assert!(is_echoed(b"\x01more\n"), "a connection was cut off because its intercept has ended");
    }
    assert!(is_pod(&answered_by(&laptop, &web.url(), "")), "a new connection goes to the laptop still");
    connection.down();
    assert!(!is_echoed(b"\x01last\n"));
}

#[test]
fn a_proxy_protocol_header_names_the_client_where_there_is_no_http() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let listener = laptop.inside(|| TcpListener::bind(LOCAL)).expect("the local port is free");
    let (heard, lines) = mpsc::channel();
    thread::spawn(move || {
        // The first ones are proofs of the intercept, with nobody behind them.
        let two_lines = |stream| {
            let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
            Some((lines.next()?, lines.next()?))
        };
        heard.send(listener.incoming().filter_map(Result::ok).find_map(two_lines))
    });
    let intercept = laptop.intercept("store", "web", &format!("{ALL} --proxy-protocol"));
    intercept.until_covered(1);
    let pod = SocketAddr::new(pod_address(&web, &web.ready()[0]), 8080);
    let client = inside(&laptop.cluster.netns("node"), || {
        let mut stream = TcpStream::connect_timeout(&pod, Duration::from_secs(2))?;
        stream.write_all(b"\x01no HTTP\n")?;
        stream.shutdown(Shutdown::Write)?;
        let client = stream.local_addr()?;
        let _ = stream.read_to_end(&mut Vec::new());
        io::Result::Ok(client)
    });
    let client = client.expect("the pod takes the connection");
    let heard = lines.recv_timeout(Duration::from_secs(5)).expect("the local process hears of it");
    let (header, line) = heard.expect("two lines");
    let expected = format!("PROXY TCP4 {} {} {} {}", client.ip(), pod.ip(), client.port(), pod.port());
    assert_eq!((header.as_str(), line.as_str()), (expected.as_str(), "\x01no HTTP"));
}

#[test]
fn every_kind_of_workload_can_be_intercepted() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    for (kind, name, pods) in [
        ("statefulset", "ledger", 2),
        ("daemonset", "scout", 1),
        ("replicaset", "batch", 1),
        ("deployment", "odd", 1),
    ] {
        let workload = Workload::sample(laptop.cluster, "store", name);
        let intercept =
            laptop.intercept("store", &format!("{kind}/{name}"), &format!("{ALL} --replace-pods"));
        intercept.until_covered(pods);
        // Pods that were replaced are known to the node a moment later.
        workload.until_ready(pods as usize);
        for _ in 0..4 {
            assert_eq!(answered_by(&laptop, &workload.url(), ""), "laptop", "{kind}/{name}");
        }
        intercept.leave();
        let (who, _) = until(Duration::from_secs(1), "the app serves again", || {
            let who = answered_by(&laptop, &workload.url(), "");
            if is_pod(&who) { Ok(who) } else { Err(who) }
        });
        assert!(who.starts_with(name), "{who}");
    }
}

#[test]
fn a_pod_that_nothing_would_make_again_is_left_alone() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let uid = || laptop.cluster.object("pod lone -n store")["metadata"]["uid"].clone();
    let before = uid();
    let run = laptop.try_intercept("store", "pod/lone", &format!("{ALL} --replace-pods"));
    let _ = laptop.run("tpd leave --all");
    run.exits(ExitCode::NoAgent).says(&["lone"]).within(Duration::from_secs(15));
    assert_eq!(uid(), before, "the pod was replaced");
}

#[test]
fn status_tells_pod_by_pod_what_goes_where() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 3);
    let (_local, intercept) = intercepted(&laptop, &web, MARKED);
    for pod in web.ready() {
        let url = format!("http://{}:8080/", pod_address(&web, &pod));
        assert_eq!(answered_by(&laptop, &url, "-H 'X-Intercept: dev'"), "laptop");
        assert_eq!(answered_by(&laptop, &url, ""), pod, "the app of another pod answers");
    }
    let each = |status: &InterceptStatus| {
        status.pods.len() == 3
            && status.pods.iter().all(|pod| {
                pod.ready
                    && pod.agent
                    && pod.acknowledged
                    && pod.traffic.to_laptop == 1
                    && pod.traffic.to_app == 1
            })
    };
    let (status, _) =
        intercept.until(Duration::from_secs(3), "each pod tells of one request to either side", each);
    assert!(status.pods.iter().all(|pod| pod.proof_micros.is_some()), "not every pod was proved: {status:?}");
    assert_eq!(status.ports.iter().map(|port| port.port).collect::<Vec<_>>(), [8080]);
    laptop.run("tpd status").ok().says(&["web", "x-intercept", "active"]);
    laptop.run("tpd list").ok().says(&["store", "web"]);
    let table = laptop.cluster.kubectl("get intercepts -A");
    table.ok().says(&["web", "dev", "Active"]);
}

#[test]
fn with_nothing_listening_the_app_serves_and_the_developer_is_told() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    drop(intercepted(&laptop, &web, ALL));
    let run = laptop.try_intercept("store", "web", ALL);
    run.exits(ExitCode::NotServed).says(&["127.0.0.1:9090"]).within(Duration::from_secs(10));
    assert!(is_pod(&answered_by(&laptop, &web.url(), "")));
    let _local = Local::start(&laptop, LOCAL);
    let (_, took) = until(Duration::from_secs(5), "the laptop is used once something listens", || {
        let who = answered_by(&laptop, &web.url(), "");
        if is_laptop(&who) { Ok(()) } else { Err(who) }
    });
    println!("the local process gets traffic {took:?} after it has begun to listen");
    laptop.run("tpd leave web --namespace store").ok();
}

#[test]
fn an_intercept_with_a_time_to_live_ends_by_itself() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let _local = Local::start(&laptop, LOCAL);
    laptop.try_intercept("store", "web", &format!("{ALL} --for 8s")).ok();
    assert_eq!(answered_by(&laptop, &web.url(), ""), "laptop");
    until(Duration::from_secs(15), "it is over", || {
        let list = laptop.cluster.object("intercepts -n store");
        if list["items"].as_array().is_some_and(Vec::is_empty) { Ok(()) } else { Err(list.to_string()) }
    });
    assert!(is_pod(&answered_by(&laptop, &web.url(), "")));
}

#[test]
fn a_command_lives_with_its_intercept() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let script = format!(
        "exec tpd intercept web --namespace store --yes {ALL} -- sh -c 'exec tpd-echo http -name laptop {LOCAL}'"
    );
    let running = laptop.script(&script).limit(Duration::from_secs(60)).start();
    until(Duration::from_secs(40), "the command gets the traffic", || {
        let run = curl(&laptop, &web.url(), "");
        if run.out().contains("\"server\":\"laptop\"") { Ok(()) } else { Err(run) }
    });
    laptop.cluster.machine(&format!("kill -INT {}", running.pid())).run().ok();
    let _ = running.finish();
    assert!(is_pod(&answered_by(&laptop, &web.url(), "")));
    let list = laptop.cluster.object("intercepts -n store");
    assert_eq!(list["items"].as_array().map(Vec::len), Some(0), "the intercept outlives its command: {list}");
}

#[test]
fn names_resolve_as_the_workloads_pods_resolve_them() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    laptop.run("getent hosts legacy.partner").ends_with(2);
    let domains = "--dns partner --dns corp.example";
    let _intercept = laptop.intercept("store", "odd", &format!("{ALL} {domains}"));
    // Of the pods' hosts file, of their nameserver.
    laptop.run("getent hosts legacy.partner").ok().says(&["192.0.2.77"]);
    laptop.run("getent hosts wiki.corp.example").ok().says(&["192.0.2.80"]);
    // And everything else as before.
    laptop.run("getent hosts www.example.com").ok();
}

#[test]
fn a_service_that_comes_later_is_intercepted_too() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let pods = web.ready();
    laptop.cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web-too", "namespace": "store" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "port": 81, "targetPort": 8080 }] },
    }));
    let url = format!("http://{}:81/", laptop.cluster.service("store/web-too")[0]);
    until(Duration::from_secs(5), "the new Service has endpoints", || {
        let run = curl(&laptop, &url, "--max-time 1");
        if run.code == Some(0) { Ok(()) } else { Err(run) }
    });
    let who = answered_by(&laptop, &url, "");
    laptop.cluster.kubectl("-n store delete service web-too").ok();
    assert_eq!(who, "laptop");
    let status = intercept.until_covered(2);
    assert_eq!(web.ready(), pods, "a Service that came and went has replaced pods: {status:?}");
    assert_eq!(ask(&laptop, &web.url(), "")["server"], "laptop");
}
