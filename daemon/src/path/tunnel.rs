//! Port-forward in SPDY in a WebSocket: what `kubectl` of Kubernetes 1.31 and later speaks.
//!
//! Messages are pieces of one SPDY connection that the API server hands on, byte for byte. In it a stream carries the
//! data and another one, in one direction only, an error's text.

use std::io;

use bytes::Bytes;

use super::spdy::{self, Decoder, Frame};
use super::websocket::{Protocol, Taken};

/// What the protocol calls itself in a WebSocket's handshake.
pub(super) const NAME: &str = "SPDY/3.1+portforward.k8s.io";

/// A client's streams have odd numbers.
const ERROR: u32 = 1;
const DATA: u32 = 3;

/// Longest error text that is kept; the runtime's are a few hundred bytes.
const ERROR_LIMIT: usize = 4096;

/// One port's connection.
#[derive(Debug)]
pub(super) struct Tunnel {
    port: u16,
    opened: bool,
    /// The peer's last ping, to be answered with the next message. A session is never silent for more than half a second.
    ping: Option<u32>,
    decoder: Decoder,
    error: Vec<u8>,
}

impl Tunnel {
    pub(super) fn new(port: u16) -> Self {
        Self { port, opened: false, ping: None, decoder: Decoder::default(), error: Vec::new() }
    }

    /// Both streams, the error's first. Data may follow at once: nobody waits for a reply.
    fn open(&self, message: &mut Vec<u8>) {
        let port = self.port.to_string();
        for (stream, kind) in [(ERROR, "error"), (DATA, "data")] {
            let headers = [("streamtype", kind), ("port", &port), ("requestid", "0")];
            spdy::open(message, stream, stream == ERROR, &headers, stream == ERROR);
        }
    }

    /// What is left to say when the peer ends a stream: why, if it said so.
    fn ended(&self) -> io::Result<Taken> {
        if self.error.is_empty() {
            return Ok(Taken::End);
        }
        Err(io::Error::other(String::from_utf8_lossy(&self.error).into_owned()))
    }

    fn reset(&self, reason: u32) -> io::Error {
        self.ended().err().unwrap_or_else(|| {
            io::Error::new(
                io::ErrorKind::ConnectionReset,
                format!("the port-forward was reset, reason {reason}"),
            )
        })
    }
}

impl Protocol for Tunnel {
    /// What a lane hands over at once fits. Smaller frames cost the container runtime more (a tenth in all at 64 KiB); it
    /// reads a frame whole, and holds up to fifty for a manager that is slow.
    const MAX_DATA: usize = 256 * 1024;

    fn message(&mut self, data: &[u8]) -> Vec<u8> {
        // Room for what precedes the data: a head, a pong's 12 bytes, and less than 200 to open the streams.
        let mut message = Vec::with_capacity(256 + data.len());
        if !std::mem::replace(&mut self.opened, true) {
            self.open(&mut message);
        }
        if let Some(number) = self.ping.take() {
            spdy::pong(&mut message, number);
        }
        spdy::data(&mut message, DATA, data);
        message
    }

