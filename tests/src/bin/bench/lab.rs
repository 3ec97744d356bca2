//! Where it is measured: the local cluster, and a laptop of our own beside the cluster's.
//!
//! ```text
//! laptop 192.0.2.2 ── 192.0.2.1 WAN 203.0.113.1 ── 203.0.113.2 node (pods, Services)
//! ```
//!
//! The laptop is a network, mount and UTS namespace without a name, so it is gone when its last process is. Every process
//! started here dies with this one, however this one ends.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// Documentation ranges (RFC 5737, RFC 3849), as on the cluster's own links.
const WAN: [&str; 2] = ["192.0.2.1/24", "2001:db8:3::1/64"];
const LAPTOP: [&str; 2] = ["192.0.2.2/24", "2001:db8:3::2/64"];
const GATEWAY: [&str; 2] = ["192.0.2.1", "2001:db8:3::1"];

/// The laptop's address on its link.
pub(crate) const LAPTOP_ADDRESS: &str = "192.0.2.2";
/// The node's address, as `tests/kubernetes/lib.sh` has it.
pub(crate) const NODE_ADDRESS: &str = "203.0.113.2";

/// The workloads that are intercepted.
const INTERCEPTED: &str = "tests/bench/intercept.yaml";

/// Far longer than any of these commands takes on a busy machine.
const SHORT_COMMAND: Duration = Duration::from_secs(20);

/// Where a command runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The laptop.
    Laptop,
    /// The node's network, with the laptop's files.
    Node,
    /// Between the two; the administrator sits here.
    Wan,
}

/// Addresses of what is measured against, all in pods.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Servers {
    pub(crate) iperf: SocketAddr,
    pub(crate) echo: SocketAddr,
    /// Reads and reads.
    pub(crate) sink: SocketAddr,
    pub(crate) web: SocketAddr,
}

/// The cluster with our laptop plugged in.
#[derive(Debug)]
pub(crate) struct Lab {
    repository: PathBuf,
    /// `TPD_CLUSTER`, as `tests/kubernetes/lib.sh` has it: a dash and a name, or nothing.
    suffix: String,
    /// First process of the node.
    pub(crate) node: u32,
    laptop: Child,
    laptop_pid: u32,
    /// The Services by their cluster addresses.
    pub(crate) services: Servers,
    /// The same pods by the node's ports.
    pub(crate) node_ports: Servers,
}

impl Lab {
    /// Plugs a laptop into the running cluster (`tests/kubernetes/cluster up`, with its samples).
    pub(crate) async fn open(repository: &Path) -> Result<Self> {
        let suffix = std::env::var("TPD_CLUSTER").map(|name| format!("-{name}")).unwrap_or_default();
        let node = repository.join(format!("target/kubernetes/run{suffix}/tpd-node{suffix}.pid"));
        let node = std::fs::read_to_string(node).context("the cluster is not running: make cluster")?;
        let laptop = start_laptop(repository).await.context("cannot make the laptop's namespaces")?;
        let laptop_pid = laptop.id().context("the laptop's first process ended at once")?;
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let nowhere = Servers { iperf: unknown, echo: unknown, sink: unknown, web: unknown };
        let mut lab = Self {
            repository: repository.to_owned(),
            suffix,
            node: node.trim().parse()?,
            laptop,
            laptop_pid,
            services: nowhere,
            node_ports: nowhere,
        };
        lab.connect().await.context("cannot connect the laptop to the WAN")?;
        lab.admin(&["apply", "--filename", &lab.file("tests/bench/node-ports.yaml")]).await?;
        lab.services = Servers {
            iperf: lab.service("shop", "perf", 5201).await?,
            echo: lab.service("shop", "echo", 7).await?,
            sink: lab.service("shop", "echo", 9).await?,
            web: lab.service("shop", "web", 80).await?,
        };
        let node: IpAddr = NODE_ADDRESS.parse()?;
        lab.node_ports = Servers {
            iperf: SocketAddr::new(node, 30201),
            echo: SocketAddr::new(node, 30007),
            sink: SocketAddr::new(node, 30009),
            web: SocketAddr::new(node, 30080),
        };
        Ok(lab)
    }

    /// Takes everything back: what it added to the cluster, and the laptop.
    pub(crate) async fn close(mut self) -> Result<()> {
        // Best effort: it runs only after an interruption, and the namespace goes in any case.
        let _ = self.run(Place::Laptop, "tpd", &["down"]).await;
        let _ = self.end_intercepts().await;
        let [services, intercepted] = [self.file("tests/bench/node-ports.yaml"), self.file(INTERCEPTED)];
        let files = ["--filename", &services, "--filename", &intercepted];
        let removed =
            self.admin(&[&["delete", "--ignore-not-found", "--wait=false"], &files[..]].concat()).await;
        self.laptop.kill().await?;
        removed.map(drop)
    }

    /// A file of the repository.
    pub(crate) fn file(&self, path: &str) -> String {
        self.repository.join(path).display().to_string()
    }

    /// The kubeconfig of `developer` or `admin`.
    pub(crate) fn kubeconfig(&self, who: &str) -> String {
        self.file(&format!("target/kubernetes/run{}/{who}.kubeconfig", self.suffix))
    }

