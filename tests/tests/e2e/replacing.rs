//! Pods whose successors never come, or not before something else happens: they serve on, and are nobody's orphans.

mod copies;
mod midway;

use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::exit::ExitCode;
use tpd_api::inject::{KEPT, RELEASED, TEMPLATE_HASH};
use tpd_api::intercept::{InterceptStatus, State};
use tpd_tests::{Cluster, Laptop, Local, Running, Workload, is_pod, pause, until};

use crate::services::uids;
use crate::store::{ALL, LOCAL, answered_by, connected};

/// Pods of which a node takes one only, and there is one node: a successor waits for its predecessor for ever.
fn lonely(laptop: &Laptop) -> Workload {
    let alone = json!({ "spec": { "affinity": { "podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [{
            "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": { "app": "lonely" } },
        }],
    } } } });
    let lonely = Workload::deploy(laptop.cluster, "lonely", 1, &alone);
    // Below the least time that tpd gives a successor.
    lonely
        .kubectl("patch deployment lonely --type=merge -p '{\"spec\":{\"progressDeadlineSeconds\":30}}'")
        .ok();
    lonely.until_ready(1);
    lonely
}

/// An intercept of a workload in `store` that gives up once it sees that it waits in vain.
fn begin(laptop: &Laptop, workload: &str) -> Running {
    let script = format!("exec tpd intercept {workload} --namespace store --yes {ALL}");
    laptop.script(&script).limit(Duration::from_secs(90)).start()
}

/// The ready pod.
fn pod(lonely: &Workload) -> Value {
    let name = lonely.ready().pop().expect("one pod is ready");
    lonely.cluster.object(&format!("pod {name} -n store"))
}

/// Waits until a pod of the workload is released, and no ReplicaSet's any more. Returns its metadata.
fn until_released(workload: &Workload) -> Value {
    until_another_is_released(workload, &Value::Null)
}

/// The same of another pod than this one.
fn until_another_is_released(workload: &Workload, uid: &Value) -> Value {
    let is_released = |pod: &Value| {
        let metadata = &pod["metadata"];
        metadata["uid"] != *uid
            && metadata["annotations"].get(RELEASED).is_some()
            && metadata["labels"].get(TEMPLATE_HASH).is_none()
            && metadata.get("ownerReferences").is_none()
    };
    until(Duration::from_secs(15), "a pod is released", || {
        let mut pods = workload.pods();
        let found = pods.iter().position(is_released);
        found.map(|found| pods.swap_remove(found)["metadata"].take()).ok_or_else(|| metadata(&pods))
    })
    .0
}

/// What is said of pods where they are not as they should be.
fn metadata(pods: &[Value]) -> String {
    pods.iter().map(|pod| format!("{}\n", pod["metadata"])).collect()
}

/// The node takes no new pods until this is dropped: successors wait for as long as a test needs them to.
struct Cordon<'a> {
    cluster: &'a Cluster,
    node: String,
}

impl<'a> Cordon<'a> {
    fn begin(cluster: &'a Cluster) -> Self {
        let nodes = cluster.object("nodes");
        let node = nodes["items"][0]["metadata"]["name"].as_str().expect("a node has a name").to_owned();
        let cordon = Self { cluster, node };
        cluster.kubectl(&format!("cordon {}", cordon.node)).ok();
        cordon
    }
}

impl Drop for Cordon<'_> {
    fn drop(&mut self) {
        let _ = self.cluster.kubectl(&format!("uncordon {}", self.node));
    }
}

/// What the manager says of the only intercept in `store`.
fn status(cluster: &Cluster) -> InterceptStatus {
    let intercepts = cluster.object("intercepts -n store");
    serde_json::from_value(intercepts["items"][0]["status"].clone()).unwrap_or_default()
}

