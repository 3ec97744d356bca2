//! What developers ask for, and what they are told.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, from_value, json};
use tpd_api::intercept::{Intercept, Workload, WorkloadKind};

use super::{Change, Found, Known, judge};
use crate::manager::intercepts::objects;

/// An intercept of Deployment `web`, port `http`, by alice; with changes to its spec.
fn intercept(name: &str, changes: Value) -> Intercept {
    let mut spec = json!({
        "owner": "alice", "session": "alice-1", "workload": { "name": "web" },
        "ports": [{ "port": "http", "overlayPort": 2000 }],
    });
    for (key, value) in changes.as_object().unwrap() {
        spec[key] = value.clone();
    }
    from_value(json!({
        "apiVersion": "tpd.dev/v1alpha1", "kind": "Intercept",
        "metadata": { "name": name, "namespace": "shop", "creationTimestamp": "2026-11-01T08:00:00Z" },
        "spec": spec,
    }))
    .unwrap()
}

fn change(changes: Value) -> Change {
    Change { namespace: "shop".into(), asked: intercept("mine", changes), before: None }
}

fn web(spec: Value) -> Found {
    let mut pod = json!({
        "metadata": { "labels": { "app": "web" } },
        "spec": { "containers": [{
            "name": "app",
            "ports": [{ "name": "http", "containerPort": 8080 }, { "name": "metrics", "containerPort": 9090 }],
        }] },
    });
    for (key, value) in spec.as_object().unwrap() {
        pod["spec"][key] = value.clone();
    }
    Found { pod: objects::pod(from_value(pod).unwrap()), belongs_to: None, stands_alone: false }
}

fn known() -> Known {
    let service = json!({
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": "http" }] },
    });
    Known {
        labels: [].into(),
        managers: "tpd-system".into(),
        session_owner: Some("alice".into()),
        services: vec![objects::service(from_value(service).unwrap())],
        others: vec![],
        found: Some(web(json!({}))),
        workloads: vec![],
        now: Timestamp::from_second(1_800_000_000).unwrap(),
    }
}

fn refusal(change: &Change, known: &Known) -> (u16, String) {
    let refusal = judge(change, known).unwrap_err();
    (refusal.code, refusal.message)
}

fn workload(kind: WorkloadKind, name: &str) -> Workload {
    Workload { kind, name: name.into() }
}

#[test]
fn what_is_right_is_let_through() {
    for ports in [
        json!([{ "port": "http", "overlayPort": 2000 }]),
        json!([{ "port": "80", "overlayPort": 2000 }]),
        json!([{ "port": "8080", "overlayPort": 2000 }, { "port": "metrics", "overlayPort": 2001 }]),
    ] {
        judge(&change(json!({ "ports": ports })), &known()).unwrap();
    }
}

#[test]
fn a_workload_that_is_not_there_is_looked_for() {
    let known = |workloads: Vec<Workload>| Known { found: None, workloads, ..known() };
    for (workloads, expected) in [
        (vec![], "there is no deployment/web in namespace shop, nor any other workload"),
        (
            vec![workload(WorkloadKind::StatefulSet, "web"), workload(WorkloadKind::Deployment, "wep")],
            "there is no deployment/web in namespace shop, but statefulset/web",
        ),
        (
            vec![workload(WorkloadKind::Deployment, "wep"), workload(WorkloadKind::Deployment, "payments")],
            "there is no deployment/web in namespace shop; did you mean deployment/wep?",
        ),
        (
            vec![workload(WorkloadKind::Deployment, "payments")],
            "there is no deployment/web in namespace shop; there are deployment/payments",
        ),
    ] {
        assert_eq!(refusal(&change(json!({})), &known(workloads)), (404, expected.into()));
    }
}

#[test]
fn a_port_that_is_not_there_is_told_with_those_that_are() {
    let port = |port: Value| change(json!({ "ports": [{ "port": port, "overlayPort": 2000 }] }));
    let (code, message) = refusal(&port("https".into()), &known());
    assert_eq!(code, 404);
    for expected in ["deployment/web", "https", "8080 (http)", "9090 (metrics)"] {
        assert!(message.contains(expected), "{message}");
    }
    let (code, message) = refusal(&port(Value::Null), &known());
    assert!(code == 422 && message.contains("8080 (http), 9090 (metrics)"), "{message}");
    let twice = json!([{ "port": "http", "overlayPort": 2000 }, { "port": "80", "overlayPort": 2001 }]);
    assert_eq!(
        refusal(&change(json!({ "ports": twice })), &known()),
        (422, "port 8080 of deployment/web is named twice".into())
    );
    let same = json!([{ "port": "http", "overlayPort": 2000 }, { "port": "metrics", "overlayPort": 2000 }]);
    assert_eq!(refusal(&change(json!({ "ports": same })), &known()).0, 422);
}

#[test]
fn nonsense_is_named() {
    let regex = json!({ "filter": { "headers": [{ "name": "x", "value": "(", "match": "Regex" }] } });
    let (code, message) = refusal(&change(regex), &known());
    assert!(code == 422 && message.contains("header `x`"), "{message}");
    let over = json!({ "expiresAt": "2026-01-01T00:00:00Z" });
    assert_eq!(refusal(&change(over), &known()).0, 422);
}

