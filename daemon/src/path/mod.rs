//! Ways through the API server to a manager's stream port.

mod channels;
mod forward;
mod proxy;
mod spdy;
mod tunnel;
mod upgrade;
mod websocket;

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::overlay::DialError;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::time::timeout;
use tpd_api::session::Endpoint;

pub(crate) use forward::Forward;
pub(crate) use proxy::Proxy;

use crate::failure::{self, Failure};
use crate::kube::cluster::Cluster;

/// Time for one replica to take a stream: TCP, TLS and the request are some six round trips on a bad day, which fit even
/// where one takes a second.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// A replica that is silent for this long gets a rival. A pod that is gone without a trace must not use up the 3 s that a
/// failover may take.
const STAGGER: Duration = Duration::from_millis(400);

/// The same for the replica that has our flows: with another they would all be reset. An API server that has only just started
/// answers within this time, and a failover has two thirds of its own left.
const LOYALTY: Duration = Duration::from_secs(1);

/// The replicas as the session's status lists them now, shared by every dialer.
#[derive(Clone, Debug)]
pub(crate) struct Replicas {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) namespace: String,
    state: Arc<RwLock<State>>,
}

#[derive(Debug, Default)]
struct State {
    endpoints: Vec<Endpoint>,
    /// Pod that carried a stream last. It still has our flows; a sibling would not.
    last: Option<String>,
}

impl Replicas {
    pub(crate) fn new(cluster: Arc<Cluster>, namespace: &str, endpoints: Vec<Endpoint>) -> Self {
        let state = Arc::new(RwLock::new(State { endpoints, last: None }));
        Self { cluster, namespace: namespace.into(), state }
    }

    pub(crate) fn set(&self, endpoints: Vec<Endpoint>) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).endpoints = endpoints;
    }

    /// Remembers who carries the session, by whatever path.
    pub(crate) fn carried_by(&self, pod: &str) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).last = Some(pod.to_owned());
    }

    /// The replicas in the order to try them.
    pub(crate) fn ordered(&self) -> Vec<Endpoint> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let mut endpoints = state.endpoints.clone();
        if let Some(position) =
            endpoints.iter().position(|endpoint| Some(&endpoint.pod) == state.last.as_ref())
        {
            endpoints[..=position].rotate_right(1);
        }
        endpoints
    }

    fn target(&self) -> String {
        self.ordered().first().map_or_else(|| "no replica".into(), |endpoint| endpoint.pod.clone())
    }

    /// How long the first of them may be silent before the next is tried.
    fn patience(&self) -> Duration {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let is_listed = state.endpoints.iter().any(|endpoint| Some(&endpoint.pod) == state.last.as_ref());
        if is_listed { LOYALTY } else { STAGGER }
    }

    /// The first replica that takes a stream; else why the first one did not. What is the API server's own fault moves on to no
    /// other replica: in the moment in which it begins to answer, any of them would do, and our flows are with one.
    async fn first<T, F>(&self, dial: impl Fn(Endpoint) -> F) -> Result<T, DialError>
    where
        F: Future<Output = Result<T, Refusal>>,
    {
        let (mut waiting, mut dialing) = (self.ordered().into_iter(), FuturesUnordered::new());
        let (mut refusals, mut patience) = (Vec::new(), self.patience());
        loop {
            if let Some(endpoint) = waiting.next() {
                let pod = endpoint.pod.clone();
                dialing.push(timeout(DIAL_TIMEOUT, dial(endpoint)).map(|result| (pod, result)));
            }
            let silence = if waiting.len() > 0 { patience } else { DIAL_TIMEOUT };
            patience = STAGGER;
            let (pod, result) = match timeout(silence, dialing.next()).await {
                Ok(Some(answer)) => answer,
                Ok(None) => break,
                Err(_) => continue,
            };
            match result {
                Ok(Ok(stream)) => {
                    self.carried_by(&pod);
                    return Ok(stream);
                }
                Ok(Err(refusal)) => {
                    let is_over = refusal.is_the_servers;
                    refusals.push((pod, refusal));
                    if is_over {
                        break;
                    }
                }
                Err(_) => refusals.push((pod, Refusal::of("it did not answer in time"))),
            }
        }
        if refusals.iter().any(|(_, refusal)| refusal.status == Some(401)) {
            self.cluster.forget_credential().await;
        }
        Err(refusals.into_iter().next().map_or_else(none_listed, |(pod, refusal)| refusal.at(&pod)))
    }
}

/// Why one replica gave no stream.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refusal {
    /// HTTP status, where there was an answer.
    status: Option<u16>,
    message: String,
    /// Whether the API server cannot be had, or refuses whatever the replica.
    is_the_servers: bool,
}

