//! Keeps a connection in step with its session, its paths and the laptop for as long as it lasts.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tpd_api::local::Phase as LocalPhase;
use tpd_api::session::{ClientSession, ClientSessionStatus, Phase};
use tpd_netstack::client::Status as LaneStatus;

use super::live::Live;
use super::setup::{Connection, Setup};
use crate::intercept::Effects;
use crate::kube::follow::Change;
use crate::overlay;

/// Why following ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Somebody wants the laptop back.
    Stop,
    /// The data plane has to be set up anew, for this reason.
    Restart(String),
}

/// Follows until the end.
pub(crate) async fn run(
    setup: &Setup,
    live: &mut Live,
    connection: &mut Connection,
    stop: &CancellationToken,
) -> End {
    let Some(mut lane) = live.lane.as_ref().map(tpd_netstack::client::Lane::status) else {
        return End::Restart("there is no data plane".into());
    };
    let mut effects = setup.keeper.effects();
    let now = effects.borrow_and_update().clone();
    intercept(live, connection, &now).await;
    let mut carrying = Carrying::default();
    loop {
        let end = tokio::select! {
            () = stop.cancelled() => Some(End::Stop),
            change = connection.changes.recv() => match change {
                Some(change) => session_changed(setup, live, connection, change).await,
                None => Some(End::Restart("nobody follows the session".into())),
            },
            Ok(()) = effects.changed() => {
                let now = effects.borrow_and_update().clone();
                intercept(live, connection, &now).await;
                None
            }
            changed = lane.changed() => match changed {
                Ok(()) => {
                    let now = Carrying::of(&mut lane);
                    if now != carrying {
                        carrying = now;
                        carrier_changed(setup, live, connection, &carrying).await;
                    }
                    None
                }
                Err(_) => Some(End::Restart("the data plane ended".into())),
            },
        };
        if let Some(end) = end {
            return end;
        }
    }
}

/// What of the lane's state the rest of the daemon acts upon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Carrying {
    path: Option<overlay::PathKind>,
    pod: Option<String>,
}

impl Carrying {
    fn of(lane: &mut watch::Receiver<LaneStatus>) -> Self {
        let status = lane.borrow_and_update();
        Self { path: status.active, pod: status.peer.as_ref().map(|peer| peer.name.clone()) }
    }
}

async fn carrier_changed(setup: &Setup, live: &Live, connection: &mut Connection, carrying: &Carrying) {
    tracing::info!(path = ?carrying.path, pod = ?carrying.pod, "carrier");
    setup.board.update(|board| {
        (board.phase, board.problem) = match carrying.path {
            Some(_) => (LocalPhase::Connected, None),
            None => (LocalPhase::Reconnecting, Some("no path to the manager answers".into())),
        };
    });
    if let Some(pod) = &carrying.pod {
        connection.replicas.carried_by(pod);
        offer_udp(live, connection, Some(pod)).await;
    }
    // Without a path the laptop may be on another network by now, where the way to the API server is a different one.
    if carrying.path.is_none()
        && let Some(network) = &live.network
    {
        network.except(&connection.needs.all(), network.routed()).await;
    }
}

/// Has the data plane and DNS do what the intercepts need.
async fn intercept(live: &mut Live, connection: &Connection, effects: &Effects) {
    if let Some(lane) = &live.lane {
        lane.set_targets(overlay::targets(&effects.targets));
    }
    if let (Some(network), Some(agents)) = (&mut live.network, overlay::agents(&connection.status)) {
        network.reach(agents.into(), !effects.targets.is_empty()).await;
    }
    if let Some(dns) = &live.dns {
        dns.set_forwards(effects.forwards.clone());
    }
}

async fn offer_udp(live: &Live, connection: &mut Connection, pod: Option<&str>) {
    let candidates = overlay::udp_candidates(&connection.status.endpoints, pod).await;
    if candidates == connection.needs.udp {
        return;
    }
    connection.needs.udp = candidates;
    if let Some(network) = &live.network {
        network.except(&connection.needs.all(), network.routed()).await;
    }
    if let Some(lane) = &live.lane {
        lane.set_udp(connection.needs.udp.clone());
    }
}

async fn session_changed(
    setup: &Setup,
    live: &mut Live,
    connection: &mut Connection,
    change: Change<ClientSession>,
) -> Option<End> {
    match change {
        Change::Applied(session) => apply(setup, live, connection, *session).await,
        // The manager has forgotten our key and every flow with it, so there is nothing to keep.
        Change::Deleted => Some(End::Restart("the session was deleted".into())),
        Change::Unknown(failure) => {
            tracing::warn!(%failure, "session cannot be followed at the moment");
            setup.board.update(|board| board.problem = Some(failure.to_string()));
            None
        }
    }
}

async fn apply(
    setup: &Setup,
    live: &mut Live,
    connection: &mut Connection,
    session: ClientSession,
) -> Option<End> {
    let status = session.status.unwrap_or_default();
    match status.phase {
        Phase::Pending => return None,
        Phase::Rejected => {
            let why =
                status.conditions.first().map_or_else(String::new, |condition| condition.message.clone());
            setup
                .board
                .update(|board| board.problem = Some(format!("the manager rejects the session: {why}")));
            return None;
        }
        Phase::Ready => {}
    }
    setup.board.update(|board| {
        if board.phase == LocalPhase::Connected {
            board.problem = None;
        }
    });
    if needs_restart(&connection.status, &status) {
        return Some(End::Restart("the manager gave the session another identity".into()));
    }
    let before = std::mem::replace(&mut connection.status, status);
    if before.endpoints != connection.status.endpoints {
        connection.replicas.set(connection.status.endpoints.clone());
        let pod = setup.board.status().manager.map(|manager| manager.pod);
        offer_udp(live, connection, pod.as_deref()).await;
    }
    if before.networks != connection.status.networks {
        networks_changed(setup, live, connection).await;
    }
    None
}

/// Changes that the running data plane cannot take.
fn needs_restart(before: &ClientSessionStatus, now: &ClientSessionStatus) -> bool {
    before.address != now.address
        || before.gateway != now.gateway
        || before.manager_key != now.manager_key
        || before.zone != now.zone
}

async fn networks_changed(setup: &Setup, live: &mut Live, connection: &Connection) {
    let Some(network) = &mut live.network else { return };
    match setup.plan(&network.netlink, network.index, &connection.status).await {
        Ok(plan) => setup.route(network, &plan, &connection.needs).await,
        Err(failure) => {
            tracing::warn!(%failure, "new networks not routed");
            setup.board.update(|board| board.problem = Some(failure.to_string()));
            return;
        }
    }
    if let Some(lane) = &live.lane {
        lane.set_allowed(overlay::allowed(&connection.status));
    }
    if let Some(dns) = &live.dns {
        dns.set_networks(connection.status.networks.all().collect());
    }
}

#[cfg(test)]
mod tests {
    use tpd_api::overlay::DualAddress;

    use super::*;

    #[test]
    fn only_a_new_identity_needs_a_new_data_plane() {
        let before = ClientSessionStatus::default();
        let mut now = before.clone();
        now.networks.pods.push("10.244.0.0/16".parse().unwrap());
        assert!(!needs_restart(&before, &now));
        now.address =
            Some(DualAddress { ipv4: [100, 127, 0, 2].into(), ipv6: "fd74:7064::2".parse().unwrap() });
        assert!(needs_restart(&before, &now));
    }
}
