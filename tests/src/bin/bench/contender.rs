//! Whoever carries traffic from the laptop to a Service, and those who need nobody to.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, copy, sink};
use tokio::process::Child;
use tokio::time::{sleep, timeout};

use crate::cpu::Involved;
use crate::intercept::{self, Case};
use crate::lab::{Lab, Place, Servers};
use crate::wireguard;

/// How long one may take until traffic flows. tpd's own promise is a second.
pub(crate) const START: Duration = Duration::from_secs(20);

/// Whose figures they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// No tunnel, on the node: the pod's own speed.
    Node,
    /// No tunnel, from the laptop to a NodePort: what a tunnel could reach at best.
    NodePort,
    Boringtun,
    Gotatun,
    PortForward,
    TpdUdp,
    TpdProxy,
    TpdForward,
    /// Requests from within the cluster to a workload, with and without tpd at it.
    Intercept(Case),
}

impl Contender {
    pub(crate) const ALL: [Self; 14] = [
        Self::Node,
        Self::NodePort,
        Self::Boringtun,
        Self::Gotatun,
        Self::PortForward,
        Self::TpdUdp,
        Self::TpdProxy,
        Self::TpdForward,
        Self::Intercept(Case::Passing),
        Self::Intercept(Case::NoAgent),
        Self::Intercept(Case::Idle),
        Self::Intercept(Case::HaProxy),
        Self::Intercept(Case::Udp),
        Self::Intercept(Case::Proxy),
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Node => "no tunnel, node to Service",
            Self::NodePort => "no tunnel, laptop to NodePort",
            Self::Boringtun => "boringtun-cli",
            Self::Gotatun => "gotatun-cli",
            Self::PortForward => "kubectl port-forward",
            Self::TpdUdp => "tpd --path udp",
            Self::TpdProxy => "tpd --path proxy",
            Self::TpdForward => "tpd --path forward",
            Self::Intercept(case) => case.name(),
        }
    }

    /// What it goes by on the command line, where all of intercepts is one word: their figures mean something only together.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::NodePort => "nodeport",
            Self::Boringtun => "boringtun",
            Self::Gotatun => "gotatun",
            Self::PortForward => "port-forward",
            Self::TpdUdp => "udp",
            Self::TpdProxy => "proxy",
            Self::TpdForward => "forward",
            Self::Intercept(_) => "intercept",
        }
    }

    /// What its traffic goes through in the cluster, by process name.
    fn components(self) -> &'static [&'static str] {
        match self {
            Self::Node | Self::NodePort | Self::Boringtun | Self::Gotatun => &[],
            Self::PortForward => &["kube-apiserver", "kubelet", "containerd"],
            Self::TpdUdp => &["tpd-manager"],
            Self::TpdProxy => &["tpd-manager", "kube-apiserver"],
            Self::TpdForward => &["tpd-manager", "kube-apiserver", "kubelet", "containerd"],
            Self::Intercept(case) => case.components(),
        }
    }

    /// Starts it and waits until traffic can flow.
    pub(crate) async fn start(self, lab: &Lab) -> Result<Running> {
        let began = Instant::now();
        let mut running = match self {
            Self::Node => Running::without_help(Place::Node, lab.services),
            Self::NodePort => Running::without_help(Place::Laptop, lab.node_ports),
            // With its default of four threads it is slower on two cores.
            Self::Boringtun => {
                tunnel(lab, "boringtun-cli", &["--foreground", "--disable-drop-privileges", "-t1"]).await?
            }
            Self::Gotatun => tunnel(lab, "gotatun", &["--foreground", "--disable-drop-privileges"]).await?,
            Self::PortForward => port_forward(lab).await?,
            Self::TpdUdp => tpd(lab, "udp").await?,
            Self::TpdProxy => tpd(lab, "proxy").await?,
            Self::TpdForward => tpd(lab, "forward").await?,
            Self::Intercept(case) => intercept::start(lab, case).await?,
        };
        running.ready.get_or_insert_with(|| began.elapsed());
        let processes = running.children.iter().filter_map(Child::id).collect();
        running.involved = Involved { processes, components: self.components(), node: lab.node };
        Ok(running)
    }
}

/// One that traffic can flow through.
#[derive(Debug)]
pub(crate) struct Running {
    /// Where its clients are.
    pub(crate) place: Place,
    /// What they connect to.
    pub(crate) servers: Servers,
    /// From its start until traffic could flow; as it says itself, where it does.
    pub(crate) ready: Option<Duration>,
    /// Whose processor time counts as its own.
    pub(crate) involved: Involved,
    /// Whether an iperf3 that sends gets to its end: `kubectl port-forward` breaks off when it closes its stream.
    pub(crate) iperf_up: bool,
    pub(crate) children: Vec<Child>,
    is_tpd: bool,
}

impl Running {
    pub(crate) fn without_help(place: Place, servers: Servers) -> Self {
        let involved = Involved::default();
        Self { place, servers, ready: None, involved, iperf_up: true, children: Vec::new(), is_tpd: false }
    }

    /// Ends it, and waits until it is gone.
    pub(crate) async fn stop(mut self, lab: &Lab) -> Result<()> {
        let mut result = Ok(());
        if self.is_tpd {
            result = lab.run(Place::Laptop, "tpd", &["down"]).await.map(drop);
        }
        for child in &mut self.children {
            child.kill().await?;
        }
        result
    }
}

async fn tunnel(lab: &Lab, program: &str, options: &[&str]) -> Result<Running> {
    let program = lab.file(&format!("target/bench/peers/bin/{program}"));
    let mut running = Running::without_help(Place::Laptop, lab.services);
    running.children = wireguard::start(lab, &program, options).await?;
    let began = Instant::now();
    while !answers(lab, running.place, running.servers.echo).await? {
        ensure!(began.elapsed() < START, "nothing comes through the tunnel");
    }
    Ok(running)
}

