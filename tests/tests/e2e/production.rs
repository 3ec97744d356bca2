//! Production never waits: something of an intercept is killed, stopped or cut off under load, the app serves, and the
//! intercept is back by itself.
//!
//! Of each failure it is counted how many requests it cost; those that were under way may fail, one for each connection.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use tpd_tests::{
    Agent, Block, Cluster, DeafManagers, Laptop, Load, Record, Source, Squeeze, Stamp, Workload, inside,
    is_laptop, is_pod, pause, until,
};

use crate::store::{
    ALL, LOCAL, MARKED, answered_by, connected, intercepted, moment, pod_address, to_the_service, web,
};

/// Connections of the load, and so requests that can be under way.
const CONNECTIONS: u32 = 8;

/// The app serves everything this soon after a laptop, or the last manager, has gone.
const OPEN: Duration = Duration::from_secs(1);

/// And the laptop this soon after what was gone has come back.
const BACK: Duration = Duration::from_secs(3);

/// What is measured in steps of fifty milliseconds, on a machine with other things to do.
const SLACK: Duration = Duration::from_millis(200);

/// Says what a failure cost, and checks that it cost nothing but what was under way.
#[track_caller]
fn cost(what: &str, record: &Record) {
    cost_of(1, what, record);
}

/// The same for what happened more than once.
#[track_caller]
fn cost_of(times: u64, what: &str, record: &Record) {
    println!("{what}: {}", record.summary());
    record.failed_at_most(times * u64::from(CONNECTIONS));
}

#[track_caller]
fn within(what: &str, took: Duration, limit: Duration) {
    println!("{what} after {took:?}");
    assert!(took <= limit + SLACK, "{what} only after {took:?}, over {limit:?}");
}

#[test]
fn a_daemon_that_is_killed_costs_what_was_under_way_and_its_successor_takes_over() {
    let laptop = Laptop::take();
    let connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (_local, _intercept) = intercepted(&laptop, &web, ALL);
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    let pid = laptop.status().pid;
    let killed = Stamp::now();
    laptop.cluster.machine(&format!("kill -KILL {pid}")).run().ok();
    pause(Duration::from_secs(3));
    laptop.until_as(connection.before(), Duration::from_secs(2));
    let before = Stamp::now();
    laptop.run("tpd up --namespace store").ok();
    let back = Stamp::now();
    pause(BACK + Duration::from_secs(1));
    let record = load.finish();
    cost("a killed daemon", &record);
    within("the app serves everything", record.settled_between(killed, before, is_pod), OPEN);
    within("the laptop serves again", record.settled_after(back, is_laptop), BACK);
}

#[test]
fn a_local_process_that_is_gone_costs_what_was_under_way() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (local, _intercept) = intercepted(&laptop, &web, ALL);
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    let killed = Stamp::now();
    drop(local);
    pause(Duration::from_secs(3));
    let before = Stamp::now();
    let local = tpd_tests::Local::start(&laptop, LOCAL);
    let back = Stamp::now();
    pause(BACK + Duration::from_secs(1));
    let record = load.finish();
    drop(local);
    cost("a killed local process", &record);
    within("the app serves everything", record.settled_between(killed, before, is_pod), OPEN);
    within("the laptop serves again", record.settled_after(back, is_laptop), BACK);
}

#[test]
fn a_laptop_whose_network_is_cut_costs_what_was_under_way() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (_local, _intercept) = intercepted(&laptop, &web, ALL);
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    let cut = Stamp::now();
    let block = Block::everything(laptop.cluster);
    pause(Duration::from_secs(4));
    let before = Stamp::now();
    drop(block);
    let back = Stamp::now();
    pause(BACK + Duration::from_secs(1));
    let record = load.finish();
    cost("a cut network", &record);
    within("the app serves everything", record.settled_between(cut, before, is_pod), OPEN);
    within("the laptop serves again", record.settled_after(back, is_laptop), BACK);
    assert!(record.max_micros < 1_500_000, "a request has waited for the laptop: {}", record.summary());
}

#[test]
fn with_two_managers_a_deleted_one_does_not_end_an_intercept() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (_local, _intercept) = intercepted(&laptop, &web, ALL);
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    let pod = laptop.manager();
    let deleted = Stamp::now();
    laptop.cluster.kubectl(&format!("-n tpd-system delete pod {pod} --wait=false")).ok();
    pause(BACK + Duration::from_secs(2));
    let record = load.finish();
    cost("one manager of two", &record);
    within("the laptop serves again", record.settled_after(deleted, is_laptop), BACK);
    laptop.cluster.managers_ready(2);
}

