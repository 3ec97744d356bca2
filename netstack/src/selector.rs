//! Which path carries the session: events in, a choice out. Pure.

use std::time::{Duration, Instant};

use crate::path::{PathKind, PathPolicy};

/// How often each open path is pinged.
pub const HEARTBEAT: Duration = Duration::from_millis(500);

/// A UDP path that is silent for this long is left: three heartbeats and the answer to a fourth. With the
/// heartbeat that notices it, traffic is back on a stream within three seconds.
pub const UDP_SILENCE: Duration = Duration::from_millis(1_750);

/// A UDP path that answers no ping for this long is left even if something still arrives by it: where only the way
/// there is blocked, the other side's retransmissions are heard for seconds.
pub const UDP_UNANSWERED: Duration = Duration::from_millis(2_250);

/// A stream that is silent for this long is given up. TCP retransmits through outages of seconds, and tells when
/// it can't; this is for peers that vanish without a word.
pub const STREAM_SILENCE: Duration = Duration::from_secs(12);

/// A stream that is silent for this long has stalled: two heartbeats without an answer. UDP that is left after [`UDP_SILENCE`]
/// finds every stream through the same broken network silent for at least so long.
pub const STREAM_STALL: Duration = UDP_SILENCE.saturating_sub(HEARTBEAT);

/// Answers in a row that a UDP path owes after it failed once, so that one that flaps is not run after. Doubles
/// with each failure.
const STEADY: u32 = 4;

/// Most answers in a row that are asked for: half a minute's.
const MOST_STEADY: u32 = 64;

/// How one path fares.
#[derive(Clone, Debug, PartialEq)]
struct Health {
    kind: PathKind,
    heard: Instant,
    answered: Instant,
    rtt: Option<Duration>,
    /// Answers since it was last silent.
    answers: u32,
}

/// The state of all paths of a laptop. There is one UDP path and one stream at a time.
#[derive(Clone, Debug)]
pub struct Selector {
    policy: PathPolicy,
    stream: Option<Health>,
    stream_stalled: bool,
    udp: Option<Health>,
    stream_problem: Option<String>,
    udp_failures: u32,
    udp_tried: bool,
}

impl Selector {
    /// A selector that knows of no path yet.
    #[must_use]
    pub fn new(policy: PathPolicy) -> Self {
        Self {
            policy,
            stream: None,
            stream_stalled: true,
            udp: None,
            stream_problem: None,
            udp_failures: 0,
            udp_tried: false,
        }
    }

    /// Something authentic arrived through a path of `kind`; `rtt` is set if it answers a ping.
    pub fn heard(&mut self, kind: PathKind, rtt: Option<Duration>, now: Instant) {
        let slot = if kind == PathKind::Udp { &mut self.udp } else { &mut self.stream };
        match slot {
            Some(health) if health.kind == kind => {
                health.heard = now;
                if rtt.is_some() {
                    health.rtt = rtt;
                    health.answered = now;
                }
                health.answers = health.answers.saturating_add(u32::from(rtt.is_some()));
            }
            // Only an answered ping proves that UDP works both ways, and for large packets.
            _ if kind == PathKind::Udp && rtt.is_none() => {}
            _ => {
                let answers = u32::from(rtt.is_some());
                *slot = Some(Health { kind, heard: now, answered: now, rtt, answers });
            }
        }
        if kind != PathKind::Udp {
            self.stream_problem = None;
            self.stream_stalled = false;
        }
    }

    /// UDP is being tried.
    pub fn trying_udp(&mut self) {
        self.udp_tried = true;
    }

    /// The manager is another process than it was: UDP led to the one before, and has yet to prove itself to this one.
    pub fn manager_restarted(&mut self) {
        self.udp = None;
    }

    /// The stream ended, or could not be had.
    pub fn stream_failed(&mut self, reason: impl Into<String>) {
        self.stream = None;
        self.stream_stalled = true;
        self.stream_problem = Some(reason.into());
    }

    /// Whether there is no stream from which something was heard lately.
    #[must_use]
    pub fn stream_stalled(&self) -> bool {
        self.stream_stalled
    }

