//! What is measured of each contender, in this order.

use anyhow::Result;

use crate::contender::Running;
use crate::cpu::{Meter, Spent};
use crate::lab::Lab;
use crate::load::{self, Direction, Transfer};

/// One figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    Ready,
    Down,
    Up,
    CpuDown,
    CpuUp,
    RoundTripP50,
    RoundTripP99,
    Connections,
    Requests,
    /// What follows is of requests from within the cluster, with and without agent and intercept.
    FixedP50,
    FixedP99,
    AgentCpu,
    AllCpu,
    ClusterRequests,
    OneP50,
}

impl Metric {
    pub(crate) const ALL: [Self; 15] = [
        Self::Down,
        Self::Up,
        Self::CpuDown,
        Self::CpuUp,
        Self::RoundTripP50,
        Self::RoundTripP99,
        Self::Connections,
        Self::Requests,
        Self::Ready,
        Self::FixedP50,
        Self::FixedP99,
        Self::AgentCpu,
        Self::AllCpu,
        Self::ClusterRequests,
        Self::OneP50,
    ];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Ready => "from the command until it is ready",
            Self::Down => "one TCP stream, pod to laptop",
            Self::Up => "one TCP stream, laptop to pod",
            Self::CpuDown => "processor time of that stream, pod to laptop",
            Self::CpuUp => "processor time of that stream, laptop to pod",
            Self::RoundTripP50 => "64 bytes there and back on one connection, median",
            Self::RoundTripP99 => "64 bytes there and back on one connection, 99th percentile",
            Self::Connections => "connections one after another, a round trip on each",
            Self::Requests => "HTTP requests on 32 connections (wrk)",
            Self::FixedP50 => {
                "in the cluster: requests at half of what the agent can make under a filter, median"
            }
            Self::FixedP99 => "in the cluster: requests at that rate, 99th percentile",
            Self::AgentCpu => "in the cluster: the agent's, or HAProxy's, processor time for each of them",
            Self::AllCpu => "in the cluster: the whole machine's processor time for each, the client's too",
            Self::ClusterRequests => "in the cluster: requests on 32 connections (wrk)",
            Self::OneP50 => "in the cluster: requests on one connection, median",
        }
    }

    /// The name in the JSON result.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Down => "streamDown",
            Self::Up => "streamUp",
            Self::CpuDown => "processorDown",
            Self::CpuUp => "processorUp",
            Self::RoundTripP50 => "roundTripP50",
            Self::RoundTripP99 => "roundTripP99",
            Self::Connections => "connections",
            Self::Requests => "requests",
            Self::FixedP50 => "clusterFixedRateP50",
            Self::FixedP99 => "clusterFixedRateP99",
            Self::AgentCpu => "clusterAgentProcessor",
            Self::AllCpu => "clusterMachineProcessor",
            Self::ClusterRequests => "clusterRequests",
            Self::OneP50 => "clusterOneConnectionP50",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Ready => "ms",
            Self::Down | Self::Up => "Gb/s",
            Self::CpuDown | Self::CpuUp => "s/GB",
            Self::RoundTripP50 | Self::RoundTripP99 | Self::FixedP50 | Self::FixedP99 | Self::OneP50 => "us",
            Self::AgentCpu | Self::AllCpu => "us/request",
            Self::Connections | Self::Requests | Self::ClusterRequests => "/s",
        }
    }

    /// What another program that intercepts made of it, on such a cluster but in no run of this benchmark: to be read beside
    /// ours, and not as a ratio.
    pub(crate) fn elsewhere(self) -> Option<f64> {
        match self {
            Self::ClusterRequests => Some(2340.0),
            Self::OneP50 => Some(1700.0),
            _ => None,
        }
    }
}

/// How much of everything: a short run measures less of each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amount {
    pub(crate) seconds: u64,
    pub(crate) round_trips: u32,
}

/// A figure, and how busy the machine was with other things meanwhile.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    pub(crate) metric: Metric,
    pub(crate) value: f64,
    pub(crate) background_percent: f64,
    pub(crate) remark: Option<String>,
}

/// The figures of one load, or why there are none.
pub(crate) type Outcome = (Metric, Result<Vec<Figure>>);

/// Puts every load on a contender, one at a time. The streams come last: `kubectl port-forward` may not survive them.
pub(crate) async fn measure(lab: &Lab, running: &Running, amount: Amount) -> Vec<Outcome> {
    vec![
        (Metric::RoundTripP50, round_trips(lab, running, amount).await),
        (Metric::Connections, connections(lab, running, amount).await),
        (Metric::Requests, requests(lab, running, amount).await),
        (Metric::Down, stream(lab, running, amount, Direction::Down).await),
        (Metric::Up, stream(lab, running, amount, Direction::Up).await),
    ]
}

async fn round_trips(lab: &Lab, running: &Running, amount: Amount) -> Result<Vec<Figure>> {
    let meter = Meter::start(&running.involved)?;
    let times = load::ping_pong(lab, running.place, running.servers.echo, amount.round_trips).await?;
    let spent = meter.stop()?;
    Ok(vec![figure(Metric::RoundTripP50, times.p50, spent), figure(Metric::RoundTripP99, times.p99, spent)])
}

async fn connections(lab: &Lab, running: &Running, amount: Amount) -> Result<Vec<Figure>> {
    let meter = Meter::start(&running.involved)?;
    let rate = load::connections(lab, running.place, running.servers.echo, amount.seconds).await?;
    Ok(vec![figure(Metric::Connections, rate, meter.stop()?)])
}

async fn requests(lab: &Lab, running: &Running, amount: Amount) -> Result<Vec<Figure>> {
    let meter = Meter::start(&running.involved)?;
    let (rate, failed) = load::requests(lab, running.place, running.servers.web, amount.seconds).await?;
    let mut requests = figure(Metric::Requests, rate, meter.stop()?);
    requests.remark = (failed > 0.0).then(|| format!("{failed} requests failed"));
    Ok(vec![requests])
}

async fn stream(lab: &Lab, running: &Running, amount: Amount, direction: Direction) -> Result<Vec<Figure>> {
    let meter = Meter::start(&running.involved)?;
    let (transfer, remark) = transfer(lab, running, amount, direction).await?;
    let spent = meter.stop()?;
    let (rate, processor) = match direction {
        Direction::Down => (Metric::Down, Metric::CpuDown),
        Direction::Up => (Metric::Up, Metric::CpuUp),
    };
    let mut speed = figure(rate, transfer.bits_per_second / 1e9, spent);
    speed.remark = remark;
    let mut figures = vec![speed];
    if !spent.involved.is_zero() {
        figures.push(figure(processor, spent.involved.as_secs_f64() / (transfer.bytes / 1e9), spent));
    }
    Ok(figures)
}

async fn transfer(
    lab: &Lab,
    running: &Running,
    amount: Amount,
    direction: Direction,
) -> Result<(Transfer, Option<String>)> {
    let (place, servers, seconds) = (running.place, running.servers, amount.seconds);
    if direction == Direction::Up && !running.iperf_up {
        let remark = "sent to the echo server's sink and counted by the sender, since it breaks iperf3's off"
            .to_owned();
        return Ok((load::fill(lab, place, servers.sink, seconds).await?, Some(remark)));
    }
    let transfer = load::stream(lab, place, servers.iperf, direction, seconds).await;
    if transfer.is_err() {
        lab.renew_iperf().await?;
    }
    Ok((transfer?, None))
}

pub(crate) fn figure(metric: Metric, value: f64, spent: Spent) -> Figure {
    Figure { metric, value, background_percent: spent.background_percent, remark: None }
}