    /// A file of the laptop, as this process can open it. Only below directories that are no symbolic links.
    pub(crate) fn laptop_file(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.laptop_pid))
    }

    /// A command that runs in a place and dies with this process.
    pub(crate) fn command(&self, place: Place, program: &str) -> Command {
        let target = format!("--target={}", self.laptop_pid);
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter"]);
        match place {
            Place::Laptop => command.args([&target, "--mount", "--uts", "--net"]),
            Place::Node => {
                command.args([&target, "--mount", &format!("--net=/run/netns/tpd-node{}", self.suffix)])
            }
            Place::Wan => command.arg(format!("--net=/run/netns/tpd-wan{}", self.suffix)),
        };
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(["--", program])
            .env(
                "PATH",
                format!("{}:{}:{path}", self.file("target/release"), self.file("target/kubernetes/bin")),
            )
            .env("KUBECONFIG", self.kubeconfig("developer"))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// Runs a command to its end and returns what it printed.
    pub(crate) async fn run(&self, place: Place, program: &str, arguments: &[&str]) -> Result<String> {
        self.run_for(SHORT_COMMAND, place, program, arguments).await
    }

    /// The same, with a limit of one's own.
    pub(crate) async fn run_for(
        &self,
        limit: Duration,
        place: Place,
        program: &str,
        arguments: &[&str],
    ) -> Result<String> {
        let mut command = self.command(place, program);
        let output = timeout(limit, command.args(arguments).output())
            .await
            .with_context(|| format!("{program} was not done after {} s", limit.as_secs()))??;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(printed);
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}): {} {}", output.status, first_line(&complaint), first_line(&printed))
    }

    /// Runs a hidden command of this program.
    pub(crate) async fn run_self(&self, limit: Duration, place: Place, arguments: &[&str]) -> Result<String> {
        let program = std::env::current_exe()?.display().to_string();
        self.run_for(limit, place, &program, arguments).await
    }

    /// kubectl as the administrator.
    pub(crate) async fn admin(&self, arguments: &[&str]) -> Result<String> {
        let kubeconfig = self.kubeconfig("admin");
        let mut all = vec!["--kubeconfig", &kubeconfig];
        all.extend_from_slice(arguments);
        self.run(Place::Wan, "kubectl", &all).await
    }

    /// The workloads that are intercepted, in nobody's intercept yet.
    pub(crate) async fn deploy_intercepted(&self) -> Result<()> {
        self.admin(&["apply", "--filename", &self.file(INTERCEPTED)]).await?;
        self.end_intercepts().await
    }

    /// Ends what a run that was killed has left of them.
    async fn end_intercepts(&self) -> Result<()> {
        let fields = "jsonpath={range .items[*]}{.metadata.name}={.spec.workload.name} {end}";
        let all = self.admin(&["--namespace", "store", "get", "intercepts", "--output", fields]).await?;
        let left = all.split_whitespace().filter_map(|entry| entry.strip_suffix("=bench-web"));
        for name in left {
            self.admin(&["--namespace", "store", "delete", "intercept", "--ignore-not-found", name]).await?;
        }
        Ok(())
    }

    /// A new iperf3 server: one whose test was cut off in the middle may wait for the rest of it for good.
    pub(crate) async fn renew_iperf(&self) -> Result<()> {
        self.admin(&["--namespace", "shop", "rollout", "restart", "deployment/perf"]).await?;
        self.admin(&["--namespace", "shop", "rollout", "status", "deployment/perf", "--timeout=15s"]).await?;
        Ok(())
    }

    /// The first cluster address of a Service.
    pub(crate) async fn service(&self, namespace: &str, name: &str, port: u16) -> Result<SocketAddr> {
        let template = "jsonpath={.spec.clusterIP}";
        let address = self
            .admin(&["--namespace", namespace, "get", "service", name, "--output", template])
            .await
            .context("the sample workloads are missing (tests/kubernetes/cluster samples)")?;
        Ok(SocketAddr::new(address.trim().parse()?, port))
    }

    async fn connect(&self) -> Result<()> {
        let pid = self.laptop_pid.to_string();
        // Left by a run that was killed a moment ago, while its namespace is still going.
        let _ = self.run(Place::Wan, "ip", &["link", "delete", "bench"]).await;
        let link = ["link", "add", "bench", "type", "veth", "peer", "name", "eth0", "netns", &pid];
        self.run(Place::Wan, "ip", &link).await?;
        // tpd tells laptops apart by their names too, and the cluster's own laptop may be connected.
        self.run(Place::Laptop, "hostname", &["bench"]).await?;
        self.ip(Place::Laptop, "link set lo up").await?;
        for (place, device, [v4, v6]) in [(Place::Wan, "bench", WAN), (Place::Laptop, "eth0", LAPTOP)] {
            self.ip(place, &format!("address add {v4} dev {device}")).await?;
            self.ip(place, &format!("address add {v6} dev {device} nodad")).await?;
            self.ip(place, &format!("link set {device} up")).await?;
        }
        for gateway in GATEWAY {
            self.ip(Place::Laptop, &format!("route add default via {gateway}")).await?;
        }
        Ok(())
    }

    /// `ip` with arguments that contain no spaces of their own.
    pub(crate) async fn ip(&self, place: Place, arguments: &str) -> Result<()> {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        self.run(place, "ip", &arguments).await.map(drop)
    }
}

/// The cluster's own laptop is made the same way: its /etc, /var and /run are in memory.
async fn start_laptop(repository: &Path) -> Result<Child> {
    let laptop = Command::new("setpriv")
        .args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--propagation",
            "private",
            "--",
        ])
        .arg(repository.join("tests/kubernetes/laptop-init.sh"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let pid = laptop.id().context("it ended at once")?;
    let deadline = Instant::now() + SHORT_COMMAND;
    // The script's last act is to become `sleep`.
    while std::fs::read_to_string(format!("/proc/{pid}/comm")).context("it ended early")?.trim() != "sleep" {
        ensure!(Instant::now() < deadline, "it is not ready after {} s", SHORT_COMMAND.as_secs());
        sleep(Duration::from_millis(10)).await;
    }
    Ok(laptop)
}

fn first_line(text: &str) -> &str {
    text.trim_start().lines().next().unwrap_or_default()
}
