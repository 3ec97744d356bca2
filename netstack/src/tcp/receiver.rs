//! The receiving half of a connection: order, window and acknowledgements.

use std::time::Duration;

use super::{
    budget::{Allowance, Budget},
    ranges::Ranges,
    ring::Ring,
    segment::{Blocks, MAX_BLOCKS},
};

/// The window that a connection starts with, bytes: what every TCP had before windows were scaled. A peer that
/// fills it starts slowly anyway.
const FIRST_WINDOW: usize = 64 << 10;

/// The window that it can grow to, bytes. On a path that loses packets, what arrives behind a gap waits a round
/// trip for it to be filled; so twice what is in flight: 1.6 Gb/s at 20 ms. Reached by who passes on promptly
/// what he receives.
const LARGEST_WINDOW: usize = 8 << 20;

/// The scale that [`LARGEST_WINDOW`] needs (RFC 7323).
pub(super) const SCALE: u8 = 8;

/// Most gaps in what was received. 4 % loss in a window of 8 MiB makes as many; beyond, data isn't kept.
const MAX_GAPS: usize = 256;

/// Offsets count from the first byte after the SYN; the FIN counts one.
#[derive(Debug)]
pub(super) struct Receiver {
    ring: Ring,
    /// Sequence number of offset 0.
    first: u32,
    /// What has arrived without gaps.
    next: u64,
    /// What has arrived beyond that.
    ahead: Ranges,
    /// Where the newest of that starts.
    newest: u64,
    /// Where the stream ends, once known.
    end: Option<u64>,
    /// Scale of the windows that are sent.
    scale: u8,
    /// The size of the buffer that the peer may rely on.
    allowance: Allowance,
    /// Offset up to which the peer has been allowed to send.
    edge: u64,
    /// Bytes passed on since the window last grew.
    moved: usize,
    /// When an acknowledgement is due, if one is owed.
    owed: Option<Duration>,
}

impl Receiver {
    /// For a peer whose SYN had `sequence`; `scaled` if it takes scaled windows.
    pub(super) fn new(sequence: u32, scaled: bool, budget: &Budget) -> Self {
        let (scale, largest) = if scaled { (SCALE, LARGEST_WINDOW) } else { (0, FIRST_WINDOW) };
        Self {
            ring: Ring::default(),
            first: sequence.wrapping_add(1),
            next: 0,
            ahead: Ranges::default(),
            newest: 0,
            end: None,
            scale,
            allowance: budget.allowance(FIRST_WINDOW, largest),
            edge: usize::from(u16::MAX) as u64,
            moved: 0,
            owed: Some(Duration::ZERO),
        }
    }

    /// The offset that `sequence` stands for: of all that it could, the one nearest to what is expected.
    fn offset(&self, sequence: u32) -> i64 {
        let expected = self.first.wrapping_add(self.next as u32);
        self.next as i64 + i64::from(sequence.wrapping_sub(expected).cast_signed())
    }

    fn sequence(&self, offset: u64) -> u32 {
        self.first.wrapping_add(offset as u32)
    }

    /// Whether a segment without data at `sequence` is exactly what is expected next.
    pub(super) fn expects(&self, sequence: u32) -> bool {
        self.acknowledgement() == sequence
    }

