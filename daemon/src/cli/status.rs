//! `tpd status`: what is up, by which path, and why.

use tpd_api::exit::ExitCode;
use tpd_api::local::{Path, PathKind, Phase, Status as Report};

use super::{OutputArgs, intercepts};
use crate::failure::Failure;
use crate::local;
use crate::output::{self, Format};

/// Shows the connection: paths and why, traffic, DNS, networks, intercepts pod by pod
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Status {
    #[command(flatten)]
    output: OutputArgs,
}

impl Status {
    pub(super) fn format(&self) -> Format {
        self.output.output
    }

    pub(super) async fn run(&self) -> Result<ExitCode, Failure> {
        let report = local::status().await?.ok_or_else(local::not_connected)?;
        match self.format() {
            Format::Json => output::json(&report),
            Format::Human => output::text(&render(&report)),
        }
        Ok(if report.phase == Phase::Connected { ExitCode::Ok } else { ExitCode::NotConnected })
    }
}

/// A path's name as it is given to `--path`.
pub(super) fn kind(kind: PathKind) -> &'static str {
    match kind {
        PathKind::Udp => "udp",
        PathKind::Proxy => "proxy",
        PathKind::Forward => "forward",
    }
}

fn render(report: &Report) -> String {
    let mut rows: Vec<(&str, String)> = vec![("state", state(report))];
    if let Some(problem) = &report.problem {
        rows.push(("problem", problem.clone()));
    }
    rows.push(("cluster", format!("{} ({})", report.request.context, report.request.server)));
    if let Some(user) = &report.user {
        rows.push(("user", user.clone()));
    }
    rows.push(("namespace", report.request.namespace.clone()));
    if let Some(manager) = &report.manager {
        rows.push(("manager", format!("{}/{}, version {}", manager.namespace, manager.pod, manager.version)));
    }
    if let Some(address) = &report.address {
        rows.push(("address", format!("{}, {}", address.ipv4, address.ipv6)));
    }
    rows.extend(report.paths.iter().map(|path| ("path", describe(path))));
    if let Some(age) = report.handshake_seconds {
        rows.push(("handshake", format!("{} ago", duration(age))));
    }
    let traffic = &report.traffic;
    rows.push((
        "traffic",
        format!(
            "{} sent, {} received, {} packets dropped",
            bytes(traffic.sent_bytes),
            bytes(traffic.received_bytes),
            traffic.dropped_packets
        ),
    ));
    let networks: Vec<_> = report.networks.iter().map(ToString::to_string).collect();
    rows.push(("networks", networks.join(", ")));
    rows.extend(
        report.excluded.iter().map(|other| ("left out", format!("{} ({})", other.network, other.reason))),
    );
    if let Some(dns) = &report.dns {
        let listen: Vec<_> = dns.listen.iter().map(ToString::to_string).collect();
        rows.push((
            "DNS",
            format!(
                "{} by way of {}, served on {}; {} questions, {} failed",
                dns.zone,
                dns.method,
                listen.join(" and "),
                dns.queries,
                dns.failures
            ),
        ));
    }
    if let Some(problem) = report.dns.as_ref().and_then(|dns| dns.problem.as_ref()) {
        rows.push(("", problem.clone()));
    }
    if let Some(tun) = &report.tun {
        rows.push(("device", format!("{}, MTU {}, {}", tun.name, tun.mtu, tun.offload)));
    }
    let rows = rows.into_iter().map(|(name, value)| format!("{name:<10} {value}\n"));
    rows.chain(report.intercepts.iter().map(intercepts::render)).collect()
}

fn state(report: &Report) -> String {
    let phase = match report.phase {
        Phase::Connecting => "connecting",
        Phase::Connected => "connected",
        Phase::Reconnecting => "reconnecting",
        Phase::Disconnecting => "disconnecting",
    };
    format!("{phase}, up {}, version {}, pid {}", duration(report.uptime_seconds), report.version, report.pid)
}

fn describe(path: &Path) -> String {
    let mark = if path.active { "*" } else { "-" };
    let rtt = path.rtt_ms.map(|rtt| format!(", {rtt:.2} ms")).unwrap_or_default();
    format!("{mark} {} to {}{rtt}: {}", kind(path.kind), path.target, path.reason)
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_rounded_for_people() {
        assert_eq!(
            [bytes(0), bytes(999), bytes(1500), bytes(2_340_000_000)],
            ["0 B", "999 B", "1.5 kB", "2.3 GB"]
        );
        assert_eq!([duration(59), duration(61), duration(7260)], ["59 s", "1 min 1 s", "2 h 1 min"]);
    }

    #[test]
    fn a_path_says_why() {
        let path = Path {
            kind: PathKind::Proxy,
            target: "tpd-manager-0".into(),
            active: true,
            reason: "first to answer".into(),
            rtt_ms: Some(0.4),
        };
        assert_eq!(describe(&path), "* proxy to tpd-manager-0, 0.40 ms: first to answer");
    }
}