    fn take(&mut self, message: &mut Bytes) -> io::Result<Taken> {
        while let Some(frame) = self.decoder.next(message)? {
            match frame {
                Frame::Data(DATA, bytes) => return Ok(Taken::Data(bytes)),
                Frame::Data(ERROR, text) => {
                    let room = ERROR_LIMIT - self.error.len();
                    self.error.extend_from_slice(&text[..text.len().min(room)]);
                }
                Frame::Fin(DATA) | Frame::GoAway => return self.ended(),
                Frame::Fin(ERROR) if self.error.is_empty() => {}
                Frame::Fin(ERROR) => return self.ended(),
                Frame::Reset(DATA | ERROR, reason) => return Err(self.reset(reason)),
                // Odd numbers are answers to pings of ours, of which there are none.
                Frame::Ping(number) => {
                    self.ping = Some(number).filter(|number| number % 2 == 0).or(self.ping)
                }
                Frame::Reset(..) => {}
                Frame::Data(stream, _) | Frame::Fin(stream) | Frame::Open(stream) => {
                    let what = format!("the port-forward names stream {stream}, which we did not open");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, what));
                }
            }
        }
        Ok(Taken::Data(Bytes::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a message of these frames brings, until nothing is left of it.
    fn taken(tunnel: &mut Tunnel, frames: &[u8]) -> Vec<Result<Taken, String>> {
        let mut message = Bytes::copy_from_slice(frames);
        let mut all = Vec::new();
        while !message.is_empty() {
            match tunnel.take(&mut message) {
                Ok(Taken::Data(bytes)) if bytes.is_empty() => {}
                other => all.push(other.map_err(|error| error.to_string())),
            }
        }
        all
    }

    fn data(stream: u32, bytes: &[u8]) -> Vec<u8> {
        let mut frames = Vec::new();
        spdy::data(&mut frames, stream, bytes);
        frames
    }

    fn fin(stream: u8) -> Vec<u8> {
        vec![0, 0, 0, stream, 1, 0, 0, 0]
    }

    fn reset(stream: u8) -> Vec<u8> {
        vec![0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, stream, 0, 0, 0, 5]
    }

    fn ping(number: u32) -> Vec<u8> {
        let mut frames = Vec::new();
        spdy::pong(&mut frames, number);
        frames
    }

    #[test]
    fn the_first_message_opens_both_streams_and_carries_data_already() {
        let mut tunnel = Tunnel::new(8443);
        let first = tunnel.message(b"hello");
        let text = String::from_utf8_lossy(&first);
        let place = |what: &str| text.find(what).unwrap_or_else(|| panic!("no {what} in {text:?}"));
        assert!(place("error") < place("data") && place("data") < place("hello"));
        assert_eq!(text.matches("8443").count(), 2);
        assert!(first.len() < 256 + 5, "a first message of {} bytes outgrew its room", first.len());
        assert_eq!(tunnel.message(b"again"), data(DATA, b"again"));
    }

    #[test]
    fn data_comes_as_it_is_and_replies_are_passed_over() {
        let reply = [0x80, 3, 0, 2, 0, 0, 0, 6, 0, 0, 0, 3, 9, 9];
        let frames = [&reply[..], &data(DATA, b"hi"), &data(DATA, b"there")].concat();
        let expected = [b"hi".as_slice(), b"there"].map(|bytes| Ok(Taken::Data(Bytes::from_static(bytes))));
        assert_eq!(taken(&mut Tunnel::new(1), &frames), expected);
    }

    #[test]
    fn only_the_peers_last_ping_is_answered_and_with_the_next_message() {
        let mut tunnel = Tunnel::new(1);
        tunnel.message(b"");
        assert_eq!(taken(&mut tunnel, &[ping(2), ping(4), ping(7)].concat()), []);
        assert_eq!(tunnel.message(b"x"), [ping(4), data(DATA, b"x")].concat());
        assert_eq!(tunnel.message(b"x"), data(DATA, b"x"));
    }

    #[test]
    fn an_end_says_why() {
        let refused = || data(ERROR, b"connection refused");
        let goaway = vec![0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        let foreign = "the port-forward names stream 2, which we did not open";
        let table = [
            (fin(3), Ok(Taken::End)),
            ([fin(1), fin(3)].concat(), Ok(Taken::End)),
            (goaway.clone(), Ok(Taken::End)),
            (reset(3), Err("the port-forward was reset, reason 5")),
            (reset(1), Err("the port-forward was reset, reason 5")),
            ([refused(), reset(3)].concat(), Err("connection refused")),
            ([refused(), fin(1)].concat(), Err("connection refused")),
            ([refused(), fin(3)].concat(), Err("connection refused")),
            ([refused(), goaway].concat(), Err("connection refused")),
            ([reset(7), fin(3)].concat(), Ok(Taken::End)),
            (data(2, b"?"), Err(foreign)),
            (vec![0x80, 3, 0, 1, 0, 0, 0, 4, 0, 0, 0, 2], Err(foreign)),
        ];
        for (frames, end) in table {
            assert_eq!(taken(&mut Tunnel::new(1), &frames), [end.map_err(String::from)], "{frames:?}");
        }
    }

    #[test]
    fn an_error_without_end_is_cut() {
        let mut tunnel = Tunnel::new(1);
        for _ in 0..3 {
            taken(&mut tunnel, &data(ERROR, &[b'x'; 3000]));
        }
        assert_eq!(tunnel.error.len(), ERROR_LIMIT);
    }
}
