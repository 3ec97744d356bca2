//! The agents' API: who connects proves its pod, and is then one session of that pod.

pub mod address;
pub mod lines;
pub mod session;
pub mod token;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::future::BoxFuture;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONNECTION, HeaderValue, RETRY_AFTER, UPGRADE, WWW_AUTHENTICATE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kube::Client;
use tokio::sync::{Semaphore, mpsc};
use tpd_api::agent::AGENT_UPGRADE;
use tracing::{debug, warn};

use self::session::Event;
use self::token::{Reviewer, Verdict};
use super::http::{self, Reply};
use super::metrics::Metrics;
use super::tls::Handler;

/// Most agents connected. Each costs some ten KiB with its TLS; four times the pods that a manager is measured with.
const SESSIONS: usize = 4096;

/// Seconds after which one that was turned away for a reason of ours may come again.
const COME_AGAIN: HeaderValue = HeaderValue::from_static("2");

/// What is answered at [`AGENT_PATH`](tpd_api::agent::AGENT_PATH).
#[derive(Clone, Debug)]
pub struct Agents(Arc<Door>);

#[derive(Debug)]
struct Door {
    reviewer: Reviewer,
    events: mpsc::Sender<Event>,
    places: Arc<Semaphore>,
    connections: AtomicU64,
    metrics: Arc<Metrics>,
}

impl Agents {
    /// Tells `events` of who comes and goes.
    #[must_use]
    pub fn new(client: Client, events: mpsc::Sender<Event>, metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Door {
            reviewer: Reviewer::new(client),
            events,
            places: Arc::new(Semaphore::new(SESSIONS)),
            connections: AtomicU64::new(0),
            metrics,
        }))
    }
}

impl Handler for Agents {
    fn answer(&self, request: Request<Incoming>) -> BoxFuture<'static, Reply> {
        let door = Arc::clone(&self.0);
        Box::pin(async move { door.answer(request).await })
    }
}

impl Door {
    async fn answer(&self, mut request: Request<Incoming>) -> Reply {
        if let Some(refusal) = refusal(request.method(), request.headers().get(UPGRADE)) {
            return refusal;
        }
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return later("there are too many agents here\n");
        };
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = token::bearer(header).unwrap_or_default();
        let identity = match self.reviewer.review(token).await {
            Ok(Verdict::Pod(identity)) => identity,
            Ok(Verdict::Nobody) => {
                self.metrics.token_refused();
                return unauthorized();
            }
            Err(error) => {
                warn!(error = format!("{error:#}"), "an agent's token could not be reviewed");
                return later("the API server does not say whose token this is\n");
            }
        };
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let (upgrade, events) = (hyper::upgrade::on(&mut request), self.events.clone());
        tokio::spawn(async move {
            let pod = format!("{}/{}", identity.namespace, identity.pod);
            let carried = match upgrade.await {
                Ok(upgraded) => session::run(TokioIo::new(upgraded), identity, connection, events).await,
                Err(error) => Err(error.into()),
            };
            if let Err(error) = carried {
                debug!(pod, error = format!("{error:#}"), "an agent's connection has ended");
            }
            drop(place);
        });
        switching_protocols()
    }
}

/// What is wrong with a request, whoever sends it.
fn refusal(method: &Method, upgrade: Option<&HeaderValue>) -> Option<Reply> {
    if method != Method::GET {
        return Some(http::text(StatusCode::METHOD_NOT_ALLOWED, "agents begin with GET\n"));
    }
    let asked = upgrade.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(AGENT_UPGRADE.as_bytes()));
    (!asked).then(|| {
        let text = format!("agents ask for `Upgrade: {AGENT_UPGRADE}`\n");
        let mut reply = http::text(StatusCode::UPGRADE_REQUIRED, text);
        reply.headers_mut().insert(UPGRADE, HeaderValue::from_static(AGENT_UPGRADE));
        reply
    })
}

fn unauthorized() -> Reply {
    let mut reply = http::text(StatusCode::UNAUTHORIZED, "");
    reply.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    reply
}

fn later(why: &'static str) -> Reply {
    let mut reply = http::text(StatusCode::SERVICE_UNAVAILABLE, why);
    reply.headers_mut().insert(RETRY_AFTER, COME_AGAIN);
    reply
}

fn switching_protocols() -> Reply {
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    reply.headers_mut().insert(UPGRADE, HeaderValue::from_static(AGENT_UPGRADE));
    reply
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use hyper::{Method, StatusCode};

    use super::refusal;

    #[test]
    fn only_an_upgrade_of_the_right_kind_is_looked_at() {
        for (method, upgrade, expected) in [
            (Method::GET, Some("tpd-agent"), None),
            (Method::GET, Some("TPD-Agent"), None),
            (Method::GET, Some("tpd"), Some(StatusCode::UPGRADE_REQUIRED)),
            (Method::GET, None, Some(StatusCode::UPGRADE_REQUIRED)),
            (Method::POST, Some("tpd-agent"), Some(StatusCode::METHOD_NOT_ALLOWED)),
        ] {
            let header = upgrade.map(HeaderValue::from_static);
            let status = refusal(&method, header.as_ref()).map(|reply| reply.status());
            assert_eq!(status, expected, "{method} {upgrade:?}");
        }
    }
}