#[test]
fn without_any_manager_the_app_serves_and_the_intercept_is_back_with_them() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    laptop.cluster.scale(0);
    let gone = Stamp::now();
    pause(Duration::from_secs(2));
    // A pod that starts meanwhile becomes ready without a manager.
    let before = Stamp::now();
    laptop.cluster.scale(2);
    let back = Stamp::now();
    pause(BACK + Duration::from_secs(2));
    let record = load.finish();
    cost("no manager at all", &record);
    within("the app serves everything", record.settled_between(gone, before, is_pod), OPEN);
    within("the laptop serves again", record.settled_after(back, is_laptop), BACK);
    intercept.until_covered(2);
}

/// The intercepted sample with so many pods, under load while something happens to the agent of one, as often as `happens` says.
fn with_an_agent(what: &str, pods: u32, load: &str, happens: impl FnOnce(&Laptop, &Agent) -> u64) {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, pods as usize);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let before = web.ready();
    let pod = before.last().expect("a pod");
    let agent = Agent::of(laptop.cluster, "store", pod).expect("a supervisor and a worker");
    let load = Load::on(Source::Node, &web.url()).with(load).connections(CONNECTIONS).rate(400);
    let load = load.start(laptop.cluster);
    moment();
    let at = Stamp::now();
    let times = happens(&laptop, &agent);
    pause(BACK + Duration::from_secs(2));
    let record = load.finish();
    cost_of(times, what, &record);
    within("the laptop serves again", record.settled_after(at, is_laptop), BACK);
    assert_eq!(web.ready(), before, "a pod was replaced, or is not ready");
    intercept.until_covered(pods);
}

#[test]
fn an_agent_that_is_killed_costs_what_was_under_way_and_its_pod_stays_ready() {
    let web = Workload::sample(Cluster::get(), "store", "web");
    let restarts = web.restarts();
    with_an_agent("a killed agent", 1, "", |laptop, agent| {
        agent.signal_worker(laptop.cluster, "KILL");
        for _ in 0..20 {
            assert_eq!(web.ready().len(), 1, "the pod is not ready while its agent restarts");
        }
        assert_eq!(web.restarts(), restarts);
        1
    });
}

#[test]
fn an_agent_that_is_out_of_memory_costs_what_was_under_way() {
    let web = Workload::sample(Cluster::get(), "store", "web");
    with_an_agent("an agent out of memory", 1, "", |laptop, agent| {
        let pod = web.ready().pop().expect("one pod");
        let address = SocketAddr::new(pod_address(&web, &pod), 8080);
        let squeeze = Squeeze::on(laptop.cluster, agent);
        let head = [b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ".as_slice(), &[b'x'; 8 << 10]].concat();
        // Each of them costs the agent a buffer, until it has none.
        let hungry = inside(&laptop.cluster.netns("node"), || {
            let mut open = Vec::new();
            for _ in 0..400 {
                let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) else {
                    break;
                };
                let _ = stream.write_all(&head);
                open.push(stream);
            }
            open
        });
        until(Duration::from_secs(5), "the kernel ends the agent for want of memory", || {
            if squeeze.kills() > 0 { Ok(()) } else { Err(format!("with {} connections", hungry.len())) }
        });
        // Its successor may have met the same fate before the limit is lifted.
        let kills = squeeze.lift();
        println!("out of memory {kills} times");
        kills
    });
}

/// As the kernel does in newer kinds of control groups when memory runs out: all processes of the container at once. Its pod is not ready for a moment, so that
/// other pods serve; what comes to it meanwhile reaches its app.
#[test]
fn an_agent_whose_container_is_killed_costs_what_was_under_way() {
    // Each connection is used once: those made straight to the app meanwhile would stay with it.
    with_an_agent("a killed container", 2, "-close", |laptop, agent| {
        agent.kill_container(laptop.cluster);
        // Its two processes end some milliseconds apart, and what comes between is lost with the second.
        2
    });
}

