//! The watches, and what of each object is kept.

use std::net::IpAddr;
use std::time::Duration;

use futures::stream::{BoxStream, select_all};
use futures::{Stream, StreamExt as _};
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tpd_api::session::ClientSession;
use tpd_api::{MANAGER, OVERLAY_PORT};
use tracing::{info, warn};

use super::cluster::{Change, Kind, Session};
use super::config::Config;
use super::endpoints::{Node, Replica, UdpService};
use super::registry::Request;

/// Seconds after which the watch of sessions is renewed. An API server that vanished without a word is noticed five
/// seconds later at the latest, and meanwhile nobody new can connect; all other watches can wait for minutes.
const SESSIONS_TIMEOUT: u32 = 30;

/// Pause after a failed watch, first and longest. A restarted API server is served again at once; few replicas
/// with six watches each are no load worth waiting longer for.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// Every watch in one stream, which never ends.
pub fn all(client: &Client, config: &Config) -> impl Stream<Item = Change> + Send + Unpin + use<> {
    let labelled = || watch::Config::default().labels(&format!("app.kubernetes.io/name={MANAGER}"));
    let everything = watch::Config::default;
    let own = &config.namespace;
    let mut watches = vec![
        one(
            Kind::Sessions,
            Api::namespaced(client.clone(), own),
            everything().timeout(SESSIONS_TIMEOUT),
            |object| {
                map(object, &|object| Some(session(object))).map(|event| Change::Session(Box::new(event)))
            },
        ),
        one(Kind::Replicas, Api::namespaced(client.clone(), own), labelled(), |object| {
            map(object, &|object| Some(replica(object))).map(Change::Replica)
        }),
        one(Kind::Services, Api::namespaced(client.clone(), own), labelled(), |object| {
            map(object, &udp_service).map(Change::Service)
        }),
        one(Kind::Nodes, Api::all(client.clone()), everything(), |object| {
            map(object, &|object| Some(node(object))).map(Change::Node)
        }),
        one(Kind::ServiceCidrs, Api::all(client.clone()), everything(), |object| {
            map(object, &|object| Some(service_networks(object))).map(Change::ServiceCidr)
        }),
    ];
    if config.watch_pods {
        watches.push(one(Kind::Pods, Api::all(client.clone()), everything(), |object| {
            map(object, &own_addresses).map(Change::Pod)
        }));
    }
    select_all(watches)
}

fn one<K>(
    kind: Kind,
    api: Api<K>,
    config: watch::Config,
    change: impl Fn(Event<K>) -> Option<Change> + Send + 'static,
) -> BoxStream<'static, Change>
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    repeated(kind, api, config, change, move || Change::Denied(kind))
}

/// One watch, repeated for ever; its failures are logged when they begin and when they end. `denied` is said where the API
/// server will not give these objects.
pub(super) fn repeated<K, C>(
    kind: impl std::fmt::Debug + Send + 'static,
    api: Api<K>,
    config: watch::Config,
    change: impl Fn(Event<K>) -> Option<C> + Send + 'static,
    denied: impl Fn() -> C + Send + 'static,
) -> BoxStream<'static, C>
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
    C: Send + 'static,
{
    let mut failing = false;
    watch(api, config)
        .backoff(Pause::default())
        .filter_map(move |event| {
            let was_failing = std::mem::replace(&mut failing, event.is_err());
            let change = match event {
                Ok(event) => {
                    if was_failing {
                        info!(?kind, "watching again");
                    }
                    change(event)
                }
                Err(error) => {
                    if !was_failing {
                        warn!(?kind, %error, "cannot watch");
                    }
                    is_denial(&error).then(&denied)
                }
            };
            std::future::ready(change)
        })
        .boxed()
}

/// Whether waiting will not help: no permission (403), or a kind that this cluster does not have (404).
fn is_denial(error: &watcher::Error) -> bool {
    matches!(
        error,
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) if matches!(status.code, 403 | 404)
    )
}