    /// Time passes: what is silent for too long is given up. Answers the kind of a stream to close.
    pub fn tick(&mut self, now: Instant) -> Option<PathKind> {
        let gone = |udp: &Health| {
            now.duration_since(udp.heard) >= UDP_SILENCE || now.duration_since(udp.answered) >= UDP_UNANSWERED
        };
        self.stream_stalled =
            self.stream.as_ref().is_none_or(|stream| now.duration_since(stream.heard) >= STREAM_STALL);
        if self.udp.as_ref().is_some_and(gone) {
            self.udp = None;
            // Where streams are silent too it is not UDP that fails.
            self.udp_failures = self.udp_failures.saturating_add(u32::from(!self.stream_stalled));
        }
        let silent =
            self.stream.as_ref().filter(|stream| now.duration_since(stream.heard) >= STREAM_SILENCE)?.kind;
        self.stream_failed(format!("nothing was heard for {} s", STREAM_SILENCE.as_secs()));
        Some(silent)
    }

    /// The path to use now.
    #[must_use]
    pub fn choice(&self) -> Option<PathKind> {
        let udp = self.udp.as_ref().filter(|udp| self.stream_stalled || udp.answers >= self.steady());
        let stream = self.stream.as_ref();
        [udp, stream].into_iter().flatten().map(|health| health.kind).find(|kind| self.policy.allows(*kind))
    }

    /// Round trip of the last ping that a path of `kind` answered.
    #[must_use]
    pub fn rtt(&self, kind: PathKind) -> Option<Duration> {
        self.health(kind)?.rtt
    }

    /// Why a path of `kind` is in use, or isn't.
    #[must_use]
    pub fn reason(&self, kind: PathKind) -> String {
        let chosen = self.choice() == Some(kind);
        let health = self.health(kind);
        match (kind, health) {
            _ if !self.policy.allows(kind) => "not asked for (--path)".into(),
            (PathKind::Udp, Some(_)) if chosen => {
                "the manager answers full-size packets by UDP, the fastest way".into()
            }
            (PathKind::Udp, Some(udp)) => {
                format!(
                    "it answers again, but failed before: {} more answers to go",
                    self.steady().saturating_sub(udp.answers)
                )
            }
            (PathKind::Udp, None) if self.udp_failures > 0 => "it stopped answering; it is tried on".into(),
            (PathKind::Udp, None) if self.udp_tried => {
                "the manager does not answer by UDP from here; it is tried on".into()
            }
            (PathKind::Udp, None) => "the manager publishes no UDP address".into(),
            (_, Some(_)) if chosen && self.policy == PathPolicy::Auto => {
                format!("the best path that answers; udp: {}", self.reason(PathKind::Udp))
            }
            (_, Some(_)) if chosen => "asked for (--path)".into(),
            (_, Some(_)) => "kept open, to fall back to".into(),
            (_, None) => self.stream_problem.clone().unwrap_or_else(|| "not tried yet".into()),
        }
    }

    fn health(&self, kind: PathKind) -> Option<&Health> {
        let slot = if kind == PathKind::Udp { &self.udp } else { &self.stream };
        slot.as_ref().filter(|health| health.kind == kind)
    }

