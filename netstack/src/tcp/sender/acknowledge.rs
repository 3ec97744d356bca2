//! Acknowledgements: what has arrived, what is lost, and what that says of the path.

use std::{ops::Range, time::Duration};

use super::{Flight, Sender, Timer};
use crate::tcp::rate::Sample;

/// Duplicate acknowledgements after which a segment is taken for lost (RFC 5681).
const DUPLICATES: u32 = 3;

/// Most ranges that are known to be acknowledged selectively. 4 % loss in the largest window makes a quarter as many; a peer that
/// acknowledges every other byte would have us look at millions with each of its segments.
const MAX_SACKED: usize = 1024;

/// What is newly known to have been delivered.
#[derive(Debug, Default)]
struct News {
    bytes: usize,
    /// What was sent last of it, and where it ended.
    newest: Option<(Flight, u64)>,
    round_trip: Option<Duration>,
}

impl Sender {
    /// Takes in an acknowledgement of `sequence` that announces `window` bytes, and the `blocks` beyond it.
    /// `false` if it is for something that was never sent.
    pub(in crate::tcp) fn acknowledge(
        &mut self,
        sequence: u32,
        blocks: &[(u32, u32)],
        window: usize,
        is_pure: bool,
        now: Duration,
    ) -> bool {
        let offset = self.offset(sequence);
        if offset > self.next as i64 {
            return false;
        }
        let Ok(offset) = u64::try_from(offset) else { return true };
        let edge = self.edge;
        self.edge = edge.max(offset + window as u64);
        let before = self.acknowledged();

        let mut news = News::default();
        if offset > before {
            self.deliver(before..offset, &mut news, now);
            self.sacked.remove(&(before..offset));
            self.lost.remove(&(before..offset));
            self.ring.consume(offset.min(self.ring.end()));
            self.duplicates = 0;
            self.rtt.relax();
        }
        for (start, end) in blocks {
            // Below what is acknowledged, by this or by an acknowledgement that overtook this one, they are old news.
            let start = self.offset(*start).max(offset.max(before) as i64);
            let end = self.offset(*end);
            if start < end && end <= self.next as i64 {
                let range = start as u64..end as u64;
                // What isn't noted is sent once more at worst.
                if self.sacked.len() >= MAX_SACKED && self.sacked.around(range.start).is_none() {
                    continue;
                }
                self.deliver(range.clone(), &mut news, now);
                self.lost.remove(&range);
                self.sacked.insert(range);
            }
        }
        self.heed_reneging();
        let mut repeated = false;
        if news.bytes > 0 || offset > before {
            self.learn(&news, now);
        } else if is_pure && self.edge == edge && !self.flying.is_empty() {
            self.duplicates += 1;
            repeated = self.duplicates == DUPLICATES;
        }
        let due = if self.selective {
            self.find_lost(now)
        } else {
            self.count_duplicates(repeated, offset > before);
            None
        };
        if news.bytes > 0 || self.timer.is_some_and(|(timer, _)| timer == Timer::Closed) {
            self.arm(now);
        }
        self.await_overtaken(due);
        true
    }

    /// A peer short of memory may throw away what it has acknowledged selectively only (RFC 2018, 8). It has, where all before that
    /// is acknowledged and that is not.
    fn heed_reneging(&mut self) {
        if self.sacked.first().is_some_and(|range| range.start <= self.acknowledged()) {
            let all = std::mem::take(&mut self.sacked);
            all.iter().for_each(|range| self.lost.insert(range));
        }
    }

    /// Takes out of flight what of `range` is there.
    fn deliver(&mut self, range: Range<u64>, news: &mut News, now: Duration) {
        for part in self.sacked.missing(range) {
            for (start, flight) in self.cut(&part) {
                let bytes = (flight.end - start) as usize;
                self.in_flight -= bytes;
                news.bytes += bytes;
                if !flight.again {
                    news.round_trip = Some(now.saturating_sub(flight.at));
                    self.overtaking |= start < self.highest;
                }
                let newest = news.newest.as_ref().map(|(newest, end)| (newest.at, *end));
                if newest.is_none_or(|newest| newest < (flight.at, flight.end)) {
                    news.newest = Some((flight, flight.end));
                }
            }
            self.highest = self.highest.max(part.end);
        }
    }

