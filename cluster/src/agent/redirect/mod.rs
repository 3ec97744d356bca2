//! The redirect: nftables rules that lead intercepted ports to the agent for as long as it says so. The init container writes
//! them, over netlink, with an encoder of just what they need.

pub mod apply;
mod expression;
mod netlink;
pub mod table;

use anyhow::Context as _;
use tracing::{info, warn};

use self::table::StandIn;

/// Sets the redirect up. Where the kernel does not have it, the pod starts all the same, and the agent reports why it can
/// intercept nothing; but not if that left probes without an answer.
///
/// # Errors
/// Fails where probes depend on a redirect that cannot be had.
pub fn run(probes: &[StandIn]) -> anyhow::Result<()> {
    match apply::apply(probes) {
        Ok(()) => info!(probes = probes.len(), "the redirect is set up"),
        Err(error) if probes.is_empty() => {
            warn!(%error, "no redirect: nothing can be intercepted in this pod")
        }
        Err(error) => return Err(error).context("set up the redirect, which the pod's probes come by"),
    }
    Ok(())
}
