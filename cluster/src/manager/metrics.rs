//! What is counted, for Prometheus.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tpd_api::intercept::State;
use tpd_api::session::{ClientSessionStatus, Phase};
use tpd_netstack::peers::Traffic;

use super::overlay::Snapshot;
use crate::process;

/// The counters of the control plane. The data plane counts for itself, and is asked when Prometheus asks.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sessions: Family<PhaseLabel, Gauge>,
    writes: Family<OutcomeLabel, Counter>,
    collected: Counter,
    agents: Gauge,
    tokens_refused: Counter,
    intercepts: Family<StateLabel, Gauge>,
    evictions: Counter,
    leader: Gauge,
}

/// How a status write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// It was stored.
    Ok,
    /// It was refused or not answered, and is tried again.
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    result: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("tpd_manager");
        let (sessions, writes) = (Family::default(), Family::default());
        let (collected, leader) = (Counter::default(), Gauge::<i64>::default());
        registry.register("sessions", "ClientSessions by phase", Family::clone(&sessions));
        registry.register("status_writes", "Writes of a ClientSession's status", Family::clone(&writes));
        registry.register(
            "sessions_collected",
            "Sessions deleted for want of a handshake",
            collected.clone(),
        );
        let (agents, intercepts) = (Gauge::<i64>::default(), Family::default());
        let (tokens_refused, evictions) = (Counter::default(), Counter::default());
        registry.register("agents", "Agents connected to this replica", agents.clone());
        registry.register(
            "tokens_refused",
            "Agents turned away because their token is nobody's",
            tokens_refused.clone(),
        );
        registry.register("intercepts", "Intercepts by state", Family::clone(&intercepts));
        registry.register("evictions", "Pods evicted to be replaced by such with agents", evictions.clone());
        registry.register("leader", "1 where this replica runs the controllers", leader.clone());
        Self { registry, sessions, writes, collected, agents, tokens_refused, intercepts, evictions, leader }
    }
}

impl Metrics {
    /// Counts the sessions anew.
    pub fn sessions<'a>(&self, statuses: impl Iterator<Item = Option<&'a ClientSessionStatus>>) {
        let mut counts = [("Pending", 0), ("Ready", 0), ("Rejected", 0)];
        for status in statuses {
            counts[match status.map(|status| status.phase).unwrap_or_default() {
                Phase::Pending => 0,
                Phase::Ready => 1,
                Phase::Rejected => 2,
            }]
            .1 += 1;
        }
        for (phase, count) in counts {
            self.sessions.get_or_create(&PhaseLabel { phase }).set(count);
        }
    }

    /// A status was written, or not.
    pub fn wrote(&self, result: Outcome) {
        self.writes.get_or_create(&OutcomeLabel { result }).inc();
    }

    /// A dead session was deleted.
    pub fn collected(&self) {
        self.collected.inc();
    }

    /// So many agents are connected.
    pub fn agents(&self, count: usize) {
        self.agents.set(level(count as u64));
    }

    /// An agent's token was nobody's.
    pub fn token_refused(&self) {
        self.tokens_refused.inc();
    }

    /// Counts the intercepts anew.
    pub fn intercepts(&self, states: impl Iterator<Item = State>) {
        let mut counts = [("NoAgent", 0), ("Waiting", 0), ("Active", 0)];
        for state in states {
            counts[match state {
                State::NoAgent => 0,
                State::Waiting => 1,
                State::Active => 2,
            }]
            .1 += 1;
        }
        for (state, count) in counts {
            self.intercepts.get_or_create(&StateLabel { state }).set(count);
        }
    }

    /// A pod was evicted.
    pub fn evicted(&self) {
        self.evictions.inc();
    }

    /// Everything in the text format of OpenMetrics.
    ///
    /// # Errors
    /// Fails where a metric cannot be written as text, which none here can.
    pub fn encode(&self, leads: bool, snapshot: Option<&Snapshot>) -> Result<String, fmt::Error> {
        self.leader.set(leads.into());
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        encode_registry(&mut text, &process())?;
        if let Some(snapshot) = snapshot {
            encode_registry(&mut text, &lane(snapshot))?;
        }
        encode_eof(&mut text)?;
        Ok(text)
    }
}

fn process() -> Registry {
    let usage = process::usage();
    let mut registry = Registry::with_prefix("process");
    gauge(&mut registry, "resident_memory_bytes", "Memory in RAM", usage.resident_bytes);
    let cpu = Counter::<f64, AtomicU64>::default();
    cpu.inc_by(usage.cpu_seconds);
    registry.register("cpu_seconds", "CPU time of user and system", cpu);
    gauge(&mut registry, "open_fds", "Open file descriptors", usage.descriptors);
    registry
}

