//! A namespace where nothing may be redirected: what Services and NetworkPolicies say of a port decides on its agent.

use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::inject::{ENTRY, NOT_INJECTED};
use tpd_api::intercept::{InterceptStatus, State};
use tpd_tests::{Laptop, Load, Local, Source, Workload, is_laptop, is_pod, until};

use super::{Extra, SOON, edit, restricted_ports, uids, until_answered};
use crate::store::{ALL, LOCAL, answered_by, connected, intercepted, moment};

/// Whether the only pod does not count as acknowledged, for a reason with these words.
fn goes_past(status: &InterceptStatus, state: State, words: &str) -> bool {
    let says = |reason: &String| reason.contains(words);
    status.state == state
        && status.counts.acknowledged == 0
        && status.pods.iter().all(|pod| !pod.acknowledged && pod.reason.as_ref().is_some_and(says))
}

#[test]
fn a_service_that_is_led_to_a_ports_number_goes_past_the_agent_until_it_is_led_back() {
    let laptop = Laptop::take();
    let detour = Workload::deploy_in(laptop.cluster, "locked", "detour", 0, &restricted_ports("enabled"));
    // The Service is there before the pod.
    detour.scale(1);
    detour.until_ready(1);
    let before = uids(&detour);
    let _connection = connected(&laptop);
    let (_local, intercept) = intercepted(&laptop, &detour, ALL);
    let lead = |target: Value| {
        edit(&detour, "detour", &json!({ "ports": [{ "name": "http", "port": 80, "targetPort": target }] }));
    };

    let load = Load::on(Source::Node, &detour.url()).with("-close").connections(4).rate(100);
    let load = load.start(laptop.cluster);
    moment();
    lead(json!(8080));
    until_answered(&laptop, &detour.url(), "the app answers what goes past its agent", is_pod);
    let named = "Service detour leads to port 8080 by its number, past the agent; name the port";
    intercept.until(SOON, "the intercept waits, and names the Service", |status| {
        goes_past(status, State::Waiting, named)
    });
    laptop.run("tpd status").ok().says(&["Service detour", "targetPort: http"]);

    let other = Extra::create(&detour, "detour-too", 82, &json!("http"));
    until_answered(&laptop, &other.url(82), "another Service leads to the laptop by the name", is_laptop);
    intercept.until(SOON, "the intercept is active in part, and says so", |status| {
        goes_past(status, State::Active, "past the agent (another Service, by its name, does not)")
    });
    assert!(is_pod(&answered_by(&laptop, &detour.url(), "")));
    other.delete();
    intercept.until(SOON, "the intercept waits again", |status| goes_past(status, State::Waiting, named));

    lead(json!("http"));
    until_answered(&laptop, &detour.url(), "the laptop answers again", is_laptop);
    intercept.until_covered(1);
    moment();
    let record = load.finish();
    println!("{}", record.summary());
    record.none_failed();
    assert_eq!(uids(&detour), before, "an edited Service has replaced a pod");
}

/// A NetworkPolicy of the namespace `locked`, which goes when this is dropped.
struct Fence<'a>(&'a Workload);

impl Fence<'_> {
    fn says(&self, spec: &Value) {
        self.0.cluster.apply(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "name": "fence", "namespace": self.0.namespace }, "spec": spec,
        }));
    }
}

impl Drop for Fence<'_> {
    fn drop(&mut self) {
        let _ = self.0.kubectl("delete networkpolicy fence --ignore-not-found");
    }
}

/// A new pod of a workload, of which a dry run says what would become of it.
struct Sketch<'a> {
    workload: &'a Workload,
    pod: String,
}

