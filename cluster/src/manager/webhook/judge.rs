//! Whether an intercept can be, and if not, why: what a developer reads at once instead of waiting for nothing.
//!
//! Pure: the intercept and what is known in, a verdict out. Codes are HTTP's: 403 where no intercept can be, 404 for what does
//! not exist, 409 for a conflict, 412 where the pods can have no agents, 422 for what makes no sense.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::Timestamp;
use tpd_api::filter::{Filter, Match};
use tpd_api::inject::{DISABLED, INJECT};
use tpd_api::intercept::{FoundPort, Intercept, InterceptSpec, Mode, Workload};

use super::inject::{SYSTEM_NAMESPACE, restriction};
use super::nearest::nearest;
pub use super::review::Refusal;
use crate::manager::intercepts::objects::{Pod, Service};
use crate::manager::intercepts::ports;

/// Most workloads that are listed where none was meant.
const LISTED: usize = 10;

/// An intercept that somebody asks for, or asks to change.
#[derive(Clone, Debug)]
pub struct Change {
    /// Its namespace.
    pub namespace: String,
    /// As it would be.
    pub asked: Intercept,
    /// As it was.
    pub before: Option<Intercept>,
}

/// What an intercept is judged by.
#[derive(Clone, Debug)]
pub struct Known {
    /// Labels of its namespace.
    pub labels: BTreeMap<String, String>,
    /// The managers' namespace.
    pub managers: String,
    /// Whose its session is; `None` if there is no such session.
    pub session_owner: Option<String>,
    /// Services of its namespace.
    pub services: Vec<Service>,
    /// Intercepts of its namespace, itself among them where it exists.
    pub others: Vec<Intercept>,
    /// Its workload, if there is one of that kind and name.
    pub found: Option<Found>,
    /// Every workload of the namespace, where there is none of that kind and name.
    pub workloads: Vec<Workload>,
    /// The time.
    pub now: Timestamp,
}

/// A workload.
#[derive(Clone, Debug)]
pub struct Found {
    /// What its pods are like.
    pub pod: Pod,
    /// The workload that it is only a part of.
    pub belongs_to: Option<Workload>,
    /// Whether it is a Deployment that starts no pod beside an old one.
    pub stands_alone: bool,
}

/// The verdict.
///
/// # Errors
/// Says why the intercept cannot be.
pub fn judge(change: &Change, known: &Known) -> Result<(), Refusal> {
    let spec = &change.asked.spec;
    covered(&change.namespace, known)?;
    own_session(spec, known)?;
    sensible(spec, known)?;
    let pod = capable(change, known)?;
    let services = leading_to(pod, &known.services);
    let ports = find_ports(spec, pod, &services)?;
    reachable(change, known, pod, &services, &ports)?;
    free(change, known, pod, &services, &ports)
}

/// Whether agents are put into pods of the namespace at all.
fn covered(namespace: &str, known: &Known) -> Result<(), Refusal> {
    if namespace == SYSTEM_NAMESPACE || namespace == known.managers {
        let message = format!(
            "no agents are put into pods of namespace {namespace}, which the cluster or tpd itself lives in"
        );
        return Err(Refusal::new(403, message));
    }
    if known.labels.get(INJECT).is_some_and(|value| value == DISABLED) {
        return Err(Refusal::new(
            403,
            format!(
                "namespace {namespace} has the label {INJECT}={DISABLED}, so no agents are put into its pods; who may change \
                 it: kubectl label namespace {namespace} {INJECT}-"
            ),
        ));
    }
    Ok(())
}

fn own_session(spec: &InterceptSpec, known: &Known) -> Result<(), Refusal> {
    match &known.session_owner {
        Some(owner) if *owner == spec.owner => Ok(()),
        Some(owner) => Err(Refusal::new(
            403,
            format!("session {} belongs to {owner}, not to {}", spec.session, spec.owner),
        )),
        None => Err(Refusal::new(
            404,
            format!(
                "there is no session {} for the traffic to go to; connect with: sudo tpd up",
                spec.session
            ),
        )),
    }
}

