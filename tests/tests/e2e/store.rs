//! What tests of intercepts have in common: the workload `store/web`, and requests to it.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;
use tpd_tests::{Connection, Intercepted, Laptop, Load, Loading, Local, Run, Source, Workload, pause, until};

/// Where the local process listens: only there, so nothing but tpd reaches it.
pub(crate) const LOCAL: &str = "127.0.0.1:9090";

/// The header of the seed document's example.
pub(crate) const MARK: &str = "x-intercept=dev";

/// All traffic of the port `http` to the local process.
pub(crate) const ALL: &str = "--port 9090:http";

/// What bears the mark.
pub(crate) const MARKED: &str = "--port 9090:http --header x-intercept=dev";

/// The Ingress, from outside the cluster: a NodePort of the node.
pub(crate) const INGRESS: &str = "http://203.0.113.2:30081/";

/// Connects the laptop, over whichever path comes first; nobody intercepts anything yet, whatever an earlier test has left.
#[must_use]
#[track_caller]
pub(crate) fn connected(laptop: &Laptop) -> Connection<'_> {
    laptop.cluster.kubectl("-n store delete intercepts --all").ok();
    laptop.up("--namespace store")
}

/// The sample `store/web` with just so many replicas, as its HorizontalPodAutoscaler has them.
#[must_use]
#[track_caller]
pub(crate) fn web(laptop: &Laptop, replicas: usize) -> Workload {
    let web = Workload::sample(laptop.cluster, "store", "web");
    web.autoscale(replicas);
    web
}

/// New pods for the sample, which have no agent as long as nobody intercepts it.
pub(crate) fn without_agents(web: &Workload) {
    let pods = web.pods().len();
    web.kubectl("rollout restart deployment web").ok();
    web.kubectl("rollout status deployment web --timeout=60s").ok();
    until(Duration::from_secs(30), "no pod has an agent any more", || {
        let injected = web.injected();
        if injected.is_empty() { Ok(()) } else { Err(format!("{injected:?}")) }
    });
    web.until_ready(pods);
}

/// A local process, and an intercept of `store/web` that leads to it and that every pod has acknowledged.
#[must_use]
#[track_caller]
pub(crate) fn intercepted<'a>(
    laptop: &'a Laptop,
    web: &Workload,
    arguments: &str,
) -> (Local<'a>, Intercepted<'a>) {
    let local = Local::start(laptop, LOCAL);
    let pods = u32::try_from(web.pods().len()).expect("few pods");
    let intercept = laptop.intercept(&web.namespace, &web.name, arguments);
    intercept.until_covered(pods);
    (local, intercept)
}

/// Requests through the Ingress, from outside, one in ten with the mark: far from what the machine can do, so that what is
/// slow is so for another reason.
#[must_use]
pub(crate) fn through_the_ingress(laptop: &Laptop) -> Loading {
    let load = Load::on(Source::Outside, INGRESS).with("-header Host=store.example");
    load.with(&format!("-mark {MARK}")).connections(8).rate(400).start(laptop.cluster)
}

/// Requests from the node to the Service, over connections that are kept: one in ten with the mark.
#[must_use]
pub(crate) fn to_the_service(web: &Workload, connections: u32) -> Loading {
    let load = Load::on(Source::Node, &web.url()).with(&format!("-mark {MARK}"));
    load.connections(connections).rate(400).start(web.cluster)
}

/// Lets a load run for a moment.
pub(crate) fn moment() {
    pause(Duration::from_millis(700));
}

/// One request from the node with curl, and what the application that answered says of it.
#[must_use]
#[track_caller]
pub(crate) fn ask(laptop: &Laptop, url: &str, arguments: &str) -> Value {
    let run = curl(laptop, url, arguments);
    serde_json::from_str(run.ok().out()).unwrap_or_else(|error| panic!("no answer of ours: {error}\n{run}"))
}

/// One request from the node with curl.
#[must_use]
#[track_caller]
pub(crate) fn curl(laptop: &Laptop, url: &str, arguments: &str) -> Run {
    laptop.cluster.node(&format!("curl -sS --max-time 10 {arguments} '{url}'"))
}

/// Who answers one request.
#[must_use]
#[track_caller]
pub(crate) fn answered_by(laptop: &Laptop, url: &str, arguments: &str) -> String {
    ask(laptop, url, arguments)["server"].as_str().unwrap_or_default().to_owned()
}

/// The first address of a pod.
#[must_use]
#[track_caller]
pub(crate) fn pod_address(workload: &Workload, pod: &str) -> IpAddr {
    let pod = workload.cluster.object(&format!("pod {pod} -n {}", workload.namespace));
    pod["status"]["podIP"].as_str().and_then(|ip| ip.parse().ok()).expect("a running pod has an address")
}