#[test]
fn an_agent_that_is_stopped_costs_what_was_under_way_and_is_replaced() {
    let web = Workload::sample(Cluster::get(), "store", "web");
    let restarts = web.restarts();
    with_an_agent("a stopped agent", 1, "", |laptop, agent| {
        agent.signal_worker(laptop.cluster, "STOP");
        1
    });
    assert_eq!(web.restarts(), restarts);
}

#[test]
fn an_agent_whose_container_is_stopped_is_passed_by_within_two_seconds() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let pod = web.ready().pop().expect("one pod");
    let agent = Agent::of(laptop.cluster, "store", &pod).expect("a supervisor and a worker");
    agent.signal(laptop.cluster, "STOP");
    pause(Duration::from_secs(2) + SLACK);
    let load = Load::on(Source::Node, &web.url()).with("-close").connections(CONNECTIONS);
    let record = load.requests(200).run(laptop.cluster);
    agent.signal(laptop.cluster, "CONT");
    let continued = Stamp::now();
    record.none_failed().all_by(is_pod);
    let load = to_the_service(&web, CONNECTIONS);
    pause(BACK + Duration::from_secs(1));
    let record = load.finish();
    record.none_failed();
    within("the laptop serves again", record.settled_after(continued, is_laptop), BACK);
    intercept.until_covered(1);
}

#[test]
fn a_local_process_that_stands_at_a_breakpoint_restarts_no_pod() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (local, _intercept) = intercepted(&laptop, &web, ALL);
    let (ready, restarts) = (web.ready(), web.restarts());
    local.signal("STOP");
    // Its liveness probes would fail after four seconds; nobody debugs as quickly as that.
    for _ in 0..120 {
        pause(Duration::from_secs(1));
        assert_eq!(web.ready(), ready, "a pod is not ready, because somebody debugs");
    }
    local.signal("CONT");
    assert_eq!(answered_by(&laptop, &web.url(), ""), "laptop");
    assert_eq!(web.restarts(), restarts, "containers were restarted, because somebody debugs");
}

#[test]
fn an_agent_that_udp_does_not_get_through_for_uses_a_stream() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let pod = web.ready().pop().expect("one pod");
    let deaf = DeafManagers::to(laptop.cluster, pod_address(&web, &pod));
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    assert_eq!(web.ready(), [pod], "the pod was replaced: UDP of another one is blocked");
    let load = to_the_service(&web, CONNECTIONS);
    pause(Duration::from_secs(1));
    load.finish().none_failed().all_by(is_laptop);

    // And where UDP stops, or comes back, in the middle.
    drop(deaf);
    pause(Duration::from_secs(12));
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    let stopped = Stamp::now();
    let deaf = DeafManagers::to(laptop.cluster, pod_address(&web, &web.ready()[0]));
    pause(BACK + Duration::from_secs(2));
    drop(deaf);
    pause(Duration::from_secs(2));
    let record = load.finish();
    cost("no more UDP", &record);
    within("the laptop serves again", record.settled_after(stopped, is_laptop), BACK);
    intercept.until_covered(1);
}

#[test]
fn a_broken_connection_to_a_manager_costs_nothing_that_is_under_way() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let agent = Agent::of(laptop.cluster, "store", &web.ready()[0]).expect("a supervisor and a worker");
    let before = intercept.status().pods[0].address;
    let url = format!("{}/?delay=3s", web.url());
    let slow = laptop.cluster.node_script(&format!("curl -sS --max-time 10 '{url}'")).start();
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    let broken = Stamp::now();
    agent.break_control(laptop.cluster);
    let answer: Value = serde_json::from_str(slow.finish().ok().out()).expect("an answer of ours");
    assert_eq!(answer["server"], "laptop", "what was under way was cut off");
    let record = load.finish();
    println!("a broken connection: {}", record.summary());
    record.none_failed();
    within("the laptop serves again", record.settled_after(broken, is_laptop), BACK);
    assert_eq!(intercept.until_covered(1).pods[0].address, before);
}