#[test]
fn sessions_are_ones_own() {
    let none = Known { session_owner: None, ..known() };
    let (code, message) = refusal(&change(json!({})), &none);
    assert!(code == 404 && message.contains("sudo tpd up"), "{message}");
    let bobs = Known { session_owner: Some("bob".into()), ..known() };
    assert_eq!(
        refusal(&change(json!({})), &bobs),
        (403, "session alice-1 belongs to bob, not to alice".into())
    );
}

#[test]
fn where_there_are_no_agents_there_is_no_intercept() {
    for namespace in ["kube-system", "tpd-system"] {
        let change = Change { namespace: namespace.into(), ..change(json!({})) };
        assert_eq!(refusal(&change, &known()).0, 403, "{namespace}");
    }
    let out = Known { labels: [("tpd.dev/inject".into(), "disabled".into())].into(), ..known() };
    let (code, message) = refusal(&change(json!({})), &out);
    assert!(code == 403 && message.contains("kubectl label namespace shop tpd.dev/inject-"), "{message}");

    let host = Known { found: Some(web(json!({ "hostNetwork": true }))), ..known() };
    let (code, message) = refusal(&change(json!({})), &host);
    assert!(code == 412 && message.contains("hostNetwork"), "{message}");
    let mut disabled = web(json!({}));
    disabled.pod.opted_out = true;
    let disabled = Known { found: Some(disabled), ..known() };
    let (code, message) = refusal(&change(json!({})), &disabled);
    assert!(code == 412 && message.contains("tpd.dev/inject=disabled"), "{message}");
    let part = Found { belongs_to: Some(workload(WorkloadKind::Deployment, "web")), ..web(json!({})) };
    let part = Known { found: Some(part), ..known() };
    assert!(refusal(&change(json!({})), &part).1.contains("a part of deployment/web"));
}

#[test]
fn where_nothing_may_be_redirected_services_must_use_names() {
    let labels = [("pod-security.kubernetes.io/enforce".into(), "baseline".into())].into();
    let restricted = Known { labels, ..known() };
    judge(&change(json!({})), &restricted).unwrap();
    let metrics = change(json!({ "ports": [{ "port": "metrics", "overlayPort": 2000 }] }));
    let (code, message) = refusal(&metrics, &restricted);
    assert!(code == 412 && message.contains("baseline") && message.contains("port 9090"), "{message}");
}

fn by_header(value: &str) -> Value {
    json!({ "headers": [{ "name": "x-user", "value": value }], "paths": ["/api/*"] })
}

#[test]
fn a_conflict_is_explained() {
    let bobs = intercept("bobs", json!({ "owner": "bob", "filter": by_header("bob") }));
    let known = Known { others: vec![bobs], ..known() };
    assert_eq!(
        refusal(&change(json!({})), &known),
        (
            409,
            "bob intercepts the requests with header x-user=bob and path /api/* of port 8080 of deployment/web (intercept bobs, since \
             2026-11-01T08:00:00Z), and a request could be meant for both. No conflict is: --header x-user=VALUE with a value \
             other than `bob`, or a --path outside of /api/*, or another port, or --wiretap"
                .into()
        )
    );
}

#[test]
fn what_does_not_meet_is_no_conflict() {
    let bob = |changes: Value| {
        let mut all = json!({ "owner": "bob", "session": "bob-1" });
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Known { others: vec![intercept("bobs", all)], ..known() }
    };
    let everything = bob(json!({}));
    for (ours, theirs) in [
        (json!({ "filter": by_header("alice") }), bob(json!({ "filter": by_header("bob") }))),
        (json!({ "mode": "Wiretap" }), everything.clone()),
        (json!({}), bob(json!({ "mode": "Wiretap" }))),
        (json!({}), bob(json!({ "ports": [{ "port": "metrics", "overlayPort": 2000 }] }))),
        (json!({}), bob(json!({ "workload": { "name": "api" } }))),
        (json!({}), bob(json!({ "workload": { "kind": "StatefulSet", "name": "web" } }))),
        (json!({}), bob(json!({ "expiresAt": "2026-11-01T09:00:00Z" }))),
    ] {
        judge(&change(ours), &theirs).unwrap();
    }
    // The port is the same one, whatever it is called.
    let by_number = json!({ "ports": [{ "port": "80", "overlayPort": 2000 }] });
    assert_eq!(refusal(&change(by_number), &everything).0, 409);
}

#[test]
fn an_intercept_does_not_conflict_with_itself() {
    let before = intercept("mine", json!({}));
    let known = Known { others: vec![before.clone()], ..known() };
    let change = Change { before: Some(before), ..change(json!({ "filter": by_header("alice") })) };
    judge(&change, &known).unwrap();
    let again = Change { asked: intercept("second", json!({})), ..change };
    assert!(refusal(&again, &known).1.ends_with("; or end it: tpd leave mine"));
}
