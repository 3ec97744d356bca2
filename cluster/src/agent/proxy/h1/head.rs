//! Heads of messages (RFC 9112, 2 to 6): read to tell where they go and where they end.
//!
//! What two parsers might understand in two ways is [`Parsed::Malformed`], however common it is: nothing is ever chosen by a
//! message that the app may read otherwise.

use std::mem::MaybeUninit;

use httparse::{Header, Status};

use super::body::{Body, Chunks};

/// Longest head, bytes. Servers' own limits are 8 to 64 KiB.
pub(super) const LONGEST: usize = crate::agent::proxy::buffer::LIMIT;

/// Most headers. Servers' own limits begin at 100.
const HEADERS: usize = 128;

/// How an `Upgrade` to HTTP/2 is offered (RFC 7540, 3.2).
pub(super) const HTTP2_OFFER: &str = "h2c";

/// What the first bytes of a message are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed<T> {
    /// Less than a head.
    Partial,
    /// No head, or one that is larger than is looked at.
    Malformed,
    /// A head.
    Complete(T),
}

/// The head of a request.
#[derive(Debug)]
pub(super) struct RequestHead<'h, 'b> {
    pub(super) method: &'b str,
    pub(super) target: &'b str,
    pub(super) headers: &'h [Header<'b>],
    pub(super) request: Request,
}

impl RequestHead<'_, '_> {
    /// Where HTTP/2 is offered in these bytes, which the head was read from.
    pub(super) fn offers_of_http2(&self, bytes: &[u8]) -> Vec<usize> {
        let upgrades = self.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("upgrade"));
        let protocols = upgrades.flat_map(|header| header.value.split(|byte| *byte == b','));
        protocols
            .map(<[u8]>::trim_ascii)
            .filter(|protocol| protocol.eq_ignore_ascii_case(HTTP2_OFFER.as_bytes()))
            .map(|protocol| protocol.as_ptr().addr() - bytes.as_ptr().addr())
            .collect()
    }
}

/// What must be known of a request to relay it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Length of the head, bytes.
    pub(super) head: usize,
    pub(super) body: Body,
    /// Whether the client means to use the connection again.
    persists: bool,
    is_1_0: bool,
    is_head: bool,
    is_connect: bool,
    /// Whether the client offers to go on with another protocol.
    offers_switch: bool,
    /// Whether it may be sent twice (RFC 9110, 9.2.2).
    pub(super) is_idempotent: bool,
}

/// What must be known of a response to relay it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Response {
    /// Length of the head, bytes.
    pub(super) head: usize,
    pub(super) kind: Kind,
    /// Whether both sides mean to use the connection again.
    pub(super) persists: bool,
}

/// What a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Another one follows.
    Interim,
    /// From here on the connection is not HTTP/1.1 any more.
    Switch,
    /// The answer.
    Final(Body),
}

/// Reads the head of a request and has it looked at.
pub(super) fn parse_request<T>(bytes: &[u8], look: impl FnOnce(&RequestHead<'_, '_>) -> T) -> Parsed<T> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS];
    let mut parsed = httparse::Request::new(&mut []);
    let head = match parsed.parse_with_uninit_headers(bytes, &mut headers) {
        Ok(Status::Complete(head)) => head,
        Ok(Status::Partial) => return partial(bytes),
        Err(_) => return Parsed::Malformed,
    };
    let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
        return Parsed::Malformed;
    };
    let Some(fields) = Fields::read(parsed.headers) else { return Parsed::Malformed };
    let body = match (fields.length, fields.chunked) {
        _ if head > LONGEST || !has_plain_lines(&bytes[..head]) => return Parsed::Malformed,
        // HTTP/1.0 has no chunks, and not every server ignores them.
        (Some(_), true) => return Parsed::Malformed,
        (None, true) if version == 0 || fields.other_coding => return Parsed::Malformed,
        (None, true) => Body::Chunked(Chunks::START),
        (None, false) if fields.other_coding => return Parsed::Malformed,
        (length, false) => Body::Length(length.unwrap_or(0)),
    };
    if method == "CONNECT" && body != Body::NONE {
        return Parsed::Malformed;
    }
    let request = Request {
        head,
        body,
        persists: fields.persists(version),
        is_1_0: version == 0,
        is_head: method == "HEAD",
        is_connect: method == "CONNECT",
        offers_switch: fields.upgrade,
        is_idempotent: matches!(method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE"),
    };
    Parsed::Complete(look(&RequestHead { method, target, headers: parsed.headers, request }))
}

