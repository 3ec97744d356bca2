//! Any filter and any head: compiling and matching never panic, and what compiles matches the same twice.
//!
//! The input is a filter as JSON on the first line, and a request behind it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tpd_api::filter::Filter;

fuzz_target!(|input: &[u8]| {
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else { return };
    let (filter, head) = (&input[..end], &input[end + 1..]);
    let Ok(filter) = serde_json::from_slice::<Filter>(filter) else { return };
    let Ok(matcher) = filter.compile() else { return };
    let mut headers = [httparse::EMPTY_HEADER; 128];
    let mut request = httparse::Request::new(&mut headers);
    let _ = request.parse(head);
    let method = request.method.unwrap_or_default().as_bytes();
    let target = request.path.unwrap_or_default().as_bytes();
    let headers = request.headers.iter().map(|header| (header.name, header.value));
    let matches = matcher.matches(method, target, headers.clone());
    assert_eq!(matcher.matches(method, target, headers), matches);
    assert!(matches || !filter.is_empty());
});
