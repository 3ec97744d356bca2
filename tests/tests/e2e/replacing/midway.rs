//! Workloads that are scaled down, or of which something is deleted, while their pods are being replaced: no pod is lost that is
//! wanted, and none is left over.

use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::inject::NOT_INJECTED;
use tpd_tests::{Laptop, Local, Workload, until};

use super::{Cordon, begin, metadata, status, until_another_is_released, until_released, until_settled};
use crate::store::{LOCAL, answered_by, connected, pod_address};

/// Pods that nothing keeps are gone within this: the garbage collector is told of it, and they have 2 s to end.
const GONE: Duration = Duration::from_secs(20);

/// Name and UID of the ReplicaSet of a workload that has one.
fn replica_set(workload: &Workload) -> Option<(String, Value)> {
    let sets = workload.cluster.object(&format!("replicasets -n store -l app={}", workload.name));
    let metadata = &sets["items"][0]["metadata"];
    Some((metadata["name"].as_str()?.to_owned(), metadata["uid"].clone()))
}

/// Deletes the workload's ReplicaSet, and waits until there is another with just so many pods.
fn delete_replica_set(workload: &Workload, cascade: &str, pods: usize) {
    let (name, uid) = replica_set(workload).expect("a Deployment has a ReplicaSet");
    workload.kubectl(&format!("delete replicaset {name} --cascade={cascade}")).ok();
    until(GONE, "the Deployment has another ReplicaSet, with all its pods", || {
        let (_, other) = replica_set(workload).filter(|(_, other)| *other != uid).ok_or("it has none")?;
        let all = workload.pods();
        let own = all.iter().filter(|pod| pod["metadata"]["ownerReferences"][0]["uid"] == other).count();
        if own == pods { Ok(()) } else { Err(format!("it has {own}: {}", metadata(&all))) }
    });
}

fn until_gone(workload: &Workload) {
    until(GONE, "no pod is left", || {
        let pods = workload.pods();
        if pods.is_empty() { Ok(()) } else { Err(metadata(&pods)) }
    });
}

#[test]
fn a_deleted_replica_set_takes_no_pod_along_that_was_released() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let woven = Workload::deploy(laptop.cluster, "woven", 2, &json!({}));
    let before = woven.until_ready(2);
    let cordon = Cordon::begin(laptop.cluster);
    let begun = begin(&laptop, "woven");
    let released = until_released(&woven);
    let name = released["name"].as_str().expect("a pod has a name");

    // The one that adopts what the first has left is not complete, as no node takes the successor.
    delete_replica_set(&woven, "orphan", 2);
    assert_eq!(woven.ready(), before, "a pod has gone with its ReplicaSet");
    // Nor is the one that makes everything anew: all that serves is the pod that was released.
    delete_replica_set(&woven, "foreground", 2);
    assert_eq!(woven.ready(), [name]);
    let url = format!("http://{}:8080", pod_address(&woven, name));
    assert_eq!(answered_by(&laptop, &url, ""), name);
    let pod = woven.cluster.object(&format!("pod {name} -n store"));
    assert_eq!(pod["metadata"]["uid"], released["uid"]);

    drop(cordon);
    until_settled(&woven, 2);
    drop(begun);
    laptop.run("tpd leave --all").ok();
}

#[test]
fn a_deployment_that_is_scaled_down_meanwhile_keeps_what_it_wants_and_nothing_else() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let waning = Workload::deploy(laptop.cluster, "waning", 2, &json!({}));
    waning.until_ready(2);
    let cordon = Cordon::begin(laptop.cluster);
    let begun = begin(&laptop, "waning");
    let first = until_released(&waning);

    // The successor, which no node takes, is the first to go; then the released pod is one too many, and the other's turn comes.
    waning.scale(1);
    let second = until_another_is_released(&waning, &first["uid"]);
    assert_eq!(waning.ready(), [second["name"].as_str().expect("a pod has a name")]);
    assert!(second["annotations"].get(NOT_INJECTED).is_none(), "it is nobody's successor: {second}");

    waning.scale(0);
    until_gone(&waning);
    drop(cordon);
    waning.scale(1);
    until_settled(&waning, 1);
    drop(begun);
    laptop.run("tpd leave --all").ok();
}

/// A StatefulSet of two pods that stays, once it is deleted, until it is let go or this is dropped.
struct Held(Workload);

impl Held {
    fn create(laptop: &Laptop, name: &str) -> Self {
        let mut spec = laptop.cluster.object("statefulset ledger -n store")["spec"].clone();
        let labels = json!({ "app": name });
        spec["selector"]["matchLabels"] = labels.clone();
        spec["template"]["metadata"]["labels"] = labels;
        laptop.cluster.apply(&json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet", "spec": spec,
            "metadata": { "name": name, "namespace": "store", "finalizers": ["tpd.dev/test"] },
        }));
        Self(Workload::sample(laptop.cluster, "store", name))
    }

    fn let_go(&self) {
        let patch = json!({ "metadata": { "finalizers": null } });
        let _ = self.0.kubectl(&format!("patch statefulset {} --type=merge -p '{patch}'", self.0.name));
    }

    fn uid_of(&self, pod: &str) -> Value {
        self.0.cluster.object(&format!("pod {pod} -n store"))["metadata"]["uid"].clone()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.let_go();
        let _ =
            self.0.kubectl(&format!("delete statefulset {} --wait=false --ignore-not-found", self.0.name));
    }
}

#[test]
fn a_stateful_set_that_is_being_deleted_loses_no_pod_before_all_of_them_go() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let held = Held::create(&laptop, "vault");
    let vault = &held.0;
    vault.until_ready(2);
    let before = held.uid_of("vault-0");
    let cordon = Cordon::begin(laptop.cluster);
    let begun = begin(&laptop, "statefulset/vault --replace-pods");
    until(Duration::from_secs(15), "the last pod's successor is there, and not ready", || {
        let (injected, ready) = (vault.injected(), vault.ready());
        if injected == ["vault-1"] && ready == ["vault-0"] {
            Ok(())
        } else {
            Err(format!("{injected:?} {ready:?}"))
        }
    });

    // It would be the other's turn, and nobody would make that one again.
    vault.kubectl("delete statefulset vault --wait=false").ok();
    drop(cordon);
    until(Duration::from_secs(30), "it is said why the other pod stays", || {
        let status = status(laptop.cluster);
        let mut pods = status.pods.iter().filter(|pod| pod.name == "vault-0");
        let reason = pods.find_map(|pod| pod.reason.as_deref()).unwrap_or_default();
        if reason == "its workload is being deleted" { Ok(()) } else { Err(format!("{status:#?}")) }
    });
    assert_eq!(held.uid_of("vault-0"), before, "a pod is lost");
    assert_eq!(vault.ready(), ["vault-0", "vault-1"]);

    held.let_go();
    until_gone(vault);
    drop(begun);
    laptop.run("tpd leave --all").ok();
}
