//! The Events by which other people learn why pods of theirs come and go.

use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::MANAGER;
use tpd_tests::{Cluster, Laptop, Local, Workload, is_laptop, pause, until};

use crate::store::{ALL, LOCAL, answered_by, connected};

/// What the manager says of an object: reasons and notes, and how often each was said.
fn said(cluster: &Cluster, about: &Value) -> Vec<String> {
    let events = cluster.object("events.events.k8s.io -n store");
    let of = |event: &&Value| event["reportingController"] == MANAGER && event["regarding"]["uid"] == *about;
    let mut said: Vec<_> = (events["items"].as_array().into_iter().flatten().filter(of))
        .map(|event| format!("{} {} {}", event["reason"], event["note"], event["series"]["count"]))
        .collect();
    said.sort_unstable();
    said
}

/// Waits until something with these words has been said of an object for each of these reasons.
#[track_caller]
fn until_said(cluster: &Cluster, about: &Value, reasons: &[&str], words: &[&str]) {
    until(Duration::from_secs(10), &format!("events {reasons:?} with {words:?}"), || {
        let said = said(cluster, about);
        let is_said = |reason: &&str| {
            let reason = format!("\"{reason}\"");
            said.iter().any(|one| one.starts_with(&reason) && words.iter().all(|word| one.contains(word)))
        };
        if reasons.iter().all(is_said) { Ok(()) } else { Err(format!("{said:#?}")) }
    });
}

fn uid(cluster: &Cluster, object: &str) -> Value {
    cluster.object(&format!("{object} -n store"))["metadata"]["uid"].clone()
}

/// The intercept of a workload.
fn intercept_of(cluster: &Cluster, workload: &str) -> Value {
    let list = cluster.object("intercepts -n store");
    let mut intercepts = list["items"].as_array().into_iter().flatten();
    let found = intercepts.find(|one| one["spec"]["workload"]["name"] == workload);
    found.expect("the workload is intercepted").clone()
}

#[test]
fn who_has_a_pod_replaced_is_told_on_the_pod_and_on_its_workload() {
    let laptop = Laptop::take();
    let cluster = laptop.cluster;
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let told = Workload::deploy(cluster, "told", 1, &json!({}));
    let old = told.until_ready(1).remove(0);
    let (pod, deployment) = (uid(cluster, &format!("pod {old}")), uid(cluster, "deployment told"));

    let intercepted = laptop.intercept("store", "told", ALL);
    intercepted.until_covered(1);
    let intercept = intercept_of(cluster, "told");
    let name = intercept["metadata"]["name"].as_str().expect("it has a name");
    let owner = intercept["spec"]["owner"].as_str().expect("it has an owner");
    let named = format!("Intercept store/{name} of {owner}");
    let intercept = &intercept["metadata"]["uid"];
    until_said(cluster, &pod, &["PodReleased", "PodEvicted"], &[&named, "needs an agent"]);
    until_said(cluster, &deployment, &["PodReleased", "PodEvicted"], &[&named, &old]);
    until_said(cluster, &deployment, &["Intercepted"], &[&named]);
    until_said(cluster, intercept, &["NoAgent", "Active"], &["deployment/told"]);
    cluster.kubectl("-n store describe deployment told").ok().says(&["PodEvicted", &named]);
    cluster.kubectl(&format!("-n store describe intercept {name}")).ok().says(&["Active", MANAGER]);

    // Its counts change, and so its status is written again and again.
    let before = [&pod, &deployment, intercept].map(|about| said(cluster, about));
    for _ in 0..4 {
        assert!(is_laptop(&answered_by(&laptop, &told.url(), "")));
        pause(Duration::from_secs(1));
    }
    let after = [&pod, &deployment, intercept].map(|about| said(cluster, about));
    assert_eq!(after, before, "an intercept to which nothing happens is talked of");

    intercepted.leave();
    until_said(cluster, &deployment, &["InterceptEnded"], &[&named]);
}
