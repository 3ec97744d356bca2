//! Kubernetes' older port-forward protocol, for API servers that tunnel no SPDY.
//!
//! Every message begins with a channel: 0 carries data, 1 carries an error's text. The first message on each channel
//! is the port, two bytes, little endian.

use std::io;

use bytes::{Buf as _, Bytes};

use super::websocket::{Protocol, Taken};

/// What the protocol calls itself in a WebSocket's handshake.
pub(super) const NAME: &str = "v4.channel.k8s.io";

const DATA: u8 = 0;
const ERROR: u8 = 1;

/// One port's connection.
#[derive(Debug, Default)]
pub(super) struct Channels {
    /// Channels whose port message has come.
    opened: [bool; 2],
}

impl Protocol for Channels {
    /// Beyond it a message only waits longer in the container runtime, which copies it whole.
    const MAX_DATA: usize = 256 * 1024;

    fn message(&mut self, data: &[u8]) -> Vec<u8> {
        let mut message = Vec::with_capacity(1 + data.len());
        message.push(DATA);
        message.extend_from_slice(data);
        message
    }

    fn take(&mut self, message: &mut Bytes) -> io::Result<Taken> {
        let mut message = std::mem::take(message);
        let Some(&channel @ (DATA | ERROR)) = message.first() else {
            let what = "a port-forward message on no known channel";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        };
        message.advance(1);
        if !std::mem::replace(&mut self.opened[usize::from(channel)], true) {
            return Ok(Taken::Data(Bytes::new()));
        }
        match channel {
            ERROR if !message.is_empty() => {
                Err(io::Error::other(String::from_utf8_lossy(&message).into_owned()))
            }
            _ => Ok(Taken::Data(message)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(channels: &mut Channels, message: &'static [u8]) -> Result<Taken, String> {
        channels.take(&mut Bytes::from_static(message)).map_err(|error| error.to_string())
    }

    fn opened() -> Channels {
        let mut channels = Channels::default();
        for port in [&[DATA, 0xfb, 0x20], &[ERROR, 0xfb, 0x20]] {
            assert_eq!(taken(&mut channels, port), Ok(Taken::Data(Bytes::new())));
        }
        channels
    }

    #[test]
    fn ports_are_passed_over_and_data_is_not() {
        let mut channels = opened();
        assert_eq!(taken(&mut channels, b"\0hi"), Ok(Taken::Data(Bytes::from_static(b"hi"))));
        assert_eq!(channels.message(b"hi"), b"\0hi");
    }

    #[test]
    fn an_error_of_the_far_end_ends_the_stream() {
        assert_eq!(taken(&mut opened(), b"\x01connection refused"), Err("connection refused".into()));
        assert_eq!(taken(&mut opened(), b"\x01"), Ok(Taken::Data(Bytes::new())));
    }

    #[test]
    fn other_channels_are_an_error() {
        let error = Err("a port-forward message on no known channel".to_owned());
        assert_eq!(taken(&mut opened(), b"\x02hi"), error);
        assert_eq!(taken(&mut opened(), b""), error);
    }
}
