//! What is known of one intercept.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio_util::task::AbortOnDropHandle;
use tpd_api::intercept::{Intercept, InterceptStatus, Protocol};
use tpd_api::local::{self, InterceptRequest, LocalPort};
use tpd_api::overlay::DNS_PORT;
use tpd_dns::Forward;

use crate::intercept::state::Kept;
use crate::kube::follow::Change;

/// An intercept, as it was asked for and as it fares.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) request: InterceptRequest,
    /// Of the request's ports, in order.
    pub(super) overlay_ports: Vec<u16>,
    /// Whether somebody else has ended it.
    pub(super) is_over: bool,
    pub(super) follower: Option<AbortOnDropHandle<()>>,
    /// Generation of the latest request; 0 until the API server has said.
    generation: i64,
    status: Option<InterceptStatus>,
    expires_at: Option<Time>,
    silent: Vec<SocketAddr>,
    problem: Option<String>,
}

impl Record {
    pub(super) fn new(request: InterceptRequest, overlay_ports: Vec<u16>) -> Self {
        Self {
            request,
            overlay_ports,
            is_over: false,
            follower: None,
            generation: 0,
            status: None,
            expires_at: None,
            silent: Vec::new(),
            problem: None,
        }
    }

    /// The API server has it.
    pub(super) fn begin(
        &mut self,
        applied: &Intercept,
        silent: BTreeSet<SocketAddr>,
        follower: AbortOnDropHandle<()>,
    ) {
        self.learn(applied);
        self.silent = silent.into_iter().collect();
        self.follower = Some(follower);
    }

    pub(super) fn heard(&mut self, change: Change<Intercept>) {
        match change {
            Change::Applied(intercept) => {
                self.problem = None;
                self.learn(&intercept);
            }
            Change::Deleted => {
                self.is_over = true;
                self.problem = Some(self.end().to_owned());
            }
            Change::Unknown(failure) => self.problem = Some(failure.to_string()),
        }
    }

    fn learn(&mut self, intercept: &Intercept) {
        self.generation = self.generation.max(intercept.metadata.generation.unwrap_or_default());
        self.status.clone_from(&intercept.status);
        self.expires_at.clone_from(&intercept.spec.expires_at);
    }

