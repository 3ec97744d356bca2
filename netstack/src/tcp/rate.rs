//! How fast to send: as fast as the peer's window allows, or at the rate that the path is measured to deliver.
//!
//! The latter is BBR (Cardwell et al., ACM Queue 14(5), 2016) without the parts that need finer timers than a
//! millisecond. Loss alone never slows it, which is what the paths that it is for need: at 1 % loss and 20 ms,
//! CUBIC gets 6 Mb/s out of any path.

use std::{collections::VecDeque, time::Duration};

/// The finest timer there is (tokio's wheel): what may be sent until the next time this task runs for sure.
const TICK: Duration = Duration::from_millis(1);

/// 2/ln 2: the least gain that doubles the rate each round.
const STARTUP_GAIN: f64 = 2.885;

/// Gains of the phases in which the rate is probed, each as long as a round trip.
const CYCLE: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];

/// Rounds whose highest delivery rate counts, and the least time: where a round takes microseconds, ten of them are no
/// longer than an end may be kept from running.
const MEMORY_ROUNDS: u64 = 10;
const MEMORY: Duration = Duration::from_millis(200);

/// Rounds without a quarter's growth after which the path is taken for filled.
const FULL_ROUNDS: u32 = 3;

/// The share of a round's bytes above which losses are taken for a queue that overflows. What radio and
/// overbooked links lose at random stays below.
const OVERFLOW: f64 = 0.15;

/// What is in flight at first (RFC 6928) and at least, segments.
const FIRST_SEGMENTS: f64 = 10.0;
const LEAST_SEGMENTS: f64 = 4.0;

/// How often the least round trip is measured anew with a nearly empty pipe, and how long that takes.
const DRAIN_EVERY: Duration = Duration::from_secs(10);
const DRAIN_FOR: Duration = Duration::from_millis(200);

/// What an acknowledgement has shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// All bytes ever delivered, and how many of them were when the newest of those just acknowledged was sent.
    pub(super) delivered: u64,
    pub(super) delivered_before: u64,
    /// Bytes just acknowledged.
    pub(super) acknowledged: usize,
    /// Bytes found to be lost since the last sample.
    pub(super) lost: usize,
    /// Bytes still in flight.
    pub(super) in_flight: usize,
    /// Time over which what was delivered in between was sent or acknowledged, whichever was longer.
    pub(super) interval: Duration,
    /// The round trip, if it could be measured.
    pub(super) round_trip: Option<Duration>,
    /// Whether the sender had less to send than it might have.
    pub(super) idle: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// Doubling the rate until the path is full.
    Startup,
    /// Letting the queue go that this has made.
    Drain,
    /// Holding the rate, and trying for more in turns.
    Probe { phase: usize, since: Duration },
    /// Measuring the least round trip.
    Empty { until: Option<Duration> },
}

/// A rate, bytes per second, and when it was seen.
#[derive(Clone, Copy, Debug)]
struct Delivery {
    rate: f64,
    round: u64,
    at: Duration,
}

/// The rate of one connection.
#[derive(Debug)]
pub(super) struct Rate {
    mss: f64,
    mode: Mode,
    /// Highest delivery rates, falling.
    rates: VecDeque<Delivery>,
    least: Option<(Duration, Duration)>,
    round: u64,
    /// The round is over once what is sent from here on has been delivered.
    round_ends: u64,
    full_rate: f64,
    full_rounds: u32,
    /// Bytes delivered and lost in this round.
    round_delivered: f64,
    round_lost: f64,
    /// Most bytes in flight that the path has been found to take.
    ceiling: f64,
    window: f64,
    /// Bytes that may be sent at once, and up to when they were added.
    credit: f64,
    credited: Duration,
}

impl Rate {
    pub(super) fn new(mss: usize, now: Duration) -> Self {
        let mss = mss as f64;
        Self {
            mss,
            mode: Mode::Startup,
            rates: VecDeque::new(),
            least: None,
            round: 0,
            round_ends: 0,
            full_rate: 0.0,
            full_rounds: 0,
            round_delivered: 0.0,
            round_lost: 0.0,
            ceiling: f64::INFINITY,
            window: FIRST_SEGMENTS * mss,
            credit: FIRST_SEGMENTS * mss,
            credited: now,
        }
    }

