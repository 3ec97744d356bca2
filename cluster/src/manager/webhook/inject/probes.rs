//! What the kubelet asks of the app's ports: it must reach the app whatever is intercepted.

use std::collections::BTreeMap;

use serde_json::Value;
use tpd_api::inject::PROBE_PORTS;

use super::patch::Patch;

/// Ports that stand in for probed ones, by the probed port.
pub type StandIns = BTreeMap<u16, u16>;

/// Where a container says what the kubelet is to ask of it.
const HANDLERS: [&str; 5] =
    ["livenessProbe", "readinessProbe", "startupProbe", "lifecycle/postStart", "lifecycle/preStop"];

/// The ways to ask that name a port.
const ACTIONS: [&str; 3] = ["httpGet", "tcpSocket", "grpc"];

/// Points every probe at a port that stands in for its own.
///
/// # Errors
/// Tells that more ports are probed than there are stand-ins.
pub fn redirect(pod: &Value) -> Result<(Patch, StandIns), String> {
    let (mut patch, mut stand_ins) = (Patch::default(), StandIns::new());
    for target in targets(pod) {
        let next = PROBE_PORTS.start() + u16::try_from(stand_ins.len()).unwrap_or(u16::MAX);
        let stand_in = *stand_ins.entry(target.number).or_insert(next);
        if !PROBE_PORTS.contains(&stand_in) {
            return Err(format!("its probes use more than {} ports", PROBE_PORTS.len()));
        }
        patch.replace(target.path, stand_in);
    }
    Ok((patch, stand_ins))
}

/// Has probes that name their port give its number, since the name will lead to the agent.
#[must_use]
pub fn by_number(pod: &Value) -> Patch {
    let mut patch = Patch::default();
    for target in targets(pod).into_iter().filter(|target| target.named) {
        patch.replace(target.path, target.number);
    }
    patch
}

/// A port that the kubelet connects to.
struct Target {
    /// Where it is written.
    path: String,
    number: u16,
    named: bool,
}

fn targets(pod: &Value) -> Vec<Target> {
    let mut targets = Vec::new();
    for list in ["containers", "initContainers"] {
        let containers = pod["spec"][list].as_array();
        for (index, container) in containers.into_iter().flatten().enumerate() {
            for handler in HANDLERS {
                let at = format!("/{handler}");
                let Some(probe) = container.pointer(&at) else { continue };
                for action in ACTIONS {
                    if let Some((number, named)) = port(container, &probe[action]) {
                        let path = format!("/spec/{list}/{index}{at}/{action}/port");
                        targets.push(Target { path, number, named });
                    }
                }
            }
        }
    }
    targets
}

/// The port of an action, and whether it is given by name. One with a host of its own is not about this pod.
fn port(container: &Value, action: &Value) -> Option<(u16, bool)> {
    if action["host"].as_str().is_some_and(|host| !host.is_empty()) {
        return None;
    }
    let number =
        |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
    match &action["port"] {
        Value::String(name) => {
            let ports = container["ports"].as_array()?;
            let port = ports.iter().find(|port| port["name"] == **name)?;
            number(&port["containerPort"]).map(|port| (port, true))
        }
        value => number(value).map(|port| (port, false)),
    }
}
