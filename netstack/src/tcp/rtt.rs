//! Round-trip times and the retransmission time-out (RFC 6298).

use std::time::Duration;

/// Before anything was measured, and the least and most afterwards. The least is Linux's; RFC 6298 asks for a
/// second, which makes a loss that nothing else reveals cost one.
const FIRST: Duration = Duration::from_secs(1);
const LEAST: Duration = Duration::from_millis(200);
const MOST: Duration = Duration::from_secs(60);

/// How long the least round trip is remembered: routes change.
const MEMORY: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct RoundTrip {
    smoothed: Option<Duration>,
    variation: Duration,
    least: Option<(Duration, Duration)>,
    /// How often the time-out has struck in a row.
    strikes: u32,
}

impl RoundTrip {
    pub(super) fn sample(&mut self, sample: Duration, now: Duration) {
        let Some(smoothed) = self.smoothed else {
            self.smoothed = Some(sample);
            self.variation = sample / 2;
            self.least = Some((sample, now));
            return;
        };
        self.variation = (self.variation * 3 + smoothed.abs_diff(sample)) / 4;
        self.smoothed = Some((smoothed * 7 + sample) / 8);
        if self.least.is_none_or(|(least, since)| sample <= least || now.saturating_sub(since) > MEMORY) {
            self.least = Some((sample, now));
        }
    }

    /// The least round trip of late.
    pub(super) fn least(&self) -> Option<Duration> {
        self.least.map(|(least, _)| least)
    }

    /// How long to wait for an acknowledgement before all is taken for lost.
    pub(super) fn timeout(&self) -> Duration {
        let base = self.smoothed.map_or(FIRST, |smoothed| (smoothed + self.variation * 4).max(LEAST));
        (base * 2u32.saturating_pow(self.strikes.min(9))).min(MOST)
    }

    /// How long to wait before a probe is sent to find out about the end of what was sent (RFC 8985, 7.2): long
    /// enough for a delayed acknowledgement if there is only one segment to acknowledge.
    pub(super) fn probe_timeout(&self, single: bool) -> Option<Duration> {
        let delayed = if single { Duration::from_millis(50) } else { Duration::ZERO };
        self.smoothed.map(|smoothed| (smoothed * 2 + delayed).max(Duration::from_millis(10)))
    }

    pub(super) const fn strike(&mut self) {
        self.strikes += 1;
    }

    pub(super) const fn relax(&mut self) {
        self.strikes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_timeout_follows_what_is_measured_and_doubles_when_it_strikes() {
        let mut rtt = RoundTrip::default();
        assert_eq!(rtt.timeout(), FIRST);
        rtt.sample(100 * MS, Duration::ZERO);
        assert_eq!(rtt.timeout(), 300 * MS);
        (0..100).for_each(|_| rtt.sample(10 * MS, Duration::ZERO));
        assert_eq!(rtt.timeout(), LEAST);
        rtt.strike();
        rtt.strike();
        assert_eq!(rtt.timeout(), LEAST * 4);
        (0..40).for_each(|_| rtt.strike());
        assert_eq!(rtt.timeout(), MOST);
        rtt.relax();
        assert_eq!(rtt.timeout(), LEAST);
    }

    #[test]
    fn the_least_is_forgotten_in_time() {
        let mut rtt = RoundTrip::default();
        rtt.sample(5 * MS, Duration::ZERO);
        rtt.sample(9 * MS, 9 * Duration::from_secs(1));
        assert_eq!(rtt.least(), Some(5 * MS));
        rtt.sample(9 * MS, 11 * Duration::from_secs(1));
        assert_eq!(rtt.least(), Some(9 * MS));
    }
}