/// Pauses that double from the first to the longest.
pub(super) struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self(PAUSE.0)
    }
}

impl Iterator for Pause {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0;
        self.0 = (pause * 2).min(PAUSE.1);
        Some(pause)
    }
}

impl Backoff for Pause {
    fn reset(&mut self) {
        self.0 = PAUSE.0;
    }
}

/// The event of the parts that are kept; `None` for an object that does not concern the manager.
fn map<K: Resource, T>(event: Event<K>, keep: &dyn Fn(K) -> Option<T>) -> Option<Event<(String, T)>> {
    keyed(event, |object| object.name_any(), keep)
}

/// The same, by another key than the name.
pub(super) fn keyed<K: Resource, T>(
    event: Event<K>,
    key: impl Fn(&K) -> String,
    keep: impl Fn(K) -> Option<T>,
) -> Option<Event<(String, T)>> {
    let named = |object: K| {
        let key = key(&object);
        keep(object).map(|item| (key, item))
    };
    Some(match event {
        Event::Apply(object) => Event::Apply(named(object)?),
        Event::Delete(object) => Event::Delete(named(object)?),
        Event::InitApply(object) => Event::InitApply(named(object)?),
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
    })
}

/// What is kept of a ClientSession.
#[must_use]
pub fn session(object: ClientSession) -> Session {
    let request = Request {
        name: object.name_any(),
        uid: object.uid().unwrap_or_default(),
        owner: object.spec.owner,
        host: object.spec.host,
        created: object.metadata.creation_timestamp.map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        keys: object.spec.public_keys,
        address: object.status.as_ref().and_then(|status| status.address),
    };
    Session {
        request,
        resource_version: object.metadata.resource_version.unwrap_or_default(),
        generation: object.metadata.generation,
        status: object.status,
    }
}

fn replica(pod: core::Pod) -> Replica {
    let status = pod.status.unwrap_or_default();
    let ready = status.conditions.iter().flatten().any(|one| one.type_ == "Ready" && one.status == "True");
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    Replica {
        name: pod.metadata.name.unwrap_or_default(),
        uid: pod.metadata.uid.unwrap_or_default(),
        node: pod.spec.and_then(|spec| spec.node_name),
        addresses: status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect(),
        ready,
        leaving: ended || pod.metadata.deletion_timestamp.is_some(),
    }
}

/// The Service's UDP port of the overlay; `None` for one that has none.
fn udp_service(service: core::Service) -> Option<UdpService> {
    let spec = service.spec?;
    let port = spec.ports.iter().flatten().find(|port| {
        port.protocol.as_deref() == Some("UDP")
            && (port.port == i32::from(OVERLAY_PORT) || port.name.as_deref() == Some("overlay"))
    })?;
    let ingress =
        service.status.and_then(|status| status.load_balancer).and_then(|balancer| balancer.ingress);
    Some(UdpService {
        port: u16::try_from(port.port).ok()?,
        node_port: port.node_port.and_then(|port| u16::try_from(port).ok()),
        balancers: ingress.into_iter().flatten().filter_map(|one| one.ip.or(one.hostname)).collect(),
        local: spec.external_traffic_policy.as_deref() == Some("Local"),
    })
}

fn node(node: core::Node) -> Node {
    let spec = node.spec.unwrap_or_default();
    let networks = spec.pod_cidrs.or_else(|| spec.pod_cidr.map(|one| vec![one]));
    let status = node.status.unwrap_or_default();
    let addresses = |kind: &str| {
        let addresses = status.addresses.iter().flatten().filter(|address| address.type_ == kind);
        addresses.filter_map(|address| address.address.parse().ok()).collect()
    };
    Node {
        external: addresses("ExternalIP"),
        internal: addresses("InternalIP"),
        pod_networks: networks.into_iter().flatten().filter_map(|network| parse(&network)).collect(),
    }
}

fn service_networks(object: ServiceCIDR) -> Vec<IpNet> {
    let networks = object.spec.and_then(|spec| spec.cidrs);
    networks.into_iter().flatten().filter_map(|network| parse(&network)).collect()
}

