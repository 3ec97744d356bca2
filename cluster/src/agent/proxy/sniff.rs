//! What a connection speaks, by its first bytes.

/// Longest method that is waited for, bytes. The longest that IANA lists has 17.
const LONGEST_METHOD: usize = 32;

/// Longest first line that is waited for, bytes; a head may not be longer either.
const LONGEST_LINE: usize = super::buffer::LIMIT;

/// What an HTTP/2 client says first (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// HTTP/1.0 or 1.1.
    Http1,
    /// HTTP/2 by prior knowledge.
    Http2,
    /// Anything else.
    Other,
}

/// Tells it from the first bytes of the client; `None` if they could still become one or the other.
pub(super) fn client(bytes: &[u8]) -> Option<Protocol> {
    if bytes.starts_with(PREFACE) {
        return Some(Protocol::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) if is_request_line(&bytes[..end]) => Some(Protocol::Http1),
        Some(_) => Some(Protocol::Other),
        None => (!may_become_request_line(bytes)).then_some(Protocol::Other),
    }
}

/// Whether the server's first bytes are, or may become, the SETTINGS that an HTTP/2 server may send before it has heard anything
/// (RFC 9113, 3.4): then it is the client that says what is spoken.
pub(super) fn may_be_http2_server(bytes: &[u8]) -> bool {
    // Length (a multiple of six, far below 2^16), type 4, no flags, stream 0.
    let header = |at: usize, byte: u8| match at {
        0 | 4..=8 => byte == 0,
        3 => byte == 4,
        _ => true,
    };
    let length = || (usize::from(bytes[1]) << 8) | usize::from(bytes[2]);
    bytes.iter().take(9).enumerate().all(|(at, byte)| header(at, *byte))
        && (bytes.len() < 3 || length() % 6 == 0)
}

/// Whether a line (without its LF) is `METHOD SP target SP HTTP/1.x CR`.
fn is_request_line(line: &[u8]) -> bool {
    let mut parts = line.splitn(3, |byte| *byte == b' ');
    let method = parts.next().is_some_and(|method| !method.is_empty() && method.iter().all(is_token));
    let target = parts.next().is_some_and(|target| !target.is_empty());
    method && target && matches!(parts.next(), Some(b"HTTP/1.0\r" | b"HTTP/1.1\r"))
}

fn may_become_request_line(bytes: &[u8]) -> bool {
    let method = bytes.iter().position(|byte| *byte == b' ').unwrap_or(bytes.len());
    method <= LONGEST_METHOD
        && bytes.len() <= LONGEST_LINE
        && bytes[..method].iter().all(is_token)
        && bytes[method..].iter().all(|byte| *byte >= b' ' || *byte == b'\r')
}

/// Whether a byte may be part of a token (RFC 9110, 5.6.2).
fn is_token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{PREFACE, Protocol, client, may_be_http2_server};

    #[test]
    fn protocols_are_told_by_their_first_bytes() {
        for (bytes, expected) in [
            (&b""[..], None),
            (b"GET", None),
            (b"GET / HTTP/1.1", None),
            (b"GET / HTTP/1.1\r\n", Some(Protocol::Http1)),
            (b"BREW /pot HTTP/1.0\r\nHost: a\r\n", Some(Protocol::Http1)),
            (b"OPTIONS * HTTP/1.1\r\n\r\n", Some(Protocol::Http1)),
            (b"GET / HTTP/1.1\n", Some(Protocol::Other)),
            (b"GET /\r\n", Some(Protocol::Other)),
            (b"GET  HTTP/1.1\r\n", Some(Protocol::Other)),
            (b"PRI * HTTP/2.0\r\n\r\n", None),
            (PREFACE, Some(Protocol::Http2)),
            (b"PRI * HTTP/2.0\r\n\r\nXX", Some(Protocol::Other)),
            (b"\x16\x03\x01", Some(Protocol::Other)),
            (b"SSH-2.0-x\r\n", Some(Protocol::Other)),
            (b"*1\r\n$4\r\nPING\r\n", Some(Protocol::Other)),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Some(Protocol::Other)),
            (b"\r\nGET / HTTP/1.1\r\n", Some(Protocol::Other)),
            (&[b'A'; 33], Some(Protocol::Other)),
        ] {
            assert_eq!(client(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn an_http2_server_that_speaks_first_is_recognized() {
        for (bytes, expected) in [
            (&b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64"[..], true),
            (b"\0\0\0\x04\0\0\0\0\0", true),
            (b"\0", true),
            (b"\0\0\x07\x04", false),
            (b"\0\0\x06\x04\x01", false),
            (b"220 mail\r\n", false),
            (b"J\0\0\0\x0a8.0.33\0", false),
        ] {
            assert_eq!(may_be_http2_server(bytes), expected, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_a_verdict(
            start in proptest::sample::select(vec![&b""[..], b"GET /x HTTP/1.1\r\n", PREFACE, b"PRI *"]),
            garbage in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let bytes = [start, &garbage].concat();
            let mut verdict = None;
            for end in 0..=bytes.len() {
                let now = client(&bytes[..end]);
                prop_assert!(verdict.is_none() || now == verdict);
                verdict = now;
            }
        }
    }
}
