//! Requests from the node to a workload in the namespace `store`: what an agent adds, and what an intercept carries.
//!
//! ```text
//! wrk, bench, tpd-echo (node) ── Service ──┬── bench-plain: nginx
//!                                          ├── bench-haproxy: HAProxy ── nginx
//!                                          └── bench-web: agent ─┬─ nginx
//!                                                                └─ manager ── tpd ── nginx (laptop, 127.0.0.1:9090)
//! ```

mod measure;

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::process::Child;

use crate::contender::{self, Running, START};
use crate::cpu;
use crate::lab::{Lab, Place, Servers};

pub(crate) use measure::measure;

/// The pods start within a few seconds, and `tpd intercept` returns as soon as it has been proved.
const LIMIT: Duration = Duration::from_secs(60);

/// The Debian package's, which the pods' image has too.
const NGINX: &str = "/usr/sbin/nginx";

/// No request of the benchmark has this header.
const NEVER: &str = "x-bench=never";

/// What is at the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    /// Nothing of tpd.
    NoAgent,
    /// An agent, and no intercept.
    Idle,
    /// An intercept whose filter no request matches.
    Passing,
    /// Nothing of tpd, and HAProxy in the pod, with a rule that no request matches: what a proxy costs.
    HaProxy,
    /// An intercept of everything, the laptop connected over UDP.
    Udp,
    /// The same over the API server's proxy.
    Proxy,
}

impl Case {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NoAgent => "no agent",
            Self::Idle => "agent, no intercept",
            Self::Passing => "agent, filter never matches",
            Self::HaProxy => "HAProxy in the agent's place",
            Self::Udp => "intercepted, --path udp",
            Self::Proxy => "intercepted, --path proxy",
        }
    }

    /// What requests go through in the cluster, by process name. Where the app serves, that is the agent at most.
    pub(crate) fn components(self) -> &'static [&'static str] {
        match self {
            Self::NoAgent => &[],
            Self::Idle | Self::Passing => &["tpd-agent"],
            Self::HaProxy => &["haproxy"],
            Self::Udp => &["tpd-agent", "tpd-manager"],
            Self::Proxy => &["tpd-agent", "tpd-manager", "kube-apiserver"],
        }
    }

    /// Whether requests go to the laptop.
    fn is_intercepted(self) -> bool {
        matches!(self, Self::Udp | Self::Proxy)
    }

    /// How the laptop is connected, where it is.
    fn path(self) -> Option<&'static str> {
        match self {
            Self::NoAgent | Self::Idle | Self::HaProxy => None,
            Self::Passing | Self::Udp => Some("udp"),
            Self::Proxy => Some("proxy"),
        }
    }

    fn workload(self) -> &'static str {
        match self {
            Self::NoAgent => "bench-plain",
            Self::HaProxy => "bench-haproxy",
            Self::Idle | Self::Passing | Self::Udp | Self::Proxy => "bench-web",
        }
    }

    /// Name of the process in the pod that requests go through before the app.
    fn proxy(self) -> Option<&'static str> {
        match self {
            Self::NoAgent => None,
            Self::HaProxy => Some("haproxy"),
            Self::Idle | Self::Passing | Self::Udp | Self::Proxy => Some("tpd-agent"),
        }
    }
}

/// Starts what the case needs, and waits until requests are answered as it says.
pub(crate) async fn start(lab: &Lab, case: Case) -> Result<Running> {
    let servers = workload(lab, case).await?;
    let mut running = match case.path() {
        Some(path) => contender::tpd(lab, path).await?,
        None => Running::without_help(Place::Node, servers),
    };
    (running.place, running.servers) = (Place::Node, servers);
    if case.path().is_none() {
        return Ok(running);
    }
    match intercept(lab, case).await {
        Ok(nginx) => running.children.push(nginx),
        Err(error) => {
            // Best effort: the reason it failed says more than how its end went.
            let _ = running.stop(lab).await;
            return Err(error);
        }
    }
    Ok(running)
}

/// Has the pods run, with no intercept of an earlier run that was killed, and finds the Service.
async fn workload(lab: &Lab, case: Case) -> Result<Servers> {
    lab.deploy_intercepted().await?;
    let deployment = format!("deployment/{}", case.workload());
    lab.admin(&["--namespace", "store", "rollout", "status", &deployment, "--timeout=15s"])
        .await
        .context("its pods do not start")?;
    let web = lab.service("store", case.workload(), 80).await?;
    let began = Instant::now();
    // The node learns of a Service some time after the API server.
    while !contender::answers(lab, Place::Node, web).await? {
        ensure!(began.elapsed() < START, "nothing answers at {}", case.workload());
    }
    Ok(Servers { web, ..lab.services })
}

/// The local process and the intercept that leads to it, as a developer types it; `tpd down` ends the intercept.
async fn intercept(lab: &Lab, case: Case) -> Result<Child> {
    let nginx = lab
        .command(Place::Laptop, NGINX)
        .args(["-e", "stderr", "-c", &lab.file("tests/bench/nginx.conf")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let began = Instant::now();
    while !contender::answers(lab, Place::Laptop, ([127, 0, 0, 1], 9090).into()).await? {
        ensure!(began.elapsed() < START, "nginx on the laptop does not listen");
    }
    let mut arguments =
        vec!["intercept", case.workload(), "--namespace", "store", "--port", "9090:http", "--yes"];
    if !case.is_intercepted() {
        arguments.extend(["--header", NEVER]);
    }
    lab.run_for(LIMIT, Place::Laptop, "tpd", &arguments).await?;
    Ok(nginx)
}

/// The processes of the proxy in the case's pod, of which there is one: their cgroup has its UID.
pub(crate) async fn proxies(lab: &Lab, case: Case) -> Result<Vec<u32>> {
    let Some(process) = case.proxy() else { return Ok(Vec::new()) };
    let (fields, label) = ("jsonpath={.items[*].metadata.uid}", format!("app={}", case.workload()));
    let pods = lab.admin(&["--namespace", "store", "get", "pods", "-l", &label, "--output", fields]).await?;
    let of_pod = |pid: &u32| {
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        pods.split_whitespace().any(|uid| cgroup.contains(uid))
    };
    Ok(cpu::named(process, lab.node).into_iter().filter(of_pod).collect())
}
