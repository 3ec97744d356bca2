//! Bytes on their way from one stream to another.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most that waits in one direction of a connection, bytes. At 50 us a turn it carries 1.3 GB/s, and a thousand connections
/// whose receivers all stall cost 64 MiB.
pub(super) const LIMIT: usize = 64 << 10;

/// What an empty buffer may keep of its memory, bytes: a request and its head, so that a busy connection allocates nothing, and
/// ten thousand idle ones cost 40 MiB.
const KEPT: usize = 4 << 10;

thread_local! {
    /// Where every read of this thread lands. What is read is moved to its connection's buffer at once, so that connections
    /// without traffic need none.
    static LANDING: RefCell<Vec<u8>> = RefCell::new(vec![0; LIMIT]);

    /// What all buffers of this thread take, bytes.
    static HELD: Cell<usize> = const { Cell::new(0) };
}

/// What all that waits on connections takes of the memory, bytes.
#[must_use]
pub fn held() -> usize {
    HELD.get()
}

/// What one thing has of [`HELD`], bytes. It gives that back with itself.
#[derive(Debug, Default)]
pub(super) struct Share(usize);

impl Share {
    pub(super) fn set(&mut self, bytes: usize) {
        HELD.set(HELD.get() - std::mem::replace(&mut self.0, bytes) + bytes);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Bytes that were read and have not been written.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    share: Share,
}

impl Buffer {
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.make_room(bytes.len());
        self.bytes.extend_from_slice(bytes);
        self.count();
    }

    /// Puts other bytes in the place of those `at` some place.
    pub(super) fn overwrite(&mut self, at: usize, bytes: &[u8]) {
        let at = self.start + at;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Forgets the first bytes.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            self.bytes.clear();
            self.bytes.shrink_to(KEPT);
            self.start = 0;
            self.count();
        }
    }

    /// Reads what there is, up to `limit` bytes in all, of which some must be left. 0 is the end of the source.
    pub(super) fn poll_fill<R>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        limit: usize,
    ) -> Poll<io::Result<usize>>
    where
        R: AsyncRead + Unpin,
    {
        let room = limit.saturating_sub(self.len()).min(LIMIT);
        debug_assert_ne!(room, 0, "a full buffer would look like the end of the source");
        LANDING.with_borrow_mut(|landing| {
            let mut landing = ReadBuf::new(&mut landing[..room]);
            ready!(Pin::new(source).poll_read(cx, &mut landing))?;
            self.push(landing.filled());
            Poll::Ready(Ok(landing.filled().len()))
        })
    }

    /// Writes everything.
    pub(super) fn poll_drain<W>(&mut self, cx: &mut Context<'_>, sink: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        while !self.is_empty() {
            let written = ready!(poll_write(cx, sink, self.filled()))?;
            self.consume(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Moves the bytes to the front where the room behind them does not do, so that a long-lived buffer stays as small as
    /// what is in it.
    fn make_room(&mut self, count: usize) {
        if self.start > 0 && self.bytes.capacity() - self.bytes.len() < count {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    fn count(&mut self) {
        self.share.set(self.bytes.capacity());
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        let mut buffer = Self { bytes, ..Self::default() };
        buffer.count();
        buffer
    }
}

/// Writes some of `bytes`; a sink that takes none is an error.
pub(super) fn poll_write<W>(cx: &mut Context<'_>, sink: &mut W, bytes: &[u8]) -> Poll<io::Result<usize>>
where
    W: AsyncWrite + Unpin,
{
    match ready!(Pin::new(sink).poll_write(cx, bytes))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        written => Poll::Ready(Ok(written)),
    }
}

#[cfg(test)]
mod tests {
    use super::{Buffer, KEPT, held};

    #[test]
    fn what_buffers_take_is_known() {
        let before = held();
        let mut buffer = Buffer::default();
        assert_eq!(held(), before);
        buffer.push(&[1; 50_000]);
        let other = Buffer::from(vec![2; 10_000]);
        assert!((60_000..150_000).contains(&(held() - before)));
        buffer.consume(50_000);
        assert!((10_000..10_000 + 2 * KEPT).contains(&(held() - before)));
        drop((buffer, other));
        assert_eq!(held(), before);
    }

    #[test]
    fn bytes_leave_in_order_and_memory_with_them() {
        let mut buffer = Buffer::default();
        for round in 0..100u8 {
            buffer.push(&[round; 1000]);
            assert_eq!(buffer.filled()[0], round);
            buffer.consume(1);
            assert_eq!(buffer.len(), 999);
            buffer.consume(999);
        }
        assert!(buffer.bytes.capacity() <= 2 * KEPT);
        buffer.push(&[1; 50_000]);
        buffer.consume(49_000);
        buffer.overwrite(998, &[3]);
        assert_eq!(buffer.filled()[997..], [1, 3, 1]);
        buffer.push(&[2; 40_000]);
        assert!(buffer.bytes.capacity() <= 100_000);
        assert_eq!((buffer.filled()[999], buffer.filled()[1000]), (1, 2));
    }
}
