//! Copies of pods by `kubectl debug --copy-to`, which have all that injection and replacing have left in the original.

use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::inject::{RELEASED, TEMPLATE_HASH};
use tpd_tests::{Laptop, Local, Workload, until};

use super::{Cordon, begin, status, until_released};
use crate::services::Told;
use crate::store::{LOCAL, answered_by, connected, pod_address};

/// A copy of a pod, which goes when this is dropped.
struct Copy<'a> {
    workload: &'a Workload,
    name: &'static str,
}

impl<'a> Copy<'a> {
    fn make(workload: &'a Workload, pod: &str, name: &'static str, arguments: &str) -> Self {
        let copy = Self { workload, name };
        workload.kubectl(&format!("debug {pod} --copy-to={name} {arguments}")).ok();
        copy
    }

    fn until_ready(&self) {
        let wait = format!("wait pod/{} --for=condition=Ready --timeout=30s", self.name);
        self.workload.kubectl(&wait).ok();
    }

    fn metadata(&self) -> Value {
        let pod = format!("pod {} -n {}", self.name, self.workload.namespace);
        self.workload.cluster.object(&pod)["metadata"].clone()
    }

    fn url(&self) -> String {
        format!("http://{}:8080", pod_address(self.workload, self.name))
    }
}

impl Drop for Copy<'_> {
    fn drop(&mut self) {
        let _ = self.workload.kubectl(&format!("delete pod {} --wait=false --ignore-not-found", self.name));
    }
}

/// Waits until the intercept is of one pod, which hands its traffic over, and names that.
fn until_of_one(laptop: &Laptop) -> String {
    until(Duration::from_secs(30), "the intercept has one pod, and that has acknowledged", || match &status(
        laptop.cluster,
    )
    .pods[..]
    {
        [pod] if pod.ready && pod.acknowledged => Ok(pod.name.clone()),
        pods => Err(format!("{pods:#?}")),
    })
    .0
}

#[test]
fn a_copy_of_a_pod_is_no_pod_of_its_workload() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let model = Workload::deploy(laptop.cluster, "model", 1, &json!({}));
    let original = model.until_ready(1).remove(0);
    let cordon = Cordon::begin(laptop.cluster);
    let begun = begin(&laptop, "model");
    until_released(&model);

    // So it keeps labels and annotations. On the same node, it needs no scheduler.
    let twin = Copy::make(&model, &original, "model-twin", "--same-node --set-image=app=tpd-test/echo:1");
    let before = twin.metadata();
    assert!(before["annotations"].get(RELEASED).is_some(), "it says nothing wrong: {before}");
    drop(cordon);
    let pod = until_of_one(&laptop);
    assert!(model.injected() == [pod.clone()] && pod != original, "{pod} is no successor of {original}");
    twin.until_ready();
    assert_eq!(answered_by(&laptop, &twin.url(), ""), "model-twin");
    let after = twin.metadata();
    assert_eq!(after["uid"], before["uid"]);
    assert!(after.get("deletionTimestamp").is_none(), "a copy went with the original: {after}");
    assert!(after["labels"].get(TEMPLATE_HASH).is_none(), "a copy was given to the ReplicaSet: {after}");
    drop(twin);

    // As it is by itself: with the agent, and without labels and annotations.
    let probe = Copy::make(&model, &pod, "model-probe", "--container=app --arguments-only -- http :8080");
    probe.until_ready();
    let url = probe.url();
    assert_eq!(answered_by(&laptop, &url, ""), "model-probe", "a copy's traffic goes to the laptop");
    let address = pod_address(&model, probe.name);
    assert!(!laptop.cluster.leads_to(address), "the node leads to a copy");
    assert_eq!(until_of_one(&laptop), pod);
    // What its agent is told, by the token of the copy.
    let told = Told::begin(laptop.cluster, probe.name).until("a copy's agent is told something", |_| true);
    assert_eq!(
        (told.workload.as_str(), told.intercepts.len(), told.services.len()),
        ("pod/model-probe", 0, 0)
    );
    drop(begun);
    laptop.run("tpd leave --all").ok();
}