/// Whether a connection can be opened; a refusal is an answer too, but not this one.
pub(crate) async fn answers(lab: &Lab, place: Place, server: SocketAddr) -> Result<bool> {
    let outcome = lab.run(place, "tpd-echo", &["connect", &server.to_string(), "1"]).await?;
    Ok(outcome.starts_with("connected "))
}

/// One process for each Service, as it takes only one.
async fn port_forward(lab: &Lab) -> Result<Running> {
    let mut running = Running::without_help(Place::Laptop, lab.services);
    let servers = &mut running.servers;
    let all: [(&str, Vec<&mut SocketAddr>); 3] = [
        ("perf", vec![&mut servers.iperf]),
        ("echo", vec![&mut servers.echo, &mut servers.sink]),
        ("web", vec![&mut servers.web]),
    ];
    for (service, servers) in all {
        running.children.push(forward_one(lab, service, servers).await?);
    }
    running.iperf_up = false;
    Ok(running)
}

/// Forwards to the ports of a Service, and puts the local addresses in their place.
async fn forward_one(lab: &Lab, service: &str, servers: Vec<&mut SocketAddr>) -> Result<Child> {
    let mut child = lab
        .command(Place::Laptop, "kubectl")
        .args(["--kubeconfig", &lab.kubeconfig("admin"), "--namespace", "shop", "port-forward"])
        .args(["--address", "127.0.0.1", &format!("service/{service}")])
        .args(servers.iter().map(|server| format!(":{}", server.port())))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("its output is piped")?);
    for server in servers {
        let mut line = String::new();
        timeout(START, output.read_line(&mut line))
            .await
            .context("kubectl port-forward does not get ready")??;
        *server = parse_forwarding(&line).with_context(|| format!("kubectl port-forward says {line:?}"))?;
    }
    // It prints a line for each connection, and would stop at a full pipe.
    tokio::spawn(async move { copy(&mut output, &mut sink()).await });
    Ok(child)
}

/// `Forwarding from 127.0.0.1:41325 -> 5201`
fn parse_forwarding(line: &str) -> Option<SocketAddr> {
    line.strip_prefix("Forwarding from ")?.split_once(" -> ")?.0.parse().ok()
}

/// `tpd up` over one path, once that carries the session.
pub(crate) async fn tpd(lab: &Lab, path: &str) -> Result<Running> {
    let program = lab.file("target/release/tpd");
    ensure!(Path::new(&program).exists(), "target/release/tpd is missing: make build");
    let log = lab.file("target/bench/tpd.log");
    let file = File::create(&log)?;
    let child = lab
        .command(Place::Laptop, &program)
        .args(["up", "--foreground", "--namespace", "shop", "--path", path])
        // After an interruption it is taken down in good order, so that no session stays in the cluster.
        .kill_on_drop(false)
        .stdout(Stdio::from(file.try_clone()?))
        .stderr(Stdio::from(file))
        .spawn()?;
    let mut running = Running::without_help(Place::Laptop, lab.services);
    running.children.push(child);
    running.is_tpd = true;
    match connected(lab, &mut running.children[0], path, &log).await {
        Ok(ready) => running.ready = Some(ready),
        Err(error) => {
            // Best effort: the reason it failed says more than how its end went.
            let _ = running.stop(lab).await;
            return Err(error);
        }
    }
    Ok(running)
}

/// Waits until the wanted path carries the session, and returns how long `tpd up` says it took.
async fn connected(lab: &Lab, child: &mut Child, path: &str, log: &str) -> Result<Duration> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            bail!("tpd up ended ({status}); see {log}: {}", last_words(log));
        }
        let status = status(lab).await;
        if status.as_ref().is_some_and(|status| is_active(status, path)) {
            let ready = status.and_then(|status| status["readyMs"].as_u64());
            return ready.map(Duration::from_millis).context("tpd status has no readyMs");
        }
        if began.elapsed() > START {
            let seen = status.map_or_else(|| "nothing".to_owned(), |status| status["paths"].to_string());
            bail!("the {path} path does not carry the session after {} s; status: {seen}", START.as_secs());
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// What `tpd status` says.
pub(crate) async fn status(lab: &Lab) -> Option<Value> {
    let printed = lab.run(Place::Laptop, "tpd", &["status", "--output", "json"]).await.ok()?;
    serde_json::from_str(&printed).ok()
}

fn is_active(status: &Value, path: &str) -> bool {
    let carries = |entry: &Value| entry["kind"] == path && entry["active"] == true;
    status["phase"] == "connected"
        && status["paths"].as_array().is_some_and(|paths| paths.iter().any(carries))
}

fn last_words(log: &str) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.trim_end()
        .lines()
        .rev()
        .take(3)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect::<Vec<_>>()
        .join(" | ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn finds_the_port_that_kubectl_chose() {
        let address = parse_forwarding("Forwarding from 127.0.0.1:41325 -> 5201\n").unwrap();
        assert_eq!(address, SocketAddr::from(([127, 0, 0, 1], 41325)));
        assert_eq!(parse_forwarding("error: unable to listen"), None);
    }

    #[test]
    fn only_the_wanted_path_counts() {
        let status = json!({ "phase": "connected", "paths": [{ "kind": "proxy", "active": true }, { "kind": "udp", "active": false }] });
        assert!(is_active(&status, "proxy"));
        assert!(!is_active(&status, "udp"));
        assert!(!is_active(&json!({ "phase": "connecting" }), "proxy"));
    }
}