    /// Takes in data that starts at `sequence`, and whether the stream ends with it. If it is nothing but the next
    /// in order, and nothing else is to be acknowledged, that may wait until `answer`.
    pub(super) fn take(&mut self, sequence: u32, payload: &[u8], fin: bool, answer: Duration) {
        if payload.is_empty() && !fin {
            // Outside the window it is a probe (RFC 1122, 4.2.3.6): whoever sends it wants to be answered.
            let offset = self.offset(sequence) - i64::from(self.is_complete());
            if offset < self.next as i64 || offset > self.edge as i64 {
                self.owe();
            }
            return;
        }
        let can_wait = self.owed.is_none() && self.expects(sequence) && self.ahead.is_empty() && !fin;
        self.owed = Some(if can_wait { answer } else { Duration::ZERO });
        let start = self.offset(sequence);
        let end = start + payload.len() as i64;
        let beyond = self.ahead.last().map_or(self.next, |last| last.end);
        if fin && self.end.is_none() && end >= beyond as i64 && end <= self.edge as i64 {
            self.end = Some(end as u64);
        }

        let (low, high) = (start.max(self.next as i64), end.min(self.limit() as i64));
        if low >= high {
            return;
        }
        let bytes = &payload[(low - start) as usize..(high - start) as usize];
        let (low, high) = (low as u64, high as u64);
        if low > self.next {
            self.newest = low;
            if self.ahead.len() < MAX_GAPS || self.ahead.around(low.saturating_sub(1)).is_some() {
                self.ring.write(low, bytes);
                self.ahead.insert(low..high);
            }
            return;
        }
        self.ring.write(low, bytes);
        self.next = high;
        while let Some(range) = self.ahead.first().filter(|range| range.start <= self.next) {
            self.next = self.next.max(range.end);
            self.ahead.remove(&range);
        }
    }

    /// Up to where data is taken: neither beyond the window nor beyond the end.
    fn limit(&self) -> u64 {
        self.end.map_or(self.edge, |end| end.min(self.edge))
    }

    /// Whether all that the peer will ever send has arrived.
    pub(super) fn is_complete(&self) -> bool {
        self.end == Some(self.next)
    }

    pub(super) fn has_data(&self) -> bool {
        self.next > self.ring.start()
    }

    /// The bytes that can be passed on.
    pub(super) fn readable(&self) -> &[u8] {
        self.ring.slices(self.ring.start()..self.next).0
    }

    /// Counts `count` bytes of [`Self::readable`] as passed on.
    pub(super) fn consume(&mut self, count: usize) {
        self.ring.consume(self.ring.start() + count as u64);
        self.moved += count;
        // Whoever keeps up with a full window gets a larger one.
        if self.moved >= self.allowance.size() && !self.has_data() {
            self.allowance.grow();
            self.moved = 0;
        }
    }

    /// Gives memory back, if nothing is kept. The peer may still fill the window that it was promised, once.
    pub(super) fn release(&mut self) {
        if self.ahead.is_empty() && self.ring.release() {
            self.allowance.shrink();
        }
    }

    pub(super) fn owe(&mut self) {
        self.owed = Some(Duration::ZERO);
    }

    /// When something should be sent for the acknowledgement's or the window's sake.
    pub(super) fn due(&self) -> Option<Duration> {
        if self.opens_wide() { Some(Duration::ZERO) } else { self.owed }
    }

