//! Lines of bounded length, from bytes as they come.

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Longest line of an agent, bytes: a report has half a KiB for each intercept, so this is a hundred of them on one workload.
pub const LONGEST: usize = 64 << 10;

/// Reads lines.
#[derive(Debug)]
pub struct Lines<R> {
    from: R,
    buffer: BytesMut,
    /// So far no line ends before this.
    searched: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of what is read from here.
    pub fn new(from: R) -> Self {
        Self { from, buffer: BytesMut::new(), searched: 0 }
    }

    /// The next line without its end; `None` when there are no more. May be dropped and called again without a loss.
    ///
    /// # Errors
    /// Fails where reading does, or where a line is too long.
    pub async fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        loop {
            if let Some(line) = self.take() {
                return Ok(Some(line));
            }
            if self.buffer.len() >= LONGEST {
                return Err(std::io::Error::other("a line is too long"));
            }
            if self.from.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }

    fn take(&mut self) -> Option<Bytes> {
        let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
            self.searched = self.buffer.len();
            return None;
        };
        let line = self.buffer.split_to(self.searched + end).freeze();
        self.buffer.advance(1);
        self.searched = 0;
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::{LONGEST, Lines};

    #[tokio::test]
    async fn lines_come_whole_however_they_are_cut() {
        let (mut end, other) = tokio::io::duplex(7);
        let writer = tokio::spawn(async move {
            end.write_all(b"one\n\ntwo and a half\nthe rest is lo").await.unwrap();
        });
        let mut lines = Lines::new(other);
        for expected in ["one", "", "two and a half"] {
            assert_eq!(lines.next().await.unwrap().unwrap(), expected.as_bytes());
        }
        assert_eq!(lines.next().await.unwrap(), None, "what has no end is no line");
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn a_line_that_does_not_end_ends_the_reading() {
        let endless = tokio::io::repeat(b'x');
        let mut lines = Lines::new(endless);
        assert!(lines.next().await.is_err());
        assert!(lines.buffer.len() < 2 * LONGEST);
    }
}