    /// What the path delivers at best, bytes per second.
    fn delivery(&self) -> Option<f64> {
        self.rates.front().map(|best| best.rate)
    }

    fn round_trip(&self) -> Duration {
        self.least.map_or(TICK, |(least, _)| least)
    }

    /// What the path holds, bytes. A task that sleeps does so for a tick, so the pipe is that much longer.
    fn pipe(&self) -> Option<f64> {
        self.delivery().map(|rate| rate * (self.round_trip() + TICK).as_secs_f64())
    }

    /// Bytes that may be in flight.
    pub(super) fn window(&self) -> usize {
        let window = match (self.mode, self.pipe()) {
            (Mode::Empty { .. }, Some(pipe)) => self.window.min(pipe / 2.0),
            _ => self.window,
        };
        window.min(self.ceiling).max(LEAST_SEGMENTS * self.mss) as usize
    }

    fn gain(&self) -> f64 {
        match self.mode {
            Mode::Startup => STARTUP_GAIN,
            Mode::Drain => 1.0 / STARTUP_GAIN,
            Mode::Probe { phase, .. } => CYCLE[phase],
            Mode::Empty { .. } => 1.0,
        }
    }

    /// Bytes per second to send at: never less than the least window in a round trip, however little was delivered
    /// for want of data or while the path was down.
    fn pace(&self) -> f64 {
        let round_trip = self.round_trip().max(TICK).as_secs_f64();
        let pace = self.gain() * self.delivery().unwrap_or(self.window / round_trip);
        pace.max(LEAST_SEGMENTS * self.mss / round_trip)
    }

    /// Bytes that may be sent now, given that [`Self::delay`] is over: a segment, or what is due to the rate.
    pub(super) fn burst(&self, now: Duration) -> usize {
        self.credit_at(now).max(self.mss) as usize
    }

    /// How long until something may be sent; zero if now.
    pub(super) fn delay(&self, now: Duration) -> Duration {
        let credit = self.credit_at(now);
        if credit > 0.0 { Duration::ZERO } else { Duration::from_secs_f64((self.mss - credit) / self.pace()) }
    }

    /// Bytes that may be sent without a pause.
    fn credit_at(&self, now: Duration) -> f64 {
        let pace = self.pace();
        // Two ticks' worth: who sleeps for one may wake up after two.
        let most = (pace * 2.0 * TICK.as_secs_f64()).max(FIRST_SEGMENTS * self.mss);
        (self.credit + pace * now.saturating_sub(self.credited).as_secs_f64()).min(most)
    }

    pub(super) fn on_send(&mut self, bytes: usize, now: Duration) {
        self.credit = self.credit_at(now) - bytes as f64;
        self.credited = now;
    }

    pub(super) fn on_acknowledgement(&mut self, sample: &Sample, now: Duration) {
        let starts_round = sample.delivered_before >= self.round_ends;
        self.round_delivered += sample.acknowledged as f64;
        self.round_lost += sample.lost as f64;
        if starts_round {
            self.round += 1;
            self.round_ends = sample.delivered;
        }
        self.measure(sample, now);
        self.heed_overflow(sample, starts_round);
        match self.mode {
            Mode::Startup => self.look_for_the_limit(sample, starts_round),
            Mode::Drain => {}
            Mode::Probe { phase, since } => self.turn(phase, since, sample, now),
            Mode::Empty { until } => self.stay_empty(until, sample, now),
        }
        let drained = self.pipe().is_some_and(|pipe| sample.in_flight as f64 <= pipe);
        if self.mode == Mode::Drain && drained {
            self.probe(now);
        }
        self.resize(sample);
    }

