//! The redirect: nftables rules that lead intercepted ports to the agent for as long as it says so. The init container writes
//! them, over netlink, with an encoder of just what they need.

pub mod apply;
mod expression;
mod netlink;
pub mod table;

use tracing::{info, warn};

use self::table::StandIn;

/// Sets the redirect up. Where the kernel does not have it, the pod starts all the same: the agent leads probes to the app, and
/// reports why it can intercept nothing.
pub fn run(probes: &[StandIn]) {
    match apply::apply(probes) {
        Ok(()) => info!(probes = probes.len(), "the redirect is set up"),
        Err(error) => warn!(%error, "no redirect: nothing can be intercepted in this pod"),
    }
}
