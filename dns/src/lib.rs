//! Cluster DNS on a laptop: a [`Proxy`] that answers cluster names over the tunnel and leaves everything else alone, and the ways in
//! which it becomes the system's resolver ([`takeover`]). Knows nothing of Kubernetes but the shape of its names.
//!
//! ```text
//! program ─► system resolver ─► Proxy ─ rules ─┬─► cache ─► gateway in the cluster (over the tunnel)
//!                                              ├─► a pod of an intercepted workload, for its domains
//!                                              └─► the resolver that was there before
//! ```

mod answer;
mod cache;
mod cluster;
mod core;
mod exchange;
mod forwards;
pub mod name;
mod prove;
mod proxy;
mod random;
mod recursion;
mod relay;
pub mod rules;
mod servers;
mod stats;
pub mod takeover;
mod upstream;
mod wire;

pub use prove::{ProofError, prove, prove_takeover};
pub use proxy::{BindError, Config, Handle, Proxy};
pub use rules::{Forward, Scope};
pub use stats::Stats;