fn sensible(spec: &InterceptSpec, known: &Known) -> Result<(), Refusal> {
    let refuse = |message: String| Err(Refusal::new(422, message));
    if let Err(error) = spec.filter.compile() {
        return refuse(error.to_string());
    }
    if spec.expires_at.as_ref().is_some_and(|time| time.0 <= known.now) {
        return refuse("the time at which it is to end is over already".to_owned());
    }
    let overlay: BTreeSet<_> = spec.ports.iter().map(|port| (port.overlay_port, port.protocol)).collect();
    if overlay.len() < spec.ports.len() {
        return refuse("two of its ports arrive at the same overlay port".to_owned());
    }
    Ok(())
}

/// What the pods are like, if they can have agents.
fn capable<'a>(change: &Change, known: &'a Known) -> Result<&'a Pod, Refusal> {
    let workload = &change.asked.spec.workload;
    let Some(found) = &known.found else {
        return Err(Refusal::new(404, missing(&change.namespace, workload, &known.workloads)));
    };
    if let Some(owner) = &found.belongs_to {
        return Err(Refusal::new(422, format!("{workload} is a part of {owner}; intercept that")));
    }
    let refuse = |message: String| Err(Refusal::new(412, message));
    if found.pod.host_network {
        return refuse(format!(
            "the pods of {workload} are on their nodes' network (hostNetwork), where no agent can stand before them"
        ));
    }
    if found.pod.opted_out {
        return refuse(format!(
            "the pods of {workload} have {INJECT}={DISABLED}, so they get no agent; take that out of the pod template"
        ));
    }
    Ok(&found.pod)
}

fn missing(namespace: &str, wanted: &Workload, workloads: &[Workload]) -> String {
    let there_is = wanted.absent_from(namespace);
    let same_name: Vec<_> =
        workloads.iter().filter(|one| one.name == wanted.name).map(ToString::to_string).collect();
    if !same_name.is_empty() {
        return format!("{there_is}, but {}", same_name.join(" and "));
    }
    let near = nearest(&wanted.name, workloads.iter().map(|one| one.name.as_str()));
    let near: Vec<_> = near
        .iter()
        .filter_map(|name| workloads.iter().find(|one| one.name == **name))
        .map(ToString::to_string)
        .collect();
    if !near.is_empty() {
        return format!("{there_is}; did you mean {}?", near.join(" or "));
    }
    match workloads {
        [] => format!("{there_is}, nor any other workload"),
        all => {
            let some: Vec<_> = all.iter().take(LISTED).map(ToString::to_string).collect();
            let more = if all.len() > LISTED { ", …" } else { "" };
            format!("{there_is}; there are {}{more}", some.join(", "))
        }
    }
}

fn leading_to<'a>(pod: &Pod, services: &'a [Service]) -> Vec<&'a Service> {
    let selects = |service: &&Service| {
        let selector = &service.selector;
        !selector.is_empty() && selector.iter().all(|(name, value)| pod.labels.get(name) == Some(value))
    };
    services.iter().filter(selects).collect()
}

fn find_ports(spec: &InterceptSpec, pod: &Pod, services: &[&Service]) -> Result<Vec<FoundPort>, Refusal> {
    let mut found: Vec<FoundPort> = Vec::with_capacity(spec.ports.len());
    for mapping in &spec.ports {
        let code = if mapping.port.is_some() { 404 } else { 422 };
        let port = ports::find(pod, services, mapping)
            .map_err(|complaint| Refusal::new(code, format!("{}: {complaint}", spec.workload)))?;
        if found.iter().any(|other| key(other) == key(&port)) {
            return Err(Refusal::new(422, format!("port {} of {} is named twice", port.port, spec.workload)));
        }
        found.push(port);
    }
    Ok(found)
}

fn key(port: &FoundPort) -> (u16, tpd_api::agent::Protocol) {
    (port.port, port.protocol)
}

