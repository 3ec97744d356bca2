//! What injection leaves in a pod: names, labels and ports that the webhook, the agent and the tests agree on.

use serde_json::{Value, json};

/// Label or annotation of a pod, or label of its namespace: [`ENABLED`] has every new pod get an agent, [`DISABLED`] none ever.
pub const INJECT: &str = "tpd.dev/inject";

/// A value of [`INJECT`].
pub const ENABLED: &str = "enabled";

/// A value of [`INJECT`].
pub const DISABLED: &str = "disabled";

/// Label of a namespace: `"true"` refuses intercepts without a filter there.
pub const REQUIRE_FILTER: &str = "tpd.dev/require-filter";

/// Annotation of an injected pod: how traffic comes to its agent, as JSON (see [`crate::agent::Entry`]).
pub const ENTRY: &str = "tpd.dev/entry";

/// Annotation of a pod that was not injected though it was to be: why.
pub const NOT_INJECTED: &str = "tpd.dev/not-injected";

/// Annotation of an injected pod: which installation of tpd its agent belongs to (see [`installation`]).
pub const INSTALLATION: &str = "tpd.dev/installation";

/// Annotation of a pod that its ReplicaSet was made to let go of: the value of its [`TEMPLATE_HASH`].
pub const RELEASED: &str = "tpd.dev/released";

/// Annotation of such a pod: when that was, RFC 3339.
pub const RELEASED_AT: &str = "tpd.dev/released-at";

/// Annotation of a pod that was given back to its ReplicaSet because it could not be replaced, as JSON: why, and for which
/// intercepts it is not to be tried again.
pub const KEPT: &str = "tpd.dev/kept";

/// Label that a Deployment's ReplicaSets and pods have: the last part of the ReplicaSet's name.
pub const TEMPLATE_HASH: &str = "pod-template-hash";

/// Name of the sidecar.
pub const AGENT: &str = "tpd-agent";

/// Name of the init container that sets the redirect up.
pub const INIT: &str = "tpd-redirect";

/// Name of the volume with the agent's token.
pub const TOKEN_VOLUME: &str = "tpd-token";

/// Where the token is mounted.
pub const TOKEN_DIRECTORY: &str = "/var/run/secrets/tpd.dev";

/// The agent's token, beneath [`TOKEN_DIRECTORY`].
pub const TOKEN_FILE: &str = "token";

/// User that the agent is to the kernel; its heartbeats are known by it.
pub const AGENT_UID: u32 = 1337;

/// First port of the agent, opened once it has its configuration: the pod's readiness waits for it. In a block that neither
/// service meshes (15000 to 15099) nor node ports (30000 and up) nor ephemeral ones (32768 and up) use.
pub const READY_PORT: u16 = 19_900;

/// Ports where intercepted traffic comes in, one for each intercepted port of the pod.
pub const ENTRY_PORTS: std::ops::RangeInclusive<u16> = 19_901..=19_949;

/// Ports that stand in for those of probes, one for each probed port: the kernel leads them to the app, past any intercept.
pub const PROBE_PORTS: std::ops::RangeInclusive<u16> = 19_950..=19_989;

/// Port of the agent's own resolver, on the pod's loopback.
pub const DNS_PORT: u16 = 19_999;

/// Port of the agent's overlay address that hands the environment of the app's container to a laptop: `GET /v1/environment`.
pub const AGENT_SERVICE_PORT: u16 = 2;

/// Environment variable of the agent: `address:port` of the managers' Service.
pub const MANAGER_ADDRESS: &str = "TPD_MANAGER";

/// Environment variable of the agent: the managers' CA, PEM.
pub const MANAGER_CA: &str = "TPD_CA";

/// Environment variable of the agent and of the init container: [`ENTRY`].
pub const AGENT_ENTRY: &str = "TPD_ENTRY";

/// Environment variable of the agent: how much memory it may have, bytes.
pub const MEMORY: &str = "TPD_MEMORY";

/// Environment variable of the agent and of the init container: probed ports as `STANDIN:PORT`, separated by commas.
pub const PROBES: &str = "TPD_PROBES";

/// Prefix of the environment variables that repeat the app container's; followed by the number of the container, `_`, and the
/// name that the app knows it by.
pub const APP_ENVIRONMENT: &str = "TPD_APP_";

/// Environment variable of the agent: names of the app's containers in the order of those numbers, separated by commas.
pub const APP_CONTAINERS: &str = "TPD_CONTAINERS";

/// What tells installations apart: a hash of the two things that an agent is given to find its managers by, their CA (PEM) and the
/// `address:port` of their Service. An agent of another installation never comes back, as it trusts another CA or dials an
/// address that nobody has.
///
/// FNV-1a: both sides are the managers' own, so nobody gains from a collision.
#[must_use]
pub fn installation(ca: &str, manager: &str) -> String {
    let bytes = manager.bytes().chain([0]).chain(ca.trim().bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// What a released pod was made from, by what its name was drawn from (`generateName`); `hash` is [`RELEASED`]. `None` for one that
/// merely carries the annotation, as a copy by `kubectl debug --copy-to` does.
#[must_use]
pub fn origin<'a>(generate_name: &'a str, hash: &str) -> Option<Origin<'a>> {
    let replica_set = generate_name.strip_suffix('-')?;
    let deployment = replica_set.strip_suffix(hash)?.strip_suffix('-').filter(|name| !name.is_empty())?;
    Some(Origin { replica_set, deployment })
}

/// What a pod was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin<'a> {
    /// Name of the ReplicaSet.
    pub replica_set: &'a str,
    /// Name of the Deployment.
    pub deployment: &'a str,
}

/// The change to a released pod's metadata, as a merge patch, that has its ReplicaSet adopt it again; `hash` is [`RELEASED`].
#[must_use]
pub fn given_back(hash: &str) -> Value {
    json!({
        "labels": { TEMPLATE_HASH: hash },
        "annotations": { RELEASED: Value::Null, RELEASED_AT: Value::Null },
    })
}

#[cfg(test)]
mod tests {
    use super::{Origin, given_back, installation, origin};

    #[test]
    fn installations_differ_by_authority_and_address() {
        let one = installation("PEM\n", "10.96.0.7:8443");
        assert_eq!(one.len(), 16);
        assert_eq!(one, installation("PEM", "10.96.0.7:8443"));
        assert_ne!(one, installation("OTHER", "10.96.0.7:8443"));
        assert_ne!(one, installation("PEM", "10.96.0.8:8443"));
    }

    #[test]
    fn a_released_pod_is_known_by_what_its_name_was_drawn_from() {
        let web = Origin { replica_set: "web-7d4b9", deployment: "web" };
        assert_eq!(origin("web-7d4b9-", "7d4b9"), Some(web));
        for (generate_name, hash) in [
            ("web-7d4b9", "7d4b9"),
            ("web-", "7d4b9"),
            ("-7d4b9-", "7d4b9"),
            ("7d4b9-", "7d4b9"),
            ("web-", ""),
        ] {
            assert_eq!(origin(generate_name, hash), None, "{generate_name} {hash}");
        }
    }

    #[test]
    fn a_pod_that_is_given_back_has_its_label_and_no_traces() {
        let change = given_back("7d4b9");
        assert_eq!(change["labels"]["pod-template-hash"], "7d4b9");
        let annotations = change["annotations"].as_object().unwrap();
        assert!(annotations.len() == 2 && annotations.values().all(serde_json::Value::is_null));
    }
}
