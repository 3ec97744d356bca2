//! Several developers on one workload, and what none of them may do.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tpd_api::exit::ExitCode;
use tpd_api::inject::REQUIRE_FILTER;
use tpd_tests::{Laptop, Local, Outcome, attempt, is_laptop, is_pod, pause, until};

use crate::store::{ALL, LOCAL, MARKED, answered_by, connected, intercepted, moment, to_the_service, web};

/// A filter of the second developer, which no request of the first one's matches.
const SECOND: &str = "--port 9090:http --header x-intercept=second";

#[test]
fn two_developers_with_different_filters_get_each_their_requests() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let web = web(&laptop, 2);
    let (_local, intercept) = intercepted(&laptop, &web, MARKED);
    let (_local2, _intercept2) = intercepted(&second, &web, SECOND);
    for _ in 0..6 {
        assert_eq!(answered_by(&laptop, &web.url(), "-H 'X-Intercept: dev'"), "laptop");
        assert_eq!(answered_by(&laptop, &web.url(), "-H 'X-Intercept: second'"), "laptop2");
        assert!(is_pod(&answered_by(&laptop, &web.url(), "-H 'X-Intercept: third'")));
        assert!(is_pod(&answered_by(&laptop, &web.url(), "")));
    }
    intercept.leave();
    until(Duration::from_secs(1), "who stays is not disturbed by who leaves", || {
        let who = answered_by(&laptop, &web.url(), "-H 'X-Intercept: dev'");
        if is_pod(&who) { Ok(()) } else { Err(who) }
    });
    assert_eq!(answered_by(&laptop, &web.url(), "-H 'X-Intercept: second'"), "laptop2");
}

#[test]
fn what_another_developer_has_is_refused_with_a_name_and_a_way_out() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let _local2 = Local::start(&second, LOCAL);
    let refused = |arguments: &str| {
        let run = second.try_intercept("store", "web", arguments);
        run.exits(ExitCode::Conflict).says(&["dev"]).within(Duration::from_secs(5));
        run
    };
    refused(ALL);
    refused(SECOND);
    intercept.change(MARKED);
    refused(ALL).says(&["--header"]);
    refused(MARKED);
    let _intercept2 = second.intercept("store", "web", SECOND);
    assert_eq!(answered_by(&laptop, &web.url(), "-H 'X-Intercept: dev'"), "laptop");
}

#[test]
fn a_wiretap_gets_a_copy_and_the_app_serves() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let web = web(&laptop, 2);
    let (_local, _intercept) = intercepted(&laptop, &web, MARKED);
    let (tap, tapped) = intercepted(&second, &web, &format!("{ALL} --wiretap"));
    let load = to_the_service(&web, 8);
    moment();
    let record = load.finish();
    record.none_failed();
    assert!(record.unmarked.keys().all(|name| is_pod(name)), "a tap answers: {:?}", record.unmarked);
    assert!(record.marked.keys().all(|name| name == "laptop"), "a tap answers: {:?}", record.marked);
    until(Duration::from_secs(3), "every request was copied", || {
        let (copies, lost) = (tap.counts().requests, tapped.status().traffic.copies_lost);
        if copies + lost >= record.requests { Ok(()) } else { Err(format!("{copies} copies, {lost} lost")) }
    });
    assert!(tap.counts().requests > record.requests / 2, "most copies of a slow load were lost");
}

#[test]
fn a_tap_that_stands_still_delays_nobody() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (tap, tapped) = intercepted(&laptop, &web, &format!("{ALL} --wiretap"));
    tap.signal("STOP");
    // A local socket holds some megabytes by itself, and the tunnel as much.
    let body = "x".repeat(100_000);
    let load = tpd_tests::Load::on(tpd_tests::Source::Node, &web.url())
        .with(&format!("-method POST -body {body}"))
        .connections(8)
        .rate(1000)
        .start(laptop.cluster);
    pause(Duration::from_secs(4));
    let record = load.finish();
    let lost = tapped.until(Duration::from_secs(5), "lost copies are counted", |s| s.traffic.copies_lost > 0);
    tap.signal("CONT");
    println!("{}; {} copies lost", record.summary(), lost.0.traffic.copies_lost);
    record.none_failed().all_by(is_pod);
    assert!(record.max_micros < 500_000, "the slowest request took {} us", record.max_micros);
}

#[test]
fn the_environment_is_for_those_who_may_execute_in_the_pods() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let _connection2 = connected(&second);
    let _web = web(&laptop, 1);
    let _local2 = Local::start(&second, LOCAL);
    let run = second.try_intercept("store", "web", &format!("{ALL} --env-file /run/web.env"));
    run.exits(ExitCode::Forbidden).says(&["pods/exec", "store"]).within(Duration::from_secs(10));
    second.run("test ! -s /run/web.env").ok();
    let list = laptop.cluster.object("intercepts -n store");
    assert_eq!(list["items"].as_array().map(Vec::len), Some(0), "it was made all the same: {list}");
}

