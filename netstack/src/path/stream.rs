//! Streams: datagrams behind a length, unsplit, never dropped.
//!
//! A frame is a length (u32, big endian) and a WireGuard datagram of up to a whole super-packet. What is to be
//! written waits in one bounded buffer; when that is full, whoever produces packets for this stream waits.

use std::task::{Context, Poll, Waker};

use crate::{packet, tunnel};

/// Length prefix, bytes.
const PREFIX: usize = 4;

/// Longest datagram in a frame: one super-packet, sealed.
pub(crate) const MAX_FRAME: usize = packet::MAX + tunnel::OVERHEAD;

/// What may wait beyond the room of a stream: handshakes, pongs and resets are written without asking for it, and must get through
/// while data waits. Only a peer that asks and asks and never reads makes so many of them.
const MAX_BEYOND: usize = 1 << 20;

/// The sending half's buffer.
#[derive(Debug)]
pub(crate) struct Output {
    filling: Vec<u8>,
    /// Bytes that may wait.
    most: usize,
    writer: Option<Waker>,
    producers: Vec<Waker>,
}

impl Output {
    /// An output where `most` bytes may wait before producers pause.
    pub(crate) fn new(most: usize) -> Self {
        Self { filling: Vec::new(), most, writer: None, producers: Vec::new() }
    }

    /// Appends a frame of at most `length` bytes that `seal` writes; it answers how many it wrote.
    pub(crate) fn frame(&mut self, length: usize, seal: impl FnOnce(&mut [u8]) -> Option<usize>) -> bool {
        let start = self.filling.len();
        if start >= self.most + MAX_BEYOND {
            return false;
        }
        self.filling.resize(start + PREFIX + length.max(tunnel::MIN_OUTPUT), 0);
        let Some(written) = seal(&mut self.filling[start + PREFIX..]) else {
            self.filling.truncate(start);
            return false;
        };
        self.filling.truncate(start + PREFIX + written);
        self.filling[start..start + PREFIX].copy_from_slice(&(written as u32).to_be_bytes());
        if let Some(writer) = self.writer.take() {
            writer.wake();
        }
        true
    }

    /// Whether producers may go on; keeps the waker if not.
    pub(crate) fn poll_room(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.filling.len() < self.most {
            return Poll::Ready(());
        }
        if !self.producers.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.producers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Hands everything that waits to the writer, whose empty buffer takes its place.
    pub(crate) fn poll_take(&mut self, taken: &mut Vec<u8>, cx: &Context<'_>) -> Poll<()> {
        if self.filling.is_empty() {
            self.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        std::mem::swap(&mut self.filling, taken);
        self.wake_producers();
        Poll::Ready(())
    }

    /// Lets everyone who waits look again; for a stream that ends, too.
    pub(crate) fn wake_all(&mut self) {
        self.wake_producers();
        if let Some(writer) = self.writer.take() {
            writer.wake();
        }
    }

    /// Lets those who wait for room look again.
    pub(crate) fn wake_producers(&mut self) {
        for waker in self.producers.drain(..) {
            waker.wake();
        }
    }
}

/// The receiving half: cuts bytes into frames.
#[derive(Debug)]
pub(crate) struct Input {
    buffer: Vec<u8>,
    filled: usize,
}

/// A frame longer than any datagram: the other side does not speak this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes was announced, longer than any datagram")]
pub(crate) struct FrameTooLong(usize);

impl Input {
    /// An input with room for so many of the longest frames, that begins with bytes that were read before, if any.
    pub(crate) fn new(frames: usize, already_read: &[u8]) -> Self {
        let capacity = frames * (PREFIX + MAX_FRAME);
        let mut buffer = vec![0; capacity.max(already_read.len())];
        buffer[..already_read.len()].copy_from_slice(already_read);
        Self { buffer, filled: already_read.len() }
    }

    /// Where to read to; never empty once frames have been taken.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        &mut self.buffer[self.filled..]
    }

    /// Says that `length` bytes were read, and gives every whole frame to `take`.
    pub(crate) fn advance(&mut self, length: usize, mut take: impl FnMut(&[u8])) -> Result<(), FrameTooLong> {
        self.filled += length;
        let mut start = 0;
        while let Some(prefix) = self.buffer[start..self.filled].first_chunk::<PREFIX>() {
            let length = u32::from_be_bytes(*prefix) as usize;
            if length > MAX_FRAME {
                return Err(FrameTooLong(length));
            }
            let Some(frame) = self.buffer[start..self.filled].get(PREFIX..PREFIX + length) else { break };
            take(frame);
            start += PREFIX + length;
        }
        self.buffer.copy_within(start..self.filled, 0);
        self.filled -= start;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use proptest::prelude::*;

    use super::{FrameTooLong, Input, MAX_FRAME, Output};

    const MOST: usize = 256 << 10;

    fn taken(output: &mut Output) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = output.poll_take(&mut bytes, &Context::from_waker(Waker::noop()));
        bytes
    }

    fn put(output: &mut Output, datagram: &[u8]) {
        output.frame(datagram.len(), |room| {
            room[..datagram.len()].copy_from_slice(datagram);
            Some(datagram.len())
        });
    }

    proptest! {
        #[test]
        fn frames_arrive_whole_however_the_bytes_are_cut(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..2000), 0..20),
            cuts in proptest::collection::vec(1usize..5000, 1..50),
        ) {
            let mut output = Output::new(MOST);
            for frame in &frames {
                put(&mut output, frame);
            }
            let bytes = taken(&mut output);
            let mut input = Input::new(1, &[]);
            let mut received = Vec::new();
            let (mut at, mut cuts) = (0, cuts.into_iter().cycle());
            while at < bytes.len() {
                let length = cuts.next().unwrap().min(bytes.len() - at).min(input.space().len());
                input.space()[..length].copy_from_slice(&bytes[at..at + length]);
                input.advance(length, |frame| received.push(frame.to_vec())).unwrap();
                at += length;
            }
            prop_assert_eq!(received, frames);
        }
    }

    #[test]
    fn a_full_buffer_holds_producers_back_until_it_is_taken() {
        let mut output = Output::new(MOST);
        let cx = Context::from_waker(Waker::noop());
        while output.poll_room(&cx).is_ready() {
            put(&mut output, &[0; MAX_FRAME]);
        }
        assert!(output.filling.len() < MOST + MAX_FRAME + 4);
        taken(&mut output);
        assert_eq!(output.poll_room(&cx), Poll::Ready(()));
    }

    #[test]
    fn a_peer_that_asks_and_never_reads_is_answered_so_often_and_no_more() {
        let mut output = Output::new(MOST);
        let answers = (0..100_000).filter(|_| output.frame(100, |_| Some(100))).count();
        assert!(answers > 1000 && output.filling.len() < MOST + (1 << 20) + 200, "{answers}");
        taken(&mut output);
        assert!(output.frame(100, |_| Some(100)));
    }

    #[test]
    fn a_frame_that_was_not_sealed_leaves_no_trace() {
        let mut output = Output::new(MOST);
        assert!(!output.frame(100, |_| None));
        assert!(taken(&mut output).is_empty());
    }

    #[test]
    fn another_protocol_is_found_out_at_once() {
        let mut input = Input::new(1, b"HTTP");
        assert_eq!(input.advance(0, |_| ()), Err(FrameTooLong(0x4854_5450)));
    }
}