    fn measure(&mut self, sample: &Sample, now: Duration) {
        if let Some(round_trip) = sample.round_trip {
            let stale = self.least.is_some_and(|(_, since)| now.saturating_sub(since) > DRAIN_EVERY);
            if stale && !matches!(self.mode, Mode::Empty { .. } | Mode::Startup) && !sample.idle {
                self.mode = Mode::Empty { until: None };
            }
            if stale || self.least.is_none_or(|(least, _)| round_trip <= least) {
                self.least = Some((round_trip, now));
            }
        }
        // Over less than half a round trip it is the acknowledgements that were bunched.
        if sample.interval.is_zero() || sample.interval < self.round_trip() / 2 {
            return;
        }
        let rate = (sample.delivered - sample.delivered_before) as f64 / sample.interval.as_secs_f64();
        if sample.idle && self.delivery().is_some_and(|best| rate < best) {
            return;
        }
        while self.rates.back().is_some_and(|known| known.rate <= rate) {
            self.rates.pop_back();
        }
        self.rates.push_back(Delivery { rate, round: self.round, at: now });
        let is_old =
            |best: &Delivery| self.round - best.round > MEMORY_ROUNDS && now.saturating_sub(best.at) > MEMORY;
        while self.rates.front().is_some_and(is_old) {
            self.rates.pop_front();
        }
    }

    /// Lowers the ceiling after a round that lost much, and raises it after one that didn't.
    fn heed_overflow(&mut self, sample: &Sample, starts_round: bool) {
        let overflows = self.round_lost > OVERFLOW * (self.round_delivered + self.round_lost);
        if self.mode == Mode::Startup && overflows && self.round_lost > FIRST_SEGMENTS * self.mss {
            self.mode = Mode::Drain;
        }
        if !starts_round {
            return;
        }
        if overflows && self.round_lost > LEAST_SEGMENTS * self.mss {
            let taken = (sample.in_flight + sample.acknowledged) as f64;
            self.ceiling = (taken.min(self.ceiling) * 0.85).max(self.pipe().unwrap_or(0.0));
        } else {
            self.ceiling *= 1.05;
        }
        (self.round_delivered, self.round_lost) = (0.0, 0.0);
    }

    fn look_for_the_limit(&mut self, sample: &Sample, starts_round: bool) {
        let Some(rate) = self.delivery().filter(|_| starts_round && !sample.idle) else { return };
        if rate >= self.full_rate * 1.25 {
            self.full_rate = rate;
            self.full_rounds = 0;
            return;
        }
        self.full_rounds += 1;
        if self.full_rounds >= FULL_ROUNDS {
            self.mode = Mode::Drain;
        }
    }

    /// Starts to probe, in a phase that neither fills nor drains.
    fn probe(&mut self, now: Duration) {
        self.mode = Mode::Probe { phase: 2, since: now };
    }

    fn turn(&mut self, phase: usize, since: Duration, sample: &Sample, now: Duration) {
        let over = now.saturating_sub(since) > self.round_trip().max(TICK);
        let drained = CYCLE[phase] < 1.0 && self.pipe().is_some_and(|pipe| sample.in_flight as f64 <= pipe);
        if over || drained {
            self.mode = Mode::Probe { phase: (phase + 1) % CYCLE.len(), since: now };
        }
    }

    fn stay_empty(&mut self, until: Option<Duration>, sample: &Sample, now: Duration) {
        match until {
            None if sample.in_flight <= self.window() => {
                self.mode = Mode::Empty { until: Some(now + DRAIN_FOR) }
            }
            Some(until) if now >= until => self.probe(now),
            _ => {}
        }
    }

    fn resize(&mut self, sample: &Sample) {
        let acknowledged = sample.acknowledged as f64;
        let Some(pipe) = self.pipe() else {
            self.window += acknowledged;
            return;
        };
        // Twice the pipe keeps it full while acknowledgements are delayed or bunched.
        let gain = if self.mode == Mode::Startup { STARTUP_GAIN } else { 2.0 };
        let target = gain * pipe + 3.0 * self.mss;
        if self.mode == Mode::Startup {
            if self.window < target {
                self.window += acknowledged;
            }
        } else {
            self.window = (self.window + acknowledged).min(target);
        }
    }

    /// All that was in flight is taken for lost: what was known of the path may no longer hold.
    pub(super) fn on_timeout(&mut self, now: Duration) {
        *self = Self { least: self.least, ..Self::new(self.mss as usize, now) };
    }
}