fn parse(network: &str) -> Option<IpNet> {
    network.parse::<IpNet>().map(|network| network.trunc()).ok()
}

/// A pod without all that a Pod may hold: there can be ten thousand in a list.
#[derive(Clone, Debug, Deserialize, Resource)]
#[resource(inherit = core::Pod)]
struct PodAddresses {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: PodNetwork,
    #[serde(default)]
    status: PodIps,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodNetwork {
    host_network: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PodIps {
    #[serde(rename = "podIPs")]
    pod_ips: Vec<core::PodIP>,
}

/// A pod on its node's network has its node's address, which is not published.
fn own_addresses(pod: PodAddresses) -> Option<Vec<IpAddr>> {
    (!pod.spec.host_network).then(|| pod.status.pod_ips.iter().filter_map(|ip| ip.ip.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::{PodAddresses, node, own_addresses, replica, udp_service};

    #[test]
    fn a_pod_of_the_manager() {
        let pod = |status: Value, deleted: Option<&str>| {
            let metadata = json!({ "name": "tpd-manager-0", "uid": "u", "deletionTimestamp": deleted });
            let spec = json!({ "nodeName": "n", "containers": [] });
            replica(from_value(json!({ "metadata": metadata, "spec": spec, "status": status })).unwrap())
        };
        let running = json!({
            "phase": "Running",
            "podIPs": [{ "ip": "10.244.0.7" }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        });
        let ready = pod(running.clone(), None);
        assert!(ready.ready && !ready.leaving);
        assert_eq!(ready.node.as_deref(), Some("n"));
        assert!(pod(running, Some("2026-01-01T00:00:00Z")).leaving);
        assert!(!pod(json!({ "phase": "Pending" }), None).ready);
        assert!(pod(json!({ "phase": "Failed" }), None).leaving);
    }

    #[test]
    fn a_service_of_a_replica() {
        let service = |spec: Value, status: Value| {
            udp_service(from_value(json!({ "spec": spec, "status": status })).unwrap())
        };
        let port = json!({ "name": "overlay", "port": 51820, "protocol": "UDP", "nodePort": 31000 });
        let found = service(
            json!({ "ports": [port] }),
            json!({ "loadBalancer": { "ingress": [{ "hostname": "lb.example" }, { "ip": "198.51.100.7" }] } }),
        );
        let found = found.unwrap();
        assert_eq!((found.port, found.node_port), (51820, Some(31000)));
        assert_eq!(found.balancers, ["lb.example", "198.51.100.7"]);
        let tcp = json!({ "name": "stream", "port": 8443, "protocol": "TCP" });
        assert_eq!(service(json!({ "ports": [tcp] }), json!({})), None);
    }

    #[test]
    fn a_node() {
        let node = node(
            from_value(json!({
                "spec": { "podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24", "fd00:10:244::/64"] },
                "status": { "addresses": [
                    { "type": "Hostname", "address": "n" },
                    { "type": "InternalIP", "address": "192.168.1.10" },
                    { "type": "ExternalIP", "address": "203.0.113.9" },
                ] },
            }))
            .unwrap(),
        );
        assert_eq!(node.pod_networks.len(), 2);
        assert_eq!((node.internal.len(), node.external.len()), (1, 1));
    }

    #[test]
    fn pods_on_their_nodes_network_have_no_address_of_their_own() {
        let pod = |host: bool| {
            from_value::<PodAddresses>(json!({
                "metadata": { "name": "p" }, "spec": { "hostNetwork": host, "containers": [] },
                "status": { "podIPs": [{ "ip": "10.244.0.9" }, { "ip": "fd00::9" }] },
            }))
            .unwrap()
        };
        assert_eq!(own_addresses(pod(false)).unwrap().len(), 2);
        assert_eq!(own_addresses(pod(true)), None);
        assert!(own_addresses(from_value(json!({ "metadata": {} })).unwrap()).unwrap().is_empty());
    }
}
