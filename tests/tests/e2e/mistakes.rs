//! What a developer can get wrong with an intercept: each is said at once, with what to do about it.

use std::time::Duration;

use serde_json::json;
use tpd_api::exit::ExitCode;
use tpd_tests::{Laptop, Local, Run, Workload, is_pod};

use crate::store::{ALL, LOCAL, answered_by, connected, web};

/// No message waits for a time-out.
const SOON: Duration = Duration::from_secs(5);

/// An intercept that cannot be had; nothing of it is left behind.
#[track_caller]
fn refused(laptop: &Laptop, namespace: &str, workload: &str, arguments: &str, code: ExitCode) -> Run {
    let run = laptop.try_intercept(namespace, workload, arguments);
    let left = laptop.cluster.object("intercepts -A");
    let _ = laptop.run("tpd leave --all");
    run.exits(code);
    assert_eq!(left["items"].as_array().map(Vec::len), Some(0), "it was made all the same: {left}\n{run}");
    run
}

#[test]
fn a_laptop_that_is_not_connected() {
    let laptop = Laptop::take();
    laptop.run(&format!("tpd intercept web {ALL}")).exits(ExitCode::NotConnected).says(&["tpd up"]);
    laptop.run("tpd leave web").exits(ExitCode::NotConnected);
}

#[test]
fn a_workload_that_does_not_exist() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    refused(&laptop, "store", "wbe", ALL, ExitCode::NotFound).says(&["wbe", "store", "web"]).within(SOON);
    refused(&laptop, "store", "statefulset/web", ALL, ExitCode::NotFound).says(&["web"]).within(SOON);
}

#[test]
fn a_port_that_the_workload_does_not_have() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _web = web(&laptop, 1);
    for port in ["nosuch", "81"] {
        let run = refused(&laptop, "store", "web", &format!("--port 9090:{port}"), ExitCode::NotFound);
        run.says(&[port, "http", "8080", "admin", "9000"]).within(SOON);
    }
}

#[test]
fn a_command_line_that_makes_no_sense() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    for (arguments, words) in [
        ("--port 9090:http --header 'x~=('", vec!["regular expression"]),
        ("--port 9090:http --header nothing", vec!["nothing"]),
        ("--port 9090:http --path api", vec!["/"]),
        ("--port ninety", vec!["ninety"]),
        ("", vec!["--port"]),
    ] {
        refused(&laptop, "store", "web", arguments, ExitCode::Usage).says(&words).within(SOON);
    }
}

#[test]
fn a_namespace_where_the_developer_may_not_intercept() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let run = refused(&laptop, "shop", "web", ALL, ExitCode::Forbidden);
    run.says(&["intercepts", "shop", "tpd-intercept"]).within(SOON);
}

#[test]
fn an_intercept_that_is_not_there() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    laptop.run("tpd leave nosuch --namespace store").exits(ExitCode::NotFound).says(&["nosuch"]).within(SOON);
}

#[test]
fn an_image_that_cannot_be_pulled() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let spec = json!({ "containers": [{ "image": "tpd-test/nosuch:1" }] });
    let _broken = Workload::deploy(laptop.cluster, "broken", 1, &json!({ "spec": spec }));
    let run = laptop.try_intercept("store", "broken", ALL);
    let _ = laptop.run("tpd leave --all");
    assert_ne!(run.code, Some(0), "an intercept of no pod goes well:\n{run}");
    run.says(&["broken", "image"]).within(Duration::from_secs(30));
}

#[test]
fn a_pod_that_may_not_be_evicted() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let guarded = Workload::deploy(laptop.cluster, "guarded", 1, &json!({}));
    guarded.until_ready(1);
    laptop.cluster.apply(&json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": { "name": "guarded", "namespace": "store" },
        "spec": { "minAvailable": 2, "selector": { "matchLabels": { "app": "guarded" } } },
    }));
    let run = laptop.try_intercept("store", "guarded", ALL);
    let who = answered_by(&laptop, &guarded.url(), "");
    let _ = laptop.run("tpd leave --all");
    guarded.kubectl("delete pdb guarded").ok();
    // The replacement serves; that the old pod stays, and why, is said, and it goes on serving its share.
    run.says(&["disruption"]).within(Duration::from_secs(30));
    assert!(who == "laptop" || is_pod(&who), "{who}");
}