    /// Whether an acknowledgement would say more than a number.
    pub(super) fn has_gaps(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Whether the window has opened so much since it was told that waiting for the next acknowledgement could
    /// stall the peer.
    fn opens_wide(&self) -> bool {
        let told = self.edge.saturating_sub(self.next);
        let now = (self.ring.start() + self.allowance.size() as u64).saturating_sub(self.next);
        self.end.is_none() && now >= 2 * told && now - told >= self.allowance.size() as u64 / 4
    }

    /// The number of the acknowledgement that is due.
    pub(super) fn acknowledgement(&self) -> u32 {
        self.sequence(self.next).wrapping_add(u32::from(self.is_complete()))
    }

    /// The window field of what is sent next, which thereby acknowledges all.
    pub(super) fn announce(&mut self) -> u16 {
        self.owed = None;
        let open = (self.ring.start() + self.allowance.size() as u64).saturating_sub(self.next) >> self.scale;
        let window = open.min(u64::from(u16::MAX));
        // What the peer has once been allowed is never taken back.
        self.edge = self.edge.max(self.next + (window << self.scale));
        window as u16
    }

    /// What has arrived beyond gaps, the newest first (RFC 2018, 4).
    pub(super) fn blocks(&self) -> Blocks {
        let mut blocks = Blocks::default();
        let newest = self.ahead.around(self.newest);
        // One acknowledgement answers many segments: what came with the newest is most likely just below it.
        let others = self.ahead.iter().rev().filter(|range| Some(range) != newest.as_ref());
        for range in newest.iter().cloned().chain(others).take(MAX_BLOCKS) {
            blocks.push(self.sequence(range.start), self.sequence(range.end));
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    /// A receiver whose numbers wrap after ten bytes.
    fn receiver() -> Receiver {
        let mut receiver = Receiver::new(u32::MAX - 10, true, &Budget::new(1 << 30));
        receiver.announce();
        receiver
    }

    fn at(offset: u32) -> u32 {
        (u32::MAX - 9).wrapping_add(offset)
    }

    #[test]
    fn gaps_are_reported_and_filled() {
        let mut receiver = receiver();
        receiver.take(at(0), b"abc", false, NOW);
        receiver.take(at(6), b"ghi", false, NOW);
        receiver.take(at(12), b"mno", true, NOW);
        assert_eq!(receiver.acknowledgement(), at(3));
        assert_eq!(receiver.blocks().as_slice(), [(at(12), at(15)), (at(6), at(9))]);
        assert_eq!(receiver.readable(), b"abc");

        receiver.take(at(2), b"cdefgh", false, NOW);
        assert_eq!(receiver.readable(), b"abcdefghi");
        assert!(!receiver.is_complete());
        receiver.take(at(9), b"jkl", false, NOW);
        assert_eq!(receiver.readable(), b"abcdefghijklmno");
        assert!(receiver.is_complete());
        assert_eq!(receiver.acknowledgement(), at(16), "the FIN counts");
        assert!(receiver.blocks().as_slice().is_empty());
    }

    #[test]
    fn only_the_acknowledgement_of_a_single_segment_in_order_waits() {
        let later = Duration::from_secs(1);
        let mut receiver = receiver();
        receiver.take(at(0), b"a", false, later);
        assert_eq!(receiver.due(), Some(later));
        receiver.take(at(1), b"b", false, later);
        assert_eq!(receiver.due(), Some(NOW));
        receiver.announce();
        receiver.take(at(3), b"d", false, later);
        assert_eq!(receiver.due(), Some(NOW), "out of order");
        receiver.announce();
        receiver.take(at(2), b"c", false, later);
        assert_eq!(receiver.due(), Some(NOW), "fills a gap");
        receiver.announce();
        receiver.take(at(4), b"e", true, later);
        assert_eq!(receiver.due(), Some(NOW), "the end");
    }

    #[test]
    fn what_lies_outside_the_window_is_cut_off() {
        let mut receiver = receiver();
        let all = vec![1; FIRST_WINDOW + 1000];
        receiver.take(at(0), &all, true, NOW);
        assert_eq!(receiver.next, receiver.edge);
        assert!(!receiver.is_complete());
        assert_eq!(receiver.announce(), 0);
        receiver.take(at(0), &all[..10], false, NOW);
        assert!(receiver.due().is_some(), "an old segment means that an acknowledgement got lost");
    }

    #[test]
    fn a_window_that_opens_is_told() {
        let mut receiver = receiver();
        receiver.take(at(0), &vec![1; FIRST_WINDOW], false, NOW);
        receiver.announce();
        assert!(receiver.due().is_none());
        receiver.consume(1000);
        assert!(receiver.due().is_none(), "not for so little");
        receiver.consume(FIRST_WINDOW / 2);
        assert!(receiver.due().is_some());
    }

    #[test]
    fn whoever_keeps_up_gets_a_larger_window() {
        let mut receiver = receiver();
        for _ in 0..1000 {
            let sequence = receiver.acknowledgement();
            receiver.take(sequence, &vec![1; FIRST_WINDOW / 2], false, NOW);
            while receiver.has_data() {
                receiver.consume(receiver.readable().len());
            }
            receiver.announce();
        }
        assert_eq!(receiver.allowance.size(), LARGEST_WINDOW);
        assert_eq!(receiver.edge - receiver.next, LARGEST_WINDOW as u64);
    }

    #[test]
    fn a_peer_that_takes_no_scaled_windows_gets_none() {
        let mut receiver = Receiver::new(7, false, &Budget::new(1 << 30));
        assert_eq!(receiver.announce(), u16::MAX);
        assert_eq!(receiver.edge, u64::from(u16::MAX));
    }
}
