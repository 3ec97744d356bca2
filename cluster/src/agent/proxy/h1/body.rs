//! Where the body of a message ends (RFC 9112, 6 and 7). Nothing is decoded: bytes are only counted.

/// Longest extensions of one chunk, bytes. Nobody is known to send any.
const EXTENSIONS: usize = 4 << 10;

/// Longest trailers, bytes: as long as a head.
const TRAILERS: usize = super::head::LONGEST;

/// What is left of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// So many bytes.
    Length(u64),
    /// Chunks.
    Chunked(Chunks),
    /// All that comes until the connection is closed.
    UntilClose,
}

/// A body that breaks the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not how a chunk is written")]
pub(super) struct Malformed;

impl Body {
    pub(super) const NONE: Self = Self::Length(0);

    pub(super) fn is_done(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunks) => *chunks == Chunks::Done,
            Self::UntilClose => false,
        }
    }

    /// How many of these bytes, which come next, belong to the body. After an error nothing that follows can be told apart.
    pub(super) fn advance(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        match self {
            Self::Length(left) => {
                let count = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= count as u64;
                Ok(count)
            }
            Self::Chunked(chunks) => chunks.advance(bytes),
            Self::UntilClose => Ok(bytes.len()),
        }
    }
}

/// What comes next in a chunked body. Strict: what two parsers might understand in two ways is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunks {
    /// Digits of a size: how many there were, and what they make.
    Size(u8, u64),
    /// Extensions after a size: how many bytes there were.
    Extensions(u64, usize),
    /// The LF after a size.
    SizeEnd(u64),
    /// So many bytes of a chunk.
    Data(u64),
    /// The CR after them.
    DataCr,
    /// The LF after that.
    DataLf,
    /// A trailer or the last line: how many bytes of trailers there were.
    TrailerStart(usize),
    /// The rest of a trailer.
    Trailer(usize),
    /// The LF after it.
    TrailerLf(usize),
    /// The LF of the last line.
    LastLf,
    /// Nothing.
    Done,
}

impl Chunks {
    pub(super) const START: Self = Self::Size(0, 0);

    fn advance(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let mut at = 0;
        while at < bytes.len() && *self != Self::Done {
            if let Self::Data(left) = self {
                let count = (bytes.len() - at).min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= count as u64;
                at += count;
                if *left == 0 {
                    *self = Self::DataCr;
                }
            } else {
                *self = self.after(bytes[at])?;
                at += 1;
            }
        }
        Ok(at)
    }

    fn after(self, byte: u8) -> Result<Self, Malformed> {
        Ok(match (self, byte) {
            // Sixteen digits are all that 64 bits hold.
            (Self::Size(digits @ 0..16, size), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                Self::Size(digits + 1, (size << 4) | u64::from(hexadecimal(byte)))
            }
            (Self::Size(1.., size), b'\r') => Self::SizeEnd(size),
            (Self::Size(1.., size), b';') => Self::Extensions(size, 1),
            (Self::Extensions(size, _), b'\r') => Self::SizeEnd(size),
            (Self::Extensions(size, length @ 0..EXTENSIONS), b'\t' | b' '..=b'~' | 0x80..) => {
                Self::Extensions(size, length + 1)
            }
            (Self::SizeEnd(0), b'\n') => Self::TrailerStart(0),
            (Self::SizeEnd(size), b'\n') => Self::Data(size),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::START,
            (Self::TrailerStart(_), b'\r') => Self::LastLf,
            // A line that begins with white space would continue the one before (obs-fold).
            (Self::TrailerStart(length), b'!'..=b'~') => Self::Trailer(length + 1),
            (Self::Trailer(length), b'\r') => Self::TrailerLf(length),
            (Self::Trailer(length @ 0..TRAILERS), b'\t' | b' '..=b'~' | 0x80..) => Self::Trailer(length + 1),
            (Self::TrailerLf(length), b'\n') => Self::TrailerStart(length),
            (Self::LastLf, b'\n') => Self::Done,
            _ => return Err(Malformed),
        })
    }
}

/// Value of a hexadecimal digit.
fn hexadecimal(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Body, Chunks, Malformed};

    fn chunked(bytes: &[u8]) -> Result<(usize, bool), Malformed> {
        let mut body = Body::Chunked(Chunks::START);
        let count = body.advance(bytes)?;
        Ok((count, body.is_done()))
    }

    #[test]
    fn chunks_are_followed_to_their_end() {
        for (bytes, expected) in [
            (&b"0\r\n\r\nGET"[..], Ok((5, true))),
            (b"5\r\nhello\r\n0\r\n\r\n", Ok((15, true))),
            (b"5;a=\"b;c\";d\r\nhello\r\n00\r\n\r\n", Ok((26, true))),
            (b"0A\r\n0123456789\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\nmore", Ok((37, true))),
            (b"5\r\nhel", Ok((6, false))),
            (b"ffffffffffffffff\r\nx", Ok((19, false))),
        ] {
            assert_eq!(chunked(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn chunks_that_could_be_read_in_two_ways_are_malformed() {
        for bytes in [
            &b"\r\n"[..],
            b"g\r\n",
            b"0x5\r\nhello\r\n",
            b"-1\r\n",
            b"+5\r\n",
            b" 5\r\n",
            b"5 \r\n",
            b"5\nhello\n0\n\n",
            b"5\r\rhello",
            b"5;a\nhello\r\n",
            b"5\r\nhelloX\r\n",
            b"5\r\nhello\n0\r\n",
            b"10000000000000000\r\n",
            b"0\r\n folded: 1\r\n\r\n",
            b"0\r\nA: 1\n\r\n",
        ] {
            assert_eq!(chunked(bytes), Err(Malformed), "{:?}", String::from_utf8_lossy(bytes));
        }
        let long = [&b"5;"[..], &[b'a'; super::EXTENSIONS], b"\r\n"].concat();
        assert_eq!(chunked(&long), Err(Malformed));
        let long = [&b"0\r\nA:"[..], &[b'a'; super::TRAILERS], b"\r\n\r\n"].concat();
        assert_eq!(chunked(&long), Err(Malformed));
    }

    #[test]
    fn lengths_are_counted() {
        let mut body = Body::Length(5);
        assert_eq!(body.advance(b"hel"), Ok(3));
        assert!(!body.is_done());
        assert_eq!(body.advance(b"lo, world"), Ok(2));
        assert!(body.is_done());
        assert_eq!(body.advance(b"x"), Ok(0));
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(
            bytes in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                "([0-9a-f]{1,2}(;x)?\r\n[a-z]{0,9}\r\n){0,5}(0\r\n(A: b\r\n)?\r\n)?.{0,9}".prop_map(String::into_bytes),
            ],
            cuts in proptest::collection::vec(1usize..20, 1..20),
        ) {
            let whole = chunked(&bytes);
            let mut body = Body::Chunked(Chunks::START);
            let (mut at, mut cuts) = (0, cuts.into_iter().cycle());
            let cut = loop {
                let end = bytes.len().min(at + cuts.next().unwrap());
                match body.advance(&bytes[at..end]) {
                    Ok(count) if count == end - at && end < bytes.len() => at = end,
                    Ok(count) => break Ok((at + count, body.is_done())),
                    Err(error) => break Err(error),
                }
            };
            prop_assert_eq!(cut, whole);
        }
    }
}
