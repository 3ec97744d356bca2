//! The sending half of a connection: what is in flight, what of it is lost, and what may be sent next.
//!
//! Losses are found by time (RACK and tail loss probes, RFC 8985) from selective acknowledgements (RFC 2018).

mod acknowledge;
#[cfg(test)]
mod tests;
mod transmit;

use std::{collections::BTreeMap, ops::Range, time::Duration};

use super::{
    budget::{Allowance, Budget},
    ranges::Ranges,
    rate::Rate,
    ring::Ring,
    rtt::RoundTrip,
};

/// Bytes kept for sending at first and at most: the receiver's windows. It grows when all that is kept is in flight.
const FIRST_BUFFER: usize = 64 << 10;
const LARGEST_BUFFER: usize = 8 << 20;

/// Offsets count from the first byte after the SYN; the FIN counts one.
#[derive(Debug)]
pub(super) struct Sender {
    ring: Ring,
    /// Sequence number of offset 0.
    first: u32,
    /// Longest pause between two questions whether a closed window has opened.
    longest_pause: Duration,
    /// Largest payload of a segment, bytes.
    mss: usize,
    /// Most payload that is sent at once, a multiple of `mss`, bytes.
    batch: usize,
    /// Whether the peer acknowledges selectively.
    selective: bool,
    allowance: Allowance,
    fin: bool,
    /// Where the next byte that was never sent is.
    next: u64,
    /// Up to where the peer's window reaches.
    edge: u64,

    /// Sent and neither acknowledged nor lost, by where it starts.
    flying: BTreeMap<u64, Flight>,
    in_flight: usize,
    /// Acknowledged selectively.
    sacked: Ranges,
    /// To be sent again.
    lost: Ranges,
    /// Of what was delivered, when the last was sent, and where it ended.
    newest: (Duration, u64),
    /// The round trip of that.
    newest_trip: Duration,
    /// The highest offset that was delivered.
    highest: u64,
    /// Whether segments have been seen to overtake each other.
    overtaking: bool,
    /// Acknowledgements in a row that acknowledged nothing.
    duplicates: u32,

    delivered: u64,
    delivered_at: Duration,
    /// When the newest of what was delivered was sent, or the pipe was empty.
    round_started: Duration,
    /// Up to how many delivered bytes the sender had too little to send.
    idle_until: u64,
    /// Bytes lost since the rate was last told.
    newly_lost: usize,

    rtt: RoundTrip,
    rate: Option<Rate>,
    timer: Option<(Timer, Duration)>,
    /// Whether the end of what was sent has been probed since the last acknowledgement.
    probed: bool,
    /// Whether a byte is to be sent although the window is closed, or the last segment although it may be on its way.
    probe: bool,
}

/// What was sent at once.
#[derive(Clone, Copy, Debug)]
struct Flight {
    end: u64,
    at: Duration,
    again: bool,
    delivered: u64,
    delivered_at: Duration,
    round_started: Duration,
    idle: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timer {
    /// The last of what was sent may be lost.
    Probe,
    /// Segments that others have overtaken count as lost from then on.
    Overtaken,
    /// All that was sent is taken for lost.
    Timeout,
    /// The peer's window was closed, and its opening may have been lost.
    Closed,
}

/// What is to be sent: a range of offsets, of which the last may be the FIN's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) range: Range<u64>,
    pub(super) fin: bool,
    /// Whether nothing is left to send behind it.
    pub(super) last: bool,
    again: bool,
}

impl Plan {
    /// Nothing, at `offset`.
    pub(super) const fn nothing(offset: u64) -> Self {
        Self { range: offset..offset, fin: false, last: false, again: false }
    }

    /// The bytes of it.
    pub(super) fn data(&self) -> Range<u64> {
        self.range.start..self.range.end - u64::from(self.fin)
    }
}