    /// Removes what is in flight of `range`, cutting what reaches over its ends.
    pub(super) fn cut(&mut self, range: &Range<u64>) -> Vec<(u64, Flight)> {
        let mut cut = Vec::new();
        let before = self.flying.range(..range.start).next_back().map(|(start, flight)| (*start, *flight));
        if let Some((start, flight)) = before.filter(|(_, flight)| flight.end > range.start) {
            self.flying.insert(start, Flight { end: range.start, ..flight });
            self.flying.insert(range.start, flight);
        }
        while let Some((start, flight)) =
            self.flying.range(range.clone()).next().map(|(start, flight)| (*start, *flight))
        {
            self.flying.remove(&start);
            if flight.end > range.end {
                self.flying.insert(range.end, flight);
            }
            cut.push((start, Flight { end: flight.end.min(range.end), ..flight }));
        }
        cut
    }

    fn learn(&mut self, news: &News, now: Duration) {
        self.probed = false;
        self.probe = false;
        self.delivered += news.bytes as u64;
        self.delivered_at = now;
        if let Some(round_trip) = news.round_trip {
            self.rtt.sample(round_trip, now);
        }
        let Some((flight, end)) = news.newest else { return };
        let trip = now.saturating_sub(flight.at);
        // Sooner than any round trip: it is the first copy that was acknowledged.
        let is_first_copy = flight.again && self.rtt.least().is_some_and(|least| trip < least);
        if !is_first_copy && (flight.at, end) > self.newest {
            self.newest = (flight.at, end);
            self.newest_trip = trip;
        }
        self.round_started = flight.at;
        let sent_over = flight.at.saturating_sub(flight.round_started);
        let sample = Sample {
            delivered: self.delivered,
            delivered_before: flight.delivered,
            acknowledged: news.bytes,
            lost: std::mem::take(&mut self.newly_lost),
            in_flight: self.in_flight,
            interval: now.saturating_sub(flight.delivered_at).max(sent_over),
            round_trip: news.round_trip,
            idle: flight.idle,
        };
        if self.delivered > self.idle_until {
            self.idle_until = 0;
        }
        if let Some(rate) = &mut self.rate {
            rate.on_acknowledgement(&sample, now);
        }
    }

    /// Takes for lost what others that were sent later have overtaken by too much, and says when more of it will be.
    pub(super) fn find_lost(&mut self, now: Duration) -> Option<Duration> {
        if self.sacked.is_empty() {
            return None;
        }
        let patience = self.newest_trip + self.tolerance();
        let mut overdue = Vec::new();
        let mut next_due: Option<Duration> = None;
        for (start, flight) in &self.flying {
            if *start >= self.highest && flight.at >= self.newest.0 {
                break;
            }
            if (flight.at, flight.end) >= self.newest {
                continue;
            }
            let due = flight.at + patience;
            if due <= now {
                overdue.push(*start..flight.end);
            } else {
                next_due = Some(next_due.map_or(due, |next| next.min(due)));
            }
        }
        overdue.into_iter().for_each(|range| self.lose(range));
        next_due
    }

    pub(super) fn await_overtaken(&mut self, due: Option<Duration>) {
        if let Some(due) = due
            && self.timer.is_none_or(|(_, at)| due < at)
        {
            self.timer = Some((Timer::Overtaken, due));
        }
    }

    /// How long segments may take that others overtake, beyond those (RFC 8985, 6.2, step 4).
    fn tolerance(&self) -> Duration {
        let sacked: u64 =
            self.sacked.iter().map(|range| range.end - range.start).take(DUPLICATES as usize).sum();
        if !self.overtaking && sacked >= u64::from(DUPLICATES) * self.mss as u64 {
            return Duration::ZERO;
        }
        self.rtt.least().unwrap_or_default() / 4
    }

    /// For peers without selective acknowledgements: NewReno's way (RFC 6582). `repeated` says that the last of so many duplicates has
    /// just come, and `advanced` that something was acknowledged.
    fn count_duplicates(&mut self, repeated: bool, advanced: bool) {
        let recovering = self.highest > self.acknowledged();
        if repeated || advanced && recovering {
            if !recovering {
                self.highest = self.next;
            }
            let start = self.acknowledged();
            self.lose(start..(start + self.mss as u64).min(self.next));
        }
    }

    pub(super) fn lose(&mut self, range: Range<u64>) {
        for (start, flight) in self.cut(&range) {
            self.in_flight -= (flight.end - start) as usize;
            self.newly_lost += (flight.end - start) as usize;
            self.lost.insert(start..flight.end);
        }
    }
}
