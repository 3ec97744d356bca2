//! A window on a byte stream, in a buffer that grows with what it has to hold.

use std::ops::Range;

/// The smallest buffer, bytes: one page.
const SMALLEST: usize = 4096;

/// Bytes of a stream by their offsets in it, from [`Self::start`] on.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// A power of two long, or empty. The byte at offset `n` is at index `n` modulo the length.
    buffer: Vec<u8>,
    start: u64,
    /// End of what has been written.
    end: u64,
}

impl Ring {
    /// Offset of the first byte that is kept.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// End of what was appended, or written furthest.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    fn index(&self, offset: u64) -> usize {
        offset as usize & (self.buffer.len() - 1)
    }

    /// Has the buffer reach up to `end`.
    fn reserve(&mut self, end: u64) {
        let needed = (end - self.start) as usize;
        if needed <= self.buffer.len() {
            return;
        }
        let mut larger = Self {
            buffer: vec![0; needed.next_power_of_two().max(SMALLEST)],
            start: self.start,
            end: self.end,
        };
        if !self.buffer.is_empty() {
            let (front, back) = self.slices(self.start..self.end);
            larger.put(self.start, front);
            larger.put(self.start + front.len() as u64, back);
        }
        *self = larger;
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let at = self.index(offset);
        let (front, back) = bytes.split_at(bytes.len().min(self.buffer.len() - at));
        self.buffer[at..at + front.len()].copy_from_slice(front);
        self.buffer[..back.len()].copy_from_slice(back);
    }

    /// Writes `bytes` at `offset`, which must not be before the start.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        self.reserve(end);
        self.put(offset, bytes);
        self.end = self.end.max(end);
    }

    /// Free room after the end, contiguous and at least one byte, for [`Self::appended`]; not beyond `limit`
    /// bytes from the start.
    pub(super) fn room(&mut self, limit: usize) -> &mut [u8] {
        let length = (self.end - self.start) as usize;
        if length >= limit {
            return &mut [];
        }
        if length == self.buffer.len() {
            self.reserve(self.end + 1);
        }
        let at = self.index(self.end);
        let until = (at + self.buffer.len() - length).min(self.buffer.len()).min(at + limit - length);
        &mut self.buffer[at..until]
    }

    /// Counts `count` bytes that were put into [`Self::room`] in.
    pub(super) fn appended(&mut self, count: usize) {
        self.end += count as u64;
    }

    /// The bytes of `range`, which must be within what is kept, in order.
    pub(super) fn slices(&self, range: Range<u64>) -> (&[u8], &[u8]) {
        let length = (range.end - range.start) as usize;
        if length == 0 {
            return (&[], &[]);
        }
        let at = self.index(range.start);
        let front = length.min(self.buffer.len() - at);
        (&self.buffer[at..at + front], &self.buffer[..length - front])
    }

    /// Lets go of everything before `start`.
    pub(super) fn consume(&mut self, start: u64) {
        self.start = start;
        self.end = self.end.max(start);
    }

    /// Gives the memory of an empty ring back; `false` if it isn't empty.
    pub(super) fn release(&mut self) -> bool {
        let empty = self.start == self.end;
        if empty {
            self.buffer = Vec::new();
        }
        empty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(ring: &Ring, range: Range<u64>) -> Vec<u8> {
        let (front, back) = ring.slices(range);
        [front, back].concat()
    }

    #[test]
    fn bytes_stay_where_they_are_while_it_grows() {
        let mut ring = Ring::default();
        ring.write(0, &[1; 4000]);
        ring.consume(3000);
        ring.write(4000, &[2; 3000]);
        assert_eq!(ring.buffer.len(), 4096, "4,000 bytes, around the end");
        ring.write(7000, &[3; 3000]);
        assert_eq!(ring.buffer.len(), 8192);
        let expected = [&[1; 1000][..], &[2; 3000], &[3; 3000]].concat();
        assert_eq!(read(&ring, 3000..10_000), expected);
    }

    #[test]
    fn room_never_exceeds_the_limit_and_is_never_nothing_below_it() {
        let mut ring = Ring::default();
        let mut total = 0;
        while total < 20_000 {
            let room = ring.room(20_000).len().min(777);
            assert!(room > 0);
            ring.room(20_000)[..room].fill(total as u8);
            ring.appended(room);
            total += room;
        }
        assert_eq!(total, 20_000);
        assert!(ring.room(20_000).is_empty());
        ring.consume(19_999);
        assert!(!ring.room(20_000).is_empty());
    }

    #[test]
    fn what_is_written_ahead_is_kept() {
        let mut ring = Ring::default();
        ring.write(5000, b"later");
        ring.write(0, &[7; 5000]);
        assert_eq!(read(&ring, 4998..5005), b"\x07\x07later");
    }
}
