//! A session's status, from what was decided about it and what is known of the cluster.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use tpd_api::overlay::DualAddress;
use tpd_api::session::{ClientSessionStatus, Endpoint, Networks, PROTOCOL, Phase};
use tpd_netstack::key::PublicKey;

use super::registry::Verdict;

/// What every session is told alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The managers' key.
    pub manager: PublicKey,
    /// The managers' overlay addresses.
    pub gateway: DualAddress,
    /// The cluster's networks.
    pub networks: Networks,
    /// The cluster's zone.
    pub zone: String,
}

/// Type of the one condition that the manager sets.
const READY: &str = "Ready";

impl Facts {
    /// The status that a session should have. Equal to `current` where nothing has changed, so that it need not be written.
    #[must_use]
    pub fn status(
        &self,
        verdict: &Verdict,
        endpoints: Vec<Endpoint>,
        generation: Option<i64>,
        current: Option<&ClientSessionStatus>,
        now: Timestamp,
    ) -> ClientSessionStatus {
        let (phase, address) = match verdict {
            Verdict::Ready(address) => (Phase::Ready, Some(*address)),
            Verdict::Rejected(_) => (Phase::Rejected, None),
        };
        ClientSessionStatus {
            phase,
            address,
            gateway: Some(self.gateway),
            manager_key: self.manager.to_string(),
            endpoints,
            networks: self.networks.clone(),
            zone: self.zone.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL,
            conditions: vec![condition(verdict, generation, current, now)],
        }
    }
}

/// The time is when `status` last changed, as the API conventions have it.
fn condition(
    verdict: &Verdict,
    observed_generation: Option<i64>,
    current: Option<&ClientSessionStatus>,
    now: Timestamp,
) -> Condition {
    let (status, reason, message) = match verdict {
        Verdict::Ready(address) => {
            ("True", "Assigned", format!("the laptop is {} and {}", address.ipv4, address.ipv6))
        }
        Verdict::Rejected(rejection) => ("False", rejection.reason(), rejection.to_string()),
    };
    let conditions = current.into_iter().flat_map(|current| &current.conditions);
    let same = conditions.into_iter().find(|old| old.type_ == READY && old.status == status);
    Condition {
        type_: READY.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        observed_generation,
        last_transition_time: same.map_or(Time(now), |old| old.last_transition_time.clone()),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use tpd_api::overlay::{DEFAULT_POOL_V4, DEFAULT_POOL_V6, gateway};
    use tpd_api::session::{Networks, Phase};
    use tpd_netstack::key::PublicKey;

    use super::Facts;
    use crate::manager::registry::{Rejection, Verdict};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_status_changes_only_with_its_cause() {
        let mut facts = Facts {
            manager: PublicKey([7; 32]),
            gateway: gateway(DEFAULT_POOL_V4, DEFAULT_POOL_V6),
            networks: Networks::default(),
            zone: "cluster.local".into(),
        };
        let ready = Verdict::Ready(facts.gateway);
        let first = facts.status(&ready, vec![], Some(1), None, at(1));
        assert_eq!((first.phase, first.conditions[0].status.as_str()), (Phase::Ready, "True"));
        assert_eq!(facts.status(&ready, vec![], Some(1), Some(&first), at(9)), first);

        facts.networks.pods.push("10.244.0.0/16".parse().unwrap());
        let second = facts.status(&ready, vec![], Some(1), Some(&first), at(9));
        assert_eq!(second.conditions, first.conditions);
        assert_ne!(second, first);

        let rejected = Verdict::Rejected(Rejection::TooManySessions { limit: 3 });
        let third = facts.status(&rejected, vec![], Some(1), Some(&second), at(9));
        assert_eq!((third.phase, third.address), (Phase::Rejected, None));
        assert_eq!(third.conditions[0].last_transition_time.0, at(9));
        assert_eq!(third.conditions[0].reason, "TooManySessions");
    }
}
