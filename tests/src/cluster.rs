//! The local Kubernetes cluster (`tests/kubernetes/`), seen by its administrator.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;

use crate::run::{Run, Script};
use crate::wait::until;

/// Namespace of the manager.
const MANAGER_NAMESPACE: &str = tpd_api::MANAGER_NAMESPACE;

/// Replicas that the tests start from.
const REPLICAS: u32 = 2;

/// Booting from built binaries takes 20 s, and building them (a fresh clone without `make cluster`) 15 minutes.
const BOOT: Duration = Duration::from_secs(30 * 60);

/// The cluster; there is one, booted and with tpd installed when it is first asked for.
#[derive(Debug)]
pub struct Cluster {
    root: PathBuf,
    suffix: String,
}

impl Cluster {
    /// Boots it if need be, loads the samples, and installs tpd as built by `make build images`.
    ///
    /// # Panics
    /// If any of that fails.
    pub fn get() -> &'static Self {
        static CLUSTER: OnceLock<Cluster> = OnceLock::new();
        CLUSTER.get_or_init(|| {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the workspace");
            let suffix = std::env::var("TPD_CLUSTER").map_or(String::new(), |name| format!("-{name}"));
            let cluster = Self { root: root.to_owned(), suffix };
            let ctl = "tests/kubernetes/cluster";
            for command in ["up", "samples", "install"] {
                cluster.machine(&format!("{ctl} {command}")).limit(BOOT).run().ok();
            }
            cluster
        })
    }

    /// A script on the machine itself, in the root of the repository. It cannot reach the cluster's networks.
    #[must_use]
    pub fn machine(&self, script: &str) -> Script {
        Script::new(&["env"], &self.root, script)
    }

    /// A script on a laptop: `laptop` or `laptop2`.
    #[must_use]
    pub fn laptop(&self, name: &str, script: &str) -> Script {
        Script::new(&["tests/kubernetes/cluster", name, "--"], &self.root, script)
    }

    /// Runs a script in the WAN's network namespace.
    #[must_use]
    #[track_caller]
    pub fn wan(&self, script: &str) -> Run {
        self.wan_script(script).run()
    }

    /// The same, to be adjusted first.
    #[must_use]
    pub fn wan_script(&self, script: &str) -> Script {
        let launcher = ["ip", "netns", "exec", &format!("tpd-wan{}", self.suffix)];
        Script::new(&launcher, &self.root, script)
    }

    /// Runs a script in the node's namespaces.
    #[must_use]
    #[track_caller]
    pub fn node(&self, script: &str) -> Run {
        self.node_script(script).run()
    }

    /// The same, to be adjusted first.
    #[must_use]
    pub fn node_script(&self, script: &str) -> Script {
        Script::new(&["tests/kubernetes/cluster", "node", "--"], &self.root, script)
    }

    /// Name of a network namespace: `laptop`, `laptop2`, `wan` or `node`.
    #[must_use]
    pub fn netns(&self, place: &str) -> String {
        format!("tpd-{place}{}", self.suffix)
    }

    /// Path of a kubeconfig: `admin`, `developer` or `developer2`.
    #[must_use]
    pub fn kubeconfig(&self, who: &str) -> String {
        self.state(&format!("{who}.kubeconfig")).display().to_string()
    }

    /// Path of the key that the API server signs ServiceAccounts' tokens with (ECDSA over P-256).
    #[must_use]
    pub fn service_account_key(&self) -> String {
        self.state("pki/service-account.key").display().to_string()
    }

    /// A program of the tests, wherever it is to run.
    #[must_use]
    pub fn program(&self, name: &str) -> String {
        self.root.join("target/kubernetes/bin").join(name).display().to_string()
    }

    pub(crate) fn state(&self, file: &str) -> PathBuf {
        self.root.join(format!("target/kubernetes/run{}", self.suffix)).join(file)
    }

    /// Runs `kubectl` as the administrator.
    #[must_use]
    #[track_caller]
    pub fn kubectl(&self, arguments: &str) -> Run {
        self.machine(&format!("tests/kubernetes/cluster kubectl {arguments}"))
            .limit(Duration::from_secs(180))
            .run()
    }

    /// What `kubectl get` answers.
    ///
    /// # Panics
    /// If there is no such object.
    #[must_use]
    #[track_caller]
    pub fn object(&self, arguments: &str) -> Value {
        let run = self.kubectl(&format!("get {arguments} --output json"));
        serde_json::from_str(run.ok().out()).expect("kubectl prints JSON")
    }

    /// Applies a manifest.
    ///
    /// # Panics
    /// If the API server refuses it.
    #[track_caller]
    pub fn apply(&self, manifest: &Value) {
        let apply = "tests/kubernetes/cluster kubectl apply --server-side --force-conflicts -f -";
        self.machine(apply).input(manifest.to_string()).run().ok();
    }

    /// The cluster addresses of a Service, `namespace/name`, IPv4 first.
    #[must_use]
    pub fn service(&self, service: &str) -> Vec<IpAddr> {
        let (namespace, name) = service.split_once('/').expect("namespace/name");
        addresses(&self.object(&format!("service {name} -n {namespace}"))["spec"]["clusterIPs"])
    }

    /// Whether the node's rules for Services have an address: of a Service, or of a pod behind one.
    #[must_use]
    #[track_caller]
    pub fn leads_to(&self, address: IpAddr) -> bool {
        let rules = self.node("nft list table ip kube-proxy; nft list table ip6 kube-proxy");
        names(rules.ok().out(), address)
    }

    /// Waits until the node leads nobody any more to those of `addresses` that no pod with the label has: for as long as it does,
    /// the cluster itself breaks connections, with and without tpd.
    #[track_caller]
    pub fn forgets(&self, namespace: &str, selector: &str, addresses: &[IpAddr]) {
        until(Duration::from_secs(20), "the node has forgotten the pods that are gone", || {
            let present = self.pods(namespace, selector).concat();
            let mut gone = addresses.iter().filter(|address| !present.contains(address));
            match gone.find(|address| self.leads_to(**address)) {
                Some(address) => Err(format!("it still leads to {address}")),
                None => Ok(()),
            }
        });
    }

    /// The addresses of every ready pod with a label, IPv4 first within each pod.
    #[must_use]
    pub fn pods(&self, namespace: &str, selector: &str) -> Vec<Vec<IpAddr>> {
        let pods =
            self.object(&format!("pods -n {namespace} -l {selector} --field-selector status.phase=Running"));
        let items = pods["items"].as_array().expect("a list has items");
        items
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .map(|pod| {
                let ips = pod["status"]["podIPs"].as_array().expect("a running pod has addresses");
                ips.iter().map(|ip| address(&ip["ip"])).collect()
            })
            .collect()
    }

    /// Kills the API server for good.
    pub fn stop_api_server(&self) {
        self.machine("tests/kubernetes/cluster stop kube-apiserver").run().ok();
    }

    /// Brings it back and waits until it answers. Kubernetes' own controllers and proxies are started anew: they may pause for a
    /// minute after an outage, and the tests that come next are not about that.
    pub fn start_api_server(&self) {
        self.machine("tests/kubernetes/cluster start kube-apiserver").run().ok();
        until(Duration::from_secs(60), "the API server is back", || {
            let run = self.kubectl("get --raw /readyz --request-timeout=2s");
            if run.code == Some(0) { Ok(()) } else { Err(run.stderr) }
        });
        let again = "for c in kube-controller-manager kube-scheduler kube-proxy; do \
                     tests/kubernetes/cluster stop $c; tests/kubernetes/cluster start $c; done";
        self.machine(again).run().ok();
    }

    /// Sets the number of manager replicas and waits until just those are ready.
    pub fn scale(&self, replicas: u32) {
        self.kubectl(&format!("-n {MANAGER_NAMESPACE} scale statefulset tpd-manager --replicas={replicas}"))
            .ok();
        self.managers_ready(replicas);
    }

    /// Waits until the managers are what they were asked to be.
    pub fn managers_ready(&self, replicas: u32) {
        until(Duration::from_secs(60), "every manager is ready, and no other", || {
            let pods =
                self.object(&format!("pods -n {MANAGER_NAMESPACE} -l app.kubernetes.io/name=tpd-manager"));
            let ready = |pod: &Value| {
                let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
                pod["metadata"]["deletionTimestamp"].is_null()
                    && conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True")
            };
            let pods = pods["items"].as_array().cloned().unwrap_or_default();
            if pods.len() == replicas as usize && pods.iter().all(ready) {
                Ok(())
            } else {
                Err(format!("{} pods", pods.len()))
            }
        });
    }

    /// Puts back what a failed test may have left: a stopped component, no managers or fewer, blocked traffic, a drained node.
    pub fn heal(&self) {
        if self.state("node/stopped/kube-apiserver").exists() {
            self.start_api_server();
        }
        let _ = self.wan(
            "for t in $(nft list tables | awk '/tpd-test-/ { print $3 }'); do nft delete table inet $t; done",
        );
        if self.object("node node")["spec"]["unschedulable"] == true {
            self.kubectl("uncordon node").ok();
        }
        if self.kubectl(&format!("get statefulset tpd-manager -n {MANAGER_NAMESPACE}")).code != Some(0) {
            self.machine("tests/kubernetes/cluster install").limit(Duration::from_secs(180)).run().ok();
        }
        let set = self.object(&format!("statefulset tpd-manager -n {MANAGER_NAMESPACE}"));
        if set["spec"]["replicas"] != REPLICAS || set["status"]["readyReplicas"] != REPLICAS {
            self.scale(REPLICAS);
        }
    }

    /// Whether a component's log, or any other state of the cluster, can be read at this path.
    #[must_use]
    pub fn log(&self, component: &str) -> String {
        fs::read_to_string(self.state(&format!("log/{component}.log"))).unwrap_or_default()
    }
}

fn addresses(list: &Value) -> Vec<IpAddr> {
    list.as_array().expect("a list of addresses").iter().map(address).collect()
}

fn address(text: &Value) -> IpAddr {
    text.as_str().and_then(|text| text.parse().ok()).expect("an address")
}

/// Whether a text has this very address, and not just a longer one that begins like it.
fn names(text: &str, address: IpAddr) -> bool {
    let part = |character: char| character.is_ascii_hexdigit() || ".:".contains(character);
    text.split(|character| !part(character)).any(|word| {
        word.trim_matches(':').parse() == Ok(address)
            || word.parse::<std::net::SocketAddr>().is_ok_and(|socket| socket.ip() == address)
    })
}
