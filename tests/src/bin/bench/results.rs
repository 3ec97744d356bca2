//! Everything that was measured, and what did not work.

use serde::Serialize;

use crate::contender::Contender;
use crate::memory::{AgentMemory, Memory};
use crate::metric::{Figure, Metric};

/// The figures of all rounds so far.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) samples: Vec<Sample>,
    pub(crate) memory: Option<Memory>,
    pub(crate) agent_memory: Option<AgentMemory>,
    /// What could not be measured, and why; a line each.
    pub(crate) missing: Vec<String>,
    /// What has to be known about figures that are there.
    pub(crate) remarks: Vec<String>,
}

/// One figure of one round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) round: u32,
    pub(crate) contender: Contender,
    pub(crate) metric: Metric,
    pub(crate) value: f64,
    pub(crate) background_percent: f64,
}

/// What a contender did in one metric, over all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) runs: usize,
    pub(crate) background_percent: f64,
}

impl Results {
    pub(crate) fn record(&mut self, round: u32, contender: Contender, figure: Figure) {
        let Figure { metric, value, background_percent, remark } = figure;
        if let Some(remark) = remark {
            note(&mut self.remarks, format!("{}, {}: {remark}", contender.name(), metric.title()));
        }
        self.samples.push(Sample { round, contender, metric, value, background_percent });
    }

    /// Notes what could not be measured; `what` is a metric's title, or nothing for the whole contender.
    pub(crate) fn miss(&mut self, contender: Contender, what: Option<Metric>, reason: &anyhow::Error) {
        let what = what.map_or_else(String::new, |metric| format!(", {}", metric.title()));
        note(&mut self.missing, format!("{}{what}: {reason:#}", contender.name()));
    }

    pub(crate) fn summary(&self, contender: Contender, metric: Metric) -> Option<Summary> {
        let samples = || self.samples.iter().filter(|s| s.contender == contender && s.metric == metric);
        let values: Vec<f64> = samples().map(|sample| sample.value).collect();
        let background: Vec<f64> = samples().map(|sample| sample.background_percent).collect();
        Some(Summary {
            median: median(&values)?,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            runs: values.len(),
            background_percent: median(&background)?,
        })
    }

    /// One contender's median as a multiple of another's.
    pub(crate) fn ratio(&self, metric: Metric, one: Contender, other: Contender) -> Option<f64> {
        Some(self.summary(one, metric)?.median / self.summary(other, metric)?.median)
    }

    /// How much more one contender's median is than another's.
    pub(crate) fn difference(&self, metric: Metric, one: Contender, other: Contender) -> Option<f64> {
        Some(self.summary(one, metric)?.median - self.summary(other, metric)?.median)
    }

    /// The first figure of a contender in a metric.
    pub(crate) fn first(&self, contender: Contender, metric: Metric) -> Option<f64> {
        let mut samples = self.samples.iter();
        samples.find(|s| s.contender == contender && s.metric == metric).map(|sample| sample.value)
    }
}

/// The same thing in every round is worth one line.
fn note(lines: &mut Vec<String>, line: String) {
    if !lines.contains(&line) {
        lines.push(line);
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(values: &[(Contender, f64)]) -> Results {
        let mut results = Results::default();
        for &(contender, value) in values {
            let figure = Figure { metric: Metric::Down, value, background_percent: 1.0, remark: None };
            results.record(1, contender, figure);
        }
        results
    }

    #[test]
    fn summarizes_by_the_median() {
        let results =
            results(&[(Contender::TpdUdp, 3.0), (Contender::TpdUdp, 1.0), (Contender::TpdUdp, 2.5)]);
        let summary = results.summary(Contender::TpdUdp, Metric::Down).unwrap();
        assert_eq!((summary.median, summary.min, summary.max, summary.runs), (2.5, 1.0, 3.0, 3));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn compares_only_what_was_measured() {
        let results = results(&[(Contender::TpdUdp, 3.0), (Contender::Boringtun, 1.5)]);
        assert_eq!(results.ratio(Metric::Down, Contender::TpdUdp, Contender::Boringtun), Some(2.0));
        assert_eq!(results.ratio(Metric::Down, Contender::TpdUdp, Contender::PortForward), None);
    }

    #[test]
    fn says_the_same_thing_once() {
        let mut results = Results::default();
        for _ in 0..3 {
            results.miss(Contender::Gotatun, None, &anyhow::anyhow!("not there"));
        }
        assert_eq!(results.missing, ["gotatun-cli: not there"]);
    }
}
