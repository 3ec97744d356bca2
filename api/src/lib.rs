//! The contracts of tpd, as serde types: what the cluster stores, what the daemon says to its
//! command line, and what a process exits with. No I/O happens here.

pub mod agent;
pub mod exit;
pub mod filter;
pub mod inject;
#[cfg(feature = "kubernetes")]
pub mod install;
#[cfg(feature = "kubernetes")]
pub mod intercept;
#[cfg(feature = "kubernetes")]
pub mod local;
pub mod overlay;
#[cfg(feature = "kubernetes")]
pub mod session;

/// API group of every custom resource of tpd.
pub const GROUP: &str = "tpd.dev";

/// Namespace that the manager is installed into unless the user says otherwise.
pub const MANAGER_NAMESPACE: &str = "tpd-system";

/// Name of the manager's StatefulSet; its pods are `tpd-manager-0`, `tpd-manager-1`, …
pub const MANAGER: &str = "tpd-manager";

/// TCP port of the manager's pods that carries overlay streams (plain HTTP Upgrade), and by TLS webhooks and agents.
pub const STREAM_PORT: u16 = 8443;

/// Name of the Service that leads the API server to the managers' webhooks, and agents to a first manager.
pub const WEBHOOK_SERVICE: &str = "tpd-webhook";

/// HTTP path of the overlay stream on [`STREAM_PORT`].
pub const STREAM_PATH: &str = "/v1/stream";

/// Token of the `Upgrade` header that turns an HTTP/1.1 connection into an overlay stream (RFC 9110, 7.8).
pub const STREAM_UPGRADE: &str = "tpd";

/// UDP port of the manager's pods that carries WireGuard datagrams.
pub const OVERLAY_PORT: u16 = 51820;

/// TCP port of the manager's pods for `/livez`, `/readyz` and `/metrics`.
pub const HEALTH_PORT: u16 = 8080;
