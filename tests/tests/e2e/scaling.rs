//! The seed document's scenario: Ingress, Service, replicas under a HorizontalPodAutoscaler, and a laptop that gets all of it.

use std::time::Duration;

use serde_json::json;
use tpd_tests::{Intercepted, Laptop, Loading, Record, Running, Workload, is_laptop, is_pod, until};

use crate::store::{
    ALL, connected, intercepted, moment, through_the_ingress, to_the_service, web, without_agents,
};

/// Up by one, and down to the last.
const STEPS: [usize; 3] = [4, 2, 1];

/// Scales from three replicas through all steps under load, once through the Ingress and at the same time straight at the
/// Service, and returns both records.
fn scale_under_load(laptop: &Laptop, web: &Workload) -> (Record, Record) {
    let (ingress, service) = (through_the_ingress(laptop), to_the_service(web, 8));
    moment();
    for replicas in STEPS {
        web.autoscale(replicas);
        moment();
    }
    (ingress.finish(), service.finish())
}

#[test]
fn three_pods_become_four_two_and_one_under_load_and_no_request_fails() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 3);
    without_agents(&web);
    let (ingress, service) = scale_under_load(&laptop, &web);
    println!("the app alone, through the Ingress:   {}", ingress.summary());
    println!("the app alone, straight at the Service: {}", service.summary());
    ingress.none_failed().all_by(is_pod);
    let bound = service.failed;

    web.autoscale(3);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let (ingress, service) = scale_under_load(&laptop, &web);
    println!("intercepted, through the Ingress:   {}", ingress.summary());
    println!("intercepted, straight at the Service: {}", service.summary());
    ingress.none_failed().all_by(is_laptop);
    service.failed_at_most(bound).all_by(is_laptop);
    intercept.until_covered(1);
}

#[test]
fn an_autoscaler_on_cpu_stays_active_with_agents_in_its_pods() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (_local, _intercept) = intercepted(&laptop, &web, ALL);
    assert_eq!(web.injected().len(), 2);
    // Pods that have just started have no metrics for a while; the metrics server asks every ten seconds.
    until(Duration::from_secs(90), "the HorizontalPodAutoscaler is active", || {
        let status = laptop.cluster.object("hpa web -n store")["status"].clone();
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        let active = conditions.iter().any(|one| one["type"] == "ScalingActive" && one["status"] == "True");
        if active { Ok(()) } else { Err(status.to_string()) }
    });
}

/// Ends a load: no request has failed, the laptop has answered all of them, and three pods are there as before.
#[track_caller]
fn all_by_the_laptop(load: Loading, web: &Workload, intercept: &Intercepted<'_>) {
    moment();
    let record = load.finish();
    println!("{}", record.summary());
    record.none_failed().all_by(is_laptop);
    web.until_ready(3);
    intercept.until_covered(3);
}

#[test]
fn a_rolling_restart_under_load_fails_no_request_through_the_ingress() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 3);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    let load = through_the_ingress(&laptop);
    moment();
    web.kubectl("rollout restart deployment web").ok();
    web.kubectl("rollout status deployment web --timeout=60s").ok();
    all_by_the_laptop(load, &web, &intercept);
}

/// The node, cordoned and being drained of pods with a label of ours; when this is dropped it takes pods again.
struct Draining<'a> {
    web: &'a Workload,
    node: String,
}

impl<'a> Draining<'a> {
    /// Marks the pods that there are, and begins.
    fn begin(web: &'a Workload) -> (Self, Running) {
        let nodes = web.cluster.object("nodes");
        let node = nodes["items"][0]["metadata"]["name"].as_str().expect("a node has a name").to_owned();
        // One that an intercept has just had replaced belongs to no controller, and `kubectl drain` refuses to touch those.
        until(Duration::from_secs(30), "pods that were replaced are gone", || {
            let run = web.kubectl("get pods -l app=web -o name");
            if run.out().lines().count() == web.ready().len() { Ok(()) } else { Err(run) }
        });
        web.kubectl("label pods -l app=web tpd-test=drained").ok();
        let script = format!(
            "tests/kubernetes/cluster kubectl drain {node} --pod-selector=tpd-test=drained --ignore-daemonsets \
             --delete-emptydir-data --timeout=80s"
        );
        let drain = web.cluster.machine(&script).limit(Duration::from_secs(90)).start();
        (Self { web, node }, drain)
    }

    /// Another node could take pods: there is only this one.
    fn uncordon(&self) {
        self.web.kubectl(&format!("uncordon {}", self.node)).ok();
    }
}

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        let _ = self.web.kubectl(&format!("uncordon {}", self.node));
        let _ = self.web.kubectl("delete pdb web --ignore-not-found");
    }
}

#[test]
fn a_drain_under_load_fails_no_request_through_the_ingress() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 3);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    laptop.cluster.apply(&json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "web", "namespace": "store" },
        "spec": { "minAvailable": 2, "selector": { "matchLabels": { "app": "web" } } },
    }));
    let before = web.ready();
    let load = through_the_ingress(&laptop);
    moment();
    let (draining, mut drain) = Draining::begin(&web);
    until(Duration::from_secs(20), "a pod has been evicted", || {
        let ready = web.ready();
        if ready.len() == 2 || drain.ended() { Ok(()) } else { Err(format!("{ready:?}")) }
    });
    // With one pod fewer, and its successor nowhere to go.
    moment();
    draining.uncordon();
    let drained = drain.finish();
    drained.ok();
    let after = web.ready();
    assert!(!after.iter().any(|pod| before.contains(pod)), "{before:?} became {after:?}:\n{drained}");
    all_by_the_laptop(load, &web, &intercept);
}
