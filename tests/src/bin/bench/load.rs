//! The loads. Each is bounded in time or count, and ends by itself.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::lab::{Lab, Place};
use crate::paced::Paced;

/// What a load may take longer than it was told to, before it is ended.
const GRACE: Duration = Duration::from_secs(10);

/// Which way the bulk of the bytes goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the pod to the client.
    Down,
    /// From the client to the pod.
    Up,
}

/// One finished bulk transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    pub(crate) bits_per_second: f64,
    pub(crate) bytes: f64,
}

/// Round trips, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RoundTrips {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// One TCP stream of iperf3 for so many seconds.
pub(crate) async fn stream(
    lab: &Lab,
    place: Place,
    server: SocketAddr,
    direction: Direction,
    seconds: u64,
) -> Result<Transfer> {
    // The server takes one test at a time, and may not have noticed yet that the last one is over.
    for _ in 0..5 {
        let report = iperf(lab, place, server, direction, seconds).await?;
        match report.error {
            None => {
                return report.end.sum_received.map(Sum::transfer).context("iperf3's report has no total");
            }
            Some(error) if error.contains("busy") => sleep(Duration::from_millis(500)).await,
            Some(error) => bail!("iperf3: {error}"),
        }
    }
    bail!("the iperf3 server stays busy with somebody else's test")
}

async fn iperf(
    lab: &Lab,
    place: Place,
    server: SocketAddr,
    direction: Direction,
    seconds: u64,
) -> Result<Report> {
    let mut command = lab.command(place, "iperf3");
    command.args(["--json", "--connect-timeout", "3000", "--client", &server.ip().to_string()]);
    command.args(["--port", &server.port().to_string(), "--time", &seconds.to_string()]);
    if direction == Direction::Down {
        command.arg("--reverse");
    }
    let output =
        timeout(Duration::from_secs(seconds) + GRACE, command.output()).await.context("iperf3 hangs")??;
    // A failed one reports too, what it saw until then and why it ended.
    serde_json::from_slice(&output.stdout).with_context(|| {
        format!("iperf3 reports nothing: {}", String::from_utf8_lossy(&output.stderr).trim_end())
    })
}

#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    end: End,
    error: Option<String>,
}

#[derive(Default, Deserialize)]
struct End {
    /// What the receiver counted.
    sum_received: Option<Sum>,
}

#[derive(Clone, Copy, Deserialize)]
struct Sum {
    seconds: f64,
    bytes: f64,
}

impl Sum {
    fn transfer(self) -> Transfer {
        Transfer { bits_per_second: 8.0 * self.bytes / self.seconds, bytes: self.bytes }
    }
}

/// One TCP stream up to the sink, for so many seconds, counted by the sender: a few MB of it may still be in buffers. The
/// sink hashes what it reads, which costs about as much processor time as reading it. For those whom iperf3 cannot measure.
pub(crate) async fn fill(lab: &Lab, place: Place, sink: SocketAddr, seconds: u64) -> Result<Transfer> {
    let arguments = ["fill", &sink.to_string(), &seconds.to_string()];
    let printed = lab.run_self(Duration::from_secs(seconds) + GRACE, place, &arguments).await?;
    serde_json::from_str::<Sum>(&printed).map(Sum::transfer).with_context(|| format!("it said {printed}"))
}

/// `bench fill SINK SECONDS`: the other half of [`fill`].
pub(crate) fn fill_here(sink: SocketAddr, seconds: u64) -> Result<()> {
    let mut connection = TcpStream::connect_timeout(&sink, Duration::from_secs(5))?;
    connection.set_write_timeout(Some(Duration::from_secs(5)))?;
    let block = vec![0; 128 * 1024];
    let (began, mut bytes) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(seconds) {
        bytes += connection.write(&block)?;
    }
    writeln!(std::io::stdout(), "{}", json!({ "seconds": began.elapsed().as_secs_f64(), "bytes": bytes }))?;
    Ok(())
}

/// 64 bytes there and back, again and again on one connection.
pub(crate) async fn ping_pong(
    lab: &Lab,
    place: Place,
    server: SocketAddr,
    rounds: u32,
) -> Result<RoundTrips> {
    // A round trip over the slowest path here takes about a millisecond.
    let limit = Duration::from_millis(2 * u64::from(rounds)) + GRACE;
    let arguments = ["ping-pong", &server.to_string(), &rounds.to_string()];
    let printed = lab.run_for(limit, place, "tpd-echo", &arguments).await?;
    parse_round_trips(&printed).with_context(|| format!("tpd-echo said something else: {printed}"))
}

fn parse_round_trips(printed: &str) -> Option<RoundTrips> {
    Some(RoundTrips { p50: number_after(printed, "p50 ")?, p99: number_after(printed, "p99 ")? })
}

