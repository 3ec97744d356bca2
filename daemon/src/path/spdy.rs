//! SPDY/3.1 frames, as much of them as a port-forward needs: bytes in, frames out, and back. No I/O.
//!
//! Blocks of headers are one zlib stream in each direction. Ours is made of stored blocks, which any inflater reads; the
//! peer's is never read, since nothing that matters is in it. Flow control is SPDY's in name only here: Kubernetes'
//! implementation (moby/spdystream) neither sends nor obeys windows, and leaves back-pressure to TCP.

use std::io;

use bytes::{Buf as _, Bytes};

/// Length of a frame's head: a data frame's stream or a control frame's version and type, then flags and length.
const HEAD: usize = 8;

/// The one version there is of the frames of 3.1, beside the bit that tells control frames from data.
const CONTROL: u16 = 0x8000 | 3;

/// The longest that a frame's length, of 24 bits, can say.
pub(super) const MAX_LENGTH: usize = (1 << 24) - 1;

/// What a frame's flags mean when they say that its sender sends no more on the stream.
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

/// A zlib stream begins so when it has no dictionary and was not really compressed (RFC 1950).
const ZLIB_BEGINS: [u8; 2] = [0x78, 0x01];

/// A stored deflate block of nothing makes an inflater hand out all that came before (zlib's sync flush).
const SYNC_FLUSH: [u8; 5] = [0, 0, 0, 0xff, 0xff];

/// What a peer says, without what nobody here asks about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Bytes of a stream: a data frame, or the piece of it that has come.
    Data(u32, Bytes),
    /// The peer sends nothing more on this stream.
    Fin(u32),
    /// The peer wants no more of this stream, for a reason in SPDY's numbers.
    Reset(u32, u32),
    /// The peer opens a stream of its own.
    Open(u32),
    /// To be answered with the same number, if that is the peer's.
    Ping(u32),
    /// The peer opens and takes no more streams.
    GoAway,
}

/// Cuts bytes, however they come in pieces, into frames. It keeps no more of them than a frame's head.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    start: Start,
    reading: Reading,
}

/// Where in a frame the next byte belongs.
#[derive(Debug, Default)]
enum Reading {
    #[default]
    Head,
    Data {
        stream: u32,
        left: usize,
        fin: bool,
    },
    Control {
        kind: u16,
        fin: bool,
        length: usize,
    },
    Nothing {
        left: usize,
    },
}