/// Whether an agent can stand before these ports where nothing may be redirected. A pod that exists has its agent or has none.
fn reachable(
    change: &Change,
    known: &Known,
    pod: &Pod,
    services: &[&Service],
    ports: &[FoundPort],
) -> Result<(), Refusal> {
    let Some(standard) = restriction(&known.labels) else { return Ok(()) };
    let out_of_reach = |port: &&FoundPort| !ports::swappable(pod, services, port.port, port.protocol);
    match ports.iter().find(out_of_reach) {
        Some(port) if pod.entry.is_none() => Err(Refusal::new(
            412,
            format!(
                "namespace {} enforces the Pod Security Standard {standard}, where an agent can only stand before ports that \
                 every Service names; let the Services' targetPort be the name of port {} of {}",
                change.namespace, port.port, change.asked.spec.workload
            ),
        )),
        _ => Ok(()),
    }
}

/// Whether nobody else has the same requests.
fn free(
    change: &Change,
    known: &Known,
    pod: &Pod,
    services: &[&Service],
    ports: &[FoundPort],
) -> Result<(), Refusal> {
    let ours = &change.asked.spec;
    if ours.mode == Mode::Wiretap {
        return Ok(());
    }
    for other in &known.others {
        let theirs = &other.spec;
        let over = theirs.expires_at.as_ref().is_some_and(|time| time.0 <= known.now);
        let same = other.metadata.name == change.asked.metadata.name;
        if same || over || theirs.mode == Mode::Wiretap || theirs.workload != ours.workload {
            continue;
        }
        let has = |port: &&FoundPort| {
            let theirs = theirs.ports.iter().filter_map(|mapping| ports::find(pod, services, mapping).ok());
            theirs.into_iter().any(|other| key(&other) == key(port))
        };
        if let Some(port) = ports.iter().find(has)
            && ours.filter.overlaps(&theirs.filter)
        {
            return Err(Refusal::new(409, conflict(ours, other, port)));
        }
    }
    Ok(())
}

fn conflict(ours: &InterceptSpec, other: &Intercept, port: &FoundPort) -> String {
    let theirs = &other.spec;
    let name = other.metadata.name.as_deref().unwrap_or_default();
    let since = other.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let mut ways: Vec<_> = theirs
        .filter
        .headers
        .iter()
        .filter(|one| one.r#match == Match::Exact)
        .take(1)
        .map(|one| format!("--header {}=VALUE with a value other than `{}`", one.name, one.value))
        .collect();
    if !theirs.filter.paths.is_empty() {
        ways.push(format!("a --path outside of {}", theirs.filter.paths.join(" and ")));
    }
    if !theirs.filter.methods.is_empty() {
        ways.push("another --method".to_owned());
    }
    if !theirs.filter.grpc.is_empty() {
        ways.push("another --grpc".to_owned());
    }
    ways.push("another port".to_owned());
    ways.push("--wiretap".to_owned());
    let end =
        if theirs.owner == ours.owner { format!("; or end it: tpd leave {name}") } else { String::new() };
    format!(
        "{} intercepts {} of port {} of {} (intercept {name}, since {since}), and a request could be meant for both. No \
         conflict is: {}{end}",
        theirs.owner,
        share(&theirs.filter),
        port.port,
        theirs.workload,
        ways.join(", or "),
    )
}

/// What a filter takes, in words.
fn share(filter: &Filter) -> String {
    let mut parts: Vec<_> = filter
        .headers
        .iter()
        .map(|one| match one.r#match {
            Match::Exact => format!("header {}={}", one.name, one.value),
            Match::Prefix => format!("header {}={}…", one.name, one.value),
            Match::Regex => format!("header {}=~{}", one.name, one.value),
        })
        .collect();
    let any = |what: &str, list: &[String]| format!("{what} {}", list.join(" or "));
    if !filter.paths.is_empty() {
        parts.push(any("path", &filter.paths));
    }
    if !filter.methods.is_empty() {
        parts.push(any("method", &filter.methods));
    }
    if !filter.grpc.is_empty() {
        let calls: Vec<_> = filter
            .grpc
            .iter()
            .map(|one| {
                one.method.as_ref().map_or_else(|| one.service.clone(), |it| format!("{}/{it}", one.service))
            })
            .collect();
        parts.push(any("gRPC", &calls));
    }
    if parts.is_empty() {
        "all traffic".to_owned()
    } else {
        format!("the requests with {}", parts.join(" and "))
    }
}