fn lane(snapshot: &Snapshot) -> Registry {
    let mut registry = Registry::with_prefix("tpd_overlay");
    let Snapshot { peers, drops, handshakes, streams, refused_streams, flows } = snapshot;
    let connected = peers.iter().filter(|peer| peer.handshake_age.is_some()).count();
    let by_path = |path| peers.iter().filter(|peer| peer.path == Some(path)).count() as u64;
    let sum = |field: fn(&Traffic) -> u64| peers.iter().map(|peer| field(&peer.traffic)).sum();

    gauge(&mut registry, "peers", "Keys that may speak", peers.len() as u64);
    gauge(&mut registry, "peers_connected", "Peers with a WireGuard session", connected as u64);
    let paths = [("udp", by_path("udp")), ("stream", by_path("stream"))];
    gauges(&mut registry, "peers_by_path", "Peers by the path that carries them", "path", &paths);
    counter(&mut registry, "handshakes", "WireGuard handshakes", *handshakes);
    gauge(&mut registry, "streams", "Streams open", *streams as u64);
    counter(&mut registry, "streams_refused", "Streams turned away: too many strangers", *refused_streams);

    // Of the peers that exist: a session that ends takes its share along, as a restart does.
    let bytes = [("received", sum(|t| t.received_bytes)), ("sent", sum(|t| t.sent_bytes))];
    gauges(&mut registry, "peer_bytes", "Bytes inside the tunnels of the present peers", "direction", &bytes);
    let packets = [("received", sum(|t| t.received_packets)), ("sent", sum(|t| t.sent_packets))];
    gauges(
        &mut registry,
        "peer_packets",
        "Packets inside the tunnels of the present peers",
        "direction",
        &packets,
    );

    let dropped = [
        ("garbage", drops.garbage),
        ("forged", drops.forged),
        ("replayed", drops.replayed),
        ("no_session", drops.no_session),
        ("under_load", drops.under_load),
        ("unknown_peer", drops.unknown_peer),
        ("spoofed", drops.spoofed),
        ("no_path", drops.no_path),
        ("unsent", drops.unsent),
        ("malformed", flows.malformed),
        ("datagram_socket_full", flows.datagrams_dropped),
        ("fragment", flows.fragments_dropped),
        ("answer_limit", flows.answers_dropped),
    ];
    counters(&mut registry, "drops", "Packets and datagrams dropped, by reason", "reason", &dropped);

    let open = [("tcp", flows.tcp_flows), ("udp", flows.udp_flows), ("icmp", flows.echo_flows)];
    gauges(&mut registry, "flows", "Flows open, by protocol", "protocol", &open);
    counter(&mut registry, "connections_accepted", "TCP connections carried on", flows.accepted);
    let failed = [
        ("refused", flows.refused),
        ("unreachable", flows.unreachable),
        ("prohibited", flows.prohibited),
        ("timed_out", flows.timed_out),
        ("over_limit", flows.over_limit),
        ("no_socket", flows.no_socket),
        ("ping_denied", flows.pings_denied),
    ];
    counters(&mut registry, "flows_failed", "Flows that were not carried, by reason", "reason", &failed);
    counter(&mut registry, "connections_reset", "TCP connections that ended by a reset", flows.reset);
    registry
}

type Labels = [(&'static str, &'static str); 1];

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(level(value));
    registry.register(name, help, gauge);
}

/// One gauge for each value of a label.
fn gauges(
    registry: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: &[(&'static str, u64)],
) {
    let family = Family::<Labels, Gauge>::default();
    for (of, value) in values {
        family.get_or_create(&[(label, *of)]).set(level(*value));
    }
    registry.register(name, help, family);
}

fn level(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Counter::<u64>::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

/// One counter for each value of a label.
fn counters(
    registry: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: &[(&'static str, u64)],
) {
    let family = Family::<Labels, Counter>::default();
    for (of, value) in values {
        family.get_or_create(&[(label, *of)]).inc_by(*value);
    }
    registry.register(name, help, family);
}

#[cfg(test)]
mod tests {
    use super::{Metrics, Outcome, Snapshot, State};

    #[test]
    fn everything_has_a_line() {
        let metrics = Metrics::default();
        metrics.sessions([None].into_iter());
        metrics.wrote(Outcome::Failed);
        metrics.intercepts([State::Active].into_iter());
        metrics.token_refused();
        let text = metrics.encode(true, Some(&Snapshot::default())).unwrap();
        for line in [
            r#"tpd_manager_sessions{phase="Pending"} 1"#,
            r#"tpd_manager_status_writes_total{result="Failed"} 1"#,
            "tpd_manager_leader 1",
            "tpd_manager_agents 0",
            "tpd_manager_tokens_refused_total 1",
            r#"tpd_manager_intercepts{state="Active"} 1"#,
            "tpd_manager_evictions_total 0",
            r#"tpd_overlay_drops_total{reason="replayed"} 0"#,
            r#"tpd_overlay_flows{protocol="tcp"} 0"#,
            "tpd_overlay_handshakes_total 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