impl Decoder {
    /// The next frame in `input`, whose bytes it takes; nothing once they are used up.
    pub(super) fn next(&mut self, input: &mut Bytes) -> io::Result<Option<Frame>> {
        loop {
            match &mut self.reading {
                Reading::Head => {
                    let Some(head) = self.start.fill(input, HEAD) else { return Ok(None) };
                    self.reading = Reading::of(head)?;
                }
                Reading::Data { stream, left: 0, fin } => {
                    let end = fin.then_some(Frame::Fin(*stream));
                    self.reading = Reading::Head;
                    if end.is_some() {
                        return Ok(end);
                    }
                }
                Reading::Data { stream, left, .. } => {
                    let piece = input.split_to(input.len().min(*left));
                    *left -= piece.len();
                    return Ok((!piece.is_empty()).then_some(Frame::Data(*stream, piece)));
                }
                &mut Reading::Control { kind, fin, length } => {
                    let wanted = length.min(HEAD);
                    let Some(start) = self.start.fill(input, wanted) else { return Ok(None) };
                    self.reading = Reading::Nothing { left: length - wanted };
                    let frame = control(kind, fin, start, length)?;
                    if frame.is_some() {
                        return Ok(frame);
                    }
                }
                Reading::Nothing { left: 0 } => self.reading = Reading::Head,
                Reading::Nothing { left } => {
                    let skipped = input.len().min(*left);
                    input.advance(skipped);
                    *left -= skipped;
                    if input.is_empty() && *left > 0 {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

impl Reading {
    fn of([a, b, c, d, flags, length @ ..]: [u8; HEAD]) -> io::Result<Self> {
        let length = u32::from_be_bytes([0, length[0], length[1], length[2]]) as usize;
        let fin = flags & FIN != 0;
        if a & 0x80 == 0 {
            return Ok(Self::Data { stream: u32::from_be_bytes([a, b, c, d]), left: length, fin });
        }
        match u16::from_be_bytes([a, b]) {
            CONTROL => Ok(Self::Control { kind: u16::from_be_bytes([c, d]), fin, length }),
            _ => Err(malformed("is of another version")),
        }
    }
}

/// What a control frame of `length` says, by its first bytes; kinds that are unknown or of no use say nothing.
fn control(kind: u16, fin: bool, start: [u8; HEAD], length: usize) -> io::Result<Option<Frame>> {
    let needed = match kind {
        RST_STREAM | GOAWAY => 8,
        SYN_STREAM | SYN_REPLY | HEADERS | PING => 4,
        _ => return Ok(None),
    };
    if length < needed {
        return Err(malformed("is too short"));
    }
    let [number, reason] =
        [[start[0], start[1], start[2], start[3]], [start[4], start[5], start[6], start[7]]]
            .map(u32::from_be_bytes);
    Ok(match kind {
        RST_STREAM => Some(Frame::Reset(number, reason)),
        SYN_STREAM => Some(Frame::Open(number)),
        PING => Some(Frame::Ping(number)),
        GOAWAY => Some(Frame::GoAway),
        _ => fin.then_some(Frame::Fin(number)),
    })
}

fn malformed(how: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a SPDY frame {how}"))
}

/// The first bytes of something, collected over several inputs.
#[derive(Debug, Default)]
struct Start {
    bytes: [u8; HEAD],
    filled: usize,
}

impl Start {
    /// `wanted` bytes followed by zeros, once there are that many.
    fn fill(&mut self, input: &mut Bytes, wanted: usize) -> Option<[u8; HEAD]> {
        let length = input.len().min(wanted - self.filled);
        input.copy_to_slice(&mut self.bytes[self.filled..self.filled + length]);
        self.filled += length;
        (self.filled == wanted).then(|| std::mem::take(self).bytes)
    }
}

/// Appends the frame that opens `stream`; `fin` says that we send nothing on it. The `first` frame with headers begins
/// the zlib stream that all of them share.
pub(super) fn open(frames: &mut Vec<u8>, stream: u32, fin: bool, headers: &[(&str, &str)], first: bool) {
    let block = header_block(headers);
    let length = u16::try_from(block.len()).expect("a port-forward's headers are less than a hundred bytes");
    let mut content = Vec::new();
    content.extend(stream.to_be_bytes());
    // Associated to no stream, highest priority, no credential.
    content.extend([0; 6]);
    content.extend(ZLIB_BEGINS.iter().filter(|_| first));
    content.push(0);
    content.extend(length.to_le_bytes());
    content.extend((!length).to_le_bytes());
    content.extend(block);
    content.extend(SYNC_FLUSH);
    put_control(frames, SYN_STREAM, if fin { FIN } else { 0 }, &content);
}

fn header_block(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = (headers.len() as u32).to_be_bytes().to_vec();
    for text in headers.iter().flat_map(|(name, value)| [name, value]) {
        block.extend((text.len() as u32).to_be_bytes());
        block.extend(text.as_bytes());
    }
    block
}

/// Appends the answer to a ping.
pub(super) fn pong(frames: &mut Vec<u8>, number: u32) {
    put_control(frames, PING, 0, &number.to_be_bytes());
}

/// Appends a data frame, of at most [`MAX_LENGTH`].
pub(super) fn data(frames: &mut Vec<u8>, stream: u32, bytes: &[u8]) {
    frames.extend(stream.to_be_bytes());
    put_length(frames, 0, bytes.len());
    frames.extend_from_slice(bytes);
}

fn put_control(frames: &mut Vec<u8>, kind: u16, flags: u8, content: &[u8]) {
    frames.extend(CONTROL.to_be_bytes());
    frames.extend(kind.to_be_bytes());
    put_length(frames, flags, content.len());
    frames.extend_from_slice(content);
}

fn put_length(frames: &mut Vec<u8>, flags: u8, length: usize) {
    debug_assert!(length <= MAX_LENGTH, "a frame of {length} bytes");
    frames.extend((u32::from(flags) << 24 | length as u32).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All frames of `bytes`, which come in pieces of `cut`. Pieces of one data frame are joined again.
    fn decode(bytes: &[u8], cut: usize) -> io::Result<Vec<Frame>> {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for piece in bytes.chunks(cut.max(1)) {
            let mut input = Bytes::copy_from_slice(piece);
            while let Some(frame) = decoder.next(&mut input)? {
                match (frames.last_mut(), frame) {
                    (Some(Frame::Data(stream, before)), Frame::Data(again, bytes)) if *stream == again => {
                        *before = [&before[..], &bytes[..]].concat().into();
                    }
                    (_, frame) => frames.push(frame),
                }
            }
            assert!(input.is_empty(), "bytes are left where no frame is");
        }
        Ok(frames)
    }

    fn control_frame(kind: u16, flags: u8, content: &[u8]) -> Vec<u8> {
        let mut frames = Vec::new();
        put_control(&mut frames, kind, flags, content);
        frames
    }

    #[test]
    fn every_frame_says_what_the_protocol_has_it_say() {
        let table = [
            (vec![0, 0, 0, 3, 0, 0, 0, 2, b'h', b'i'], vec![Frame::Data(3, Bytes::from_static(b"hi"))]),
            (vec![0, 0, 0, 3, 1, 0, 0, 0], vec![Frame::Fin(3)]),
            (vec![0, 0, 0, 3, 0, 0, 0, 0], vec![]),
            (vec![0, 0, 0, 1, 1, 0, 0, 1, 7], vec![Frame::Data(1, Bytes::from_static(&[7])), Frame::Fin(1)]),
            (vec![0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 5], vec![Frame::Reset(3, 5)]),
            (vec![0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 2], vec![Frame::Ping(2)]),
            (vec![0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0], vec![Frame::GoAway]),
            (control_frame(SYN_REPLY, 0, &[0, 0, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9]), vec![]),
            (control_frame(SYN_REPLY, FIN, &[0, 0, 0, 3, 1]), vec![Frame::Fin(3)]),
            (control_frame(HEADERS, FIN, &[0, 0, 0, 3]), vec![Frame::Fin(3)]),
            (control_frame(SYN_STREAM, FIN, &[0, 0, 0, 2, 0, 0, 0, 0, 0, 0]), vec![Frame::Open(2)]),
            // Settings, a window update, and a type that nobody has defined.
            (control_frame(4, 0, &[0; 12]), vec![]),
            (control_frame(9, 0, &[0; 8]), vec![]),
            (control_frame(99, FIN, &[]), vec![]),
        ];
        for (bytes, frames) in table {
            for cut in 1..=bytes.len() {
                let next = [&bytes[..], &control_frame(PING, 0, &[0, 0, 0, 9])].concat();
                let expected = [&frames[..], &[Frame::Ping(9)]].concat();
                assert_eq!(decode(&next, cut).unwrap(), expected, "{bytes:?} in pieces of {cut}");
            }
        }
    }

    #[test]
    fn other_versions_and_frames_that_are_too_short_are_errors() {
        let mut spdy2 = control_frame(PING, 0, &[0, 0, 0, 2]);
        spdy2[1] = 2;
        let short = [RST_STREAM, GOAWAY].map(|kind| control_frame(kind, 0, &[0; 7]));
        let shorter = [SYN_STREAM, SYN_REPLY, HEADERS, PING].map(|kind| control_frame(kind, 0, &[0; 3]));
        for bytes in [spdy2].into_iter().chain(short).chain(shorter) {
            assert_eq!(decode(&bytes, 100).unwrap_err().kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
    }

    /// As moby/spdystream's framer has read it.
    #[test]
    fn streams_are_opened_in_a_zlib_stream_of_stored_blocks() {
        let mut frames = Vec::new();
        open(&mut frames, 1, true, &[("port", "80")], true);
        open(&mut frames, 3, false, &[("port", "80")], false);
        let block = b"\0\0\0\x01\0\0\0\x04port\0\0\0\x0280";
        let stored = [&[0, 18, 0, 0xed, 0xff], &block[..], &[0, 0, 0, 0xff, 0xff]].concat();
        let first =
            [&[0x80, 3, 0, 1, 1, 0, 0, 40, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x78, 1], &stored[..]].concat();
        let second = [&[0x80, 3, 0, 1, 0, 0, 0, 38, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0], &stored[..]].concat();
        assert_eq!(frames, [first, second].concat());
    }

    proptest! {
        #[test]
        fn data_arrives_whole_however_it_is_cut(
            contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..300), 0..20),
            cut in 1usize..400,
        ) {
            let (mut bytes, mut expected) = (Vec::new(), Vec::new());
            for (content, number) in contents.iter().zip(1..) {
                data(&mut bytes, 3, content);
                pong(&mut bytes, number);
                expected.extend([Frame::Data(3, content.clone().into()), Frame::Ping(number)]);
            }
            prop_assert_eq!(decode(&bytes, cut).unwrap(), expected);
        }

        #[test]
        fn garbage_is_read_alike_however_it_is_cut(
            bytes in proptest::collection::vec(prop_oneof![0u8..10, Just(0x80), any::<u8>()], 0..200),
            cut in 1usize..50,
        ) {
            let (whole, pieces) = (decode(&bytes, usize::MAX), decode(&bytes, cut));
            prop_assert_eq!(whole.map_err(|error| error.to_string()), pieces.map_err(|error| error.to_string()));
        }
    }
}
