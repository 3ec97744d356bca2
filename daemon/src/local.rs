//! The command line's side of the daemon's local API.

use std::io;
use std::time::Duration;

use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tpd_api::exit::ExitCode;
use tpd_api::local::{
    Down, Environment, Intercept, InterceptRequest, Other, Preview, Problem, SOCKET, Status,
};

use crate::failure::Failure;

/// The daemon answers from memory; one that takes longer hangs.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Undoing takes milliseconds, plus the 2 s that each of two farewells to an API server that is gone may take: to the intercepts,
/// and to the session.
const DOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// The daemon asks the API server, for 5 s at the most, or agents for 9 s; a credential plugin may have to run before.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The daemon's status; `None` where no daemon runs.
pub(crate) async fn status() -> Result<Option<Status>, Failure> {
    call(Method::GET, "/v1/status", None::<&()>, STATUS_TIMEOUT).await
}

/// Ends the daemon; `None` where none runs.
pub(crate) async fn down() -> Result<Option<Down>, Failure> {
    call(Method::POST, "/v1/down", None::<&()>, DOWN_TIMEOUT).await
}

/// Intercepts of this machine.
pub(crate) async fn intercepts() -> Result<Vec<Intercept>, Failure> {
    connected(call(Method::GET, "/v1/intercepts", None::<&()>, STATUS_TIMEOUT).await)
}

/// Makes an intercept, or changes it.
pub(crate) async fn intercept(request: &InterceptRequest) -> Result<Intercept, Failure> {
    connected(call(Method::POST, "/v1/intercepts", Some(request), CALL_TIMEOUT).await)
}

/// An intercept as it is now.
pub(crate) async fn look(namespace: &str, name: &str) -> Result<Intercept, Failure> {
    connected(call(Method::GET, &path(namespace, name), None::<&()>, STATUS_TIMEOUT).await)
}

/// The environment of the app's container.
pub(crate) async fn environment(namespace: &str, name: &str) -> Result<Environment, Failure> {
    let path = path(namespace, name) + "/environment";
    connected(call(Method::GET, &path, None::<&()>, CALL_TIMEOUT).await)
}

/// Ends an intercept.
pub(crate) async fn leave(namespace: &str, name: &str) -> Result<(), Failure> {
    connected(call(Method::DELETE, &path(namespace, name), None::<&()>, CALL_TIMEOUT).await)
}

/// What an intercept would come to.
pub(crate) async fn preview(request: &InterceptRequest) -> Result<Preview, Failure> {
    connected(call(Method::POST, "/v1/preview", Some(request), CALL_TIMEOUT).await)
}

/// Intercepts that are not this machine's, in one namespace or in all.
pub(crate) async fn others(namespace: Option<&str>) -> Result<Vec<Other>, Failure> {
    let path =
        namespace.map_or_else(|| "/v1/others".to_owned(), |namespace| format!("/v1/others/{namespace}"));
    connected(call(Method::GET, &path, None::<&()>, CALL_TIMEOUT).await)
}

fn path(namespace: &str, name: &str) -> String {
    format!("/v1/intercepts/{namespace}/{name}")
}

/// An answer that only a daemon has.
fn connected<T>(answer: Result<Option<T>, Failure>) -> Result<T, Failure> {
    answer?.ok_or_else(not_connected)
}

/// The failure of a command that needs a daemon.
pub(crate) fn not_connected() -> Failure {
    Failure::new(ExitCode::NotConnected, "not connected: no tpd daemon is running")
        .help("connect with: sudo tpd up")
}

async fn call<T: DeserializeOwned>(
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
    limit: Duration,
) -> Result<Option<T>, Failure> {
    let stream = match UnixStream::connect(SOCKET).await {
        Ok(stream) => stream,
        Err(error) => return absent(&error),
    };
    match timeout(limit, exchange(stream, method, path, body)).await {
        Ok(Ok(answer)) => answer.map(Some),
        Ok(Err(error)) => Err(silent().caused_by(&*error)),
        Err(_) => Err(silent().because(format!("no answer within {} s", limit.as_secs()))),
    }
}

fn absent<T>(error: &io::Error) -> Result<Option<T>, Failure> {
    match error.kind() {
        // A socket without a daemon behind it is what a killed one leaves.
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
        io::ErrorKind::PermissionDenied => {
            Err(Failure::new(ExitCode::Privilege, "the tpd daemon belongs to another user")
                .because(format!("{SOCKET}: {error}"))
                .help("run the command as that user, or with sudo"))
        }
        _ => Err(silent().caused_by(error)),
    }
}

fn silent() -> Failure {
    Failure::new(ExitCode::Failure, "the tpd daemon does not answer")
        .help("tpd logs tells more; end it with: sudo tpd down")
}

/// The answer, or the daemon's own words on why there is none.
async fn exchange<T: DeserializeOwned>(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<Result<T, Failure>, BoxError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "tpd")
        .header("content-type", "application/json")
        .body(Full::<Bytes>::from(body))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    connection.abort();
    if status.is_success() {
        return Ok(Ok(serde_json::from_slice(&body)?));
    }
    match serde_json::from_slice::<Problem>(&body) {
        Ok(problem) => Ok(Err(problem.into())),
        Err(_) => Err(format!("it answered {status}").into()),
    }
}