impl<'a> Sketch<'a> {
    fn of(workload: &'a Workload) -> Self {
        let deployment = format!("deployment {} -n {}", workload.name, workload.namespace);
        let template = workload.cluster.object(&deployment)["spec"]["template"].clone();
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
            "metadata": { "name": "sketch", "labels": template["metadata"]["labels"] },
        });
        Self { workload, pod: pod.to_string() }
    }

    /// Waits until it would have an agent, or none for a reason with these words. The webhook may be told of a policy a moment late.
    fn until(&self, refusal: Option<&str>) {
        let what = format!("a new pod would be refused an agent: {refusal:?}");
        let namespace = &self.workload.namespace;
        let create =
            format!("tests/kubernetes/cluster kubectl -n {namespace} create --dry-run=server -o json -f -");
        until(SOON, &what, || {
            let run = self.workload.cluster.machine(&create).input(&*self.pod).run();
            let made: Value = serde_json::from_str(run.ok().out()).expect("kubectl prints JSON");
            let annotations = &made["metadata"]["annotations"];
            let is_so = match refusal {
                Some(words) => annotations[NOT_INJECTED].as_str().is_some_and(|why| why.contains(words)),
                None => annotations[ENTRY].is_string(),
            };
            if is_so { Ok(()) } else { Err(annotations.to_string()) }
        });
    }
}

/// The CNI of the tests enforces no policy. What is decided for their sake does not depend on that.
#[test]
fn a_network_policy_that_names_a_ports_number_keeps_the_agent_from_taking_its_name() {
    let laptop = Laptop::take();
    let ledge = Workload::deploy_in(laptop.cluster, "locked", "ledge", 0, &restricted_ports("enabled"));
    let (fence, sketch) = (Fence(&ledge), Sketch::of(&ledge));
    let named = Some("NetworkPolicy fence names port 8080 by its number; let it say `http`");
    let own = json!({ "matchLabels": { "app": "ledge" } });
    let others = json!({ "matchLabels": { "app": "front" } });
    let by_number = json!({ "podSelector": own, "ingress": [{ "ports": [{ "port": 8080 }] }] });
    let by_name = json!({ "podSelector": own, "ingress": [{ "ports": [{ "port": "http" }] }] });
    let range = json!([{ "ports": [{ "port": 8000, "endPort": 8100 }] }]);
    let out = |to: &Value| json!([{ "ports": [{ "port": 8080 }], "to": [{ "podSelector": to }] }]);
    // What is refused and what is not take turns, so that none passes for the one before it.
    for (policy, refusal) in [
        (json!({ "podSelector": own, "ingress": range }), named),
        (json!({ "podSelector": others, "ingress": range }), None),
        (json!({ "podSelector": others, "policyTypes": ["Egress"], "egress": out(&own) }), named),
        (json!({ "podSelector": others, "policyTypes": ["Egress"], "egress": out(&others) }), None),
        (by_number, named),
    ] {
        fence.says(&policy);
        sketch.until(refusal);
    }

    ledge.scale(1);
    ledge.until_ready(1);
    let before = uids(&ledge);
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let begun = laptop.start(&format!("exec tpd intercept ledge --namespace locked --yes {ALL}"));
    until(Duration::from_secs(10), "the Intercept names the policy", || {
        let status = laptop.cluster.object("intercepts -n locked")["items"][0]["status"].clone();
        let reason = status["pods"][0]["reason"].as_str().unwrap_or_default();
        let is_so = status["state"] == "NoAgent" && reason.contains("NetworkPolicy fence");
        if is_so { Ok(()) } else { Err(status.to_string()) }
    });
    drop(begun);
    assert!(is_pod(&answered_by(&laptop, &ledge.url(), "")));
    assert_eq!(uids(&ledge), before, "a pod was replaced by one that would be no better");

    // With the name in it, a pod that is made anew has an agent.
    fence.says(&by_name);
    sketch.until(None);
    ledge.kubectl("rollout restart deployment ledge").ok();
    ledge.kubectl("rollout status deployment ledge --timeout=30s").ok();
    let intercept = laptop.intercept("locked", "ledge", ALL);
    intercept.until_covered(1);
    assert_eq!(answered_by(&laptop, &ledge.url(), ""), "laptop");
}