/// Waits until the workload has just so many pods, ready and with agents that have acknowledged, and checks that they stay.
fn until_settled(workload: &Workload, pods: u32) {
    let cluster = workload.cluster;
    workload.until_ready(pods as usize);
    until(Duration::from_secs(15), "every pod hands its traffic over, and there is no other", || {
        let status = status(cluster);
        let counts = status.counts;
        let is_so =
            status.state == State::Active && [counts.pods, counts.ready, counts.acknowledged] == [pods; 3];
        if is_so { Ok(()) } else { Err(format!("{status:#?}")) }
    });
    let before = uids(workload);
    assert_eq!((before.len(), workload.injected().len()), (pods as usize, pods as usize));
    let left: Vec<_> =
        workload.pods().into_iter().filter(|pod| pod["metadata"].get("ownerReferences").is_none()).collect();
    assert!(left.is_empty(), "a pod is nobody's: {}", metadata(&left));
    // Twice the pause between two steps: what goes round in circles has begun again.
    pause(Duration::from_secs(2));
    assert_eq!(uids(workload), before, "pods are replaced again");
}

/// The pod is its ReplicaSet's again, and it is the only one.
fn until_given_back(lonely: &Workload, limit: Duration, uid: &Value) -> Value {
    until(limit, "the pod is its ReplicaSet's again", || {
        let (pods, pod) = (lonely.pods(), pod(lonely));
        let metadata = &pod["metadata"];
        let is_owned = metadata["ownerReferences"][0]["kind"] == "ReplicaSet";
        let is_back = metadata["labels"].get(TEMPLATE_HASH).is_some()
            && metadata["annotations"].get(RELEASED).is_none();
        if pods.len() == 1 && is_owned && is_back && metadata["uid"] == *uid {
            Ok(metadata.clone())
        } else {
            Err(format!("{} pods; {metadata}", pods.len()))
        }
    })
    .0
}

#[test]
fn a_pod_whose_successor_cannot_start_is_given_back() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let lonely = lonely(&laptop);
    let uid = pod(&lonely)["metadata"]["uid"].clone();

    let intercept = begin(&laptop, "lonely");
    until_released(&lonely);
    assert!(is_pod(&answered_by(&laptop, &lonely.url(), "")), "a pod that is being replaced does not serve");
    intercept.finish().exits(ExitCode::NoAgent).says(&["no node takes it"]);
    let kept = until_given_back(&lonely, Duration::from_secs(90), &uid);
    assert!(kept["annotations"].get(KEPT).is_some(), "it does not say why it was given back: {kept}");
    let status = laptop.cluster.kubectl("-n store get intercepts -o yaml");
    status.ok().says(&["no successor was ready within 60 s"]);
    pause(Duration::from_secs(5));
    until_given_back(&lonely, Duration::ZERO, &uid);
    assert!(is_pod(&answered_by(&laptop, &lonely.url(), "")));
    laptop.run("tpd leave --all").ok();

    // A new intercept has it tried again; and once nobody needs it any more, it is over at once.
    let again = begin(&laptop, "lonely");
    until_released(&lonely);
    let _ = again.finish();
    laptop.cluster.kubectl(&format!("-n tpd-system delete pod {}", laptop.manager())).ok();
    until(Duration::from_secs(5), "the laptop is connected again", || {
        let run = laptop.run("tpd status");
        if run.code == Some(0) { Ok(()) } else { Err(run) }
    });
    laptop.run("tpd leave --all").ok();
    until_given_back(&lonely, Duration::from_secs(20), &uid);
    laptop.cluster.managers_ready(2);
}

#[test]
fn a_pod_that_was_released_goes_with_its_workload() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let lonely = lonely(&laptop);
    let intercept = begin(&laptop, "lonely");
    until_released(&lonely);
    lonely.kubectl("delete deployment lonely").ok();
    until(Duration::from_secs(20), "no pod is left", || {
        let pods = lonely.pods();
        if pods.is_empty() { Ok(()) } else { Err(format!("{} pods", pods.len())) }
    });
    let _ = laptop.run("tpd leave --all");
    let _ = intercept.finish();
}