    fn steady(&self) -> u32 {
        match self.udp_failures {
            0 => 1,
            failures => STEADY.saturating_mul(1 << (failures - 1).min(8)).min(MOST_STEADY),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const RTT: Option<Duration> = Some(Duration::from_millis(1));

    #[test]
    fn udp_is_preferred_once_it_answers_and_left_when_it_stops() {
        let mut selector = Selector::new(PathPolicy::Auto);
        let start = Instant::now();
        assert_eq!(selector.choice(), None);
        selector.heard(PathKind::Proxy, None, start);
        assert_eq!(selector.choice(), Some(PathKind::Proxy));
        selector.heard(PathKind::Udp, None, start);
        assert_eq!(selector.choice(), Some(PathKind::Proxy), "an unanswered ping proves nothing");
        selector.heard(PathKind::Udp, RTT, start);
        assert_eq!(selector.choice(), Some(PathKind::Udp));

        selector.heard(PathKind::Proxy, RTT, start + UDP_SILENCE);
        selector.tick(start + UDP_SILENCE);
        assert_eq!(selector.choice(), Some(PathKind::Proxy));
        assert!(UDP_SILENCE + 2 * HEARTBEAT < Duration::from_secs(3));
    }

    #[test]
    fn udp_that_is_blocked_one_way_is_left_as_well() {
        let mut selector = Selector::new(PathPolicy::Auto);
        let start = Instant::now();
        selector.heard(PathKind::Proxy, RTT, start);
        selector.heard(PathKind::Udp, RTT, start);
        let mut now = start;
        while selector.choice() == Some(PathKind::Udp) {
            now += HEARTBEAT;
            selector.heard(PathKind::Proxy, RTT, now);
            selector.heard(PathKind::Udp, None, now);
            selector.tick(now);
        }
        assert!(now - start < Duration::from_secs(3), "{:?}", now - start);
    }

    #[test]
    fn udp_that_flaps_must_prove_itself_longer_each_time() {
        let mut selector = Selector::new(PathPolicy::Auto);
        let mut now = Instant::now();
        selector.heard(PathKind::Proxy, RTT, now);
        let mut needed = Vec::new();
        for _ in 0..8 {
            let mut answers = 0;
            while selector.choice() != Some(PathKind::Udp) {
                now += HEARTBEAT;
                selector.heard(PathKind::Proxy, RTT, now);
                selector.heard(PathKind::Udp, RTT, now);
                answers += 1;
            }
            needed.push(answers);
            now += UDP_SILENCE;
            selector.heard(PathKind::Proxy, RTT, now);
            selector.tick(now);
        }
        assert_eq!(needed, [1, 4, 8, 16, 32, 64, 64, 64]);
    }

    #[test]
    fn a_restarted_manager_is_no_failure_of_udp() {
        let mut selector = Selector::new(PathPolicy::Auto);
        let now = Instant::now();
        selector.heard(PathKind::Proxy, RTT, now);
        selector.heard(PathKind::Udp, RTT, now);
        selector.manager_restarted();
        assert_eq!(selector.choice(), Some(PathKind::Proxy));
        selector.heard(PathKind::Udp, RTT, now);
        assert_eq!(selector.choice(), Some(PathKind::Udp), "one answer is enough again");
    }

    #[test]
    fn a_network_that_was_gone_is_no_failure_of_udp() {
        let mut selector = Selector::new(PathPolicy::Auto);
        let start = Instant::now();
        selector.heard(PathKind::Proxy, RTT, start);
        selector.heard(PathKind::Udp, RTT, start + HEARTBEAT);
        let left = start + HEARTBEAT + UDP_SILENCE;
        selector.tick(left);
        assert_eq!(selector.choice(), Some(PathKind::Proxy), "there is nothing better");
        selector.heard(PathKind::Udp, RTT, left);
        assert_eq!(selector.choice(), Some(PathKind::Udp), "the stream waits for a retransmission");
        selector.heard(PathKind::Proxy, RTT, left);
        assert_eq!(selector.choice(), Some(PathKind::Udp));
    }

    #[test]
    fn udp_that_failed_need_not_prove_itself_while_there_is_no_stream() {
        let mut selector = Selector::new(PathPolicy::Auto);
        let start = Instant::now();
        selector.heard(PathKind::Udp, RTT, start);
        selector.heard(PathKind::Proxy, RTT, start + UDP_SILENCE);
        selector.tick(start + UDP_SILENCE);
        selector.heard(PathKind::Udp, RTT, start + UDP_SILENCE);
        assert_eq!(selector.choice(), Some(PathKind::Proxy));
        selector.stream_failed("it ended");
        assert_eq!(selector.choice(), Some(PathKind::Udp));
    }

    #[test]
    fn a_policy_is_kept_even_if_nothing_answers() {
        let mut selector = Selector::new(PathPolicy::Only(PathKind::Udp));
        selector.heard(PathKind::Proxy, RTT, Instant::now());
        assert_eq!(selector.choice(), None);
    }

    #[test]
    fn a_silent_stream_is_closed() {
        let mut selector = Selector::new(PathPolicy::Auto);
        let start = Instant::now();
        selector.heard(PathKind::Forward, RTT, start);
        assert_eq!(selector.tick(start + STREAM_SILENCE - HEARTBEAT), None);
        assert_eq!(selector.tick(start + STREAM_SILENCE), Some(PathKind::Forward));
        assert_eq!(selector.choice(), None);
        assert!(selector.reason(PathKind::Forward).contains("12 s"));
    }
}
