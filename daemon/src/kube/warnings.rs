//! What the API server warns of when it does something: `Warning` headers (RFC 7234, 5.5), which kubectl shows as well.

use http::{HeaderMap, Request, header};
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use kube::core::Status;

/// Does a request. Answers the texts of the warnings that came with it, and nothing else of it.
pub(crate) async fn of(client: &Client, request: Request<Vec<u8>>) -> Result<Vec<String>, kube::Error> {
    let response = client.send(request.map(Body::from)).await?;
    let code = response.status();
    if code.is_success() {
        return Ok(texts(response.headers()));
    }
    let body = response.into_body().collect().await?.to_bytes();
    let unknown = || Status::failure(String::from_utf8_lossy(&body).trim(), "").with_code(code.as_u16());
    Err(kube::Error::Api(serde_json::from_slice(&body).unwrap_or_else(|_| unknown()).boxed()))
}

/// The texts of all warnings: one header may have several, and there may be several headers.
fn texts(headers: &HeaderMap) -> Vec<String> {
    let mut texts = Vec::new();
    for value in headers.get_all(header::WARNING) {
        let value = String::from_utf8_lossy(value.as_bytes());
        let mut rest = &*value;
        while let Some((text, behind)) = warning(rest) {
            texts.push(text);
            rest = behind;
        }
    }
    texts
}

/// The text of the first warning (`299 - "text"`, and a date where there is one), and what is behind it.
fn warning(value: &str) -> Option<(String, &str)> {
    let (_, quoted) = value.split_once('"')?;
    let (text, behind) = string(quoted)?;
    let behind = behind.trim_start();
    let behind = match behind.strip_prefix('"') {
        Some(date) => string(date)?.1,
        None => behind,
    };
    Some((text, behind))
}

/// The content of a quoted string (RFC 9110, 5.6.4) whose first quote is gone already, without what a terminal would obey, and what
/// is behind it.
fn string(quoted: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut characters = quoted.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '"' => return Some((text, &quoted[index + 1..])),
            '\\' => text.extend(characters.next().map(|(_, escaped)| escaped)),
            other => text.extend((!other.is_control()).then_some(other)),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Response};
    use proptest::prelude::*;
    use tower::BoxError;

    use super::*;

    fn read(values: &[&[u8]]) -> Vec<String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::WARNING, HeaderValue::from_bytes(value).unwrap());
        }
        texts(&headers)
    }

    /// What comes of a request that is answered like this.
    async fn answered(code: u16, body: &'static str) -> Result<Vec<String>, kube::Error> {
        let service = tower::service_fn(move |_: Request<Body>| async move {
            let answer = Response::builder().status(code).header(header::WARNING, r#"299 - "pods go""#);
            Ok::<_, BoxError>(answer.body(Body::from(body.as_bytes().to_vec()))?)
        });
        of(&Client::new(service, "shop"), Request::new(Vec::new())).await
    }

    #[tokio::test]
    async fn a_refusal_is_what_it_is_elsewhere() {
        assert_eq!(answered(201, "{}").await.unwrap(), ["pods go"]);
        let taken =
            r#"{"kind":"Status","status":"Failure","message":"taken","reason":"Conflict","code":409}"#;
        for (code, body, message) in [(409, taken, "taken"), (502, "no gateway\n", "no gateway")] {
            let Err(kube::Error::Api(status)) = answered(code, body).await else { panic!() };
            assert_eq!((status.code, &*status.message), (code, message));
        }
    }

    #[test]
    fn every_warning_is_read() {
        assert_eq!(read(&[]), [""; 0]);
        assert_eq!(read(&[br#"299 - "2 pods (a, b) go""#]), ["2 pods (a, b) go"]);
        let dated = br#"299 - "one" "Wed, 21 Oct 2015 07:28:00 GMT", 299 kube "two, \"three\" \\""#;
        assert_eq!(read(&[dated, br#"299 - "four""#]), ["one", r#"two, "three" \"#, "four"]);
        assert_eq!(read(&["299 - \"and so on…\"".as_bytes()]), ["and so on…"]);
    }

    #[test]
    fn what_is_no_warning_is_none() {
        for value in ["", "299 - text", "299 - \"open", "299 - \"open\\"] {
            assert_eq!(read(&[value.as_bytes()]), [""; 0], "{value}");
        }
        assert_eq!(read(&[b"299 - \"a\tb\""]), ["ab"]);
    }

    proptest! {
        #[test]
        fn garbage_is_read_to_its_end(value in "[\"\\\\, a-c…]{0,40}") {
            read(&[value.as_bytes()]);
        }
    }
}