/// Connections one after another, each for one round trip: how many in a second.
pub(crate) async fn connections(lab: &Lab, place: Place, server: SocketAddr, seconds: u64) -> Result<f64> {
    let limit = Duration::from_secs(seconds) + GRACE;
    let arguments = ["rate", &server.to_string(), &seconds.to_string()];
    let printed = lab.run_for(limit, place, "tpd-echo", &arguments).await?;
    number_after(&printed, "ok: ").with_context(|| format!("tpd-echo said something else: {printed}"))
}

/// HTTP over 32 connections that stay open: requests in a second, and how many failed.
pub(crate) async fn requests(
    lab: &Lab,
    place: Place,
    server: SocketAddr,
    seconds: u64,
) -> Result<(f64, f64)> {
    let limit = Duration::from_secs(seconds) + GRACE;
    let (duration, url) = (format!("-d{seconds}s"), format!("http://{server}/"));
    let printed = lab.run_for(limit, place, "wrk", &["-t1", "-c32", &duration, &url]).await?;
    let rate = number_after(&printed, "Requests/sec:").with_context(|| format!("wrk said: {printed}"))?;
    ensure!(rate > 0.0, "not one of wrk's requests was answered");
    Ok((rate, wrk_failures(&printed)))
}

/// HTTP at an even rate over as many connections: so many requests in a second.
pub(crate) async fn paced(
    lab: &Lab,
    place: Place,
    server: SocketAddr,
    rate: f64,
    seconds: u64,
) -> Result<Paced> {
    let arguments = ["paced", &server.to_string(), &rate.to_string(), &seconds.to_string()];
    let printed = lab.run_self(Duration::from_secs(seconds) + GRACE, place, &arguments).await?;
    serde_json::from_str(&printed).with_context(|| format!("it said {printed}"))
}

/// What `tpd-echo load` says of the requests it made.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Answered {
    pub(crate) requests: u64,
    failed: u64,
    /// Who answered how many.
    pub(crate) unmarked: BTreeMap<String, u64>,
    pub(crate) p50_micros: f64,
}

/// HTTP over one connection that stays open, one request at a time. All were answered, and well.
pub(crate) async fn one_by_one(
    lab: &Lab,
    place: Place,
    server: SocketAddr,
    seconds: u64,
) -> Result<Answered> {
    let limit = Duration::from_secs(seconds) + GRACE;
    let (seconds, url) = (seconds.to_string(), format!("http://{server}/"));
    let arguments = ["load", "-connections", "1", "-seconds", &seconds, &url];
    let printed = lab.run_for(limit, place, "tpd-echo", &arguments).await?;
    let answered: Answered = serde_json::from_str(&printed).context("tpd-echo said something else")?;
    ensure!(answered.requests > 0, "tpd-echo made no request");
    // The load does not fail; it says so here where requests did.
    ensure!(answered.failed == 0, "{} of {} requests failed", answered.failed, answered.requests);
    Ok(answered)
}

/// `Socket errors: connect 0, read 1, write 2, timeout 3` and `Non-2xx or 3xx responses: 4`, printed only where there are some.
fn wrk_failures(printed: &str) -> f64 {
    let labels = ["connect ", "read ", "write ", "timeout ", "responses: "];
    labels.iter().filter_map(|label| number_after(printed, label)).sum()
}

fn number_after(text: &str, label: &str) -> Option<f64> {
    let (_, rest) = text.split_once(label)?;
    let rest = rest.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_clients_print() {
        let printed = "ok: 2000 rounds, p50 63 us, p99 140 us\n";
        assert_eq!(parse_round_trips(printed), Some(RoundTrips { p50: 63.0, p99: 140.0 }));
        assert_eq!(number_after("ok: 812 connections/s\n", "ok: "), Some(812.0));
    }

    #[test]
    fn adds_up_what_wrk_complains_of() {
        let printed = "  Socket errors: connect 0, read 2, write 3, timeout 0\n  Non-2xx or 3xx responses: 4\nRequests/sec:  17.50\n";
        assert_eq!(wrk_failures(printed), 9.0);
        assert_eq!(number_after(printed, "Requests/sec:"), Some(17.5));
        assert_eq!(wrk_failures("Requests/sec:  17.50\n"), 0.0);
    }

    #[test]
    fn a_transfer_counts_as_the_receiver_saw_it() {
        let json =
            r#"{"end":{"sum_sent":{"seconds":2.0,"bytes":9e9},"sum_received":{"seconds":2.0,"bytes":1e9}}}"#;
        let report: Report = serde_json::from_str(json).unwrap();
        assert_eq!(report.end.sum_received.unwrap().transfer().bits_per_second, 4e9);
    }

    #[test]
    fn a_failed_transfer_says_why() {
        let report: Report = serde_json::from_str(r#"{"intervals":[],"end":{},"error":"refused"}"#).unwrap();
        assert_eq!(report.error.as_deref(), Some("refused"));
    }
}