impl Refusal {
    fn of(message: impl Into<String>) -> Self {
        Self { status: None, message: message.into(), is_the_servers: false }
    }

    fn answered(status: u16, message: &str) -> Self {
        let message = format!("answered {status}: {message}");
        Self { status: Some(status), message, is_the_servers: matches!(status, 401 | 403 | 429) }
    }

    fn of_the_server(message: String) -> Self {
        Self { status: None, message, is_the_servers: true }
    }

    /// As the lane is told of it. Only a 403 is final: everything else may pass.
    fn at(self, pod: &str) -> DialError {
        DialError { message: format!("{pod}: {}", self.message), refused: self.status == Some(403) }
    }
}

impl From<&kube::Error> for Refusal {
    fn from(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::answered(status.code, &status.message),
            kube::Error::Service(cause) => Self::of_the_server(failure::chain(&**cause)),
            other => Self::of_the_server(failure::chain(other)),
        }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::of(failure.to_string())
    }
}

fn none_listed() -> DialError {
    DialError { message: "the manager lists no replica that is ready".into(), refused: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::config::Target;

    fn replicas(pods: &[&str]) -> Replicas {
        let target = Target::example("https://127.0.0.1:1");
        let invoker =
            crate::invoker::Invoker { uid: 0, gid: 0, environment: [].into(), directory: "/".into() };
        let endpoints =
            pods.iter().map(|pod| Endpoint { pod: (*pod).into(), port: 8443, udp: Vec::new() }).collect();
        Replicas::new(Arc::new(Cluster::new(target, &invoker)), "tpd-system", endpoints)
    }

    #[tokio::test]
    async fn the_next_replica_is_tried_and_then_preferred() {
        let replicas = replicas(&["a", "b", "c"]);
        let taken = replicas
            .first(|endpoint| async move {
                if endpoint.pod == "b" { Ok(endpoint.pod) } else { Err(Refusal::of("down")) }
            })
            .await;
        assert_eq!(taken, Ok("b".into()));
        let order: Vec<_> = replicas.ordered().into_iter().map(|endpoint| endpoint.pod).collect();
        assert_eq!(order, ["b", "a", "c"]);
        assert_eq!(replicas.target(), "b");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_replica_gets_a_rival_and_may_still_win() {
        let replicas = replicas(&["slow", "dead"]);
        let taken = replicas
            .first(|endpoint| async move {
                let seconds = if endpoint.pod == "slow" { 3 } else { 60 };
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                Ok(endpoint.pod)
            })
            .await;
        assert_eq!(taken, Ok("slow".into()));
        let began = tokio::time::Instant::now();
        replicas.carried_by("somebody else");
        let taken = replicas.first(|endpoint| async move {
            if endpoint.pod == "slow" { std::future::pending().await } else { Ok(endpoint.pod) }
        });
        assert_eq!(taken.await, Ok("dead".into()));
        assert_eq!(began.elapsed(), STAGGER);

        replicas.carried_by("slow");
        let began = tokio::time::Instant::now();
        let taken = replicas.first(|endpoint| async move {
            if endpoint.pod == "slow" { std::future::pending().await } else { Ok(endpoint.pod) }
        });
        assert_eq!(taken.await, Ok("dead".into()));
        assert_eq!(began.elapsed(), LOYALTY, "it has our flows");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_our_flows_is_asked_alone_while_the_api_server_is_away() {
        let replicas = replicas(&["a", "b"]);
        replicas.carried_by("b");
        let away = |endpoint: Endpoint| async move {
            if endpoint.pod == "b" {
                Err(Refusal::of_the_server("no route".into()))
            } else {
                Ok(endpoint.pod)
            }
        };
        let error = replicas.first(away).await.unwrap_err();
        assert_eq!(error.message, "b: no route");
        let slow = |endpoint: Endpoint| async move {
            tokio::time::sleep(if endpoint.pod == "b" { LOYALTY / 2 } else { Duration::ZERO }).await;
            Ok(endpoint.pod)
        };
        assert_eq!(replicas.first(slow).await, Ok("b".into()));
        let gone = |endpoint: Endpoint| async move {
            if endpoint.pod == "b" { Err(Refusal::answered(404, "no such pod")) } else { Ok(endpoint.pod) }
        };
        assert_eq!(replicas.first(gone).await, Ok("a".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_answer_it_says_so() {
        let replicas = replicas(&["a"]);
        let error = replicas.first(|_| std::future::pending::<Result<(), Refusal>>()).await.unwrap_err();
        assert_eq!(error.message, "a: it did not answer in time");
        replicas.set(Vec::new());
        let error = replicas.first(|_| async { Ok(()) }).await.unwrap_err();
        assert_eq!(error.message, "the manager lists no replica that is ready");
    }
}