#[test]
fn an_intercept_belongs_to_its_owner() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let name = intercept.now().request.name.expect("it has one");
    let refused = |arguments: &str, input: &str, words: &[&str]| {
        let script = format!("kubectl -n store {arguments}");
        second.script(&script).input(input).run().ends_with(1).says(words);
    };
    refused(&format!("delete intercept {name}"), "", &["belongs to"]);
    let session = second.session();
    let takeover = json!({ "spec": { "session": session } });
    refused(&format!("patch intercept {name} --type=merge -p '{takeover}'"), "", &["dev"]);
    // One of one's own, for the traffic to go to somebody else's laptop.
    let victim = laptop.session();
    for (owner, session) in [("dev", &session), ("dev2", &victim)] {
        let forged = json!({
            "apiVersion": "tpd.dev/v1alpha1", "kind": "Intercept",
            "metadata": { "name": "forged", "namespace": "store" },
            "spec": { "owner": owner, "session": session, "workload": { "kind": "Deployment", "name": "odd" },
                "ports": [{ "port": "http", "overlayPort": 20_001 }] },
        });
        refused("create -f -", &forged.to_string(), &["dev"]);
    }
    assert_eq!(answered_by(&laptop, &web.url(), ""), "laptop");
    let status = json!({ "status": { "state": "NoAgent" } });
    refused(
        &format!("patch intercept {name} --subresource=status --type=merge -p '{status}'"),
        "",
        &["forbidden"],
    );
}

#[test]
fn one_laptop_does_not_reach_another() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let name = intercept.now().request.name.expect("it has one");
    let object = laptop.cluster.object(&format!("intercept {name} -n store"));
    let overlay_port = object["spec"]["ports"][0]["overlayPort"].as_u64().expect("a port");
    let overlay_port = u16::try_from(overlay_port).expect("a port");
    let victim = laptop.status().address.expect("a connected laptop has addresses");
    second
        .run(&format!("ip route replace {} dev tpd0; ip route replace {} dev tpd0", victim.ipv4, victim.ipv6))
        .ok();
    for port in [overlay_port, 9090, 22] {
        for address in [victim.ipv4.into(), victim.ipv6.into()] {
            let address = SocketAddr::new(address, port);
            let (outcome, _) = second.inside(|| attempt(address, Duration::from_secs(1)));
            assert!(
                matches!(outcome, Outcome::Unreachable | Outcome::Timeout),
                "one laptop reaches another's {address}: {outcome:?}"
            );
        }
    }
    // Nor does the app reach it by the agent's way: the agent's addresses are the agent's alone.
    let pod = web.ready().pop().expect("one pod");
    let run = web.kubectl(&format!(
        "exec {pod} -c web -- /usr/bin/tpd-echo connect [{}]:{overlay_port} 1",
        victim.ipv6
    ));
    assert!(!run.out().starts_with("connected"), "an app reaches a laptop:\n{run}");
    assert_eq!(answered_by(&laptop, &web.url(), ""), "laptop");
}

#[test]
fn a_namespace_can_demand_a_filter() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let _local = Local::start(&laptop, LOCAL);
    laptop.cluster.kubectl(&format!("label namespace store {REQUIRE_FILTER}=true")).ok();
    let run = laptop.try_intercept("store", "web", ALL);
    let every_path = laptop.try_intercept("store", "web", &format!("{ALL} --path '/*'"));
    let filtered = laptop.try_intercept("store", "web", MARKED);
    laptop.cluster.kubectl(&format!("label namespace store {REQUIRE_FILTER}-")).ok();
    let who = answered_by(&laptop, &web.url(), "-H 'X-Intercept: dev'");
    let _ = laptop.run("tpd leave --all");
    assert_ne!(run.code, Some(0), "an intercept without a filter is admitted:\n{run}");
    assert_ne!(every_path.code, Some(0), "a filter that every request passes is admitted:\n{every_path}");
    run.says(&["filter", "--header"]).within(Duration::from_secs(5));
    filtered.ok();
    assert_eq!(who, "laptop");
}

#[test]
fn an_administrator_can_revoke_an_intercept() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let _local = Local::start(&laptop, LOCAL);
    laptop.try_intercept("store", "web", ALL).ok();
    let load = to_the_service(&web, 8);
    moment();
    let revoked = tpd_tests::Stamp::now();
    laptop.cluster.kubectl("-n store delete intercepts --all").ok();
    moment();
    moment();
    let record = load.finish();
    record.none_failed();
    let settled = record.settled_after(revoked, is_pod);
    println!("{}; the app serves everything after {settled:?}", record.summary());
    assert!(settled < Duration::from_secs(1), "the app serves everything only after {settled:?}");
    assert!(record.by(is_laptop) > 0);
    let status = laptop.status();
    let gone = status.intercepts.iter().all(|one| one.over);
    assert!(gone, "the laptop does not know that its intercept was revoked: {:?}", status.intercepts);
}
