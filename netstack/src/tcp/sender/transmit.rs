//! What is sent when.

use std::{ops::Range, time::Duration};

use super::{Flight, Plan, Sender, Timer};
use crate::tcp::rate::Rate;

impl Sender {
    /// What may be sent at `now`.
    pub(in crate::tcp) fn plan(&self, now: Duration) -> Option<Plan> {
        if let Some(probe) = self.plan_probe() {
            return Some(probe);
        }
        let window = self.rate.as_ref().map_or(usize::MAX, Rate::window);
        let allowed = window.saturating_sub(self.in_flight);
        let paused = self.rate.as_ref().is_some_and(|rate| !rate.delay(now).is_zero());
        if paused || allowed < self.mss && self.in_flight > 0 {
            return None;
        }
        let allowed = allowed.min(self.rate.as_ref().map_or(usize::MAX, |rate| rate.burst(now)));
        if let Some(lost) = self.lost.first() {
            return Some(self.plan_for(lost.start, lost.end, allowed, true));
        }
        let open = self.end().min(self.edge);
        if self.next >= open {
            return None;
        }
        // Small segments only at the end of the stream so far, or when nothing else can happen.
        let waiting = self.end() - self.next;
        let sendable = open - self.next;
        if sendable < waiting.min(self.mss as u64) && self.in_flight > 0 {
            return None;
        }
        Some(self.plan_for(self.next, open, allowed, false))
    }

    fn plan_for(&self, start: u64, end: u64, allowed: usize, again: bool) -> Plan {
        let whole = (allowed / self.mss).max(1) * self.mss;
        let mut end = end.min(start + whole.min(self.batch) as u64);
        let partial = (end - start) % self.mss as u64;
        if partial > 0 && end < self.end() && end - start > partial && !again {
            end -= partial;
        }
        let fin = self.fin && end == self.end();
        Plan { range: start..end, fin, last: end >= self.ring.end(), again }
    }

    fn plan_probe(&self) -> Option<Plan> {
        if !self.probe {
            return None;
        }
        if self.next < self.end() && (self.next < self.edge || self.flying.is_empty()) {
            let length = if self.next < self.edge { self.mss as u64 } else { 1 };
            let end = self.end().min(self.next + length);
            return Some(self.plan_for(self.next, end, self.mss, false));
        }
        let (start, flight) = self.flying.last_key_value()?;
        let start = (*start).max(flight.end.saturating_sub(self.mss as u64));
        Some(self.plan_for(start, flight.end, self.mss, true))
    }

    /// Notes that `plan` has been carried out.
    pub(in crate::tcp) fn sent(&mut self, plan: &Plan, now: Duration) {
        let Range { start, end } = plan.range;
        if self.flying.is_empty() {
            self.round_started = now;
            self.delivered_at = now;
        }
        // Of what is sent once more on suspicion only, the first copy is still in flight.
        for (start, flight) in self.cut(&plan.range) {
            self.in_flight -= (flight.end - start) as usize;
        }
        self.lost.remove(&plan.range);
        self.next = self.next.max(end);
        self.in_flight += (end - start) as usize;
        let flight = Flight {
            end,
            at: now,
            again: plan.again,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            round_started: self.round_started,
            idle: self.idle_until > 0,
        };
        self.flying.insert(start, flight);
        if let Some(rate) = &mut self.rate {
            rate.on_send((end - start) as usize, now);
        }
        self.probe = false;
        if self.timer.is_none_or(|(timer, _)| timer == Timer::Closed) {
            self.arm(now);
        }
        self.note_idle();
        // All that may be kept is in flight, and the peer would take more.
        let full = self.room() < self.allowance.size() / 8;
        if full && self.next == self.ring.end() && self.edge > self.next {
            self.allowance.grow();
        }
    }

    /// Rates that are measured while there is nothing to send say little of the path.
    fn note_idle(&mut self) {
        let window = self.rate.as_ref().map_or(usize::MAX, Rate::window);
        if self.next >= self.end().min(self.edge) && self.lost.is_empty() && self.in_flight < window {
            self.idle_until = (self.delivered + self.in_flight as u64).max(1);
        }
    }

    /// Sets the timer anew, for what is in flight.
    pub(super) fn arm(&mut self, now: Duration) {
        // A peer whose window is closed answers each question, and is given up if none is asked for too long.
        let is_shut = self.edge <= self.acknowledged();
        let longest = if is_shut { self.longest_pause } else { Duration::MAX };
        let timeout = self.rtt.timeout().min(longest);
        self.timer = if self.flying.is_empty() {
            let closed = self.lost.is_empty() && self.next < self.end() && self.next >= self.edge;
            closed.then_some((Timer::Closed, now + timeout))
        } else {
            let probe = self.rtt.probe_timeout(self.in_flight <= self.mss);
            match probe.filter(|probe| !self.probed && self.lost.is_empty() && *probe < timeout) {
                Some(probe) => Some((Timer::Probe, now + probe)),
                None => Some((Timer::Timeout, now + timeout)),
            }
        };
    }

    /// Does what is due at `now`.
    pub(in crate::tcp) fn tick(&mut self, now: Duration) {
        if self.timer.is_none() && self.flying.is_empty() && self.next < self.end() && self.next >= self.edge
        {
            self.arm(now);
        }
        let Some((timer, _)) = self.timer.filter(|(_, at)| *at <= now) else { return };
        self.timer = None;
        match timer {
            Timer::Probe => {
                self.probed = true;
                self.probe = true;
            }
            Timer::Overtaken => {
                let due = self.find_lost(now);
                self.arm(now);
                self.await_overtaken(due);
            }
            Timer::Closed => {
                self.rtt.strike();
                self.probe = true;
            }
            Timer::Timeout => {
                self.rtt.strike();
                self.duplicates = 0;
                self.lose(self.acknowledged()..self.next);
                if let Some(rate) = &mut self.rate {
                    rate.on_timeout(now);
                }
            }
        }
        if self.timer.is_none() {
            self.arm(now);
        }
    }

    /// How long until [`Self::tick`] or [`Self::plan`] has something to do by itself.
    pub(in crate::tcp) fn deadline(&self, now: Duration) -> Option<Duration> {
        let timer = self.timer.map(|(_, at)| at.saturating_sub(now));
        let sendable = !self.lost.is_empty() || self.next < self.end().min(self.edge);
        let pause = self
            .rate
            .as_ref()
            .filter(|_| sendable)
            .map(|rate| rate.delay(now))
            .filter(|delay| !delay.is_zero());
        timer.into_iter().chain(pause).min()
    }
}
