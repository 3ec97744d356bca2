//! Intercepts that are made with kubectl, and not by anybody's tpd.

use serde_json::{Value, json};
use tpd_api::exit::ExitCode;
use tpd_tests::{Laptop, Workload, is_laptop, is_pod, until};

use super::{SOON, none_is_left, present};
use crate::store::{MARKED, answered_by, connected, intercepted, web};

/// An Intercept that nobody's tpd has made.
fn by_hand(workload: &str, session: &str, overlay_port: u64, value: &str) -> Value {
    json!({
        "apiVersion": "tpd.dev/v1alpha1", "kind": "Intercept", "metadata": { "name": "by-hand", "namespace": "store" },
        "spec": {
            "owner": "dev", "session": session, "workload": { "kind": "Deployment", "name": workload },
            "ports": [{ "port": "http", "overlayPort": overlay_port }],
            "filter": { "headers": [{ "name": "x-intercept", "value": value }] },
        },
    })
}

#[test]
fn an_intercept_made_with_kubectl_that_cannot_be_is_refused_with_a_reason() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _idle = Workload::deploy(laptop.cluster, "idle", 0, &json!({}));
    let session = laptop.session();
    let cases: [(&str, Value, &[&str]); 6] = [
        (
            "/spec/filter/headers/0",
            json!({ "name": "x", "value": "a(b", "match": "Regex" }),
            &["`a(b` is no usable regular expression"],
        ),
        (
            "/spec/ports",
            json!([{ "port": "http", "overlayPort": 20_001 }, { "port": "8080", "overlayPort": 20_001 }]),
            &["two of its ports", "same overlay port"],
        ),
        ("/spec/expiresAt", json!("2020-01-01T00:00:00Z"), &["the time at which it is to end is over"]),
        (
            "/spec/workload/kind",
            json!("CronJob"),
            &["CronJob", "supported values", "DaemonSet", "StatefulSet"],
        ),
        ("/spec/session", json!("nosuch"), &["no session nosuch", "sudo tpd up"]),
        ("/spec/workload/name", json!("idel"), &["no deployment/idel", "did you mean deployment/idle"]),
    ];
    for (path, value, words) in cases {
        let mut object = by_hand("idle", &session, 20_001, "dev");
        let (parent, key) = path.rsplit_once('/').expect("a path has a slash");
        let parent = object.pointer_mut(parent).expect("the example has it");
        match parent {
            Value::Array(items) => items[0] = value,
            parent => parent[key] = value,
        }
        let run = laptop.script("kubectl create -f -").input(object.to_string()).run();
        run.ends_with(1).says(words).within(SOON);
        none_is_left(&laptop);
    }
}

#[test]
fn an_intercept_made_with_kubectl_may_lead_to_a_port_of_the_laptop_that_another_one_has() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, _intercept) = intercepted(&laptop, &web, MARKED);
    let overlay_port = present(&laptop)[0]["spec"]["ports"][0]["overlayPort"].as_u64().expect("a port");
    let until_second_by = |who: fn(&str) -> bool| {
        until(SOON, "the second filter's requests go where they are to", || {
            let server = answered_by(&laptop, &web.url(), "-H 'X-Intercept: second'");
            if who(&server) { Ok(()) } else { Err(server) }
        });
        assert_eq!(answered_by(&laptop, &web.url(), "-H 'X-Intercept: dev'"), "laptop");
    };
    let object = by_hand("web", &laptop.session(), overlay_port, "second");
    laptop.script("kubectl create -f -").input(object.to_string()).run().ok();
    until_second_by(is_laptop);

    // It is not this machine's tpd that keeps it, and whoever has it must be able to find it all the same.
    laptop.run("tpd list --namespace store").ok().says(&["by-hand", "requests with x-intercept=second"]);
    let run = laptop.run("tpd leave by-hand --namespace store");
    run.exits(ExitCode::NotFound).says(&["by-hand", "dev's", "kubectl -n store delete intercept by-hand"]);

    // One that nothing is behind is no harm, and no secret.
    let patch = json!({ "spec": { "ports": [{ "port": "http", "overlayPort": 1999 }] } });
    laptop.run(&format!("kubectl -n store patch intercept by-hand --type=merge -p '{patch}'")).ok();
    until_second_by(is_pod);
    until(SOON, "its status says that nothing answers", || {
        let object = laptop.cluster.object("intercept by-hand -n store");
        let problem = object["status"]["pods"][0]["problem"].as_str().unwrap_or_default().to_owned();
        if problem.is_empty() { Err(object["status"].to_string()) } else { Ok(()) }
    });
    laptop.run("kubectl -n store delete intercept by-hand").ok();
    until_second_by(is_pod);
}
