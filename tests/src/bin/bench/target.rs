//! What tpd has set itself to reach.

use crate::contender::Contender::{self, Boringtun, Intercept, PortForward, TpdForward, TpdProxy, TpdUdp};
use crate::intercept::Case;
use crate::metric::Metric::{
    self, ClusterRequests, Down, FixedP50, OneP50, Ready, Requests, RoundTripP50, Up,
};
use crate::results::Results;

/// A figure of one contender, and the bound it should keep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) metric: Metric,
    pub(crate) contender: Contender,
    pub(crate) bound: Bound,
}

/// What a figure is held against.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bound {
    /// At least so many times another contender's.
    Times(f64, Contender),
    /// At least so much, in the metric's unit.
    AtLeast(f64),
    /// At most so much, in the metric's unit.
    AtMost(f64),
    /// At most so much more than another contender's, in the metric's unit.
    AtMostOver(f64, Contender),
}

/// All of them.
pub(crate) const TARGETS: [Target; 17] = [
    target(Down, TpdUdp, Bound::AtLeast(2.5)),
    target(Up, TpdUdp, Bound::AtLeast(2.5)),
    target(Down, TpdUdp, Bound::Times(2.0, Boringtun)),
    target(Up, TpdUdp, Bound::Times(2.0, Boringtun)),
    target(Down, TpdProxy, Bound::Times(1.2, PortForward)),
    target(Up, TpdProxy, Bound::Times(1.2, PortForward)),
    target(Down, TpdForward, Bound::Times(0.7, PortForward)),
    target(Up, TpdForward, Bound::Times(0.7, PortForward)),
    target(RoundTripP50, TpdUdp, Bound::AtMost(250.0)),
    target(RoundTripP50, TpdProxy, Bound::AtMost(350.0)),
    target(Requests, TpdUdp, Bound::Times(3.0, PortForward)),
    target(Requests, TpdProxy, Bound::Times(2.0, PortForward)),
    target(Ready, TpdUdp, Bound::AtMost(1000.0)),
    target(Ready, TpdProxy, Bound::AtMost(1000.0)),
    target(FixedP50, Intercept(Case::Passing), Bound::AtMostOver(50.0, Intercept(Case::NoAgent))),
    target(ClusterRequests, Intercept(Case::Udp), Bound::AtLeast(12_000.0)),
    target(OneP50, Intercept(Case::Udp), Bound::AtMost(400.0)),
];

const fn target(metric: Metric, contender: Contender, bound: Bound) -> Target {
    Target { metric, contender, bound }
}

impl Target {
    /// The figure as the bound sees it (a multiple, or in the metric's unit), and whether it keeps it.
    pub(crate) fn judge(&self, results: &Results) -> Option<(f64, bool)> {
        let own = || results.summary(self.contender, self.metric).map(|summary| summary.median);
        match self.bound {
            Bound::Times(least, other) => {
                results.ratio(self.metric, self.contender, other).map(|ratio| (ratio, ratio >= least))
            }
            Bound::AtLeast(least) => own().map(|value| (value, value >= least)),
            Bound::AtMost(most) => own().map(|value| (value, value <= most)),
            Bound::AtMostOver(most, other) => {
                results.difference(self.metric, self.contender, other).map(|more| (more, more <= most))
            }
        }
    }

    /// The bound in words.
    pub(crate) fn words(&self) -> String {
        let unit = self.metric.unit();
        match self.bound {
            Bound::Times(least, other) => format!("at least {least} x {}", other.name()),
            Bound::AtLeast(least) => format!("at least {least} {unit}"),
            Bound::AtMost(most) => format!("at most {most} {unit}"),
            Bound::AtMostOver(most, other) => format!("at most {most} {unit} over {}", other.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::Figure;

    #[test]
    fn judges_by_multiples_and_by_bounds() {
        let mut results = Results::default();
        for (contender, metric, value) in
            [(TpdProxy, Down, 1.5), (PortForward, Down, 1.5), (TpdUdp, RoundTripP50, 100.0)]
        {
            results.record(1, contender, Figure { metric, value, background_percent: 0.0, remark: None });
        }
        assert_eq!(
            target(Down, TpdProxy, Bound::Times(1.2, PortForward)).judge(&results),
            Some((1.0, false))
        );
        assert_eq!(target(RoundTripP50, TpdUdp, Bound::AtMost(250.0)).judge(&results), Some((100.0, true)));
        assert_eq!(target(Down, TpdUdp, Bound::AtLeast(2.5)).judge(&results), None);
        let over = |most| target(Down, TpdProxy, Bound::AtMostOver(most, PortForward)).judge(&results);
        assert_eq!([over(0.5), over(-0.5)], [Some((0.0, true)), Some((0.0, false))]);
    }
}
