//! The redirect: nftables rules that lead intercepted ports to the agent for as long as it says so. The init container writes
//! them, over netlink, with an encoder of just what they need.

pub mod apply;
mod expression;
mod netlink;
pub mod table;

use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use self::apply::ApplyError;
use self::table::StandIn;

/// How often it is tried, and the pause between: a kernel that is short of memory may have some again.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(200);

/// Sets the redirect up. Where the kernel does not have it, the pod starts all the same: the agent leads probes to the app, and
/// reports why it can intercept nothing.
pub async fn run(probes: &[StandIn]) {
    let mut outcome = apply::apply(probes);
    for _ in 1..TRIES {
        if !outcome.as_ref().is_err_and(ApplyError::may_pass) {
            break;
        }
        sleep(PAUSE).await;
        outcome = apply::apply(probes);
    }
    match outcome {
        Ok(()) => info!(probes = probes.len(), "the redirect is set up"),
        Err(error) => warn!(%error, "no redirect: nothing can be intercepted in this pod"),
    }
}