#[test]
fn a_pod_that_ends_finishes_what_it_has_begun() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let changes = json!({ "spec": { "terminationGracePeriodSeconds": 20 } });
    let slow = Workload::deploy(laptop.cluster, "slow", 1, &changes);
    let pod = slow.until_ready(1).pop().expect("one pod");
    let (_local, _intercept) = intercepted(&laptop, &slow, ALL);
    let pod = slow.until_ready(1).pop().unwrap_or(pod);
    // One that waits for its answer, one whose answer comes bit by bit, and one that has nothing more to ask.
    let address = SocketAddr::new(pod_address(&slow, &pod), 8080);
    let ask = |query: &str| {
        let script = format!("curl -sS --fail --max-time 20 'http://{address}/?{query}'");
        laptop.cluster.node_script(&script).start()
    };
    let (late, long) = (ask("delay=8s"), ask("chunks=32&every=250ms"));
    let _idle = inside(&laptop.cluster.netns("node"), || TcpStream::connect(address)).expect("the port");
    moment();
    slow.kubectl(&format!("delete pod {pod} --wait=false")).ok();
    let answer: Value = serde_json::from_str(late.finish().ok().out()).expect("an answer of ours");
    assert_eq!(answer["server"], "laptop");
    long.finish().ok().says(&["chunk 32 of 32"]);
    // What is idle does not hold it: its grace would last for ten seconds more.
    let (_, took) = until(Duration::from_secs(7), "the pod is gone", || {
        let run = slow.kubectl(&format!("get pod {pod} -o name --ignore-not-found"));
        if run.out().is_empty() { Ok(()) } else { Err(run) }
    });
    println!("gone {took:?} after its last answer");
}

#[test]
fn tpd_down_hands_everything_back() {
    let laptop = Laptop::take();
    let connection = connected(&laptop);
    let web = web(&laptop, 2);
    let local = tpd_tests::Local::start(&laptop, LOCAL);
    laptop.try_intercept("store", "web", ALL).ok();
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    connection.down();
    let down = Stamp::now();
    pause(Duration::from_secs(2));
    let record = load.finish();
    drop(local);
    println!("tpd down: {}", record.summary());
    record.none_failed();
    within("the app serves everything", record.settled_after(down, is_pod), OPEN);
}

#[test]
fn garbage_at_an_agents_port_harms_no_other_connection() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, _intercept) = intercepted(&laptop, &web, MARKED);
    let pod = web.ready().pop().expect("one pod");
    let restarts = web.restarts();
    let address = SocketAddr::new(pod_address(&web, &pod), 8080);
    let load = to_the_service(&web, CONNECTIONS);
    let endless = [b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ".as_slice(), &[b'x'; 1 << 20]].concat();
    let openings: [&[u8]; 8] = [
        b"",
        b"\0\xff\0\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x04\x08\0\0\0\0\0\x7f\xff\xff\xff",
        &endless,
    ];
    let slow = inside(&laptop.cluster.netns("node"), || {
        for opening in openings {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).expect("the port");
            stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a time-out");
            stream.set_write_timeout(Some(Duration::from_secs(2))).expect("a time-out");
            // It may well be closed before all is written.
            let _ = stream.write_all(opening);
            let _ = stream.read(&mut [0; 4096]);
        }
        let slow: Vec<_> = (0..300)
            .filter_map(|_| {
                let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
                stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ").ok()?;
                Some(stream)
            })
            .collect();
        pause(Duration::from_secs(1));
        slow
    });
    let record = load.finish();
    println!("under garbage: {}", record.summary());
    record.none_failed();
    assert!(record.max_micros < 1_000_000, "under garbage a request takes {} us", record.max_micros);
    assert!(record.marked.keys().all(|name| is_laptop(name)), "{:?}", record.marked);
    assert_eq!(web.restarts(), restarts, "the agent has restarted");
    drop(slow);
}

#[test]
fn a_namespace_with_a_live_intercept_can_be_deleted() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    laptop.cluster.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": [
        { "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "leaving" } },
        { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
          "metadata": { "name": "developers", "namespace": "leaving" },
          "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "tpd-intercept" },
          "subjects": [{ "kind": "Group", "name": "tpd-developers", "apiGroup": "rbac.authorization.k8s.io" }] },
    ] }));
    let app = Workload::deploy_in(laptop.cluster, "leaving", "app", 1, &json!({}));
    app.until_ready(1);
    let _local = tpd_tests::Local::start(&laptop, LOCAL);
    laptop.try_intercept("leaving", "app", ALL).ok();
    laptop.cluster.kubectl("delete namespace leaving --timeout=40s").ok();
    until(Duration::from_secs(5), "the laptop knows that the intercept is gone", || {
        let intercepts = laptop.status().intercepts;
        let gone = intercepts.iter().all(|one| one.over || one.request.namespace != "leaving");
        if gone { Ok(()) } else { Err(format!("{intercepts:?}")) }
    });
}
