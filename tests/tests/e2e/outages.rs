//! The API server goes away, and comes back.

use std::time::{Duration, Instant};

use tpd_api::local::PathKind;
use tpd_tests::{Held, Laptop, Snapshot, pause, until};

use crate::samples::echo;

/// How long the API server stays away.
const AWAY: Duration = Duration::from_secs(30);

/// Stops the API server, waits, starts it again, and waits until the laptop works.
fn outage(laptop: &Laptop) {
    laptop.cluster.stop_api_server();
    pause(AWAY);
    laptop.cluster.start_api_server();
    cluster_works(laptop);
    let back = Instant::now();
    until(Duration::from_secs(15), "the laptop works again", || {
        let run = laptop.run("curl -sS --max-time 1 http://web.shop");
        if run.code == Some(0) { Ok(()) } else { Err(run) }
    });
    println!("works {:?} after the API server does", back.elapsed());
}

/// Waits until the cluster has got over it: its controllers take a node that could not report for so long for dead, and its pods
/// out of their Services, until it reports again.
fn cluster_works(laptop: &Laptop) {
    let (dns, web) =
        (laptop.cluster.service("kube-system/kube-dns")[0], laptop.cluster.service("shop/web")[0]);
    let (_, took) = until(Duration::from_secs(60), "the cluster works for itself", || {
        let run = laptop.cluster.node(&format!(
            "dig +short +time=1 +tries=1 web.shop.svc.cluster.local @{dns} | grep . && curl -sS --max-time 1 http://{web}"
        ));
        if run.code == Some(0) { Ok(()) } else { Err(run) }
    });
    println!("the cluster works for itself {took:?} after the API server does");
}

#[test]
fn udp_carries_on_without_an_api_server() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    laptop.until_over(Duration::from_secs(10), PathKind::Udp);
    let held = Held::start(&laptop, echo(&laptop, 7));
    outage(&laptop);
    let gap = held.longest_gap();
    assert!(gap < Duration::from_secs(4), "over UDP a connection was silent for {gap:?}");
}

#[test]
fn a_path_through_the_api_server_is_back_with_it() {
    let laptop = Laptop::take();
    for path in [PathKind::Proxy, PathKind::Forward] {
        let _connection = laptop.up_over(path);
        let held = Held::start(&laptop, echo(&laptop, 7));
        outage(&laptop);
        println!("{path:?}: longest silence {:?}", held.longest_gap());
        laptop.until_over(Duration::from_secs(5), path);
    }
}

#[test]
fn down_works_with_the_cluster_gone() {
    let laptop = Laptop::take();
    let connection = laptop.up("--namespace shop");
    laptop.cluster.stop_api_server();
    // Connected by UDP, or reconnecting: it says so at once.
    let status = laptop.run("tpd status");
    status.within(Duration::from_secs(1));
    assert!(matches!(status.code, Some(0 | 13)), "{status}");
    laptop.run("tpd down").ok().within(Duration::from_secs(6));
    laptop.until_as(connection.before(), Duration::ZERO);
    laptop.cluster.start_api_server();
}

#[test]
fn up_says_that_the_api_server_does_not_answer() {
    let laptop = Laptop::take();
    let before = Snapshot::of(&laptop);
    laptop.cluster.stop_api_server();
    let run = laptop.run("tpd up");
    laptop.cluster.start_api_server();
    run.exits(tpd_api::exit::ExitCode::Unreachable)
        .says(&["203.0.113.2:6443"])
        .within(Duration::from_secs(15));
    laptop.until_as(&before, Duration::ZERO);
}