/// Reads the head of a response to `request`.
pub(super) fn parse_response(bytes: &[u8], request: &Request) -> Parsed<Response> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let head = match config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut headers) {
        Ok(Status::Complete(head)) => head,
        Ok(Status::Partial) => return partial(bytes),
        Err(_) => return Parsed::Malformed,
    };
    let (Some(status), Some(version)) = (parsed.code, parsed.version) else { return Parsed::Malformed };
    let Some(fields) = Fields::read(parsed.headers) else { return Parsed::Malformed };
    if head > LONGEST || (fields.length.is_some() && fields.chunked) || !has_plain_lines(&bytes[..head]) {
        return Parsed::Malformed;
    }
    let kind = match status {
        101 if request.offers_switch => Kind::Switch,
        101 => return Parsed::Malformed,
        200..300 if request.is_connect => Kind::Switch,
        100..200 => Kind::Interim,
        204 | 304 => Kind::Final(Body::NONE),
        _ if request.is_head => Kind::Final(Body::NONE),
        _ => Kind::Final(match (fields.chunked, fields.length) {
            (true, _) => Body::Chunked(Chunks::START),
            (false, Some(length)) if !fields.other_coding => Body::Length(length),
            _ => Body::UntilClose,
        }),
    };
    // A client of HTTP/1.0 reads on only where it is told to.
    let persists =
        request.persists && if request.is_1_0 { fields.keep_alive } else { fields.persists(version) };
    Parsed::Complete(Response { head, kind, persists })
}

/// Where the part of a head ends that more headers can be appended to: before its last, empty line.
pub(super) fn end_of_headers(request: &Request) -> usize {
    request.head - b"\r\n".len()
}

fn partial<T>(bytes: &[u8]) -> Parsed<T> {
    if bytes.len() < LONGEST { Parsed::Partial } else { Parsed::Malformed }
}

/// Whether every line ends with CR LF. LF alone is read as the end of a line by some, and as part of it by others.
fn has_plain_lines(head: &[u8]) -> bool {
    let mut before = 0;
    head.iter().all(|byte| std::mem::replace(&mut before, *byte) == b'\r' || *byte != b'\n')
}

/// The headers that say where a message and its connection end.
#[derive(Default)]
struct Fields {
    length: Option<u64>,
    /// The last transfer coding is `chunked`.
    chunked: bool,
    /// There are others than that.
    other_coding: bool,
    close: bool,
    keep_alive: bool,
    upgrade: bool,
}

impl Fields {
    /// `None` if they cannot be understood in one way only.
    fn read(headers: &[Header<'_>]) -> Option<Self> {
        let mut fields = Self::default();
        for header in headers {
            let (name, value) = (header.name, header.value.trim_ascii());
            if name.eq_ignore_ascii_case("content-length") {
                let length = length(value)?;
                if fields.length.replace(length).is_some() {
                    return None;
                }
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                for coding in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                    // What is chunked is not encoded again.
                    if fields.chunked {
                        return None;
                    }
                    fields.chunked = coding.eq_ignore_ascii_case(b"chunked");
                    fields.other_coding |= !fields.chunked;
                }
            } else if name.eq_ignore_ascii_case("upgrade") {
                fields.upgrade = true;
            } else if name.eq_ignore_ascii_case("connection") {
                for token in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                    fields.close |= token.eq_ignore_ascii_case(b"close");
                    fields.keep_alive |= token.eq_ignore_ascii_case(b"keep-alive");
                }
            }
        }
        Some(fields)
    }

    fn persists(&self, version: u8) -> bool {
        !self.close && (version == 1 || self.keep_alive)
    }
}

