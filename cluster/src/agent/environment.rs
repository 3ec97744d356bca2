//! The environment of the app's containers, for laptops that were granted it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::OsString;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE};
use http::{HeaderValue, Method, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tpd_api::agent::{ENVIRONMENT_PATH, Environment};
use tpd_api::inject::APP_ENVIRONMENT;
use tracing::debug;

/// For one exchange: a MiB of environment over the slowest path that is still of use.
const PATIENCE: Duration = Duration::from_secs(30);

/// Largest head of a request, bytes. It is the daemon's own.
const HEAD_SIZE: usize = 8 * 1024;

/// Variables of each of the app's containers, by its name.
#[derive(Debug, Default)]
pub struct Environments(BTreeMap<String, BTreeMap<String, String>>);

impl Environments {
    /// Takes them from the agent's own environment, where the webhook has repeated them: `TPD_APP_0_NAME` is the first
    /// container's `NAME`. What is no UTF-8 is left out, as it cannot be written in JSON.
    pub fn gather(containers: &[String], own: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut environments: BTreeMap<_, BTreeMap<_, _>> =
            containers.iter().map(|container| (container.clone(), BTreeMap::new())).collect();
        for (name, value) in own {
            let (Ok(name), Ok(value)) = (name.into_string(), value.into_string()) else { continue };
            let Some((number, name)) = repeated(&name) else { continue };
            if let Some(variables) = containers.get(number).and_then(|one| environments.get_mut(one)) {
                variables.insert(name.to_owned(), value);
            }
        }
        Self(environments)
    }

    /// That of one container.
    fn of(&self, container: &str) -> Option<Environment> {
        let variables = self.0.get(container)?.clone();
        Some(Environment { container: container.to_owned(), variables })
    }
}

/// The container's number and the name that it knows the variable by.
fn repeated(name: &str) -> Option<(usize, &str)> {
    let (number, name) = name.strip_prefix(APP_ENVIRONMENT)?.split_once('_')?;
    Some((number.parse().ok()?, name))
}

/// Answers one request, on behalf of a laptop that may have a container's environment, if it may have one.
pub async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    environments: &Environments,
    container: Option<String>,
) {
    let environment = container.and_then(|container| environments.of(&container));
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| {
        let reply = match (request.method(), request.uri().path(), &environment) {
            (&Method::GET, ENVIRONMENT_PATH, Some(environment)) => whole(environment),
            (&Method::GET, ENVIRONMENT_PATH, None) => {
                text(StatusCode::FORBIDDEN, "no intercept of this laptop grants an environment here\n")
            }
            _ => text(StatusCode::NOT_FOUND, "there is nothing but /v1/environment here\n"),
        };
        async { Ok::<_, Infallible>(reply) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(HEAD_SIZE)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "environment"),
        Err(_) => debug!("a laptop took too long to fetch an environment"),
    }
}

fn whole(environment: &Environment) -> Response<Full<Bytes>> {
    match serde_json::to_vec(environment) {
        Ok(json) => reply(StatusCode::OK, "application/json", json),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    reply(status, "text/plain; charset=utf-8", text)
}

fn reply(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(body.into()));
    *reply.status_mut() = status;
    let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-store"), (CONNECTION, "close")];
    reply.headers_mut().extend(headers.map(|(name, value)| (name, HeaderValue::from_static(value))));
    reply
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tpd_api::agent::Environment;

    use super::{Environments, serve};

    fn environments() -> Environments {
        let own = [
            ("TPD_APP_0_DB_PASSWORD", "secret"),
            ("TPD_APP_1_DB_PASSWORD", "other"),
            ("TPD_APP_2_X", "of no container"),
            ("TPD_APP_0", "no name"),
            ("TPD_APP_x_Y", "no number"),
            ("PATH", "the agent's own"),
        ];
        let containers = ["app".to_owned(), "worker".to_owned()];
        Environments::gather(&containers, own.map(|(name, value)| (name.into(), value.into())))
    }

    async fn ask(path: &str, container: Option<&str>) -> String {
        let (mut laptop, agent) = duplex(64 << 10);
        laptop.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        serve(agent, &environments(), container.map(Into::into)).await;
        let mut reply = String::new();
        laptop.read_to_string(&mut reply).await.unwrap();
        reply
    }

    #[tokio::test]
    async fn a_laptop_gets_the_container_that_it_was_granted() {
        let reply = ask("/v1/environment", Some("app")).await;
        let body = reply.split_once("\r\n\r\n").unwrap().1;
        let environment: Environment = serde_json::from_str(body).unwrap();
        assert_eq!(environment.container, "app");
        assert_eq!(environment.variables, [("DB_PASSWORD".to_owned(), "secret".to_owned())].into());
    }

    #[tokio::test]
    async fn nobody_else_gets_anything() {
        for (path, container, status) in [
            ("/v1/environment", None, "403"),
            ("/v1/environment", Some("sidecar"), "403"),
            ("/", Some("app"), "404"),
        ] {
            let reply = ask(path, container).await;
            assert!(reply.starts_with(&format!("HTTP/1.1 {status}")) && !reply.contains("secret"), "{reply}");
        }
    }
}
