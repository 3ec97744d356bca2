//! The client's half of the HTTP/1.1 Upgrade that turns a connection to a manager into a stream (RFC 9110, 7.8).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest answer that is read before it is given up on: a manager's has a hundred bytes.
const MAX_ANSWER: usize = 4096;

/// Asks the manager behind `stream` for a stream at `path`, of the protocol `token`. Answers with what came behind its answer.
///
/// # Errors
/// When the connection fails, or the manager says anything but 101.
pub(crate) async fn upgrade(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    path: &str,
    token: &str,
) -> io::Result<Vec<u8>> {
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: tpd-manager\r\nConnection: Upgrade\r\nUpgrade: {token}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(256);
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(end) = end_of_head(&answer) {
            switched(&answer[..end])?;
            return Ok(answer.split_off(end));
        }
        if answer.len() > MAX_ANSWER {
            return Err(io::Error::other("the answer to the Upgrade has no end"));
        }
    }
}

/// Where the head of an answer ends, if it has arrived whole.
fn end_of_head(answer: &[u8]) -> Option<usize> {
    answer.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// Whether the manager switches protocols; if not, its status line is the error.
fn switched(head: &[u8]) -> io::Result<()> {
    if head.starts_with(b"HTTP/1.1 101 ") {
        return Ok(());
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    Err(io::Error::other(format!("the manager answers {:?}", String::from_utf8_lossy(line))))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answered_with(answer: &'static [u8]) -> io::Result<Vec<u8>> {
        let (mut ours, mut theirs) = tokio::io::duplex(64);
        tokio::spawn(async move {
            let mut request = Vec::new();
            while end_of_head(&request).is_none() {
                theirs.read_buf(&mut request).await.unwrap();
            }
            assert!(request.starts_with(b"GET /v1/stream HTTP/1.1\r\n"));
            let _ = theirs.write_all(answer).await;
        });
        upgrade(&mut ours, "/v1/stream", "tpd").await
    }

    #[tokio::test]
    async fn bytes_behind_the_101_belong_to_the_stream() {
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: tpd\r\n\r\nhello";
        assert_eq!(answered_with(answer).await.unwrap(), b"hello");
    }

    #[tokio::test]
    async fn anything_else_is_an_error_that_tells_it() {
        let error = answered_with(b"HTTP/1.1 404 Not Found\r\n\r\n").await.unwrap_err();
        assert!(error.to_string().contains("404 Not Found"), "{error}");
        let error = answered_with(b"HTTP/1.1 101 Swi").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error = answered_with(&[b'x'; 10_000]).await.unwrap_err();
        assert!(error.to_string().contains("no end"), "{error}");
    }
}