/// A length: digits, and nothing else.
fn length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Body, Chunks, Kind, LONGEST, Parsed, Request, parse_request, parse_response};

    fn request(text: &str) -> Parsed<Request> {
        parse_request(text.as_bytes(), |head| head.request)
    }

    fn body(text: &str) -> Option<Body> {
        match request(text) {
            Parsed::Complete(request) => Some(request.body),
            _ => None,
        }
    }

    #[test]
    fn requests_say_how_long_they_are() {
        for (text, expected) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", Body::NONE),
            ("\r\nGET / HTTP/1.1\r\n\r\n", Body::NONE),
            ("POST / HTTP/1.1\r\ncontent-LENGTH:  12 \r\n\r\n", Body::Length(12)),
            ("POST / HTTP/1.0\r\nContent-Length: 12\r\n\r\n", Body::Length(12)),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n", Body::Chunked(Chunks::START)),
            ("CONNECT a:1 HTTP/1.1\r\n\r\n", Body::NONE),
        ] {
            assert_eq!(body(text), Some(expected), "{text:?}");
        }
    }

    #[test]
    fn requests_that_could_be_read_in_two_ways_are_malformed() {
        for headers in [
            "Content-Length: 5\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 5",
            "Content-Length: 5\r\nContent-Length: 6",
            "Content-Length: 5\r\nContent-Length: 5",
            "Content-Length: 5, 5",
            "Content-Length: +5",
            "Content-Length: -5",
            "Content-Length: 0x5",
            "Content-Length: 5 5",
            "Content-Length: ",
            "Content-Length: 99999999999999999999",
            "Content-Length : 5",
            "Transfer-Encoding : chunked",
            "Transfer-Encoding: xchunked",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked, identity",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
            "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: \"chunked\"",
            "Transfer-Encoding:\u{b}chunked",
            "Transfer-Encoding:\r\n chunked",
            "X: a\r\n folded",
            " X: a",
            "X: a\nContent-Length: 5",
            "X: a\rb",
            "X: a\0b",
            "X",
            "X y: a",
            ": a",
        ] {
            let text = format!("POST / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n");
            assert_eq!(request(&text), Parsed::Malformed, "{headers:?}");
        }
        for text in [
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "CONNECT a:1 HTTP/1.1\r\nContent-Length: 3\r\n\r\n",
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\n",
            "GET  / HTTP/1.1\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET /\r\n\r\n",
        ] {
            assert_eq!(request(text), Parsed::Malformed, "{text:?}");
        }
    }

    #[test]
    fn heads_are_bounded() {
        let many = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
        assert!(matches!(request(&many(128)), Parsed::Complete(_)));
        assert_eq!(request(&many(129)), Parsed::Malformed);
        let long = |length: usize| format!("GET / HTTP/1.1\r\nA: {}", "x".repeat(length));
        assert_eq!(request(&long(1000)), Parsed::Partial);
        assert_eq!(request(&long(LONGEST)), Parsed::Malformed);
        assert_eq!(request(&(long(LONGEST) + "\r\n\r\n")), Parsed::Malformed);
    }

    #[test]
    fn responses_say_what_follows() {
        let to = |text: &str| match request(text) {
            Parsed::Complete(request) => request,
            other => panic!("{other:?}"),
        };
        let get = to("GET / HTTP/1.1\r\n\r\n");
        let head = to("HEAD / HTTP/1.1\r\n\r\n");
        let connect = to("CONNECT a:1 HTTP/1.1\r\n\r\n");
        let old = to("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        let last = to("GET / HTTP/1.1\r\nConnection: x, Close\r\n\r\n");
        let upgrade = to("GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n");
        for (request, text, kind, persists) in [
            (&get, "200 OK\r\nContent-Length: 5", Kind::Final(Body::Length(5)), true),
            (&get, "200 \r\nTransfer-Encoding: chunked", Kind::Final(Body::Chunked(Chunks::START)), true),
            (&get, "200 OK\r\nA: b", Kind::Final(Body::UntilClose), true),
            (&get, "200 OK\r\nTransfer-Encoding: gzip", Kind::Final(Body::UntilClose), true),
            (
                &get,
                "200 \r\nTransfer-Encoding: gzip, Chunked",
                Kind::Final(Body::Chunked(Chunks::START)),
                true,
            ),
            (
                &get,
                "200 \r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
                Kind::Final(Body::Chunked(Chunks::START)),
                true,
            ),
            (&get, "204 No\r\nContent-Length: 5", Kind::Final(Body::NONE), true),
            (&get, "304 Not\r\nContent-Length: 5", Kind::Final(Body::NONE), true),
            (&get, "100 Continue", Kind::Interim, true),
            (&get, "103 Hints\r\nLink: x", Kind::Interim, true),
            (&upgrade, "101 Switching", Kind::Switch, true),
            (&get, "200 OK\r\nConnection: close\r\nContent-Length: 5", Kind::Final(Body::Length(5)), false),
            (&head, "200 OK\r\nContent-Length: 5", Kind::Final(Body::NONE), true),
            (&connect, "200 OK", Kind::Switch, true),
            (&connect, "403 No\r\nContent-Length: 5", Kind::Final(Body::Length(5)), true),
            (&old, "200 OK\r\nContent-Length: 5", Kind::Final(Body::Length(5)), false),
            (&old, "204 No\r\nConnection: Keep-Alive", Kind::Final(Body::NONE), true),
            (&last, "204 No", Kind::Final(Body::NONE), false),
        ] {
            let text = format!("HTTP/1.1 {text}\r\n\r\n");
            let Parsed::Complete(response) = parse_response(text.as_bytes(), request) else {
                panic!("{text:?}");
            };
            assert_eq!((response.kind, response.persists), (kind, persists), "{text:?}");
            assert_eq!(response.head, text.len());
        }
        for text in [
            "200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
            "200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: gzip, chunked",
            "200 OK\r\nTransfer-Encoding: chunked, gzip",
            "200 OK\r\nTransfer-Encoding: chunked, chunked",
            "101 Switching",
        ] {
            let text = format!("HTTP/1.1 {text}\r\n\r\n");
            assert_eq!(parse_response(text.as_bytes(), &get), Parsed::Malformed, "{text:?}");
        }
    }

    #[test]
    fn offers_of_http2_are_found_among_others() {
        for (headers, expected) in [
            ("Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA", &[25][..]),
            ("upgrade: websocket,H2C , h2c\r\nA: h2c\r\nUpgrade:h2c", &[35, 41, 62]),
            ("Upgrade: websocket\r\nA: h2c", &[]),
            ("Upgrade: h2c-14, h2, xh2c", &[]),
        ] {
            let text = format!("GET / HTTP/1.1\r\n{headers}\r\n\r\n");
            let offers = parse_request(text.as_bytes(), |head| head.offers_of_http2(text.as_bytes()));
            assert_eq!(offers, Parsed::Complete(expected.to_vec()), "{headers:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_prefixes_never_disagree(
            bytes in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..300),
                "[A-Z]{1,5} /[a-z ]{0,3} HTTP/1\\.[0-2]\r?\n([A-Za-z-]{1,9} ?: ?[ -~]{0,9}\r?\n){0,4}\r?\n.{0,9}"
                    .prop_map(String::into_bytes),
            ],
        ) {
            let whole = parse_request(&bytes, |head| head.request);
            for end in 0..bytes.len() {
                let part = parse_request(&bytes[..end], |head| head.request);
                prop_assert!(part == Parsed::Partial || part == whole);
            }
        }
    }
}
