//! What is set up at the moment, and how to undo it.

use std::time::Duration;

use tokio::time::timeout;
use tpd_netstack::client::Lane;

use super::board::Board;
use crate::dns::Dns;
use crate::kube::session::Sessions;
use crate::net::network::Network;

/// Time to tell the cluster that we leave. It notices by itself if it can't be told, so a cluster that is gone must
/// not hold up a person who wants the laptop back.
const FAREWELL: Duration = Duration::from_secs(2);

/// The connection's parts, in the order in which they came to be.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// Where our session is, and its name.
    pub(crate) session: Option<(Sessions, String)>,
    pub(crate) lane: Option<Lane>,
    pub(crate) network: Option<Network>,
    pub(crate) dns: Option<Dns>,
}

impl Live {
    /// Undoes everything, the laptop's side first. Answers what could not be undone.
    pub(crate) async fn undo(self, board: &Board) -> Vec<String> {
        let (here, there) = tokio::join!(undo_here(self.dns, self.network, self.lane), leave(self.session));
        board.attach_dns(None);
        board.attach_lane(None);
        here.into_iter().chain(there).collect()
    }
}

async fn undo_here(dns: Option<Dns>, network: Option<Network>, lane: Option<Lane>) -> Vec<String> {
    let mut leftovers = Vec::new();
    if let Some(dns) = dns
        && let Err(error) = dns.restore().await
    {
        leftovers.push(format!("the system's resolver was not restored: {error}"));
    }
    // The TUN's routes vanish with it; the exceptions are on other devices.
    if let Some(network) = network
        && let Err(error) = network.netlink.remove_ours().await
    {
        leftovers.push(format!("routes (ip route show proto 116) were not removed: {error}"));
    }
    if let Some(lane) = lane {
        let _ = tokio::task::spawn_blocking(move || lane.shutdown()).await;
    }
    leftovers
}

async fn leave(session: Option<(Sessions, String)>) -> Option<String> {
    let (sessions, name) = session?;
    // Bounded as a whole: before the call a credential plugin may have to run.
    let why = match timeout(FAREWELL, sessions.delete(&name, FAREWELL)).await {
        Ok(deleted) => deleted.err()?.to_string(),
        Err(_) => format!("no answer within {} s", FAREWELL.as_secs()),
    };
    Some(format!(
        "ClientSession {}/{name} is still in the cluster; the manager deletes it once it has not heard from this machine for a while ({why})",
        sessions.namespace
    ))
}