    /// Why it is gone, as far as can be told from here.
    fn end(&self) -> &'static str {
        match &self.expires_at {
            Some(time) if time.0 <= Timestamp::now() => "its time was up",
            _ => "somebody deleted it in the cluster",
        }
    }

    /// Takes note of where nothing listens.
    pub(super) fn checked(&mut self, silent: &BTreeSet<SocketAddr>) {
        let own = self.request.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
        let own: BTreeSet<SocketAddr> = own.map(|port| port.local).collect();
        self.silent = own.intersection(silent).copied().collect();
    }

    /// The request's ports with their overlay ports.
    pub(super) fn mappings(&self) -> Vec<(LocalPort, u16)> {
        self.request.ports.iter().cloned().zip(self.overlay_ports.iter().copied()).collect()
    }

    pub(super) fn targets(&self) -> impl Iterator<Item = ((Protocol, u16), SocketAddr)> {
        let ports = self.request.ports.iter().zip(&self.overlay_ports);
        ports.map(|(port, &overlay)| ((port.protocol, overlay), port.local))
    }

    /// The domains that its pods resolve, while there is such a pod.
    pub(super) fn forwards(&self) -> Vec<Forward> {
        let pods = self.status.iter().flat_map(|status| &status.pods);
        let ready = pods.filter(|pod| pod.ready && pod.acknowledged);
        let servers: Arc<[SocketAddr]> = ready
            .filter_map(|pod| pod.address)
            .map(|address| SocketAddr::new(IpAddr::V6(address), DNS_PORT))
            .collect();
        if servers.is_empty() {
            return Vec::new();
        }
        let forward = |domain: &String| Forward { domain: domain.clone(), servers: Arc::clone(&servers) };
        self.request.dns.iter().map(forward).collect()
    }

    pub(super) fn describe(&self) -> local::Intercept {
        let observed = self.status.as_ref().map(|status| status.observed_generation);
        local::Intercept {
            request: self.request.clone(),
            status: self.status.clone(),
            current: observed.is_some_and(|observed| observed >= self.generation),
            silent: self.silent.clone(),
            over: self.is_over,
            problem: self.problem.clone(),
        }
    }

    pub(super) fn keep(&self) -> Kept {
        Kept {
            name: self.request.name.clone().unwrap_or_default(),
            request: self.request.clone(),
            overlay_ports: self.overlay_ports.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use tpd_api::exit::ExitCode;
    use tpd_api::intercept::PodStatus;

    use super::*;
    use crate::failure::Failure;
    use crate::intercept::example;
    use crate::intercept::resource::{Owner, object};

    fn pod(name: &str, acknowledged: bool, address: Option<&str>) -> PodStatus {
        PodStatus {
            name: name.into(),
            ready: true,
            agent: true,
            acknowledged,
            address: address.map(|address| address.parse().unwrap()),
            ..PodStatus::default()
        }
    }

    fn applied(generation: i64, status: Option<InterceptStatus>) -> Box<Intercept> {
        let owner = Owner { user: "ann", session: "s" };
        let mut object = object(&example("web", &["http"]), "web-x", owner, &[20_001]);
        object.metadata.generation = Some(generation);
        object.status = status;
        Box::new(object)
    }

    #[test]
    fn a_status_counts_once_it_is_about_the_latest_request() {
        let mut record = Record::new(example("web", &["http"]), vec![20_001]);
        record.heard(Change::Applied(applied(2, None)));
        assert!(!record.describe().current);
        let old = InterceptStatus { observed_generation: 1, ..InterceptStatus::default() };
        record.heard(Change::Applied(applied(2, Some(old.clone()))));
        assert!(!record.describe().current && record.describe().status.is_some());
        record.heard(Change::Applied(applied(2, Some(InterceptStatus { observed_generation: 2, ..old }))));
        assert!(record.describe().current);
    }

    #[test]
    fn an_end_in_the_cluster_is_told_and_an_outage_is_forgotten() {
        let mut record = Record::new(example("web", &["http"]), vec![20_001]);
        record.heard(Change::Unknown(Failure::new(ExitCode::Unreachable, "no answer")));
        assert_eq!(record.describe().problem.as_deref(), Some("no answer"));
        record.heard(Change::Applied(applied(1, None)));
        assert_eq!(record.describe().problem, None);
        record.heard(Change::Deleted);
        assert!(record.is_over && record.describe().problem.unwrap().contains("somebody deleted it"));
    }

    #[test]
    fn domains_are_asked_of_pods_that_are_in() {
        let mut request = example("web", &["http"]);
        request.dns = vec!["corp.example".into()];
        let mut record = Record::new(request, vec![20_001]);
        assert!(record.forwards().is_empty());
        let pods = vec![
            pod("web-1", false, Some("fd74::8000:0:0:1")),
            pod("web-2", true, Some("fd74::8000:0:0:2")),
            pod("web-3", true, None),
        ];
        record
            .heard(Change::Applied(applied(1, Some(InterceptStatus { pods, ..InterceptStatus::default() }))));
        let forwards = record.forwards();
        assert_eq!(forwards[0].domain, "corp.example");
        assert_eq!(*forwards[0].servers, ["[fd74::8000:0:0:2]:53".parse().unwrap()]);
    }

    #[test]
    fn only_its_own_ports_are_silent() {
        let mut record = Record::new(example("web", &["http", "metrics"]), vec![20_001, 20_002]);
        record.checked(&["127.0.0.1:9091".parse().unwrap(), "127.0.0.1:1".parse().unwrap()].into());
        assert_eq!(record.describe().silent, ["127.0.0.1:9091".parse().unwrap()]);
    }
}
