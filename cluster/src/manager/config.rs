//! What the manager is told: flags, or the environment that the StatefulSet sets.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::Parser;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tpd_api::install::default_agent_image;
use tpd_api::overlay::{self, DEFAULT_POOL_V4, DEFAULT_POOL_V6, DualAddress};
use tpd_api::{HEALTH_PORT, OVERLAY_PORT, STREAM_PORT};

use crate::log::LogFormat;

/// Puts laptops on the cluster's network.
#[derive(Clone, Debug, Parser)]
#[command(name = "tpd-manager", version)]
pub struct Config {
    /// Name of this pod.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,

    /// UID of this pod.
    #[arg(long, env = "POD_UID")]
    pub pod_uid: String,

    /// Namespace of this pod, and of the ClientSessions.
    #[arg(long, env = "POD_NAMESPACE", default_value = tpd_api::MANAGER_NAMESPACE)]
    pub namespace: String,

    /// Addresses of this pod: no session may dial them.
    #[arg(long, env = "POD_IPS", value_delimiter = ',')]
    pub pod_ips: Vec<IpAddr>,

    /// IPv4 addresses of the overlay.
    #[arg(long, env = "TPD_POOL_V4", default_value_t = DEFAULT_POOL_V4, value_parser = pool_v4)]
    pub pool_v4: Ipv4Net,

    /// IPv6 addresses of the overlay.
    #[arg(long, env = "TPD_POOL_V6", default_value_t = DEFAULT_POOL_V6, value_parser = pool_v6)]
    pub pool_v6: Ipv6Net,

    /// Pod networks beside those that are found.
    #[arg(long, env = "TPD_POD_NETWORKS", value_delimiter = ',')]
    pub pod_networks: Vec<IpNet>,

    /// Service networks beside those that are found.
    #[arg(long, env = "TPD_SERVICE_NETWORKS", value_delimiter = ',')]
    pub service_networks: Vec<IpNet>,

    /// Whether to list the cluster's pods, to find pod networks that no node declares.
    #[arg(long, env = "TPD_WATCH_PODS", default_value_t = true, action = clap::ArgAction::Set)]
    pub watch_pods: bool,

    /// The cluster's DNS zone, where this pod's resolv.conf does not tell it.
    #[arg(long, env = "TPD_ZONE")]
    pub zone: Option<String>,

    /// Seconds without a handshake after which a session is deleted.
    #[arg(long, env = "TPD_SESSION_TIMEOUT", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub session_timeout: u32,

    /// Most sessions that one user may have.
    #[arg(long, env = "TPD_SESSIONS_PER_OWNER", default_value_t = 32)]
    pub sessions_per_owner: usize,

    /// Image of the agent that is put into pods.
    #[arg(long, env = "TPD_AGENT_IMAGE", default_value_t = default_agent_image())]
    pub agent_image: String,

    /// When nodes pull it.
    #[arg(long, env = "TPD_AGENT_PULL_POLICY", default_value = "IfNotPresent")]
    pub agent_pull_policy: String,

    /// Where streams are accepted, and by TLS webhooks and agents.
    #[arg(long, env = "TPD_STREAM", default_value_t = any(STREAM_PORT))]
    pub stream: SocketAddr,

    /// Where WireGuard datagrams are accepted.
    #[arg(long, env = "TPD_OVERLAY", default_value_t = any(OVERLAY_PORT))]
    pub overlay: SocketAddr,

    /// Where health and metrics are served.
    #[arg(long, env = "TPD_HEALTH", default_value_t = any(HEALTH_PORT))]
    pub health: SocketAddr,

    /// The resolver's configuration, as a pod has it.
    #[arg(long, env = "TPD_RESOLV_CONF", default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,

    /// What is logged: a level, or directives such as `info,tpd_netstack=debug`.
    #[arg(long, env = "TPD_LOG", default_value = "info")]
    pub log: String,

    /// How it is logged.
    #[arg(long, env = "TPD_LOG_FORMAT", default_value = "json")]
    pub log_format: LogFormat,
}

impl Config {
    /// The overlay's own addresses.
    #[must_use]
    pub fn gateway(&self) -> DualAddress {
        overlay::gateway(self.pool_v4, self.pool_v6)
    }
}

/// Every address of either family: an IPv6 socket takes IPv4 too.
fn any(port: u16) -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, port).into()
}

/// A pool of at least a /24: one gateway and a team of laptops.
fn pool_v4(text: &str) -> Result<Ipv4Net, String> {
    let pool: Ipv4Net = text.parse().map_err(|_| "not an IPv4 network such as 100.127.0.0/16".to_owned())?;
    match pool.prefix_len() {
        8..=24 => Ok(pool.trunc()),
        _ => Err("the pool must be between a /8 and a /24".to_owned()),
    }
}

/// A pool with room for every host number of the IPv4 one.
fn pool_v6(text: &str) -> Result<Ipv6Net, String> {
    let pool: Ipv6Net = text.parse().map_err(|_| "not an IPv6 network such as fd74:7064::/64".to_owned())?;
    match pool.prefix_len() {
        16..=96 => Ok(pool.trunc()),
        _ => Err("the pool must be between a /16 and a /96".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::Config;

    fn parse(arguments: &[&str]) -> Result<Config, clap::Error> {
        let required = ["tpd-manager", "--pod-name", "tpd-manager-0", "--pod-uid", "u"];
        Config::try_parse_from(required.iter().chain(arguments))
    }

    #[test]
    fn lists_and_pools_are_read() {
        let config = parse(&["--pod-ips", "10.244.0.7,fd00::7", "--pool-v4", "100.64.3.0/16"]).unwrap();
        assert_eq!(config.pod_ips.len(), 2);
        assert_eq!(config.pool_v4.to_string(), "100.64.0.0/16");
        assert_eq!(config.gateway().ipv4.to_string(), "100.64.0.1");
        assert_eq!(config.overlay.to_string(), "[::]:51820");
    }

    #[test]
    fn pools_that_cannot_work_are_refused() {
        assert!(parse(&["--pool-v4", "10.0.0.0/30"]).is_err());
        assert!(parse(&["--pool-v6", "fd00::/120"]).is_err());
        assert!(parse(&["--session-timeout", "0"]).is_err());
    }
}
