//! The handshake that turns an HTTP/1.1 connection into an overlay stream (RFC 9110, 7.8).

use http::header::{CONNECTION, UPGRADE};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::{Body, Bytes};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tpd_api::{STREAM_PATH, STREAM_UPGRADE};

use super::Refusal;
use crate::failure;
use crate::overlay::BoxStream;

/// A refusal is a sentence or a `Status` object; whatever is longer is not for people.
const REFUSAL_LIMIT: usize = 16 * 1024;

/// A connection that is no longer HTTP's.
pub(super) type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// A request for a stream at `path`, with a body that is empty.
pub(super) fn request<B>(path: &str, body: B) -> Request<B> {
    Request::get(path)
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, STREAM_UPGRADE)
        .body(body)
        .expect("pod names and ports make valid paths")
}

/// The stream behind a 101; any other answer is an error that says what it was.
pub(super) async fn accept<B>(response: Response<B>) -> Result<BoxStream, Refusal>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    Ok(Box::new(switched(response).await?))
}

/// The connection behind a 101, whatever it was switched to.
pub(super) async fn switched<B>(response: Response<B>) -> Result<Upgraded, Refusal>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refusal(response).await);
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(|error| Refusal::of(failure::chain(&error)))?;
    Ok(TokioIo::new(upgraded))
}

async fn refusal<B>(response: Response<B>) -> Refusal
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), REFUSAL_LIMIT).collect().await;
    let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned()).unwrap_or_default();
    Refusal::answered(status, &sentence(&text))
}

/// The message of a `Status` object, or the text itself.
fn sentence(text: &str) -> String {
    serde_json::from_str::<serde_json::Value>(text)
        .ok()
        .and_then(|status| Some(status.get("message")?.as_str()?.to_owned()))
        .unwrap_or_else(|| text.trim().to_owned())
}

/// The same handshake with the manager itself, over a connection that leads straight to it.
pub(super) async fn over<S>(stream: S) -> Result<BoxStream, Refusal>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
        .await
        .map_err(|error| Refusal::of(failure::chain(&error)))?;
    tokio::spawn(connection.with_upgrades());
    let mut request = request(STREAM_PATH, Empty::new());
    request.headers_mut().insert(http::header::HOST, http::HeaderValue::from_static(tpd_api::MANAGER));
    accept(sender.send_request(request).await.map_err(|error| Refusal::of(failure::chain(&error)))?).await
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn answer_with(answer: &'static str) -> Result<BoxStream, Refusal> {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        tokio::spawn(async move {
            let mut head = vec![0; 4096];
            let length = theirs.read(&mut head).await.unwrap();
            let head = String::from_utf8_lossy(&head[..length]).to_lowercase();
            assert!(
                head.starts_with("get /v1/stream http/1.1\r\n") && head.contains("upgrade: tpd\r\n"),
                "{head}"
            );
            theirs.write_all(answer.as_bytes()).await.unwrap();
            let _ = theirs.read(&mut [0; 1]).await;
        });
        over(ours).await
    }

    #[tokio::test]
    async fn bytes_after_the_101_belong_to_the_stream() {
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tpd\r\n\r\nhello";
        let mut stream = answer_with(answer).await.unwrap();
        let mut first = [0; 5];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"hello");
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_its_own_words() {
        let answer = "HTTP/1.1 403 Forbidden\r\nContent-Length: 19\r\n\r\n{\"message\": \"no!\"}\n";
        let error = answer_with(answer).await.err().unwrap();
        assert_eq!(error, Refusal::answered(403, "no!"));
    }
}
