//! Answers that belong to no flow: resets and ICMP errors.

use std::{cell::RefCell, collections::VecDeque, time::Duration};

use super::PeerId;

/// Answers per second to segments of unknown connections. Linux sends ICMP errors at this rate
/// (`icmp_msgs_per_sec`); at 3 µs to seal one, it is 0.3 % of a core.
const RATE: u32 = 1_000;

/// A lane's batch holds up to 64 segments: so many stray ones of a connection that has just gone away are
/// answered at once, of three such.
const BURST: u32 = 200;

/// Most answers waiting for the lane's next turn: four batches of the largest size.
const MAX_WAITING: usize = 256;

/// Waiting answers, and how many more may be given.
#[derive(Debug, Default)]
pub(super) struct Answers {
    waiting: RefCell<VecDeque<(PeerId, Vec<u8>)>>,
    bucket: RefCell<Bucket>,
}

impl Answers {
    /// Queues an answer; `Err` if too many wait. `Ok(true)` if it is the first to wait.
    pub(super) fn push(&self, peer: PeerId, packet: Vec<u8>) -> Result<bool, Full> {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.len() >= MAX_WAITING {
            return Err(Full);
        }
        waiting.push_back((peer, packet));
        Ok(waiting.len() == 1)
    }

    pub(super) fn pop(&self) -> Option<(PeerId, Vec<u8>)> {
        self.waiting.borrow_mut().pop_front()
    }

    /// Whether an answer to something unsolicited may be given at `now`.
    pub(super) fn may(&self, now: Duration) -> bool {
        self.bucket.borrow_mut().take(now)
    }
}

/// The queue of answers is full.
#[derive(Debug)]
pub(super) struct Full;

/// A token bucket of [`BURST`] tokens, refilled at [`RATE`].
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    /// Up to when tokens have been added.
    filled: Duration,
}

impl Default for Bucket {
    fn default() -> Self {
        Self { tokens: BURST, filled: Duration::ZERO }
    }
}

impl Bucket {
    fn take(&mut self, now: Duration) -> bool {
        const STEP: Duration = Duration::from_micros(1_000_000 / RATE as u64);
        let due =
            (now.saturating_sub(self.filled).as_micros() / STEP.as_micros()).min(u128::from(BURST)) as u32;
        if due > 0 {
            let tokens = self.tokens + due;
            self.tokens = tokens.min(BURST);
            self.filled = if tokens >= BURST { now } else { self.filled + STEP * due };
        }
        let may = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_the_rate() {
        let mut bucket = Bucket::default();
        let start = Duration::from_secs(10);
        assert_eq!((0..1000).filter(|_| bucket.take(start)).count(), BURST as usize);
        let later = start + Duration::from_millis(50);
        assert_eq!((0..1000).filter(|_| bucket.take(later)).count(), 50);
    }

    #[test]
    fn the_queue_is_bounded() {
        let answers = Answers::default();
        assert!(answers.push(PeerId(1), vec![]).unwrap());
        assert!(!answers.push(PeerId(1), vec![]).unwrap());
        for _ in 2..MAX_WAITING {
            answers.push(PeerId(1), vec![]).unwrap();
        }
        answers.push(PeerId(1), vec![]).unwrap_err();
    }
}
