//! What can go wrong between laptop and cluster.

use crate::Cluster;

/// Traffic that the WAN drops for as long as this lives.
#[derive(Debug)]
pub struct Block {
    cluster: &'static Cluster,
    table: String,
}

impl Block {
    /// All UDP between laptop and cluster.
    #[must_use]
    pub fn udp(cluster: &'static Cluster) -> Self {
        Self::new(cluster, "udp", "forward", "meta l4proto udp drop")
    }

    /// All between laptop and cluster.
    #[must_use]
    pub fn everything(cluster: &'static Cluster) -> Self {
        Self::new(cluster, "everything", "forward", "drop")
    }

    /// The laptop's questions to its ordinary resolver.
    #[must_use]
    pub fn upstream_dns(cluster: &'static Cluster) -> Self {
        Self::new(cluster, "dns", "input", "iifname laptop meta l4proto { tcp, udp } th dport 53 drop")
    }

    fn new(cluster: &'static Cluster, name: &str, hook: &str, rule: &str) -> Self {
        let table = format!("tpd-test-{name}");
        cluster
            .wan(&format!(
                "nft 'table inet {table} {{ chain {hook} {{ type filter hook {hook} priority -10; {rule}; }}; }}'"
            ))
            .ok();
        Self { cluster, table }
    }
}

/// UDP from a pod that the managers' own network namespaces drop for as long as this lives: the pod hears nothing of it.
#[derive(Debug)]
pub struct DeafManagers(&'static Cluster);

impl DeafManagers {
    /// To UDP from this address.
    #[must_use]
    #[track_caller]
    pub fn to(cluster: &'static Cluster, pod: std::net::IpAddr) -> Self {
        let family = if pod.is_ipv4() { "ip" } else { "ip6" };
        let deaf = Self(cluster);
        let table = format!(
            "table inet tpd-test-deaf {{ chain input {{ type filter hook input priority -10; {family} saddr {pod} meta l4proto udp drop; }}; }}"
        );
        deaf.in_each(&format!("nft '{table}'")).ok();
        deaf
    }

    fn in_each(&self, command: &str) -> crate::Run {
        self.0.node(&format!("for p in $(pgrep -x tpd-manager); do nsenter -t $p -n {command}; done"))
    }
}

impl Drop for DeafManagers {
    fn drop(&mut self) {
        let _ = self.in_each("nft delete table inet tpd-test-deaf");
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let _ = self.cluster.wan(&format!("nft delete table inet {}", self.table));
    }
}