impl Sender {
    /// A sender whose SYN has `sequence` and is yet to be answered.
    pub(super) fn new(
        sequence: u32,
        mss: usize,
        batch: usize,
        longest_pause: Duration,
        budget: &Budget,
    ) -> Self {
        Self {
            ring: Ring::default(),
            first: sequence.wrapping_add(1),
            longest_pause,
            mss,
            batch,
            selective: false,
            allowance: budget.allowance(FIRST_BUFFER, LARGEST_BUFFER),
            fin: false,
            next: 0,
            edge: 0,
            flying: BTreeMap::new(),
            in_flight: 0,
            sacked: Ranges::default(),
            lost: Ranges::default(),
            newest: (Duration::ZERO, 0),
            newest_trip: Duration::ZERO,
            highest: 0,
            overtaking: false,
            duplicates: 0,
            delivered: 0,
            delivered_at: Duration::ZERO,
            round_started: Duration::ZERO,
            idle_until: 0,
            newly_lost: 0,
            rtt: RoundTrip::default(),
            rate: None,
            timer: None,
            probed: false,
            probe: false,
        }
    }

    /// What the peer's SYN says: its segments, whether it acknowledges selectively, and its window in bytes.
    pub(super) fn meet(&mut self, mss: usize, selective: bool, window: usize) {
        self.batch = (self.batch / self.mss).max(1) * mss;
        self.mss = mss;
        self.selective = selective;
        self.edge = window as u64;
    }

    /// Takes in how long the handshake took.
    pub(super) fn measure(&mut self, round_trip: Duration, now: Duration) {
        self.rtt.sample(round_trip, now);
    }

    /// Measures the rate, or no longer.
    pub(super) fn set_measured(&mut self, measured: bool, now: Duration) {
        if measured != self.rate.is_some() {
            self.rate = measured.then(|| Rate::new(self.mss, now));
        }
    }

    pub(super) fn is_selective(&self) -> bool {
        self.selective
    }

    pub(super) fn mss(&self) -> usize {
        self.mss
    }

    pub(super) fn sequence(&self, offset: u64) -> u32 {
        self.first.wrapping_add(offset as u32)
    }

    /// The offset that `sequence` stands for, counted from what is acknowledged.
    fn offset(&self, sequence: u32) -> i64 {
        let acknowledged = self.sequence(self.acknowledged());
        self.acknowledged() as i64 + i64::from(sequence.wrapping_sub(acknowledged).cast_signed())
    }

    /// All before this offset is acknowledged.
    fn acknowledged(&self) -> u64 {
        self.ring.start()
    }

    /// Where the stream ends so far, including the FIN.
    fn end(&self) -> u64 {
        self.ring.end() + u64::from(self.fin)
    }

    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// The offset that a segment without data has. What was sent to ask a closed window lies beyond it, where the peer answers
    /// whatever comes; were both windows closed, the two would answer each other's answers for ever.
    pub(super) fn acceptable(&self) -> u64 {
        self.next.min(self.edge.max(self.acknowledged()))
    }

    pub(super) fn is_fin_queued(&self) -> bool {
        self.fin
    }

    /// Whether the peer has acknowledged everything, the FIN too.
    pub(super) fn is_finished(&self) -> bool {
        let all_sent = self.fin && self.next == self.end();
        all_sent && self.flying.is_empty() && self.lost.is_empty() && self.sacked.is_empty()
    }

    /// Whether something is unacknowledged, or waits to be sent.
    pub(super) fn is_busy(&self) -> bool {
        !self.flying.is_empty() || !self.lost.is_empty() || self.next < self.end()
    }

    /// Bytes that are kept until they are acknowledged.
    pub(super) fn kept(&self) -> usize {
        (self.ring.end() - self.ring.start()) as usize
    }

    /// Bytes that can be taken on.
    pub(super) fn room(&self) -> usize {
        self.allowance.size().saturating_sub(self.kept())
    }

    /// Where to put what is to be sent; see [`Self::append`].
    pub(super) fn vacant(&mut self) -> &mut [u8] {
        self.ring.room(self.allowance.size())
    }

    /// Counts `count` bytes that were put into [`Self::vacant`] in.
    pub(super) fn append(&mut self, count: usize) {
        self.ring.appended(count);
    }

    pub(super) fn finish(&mut self) {
        self.fin = true;
    }

    pub(super) fn bytes(&self, range: Range<u64>) -> (&[u8], &[u8]) {
        self.ring.slices(range)
    }

    /// Gives memory back, if nothing is kept.
    pub(super) fn release(&mut self) {
        if self.ring.release() {
            self.allowance.shrink();
        }
    }
}
