//! What comes in.

use std::time::Duration;

use super::{Connection, Phase, SYN_TIMEOUT};
use crate::{
    packet::IpHeader,
    tcp::segment::{ACK, FIN, RST, SYN, Segment},
};

/// How long an answer is waited for before its question is acknowledged by itself: a tick of tokio's timers. The
/// usual 40 ms (Linux) would hold up those who write in small pieces without TCP_NODELAY.
const ANSWER: Duration = Duration::from_millis(1);

impl Connection {
    /// Takes in a packet of this connection. Nothing is sent before [`Self::egress`].
    pub fn ingest(&mut self, packet: &[u8], now: Duration) {
        let segment =
            IpHeader::parse(packet).and_then(|header| Segment::parse(&packet[header.payload..header.total]));
        let Some(segment) = segment else { return };
        match self.phase {
            Phase::Calling => self.ingest_calling(&segment, now),
            Phase::Answering => self.ingest_answering(&segment, now),
            Phase::Open => self.ingest_open(&segment, now),
            Phase::Closed => {}
        }
    }

    fn ingest_calling(&mut self, segment: &Segment<'_>, now: Duration) {
        if !segment.has(ACK) {
            return;
        }
        if segment.acknowledgement != self.tx.sequence(0) {
            self.stale = (!segment.has(RST)).then_some(segment.acknowledgement);
        } else if segment.has(RST) {
            self.tear_down();
        } else if segment.has(SYN) {
            self.meet(segment);
            self.open(now);
        }
    }

    fn ingest_answering(&mut self, segment: &Segment<'_>, now: Duration) {
        if segment.has(RST) {
            if self.rx.expects(segment.sequence) {
                self.tear_down();
            }
        } else if segment.has(SYN) {
            // Our answer was lost, or is on its way.
            self.syn.0 = now;
        } else if segment.has(ACK) && segment.acknowledgement == self.tx.sequence(0) {
            self.open(now);
            self.ingest_open(segment, now);
        } else if segment.has(ACK) {
            self.stale = Some(segment.acknowledgement);
        }
    }

    fn open(&mut self, now: Duration) {
        self.phase = Phase::Open;
        self.heard = now;
        // Of a SYN that was sent more than once, it isn't known which was answered (RFC 6298, 3).
        let (due, tries) = self.syn;
        if tries == 1 {
            self.tx.measure(now.saturating_sub(due - SYN_TIMEOUT), now);
        }
    }

    fn ingest_open(&mut self, segment: &Segment<'_>, now: Duration) {
        if segment.has(RST) {
            // Only a reset that is exactly in place is believed; others are asked back for (RFC 5961, 3.2).
            if !self.rx.expects(segment.sequence) {
                self.rx.owe();
            } else if self.is_quiet() {
                // The peer is done, and its last acknowledgement got lost.
                self.phase = Phase::Closed;
            } else {
                self.tear_down();
            }
            return;
        }
        if segment.has(SYN) || !segment.has(ACK) {
            return self.rx.owe();
        }
        self.heard = now;
        let window = usize::from(segment.window) << self.scale.unwrap_or(0);
        let is_pure = segment.payload.is_empty() && !segment.has(FIN);
        let blocks = segment.blocks.as_slice();
        if !self.tx.acknowledge(segment.acknowledgement, blocks, window, is_pure, now) {
            return self.rx.owe();
        }
        // What a peer asks is likely to be answered soon, and the answer acknowledges the question.
        let is_question = self.conversing && segment.payload.len() <= self.tx.mss();
        let answer = if is_question { now + ANSWER } else { now };
        self.rx.take(segment.sequence, segment.payload, segment.has(FIN), answer);
    }
}
