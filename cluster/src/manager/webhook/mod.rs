//! The API server's questions: whether a new pod gets an agent, and whether an intercept can be.
//!
//! The second comes with warnings: what would become of the workload's pods. Nothing is recorded, so a dry run is answered alike.
//! The first is always answered with yes and within its time, whatever becomes of the agent: a pod is never kept from starting.

pub mod attempts;
pub mod facts;
pub mod inject;
pub mod judge;
mod known;
pub mod nearest;
pub mod register;
pub mod review;
pub mod warnings;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use kube::Client;
use rustls::ServerConfig;
use serde_json::Value;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};
use tpd_api::intercept::Intercept;
use tracing::{debug, info, warn};

use self::attempts::{Attempts, Way};
use self::facts::Facts;
use self::inject::{Candidate, Patch, Settings, Surroundings};
use self::judge::Change;
use self::review::{Refusal, Review};
use super::ca::{self, Authority};
use super::config::Config;
use super::http::{self, Reply};
use super::intercepts::objects;
use super::intercepts::question::Inquiry;
use super::tls::{Handler, Secure, WEBHOOKS};

/// Largest review, bytes: the API server takes objects of at most 3 MiB, and escapes some of what is in them.
const MAX_BODY: usize = 4 << 20;

/// Reviews that are read at the same time: what they may hold together stays a fraction of the manager's memory.
const AT_ONCE: usize = 32;

/// For a whole review of a pod. The API server waits two seconds.
const POD_PATIENCE: Duration = Duration::from_millis(1500);

/// For a whole review of an intercept. The API server waits five seconds.
const INTERCEPT_PATIENCE: Duration = Duration::from_secs(4);

/// What is left on a pod that has no agent because others like it, with one, did not come to be.
const REFUSED: &str = "pods like it did not come to be with an agent, several times in a row: a policy of the cluster may forbid \
                       something about it (the events of what makes the pod say what); once that is out of the way, restart it";

/// Pause before the API server is asked again for the CA.
const RETRY: Duration = Duration::from_millis(500);

/// Gives `secure` what is behind TLS, the webhooks and `agents`, once the managers' CA is there; then keeps the webhooks
/// registered for as long as this manager leads. Tells `installation` which one the agents that it puts into pods belong to.
/// Runs for ever.
pub async fn run(
    client: Client,
    config: Config,
    leads: watch::Receiver<bool>,
    secure: Arc<OnceLock<Secure>>,
    agents: Arc<dyn Handler>,
    installation: watch::Sender<Option<String>>,
    inquiry: Inquiry,
) {
    let (authority, certificate) = authority(&client, &config.namespace).await;
    let settings = Settings {
        image: config.agent_image,
        pull_policy: config.agent_pull_policy,
        namespace: config.namespace,
        ca: authority.pem().to_owned(),
    };
    let webhooks = Arc::new(Webhooks::new(client.clone(), settings, installation, inquiry));
    // Nobody else sets it.
    let _ = secure.set(Secure::new(certificate, webhooks, agents));
    register::run(client, authority.pem().to_owned(), leads).await;
}

async fn authority(client: &Client, namespace: &str) -> (Authority, Arc<ServerConfig>) {
    loop {
        let loaded = ca::load(client.clone(), namespace).await;
        match loaded.and_then(|authority| Ok((authority.server_config(namespace)?, authority))) {
            Ok((certificate, authority)) => return (authority, certificate),
            Err(error) => warn!(error = format!("{error:#}"), "no CA yet: no webhooks, and no agents"),
        }
        sleep(RETRY).await;
    }
}

/// Answers the API server.
#[derive(Debug)]
pub struct Webhooks(Arc<Inner>);

struct Inner {
    client: Client,
    facts: Facts,
    settings: Settings,
    inquiry: Inquiry,
    attempts: Mutex<Attempts>,
    permits: Semaphore,
}

impl Webhooks {
    /// Begins to learn what it needs to know.
    #[must_use]
    pub fn new(
        client: Client,
        settings: Settings,
        installation: watch::Sender<Option<String>>,
        inquiry: Inquiry,
    ) -> Self {
        let facts = Facts::new(&client, &settings.namespace, settings.ca.clone(), installation);
        let (attempts, permits) = (Mutex::default(), Semaphore::new(AT_ONCE));
        Self(Arc::new(Inner { client, facts, settings, inquiry, attempts, permits }))
    }
}

impl Handler for Webhooks {
    fn answer(&self, request: Request<Incoming>) -> BoxFuture<'static, Reply> {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { inner.answer(request).await })
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Inner {
    async fn answer(&self, request: Request<Incoming>) -> Reply {
        let patience = match request.uri().path().strip_prefix(WEBHOOKS) {
            Some("pods") => POD_PATIENCE,
            Some("intercepts") => INTERCEPT_PATIENCE,
            _ => return http::text(StatusCode::NOT_FOUND, "there are pods and intercepts\n"),
        };
        if request.method() != Method::POST {
            return http::text(StatusCode::METHOD_NOT_ALLOWED, "reviews are sent by POST\n");
        }
        let late = || http::text(StatusCode::SERVICE_UNAVAILABLE, "the review took too long\n");
        timeout(patience, self.review(request)).await.unwrap_or_else(|_| late())
    }

    async fn review(&self, request: Request<Incoming>) -> Reply {
        let Ok(_permit) = self.permits.acquire().await else {
            return http::text(StatusCode::SERVICE_UNAVAILABLE, "this manager is ending\n");
        };
        let about_pods = request.uri().path().ends_with("pods");
        let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return http::text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        let review = match serde_json::from_slice::<Review>(&body) {
            Ok(review) => review.request,
            Err(error) => {
                return http::text(StatusCode::BAD_REQUEST, format!("no AdmissionReview: {error}\n"));
            }
        };
        let answer = if about_pods { self.pod(review).await } else { self.intercept(review).await };
        http::typed(StatusCode::OK, "application/json", Bytes::from(answer.to_string()))
    }

    async fn pod(&self, request: review::Request) -> Value {
        let patch = match request.operation.as_str() {
            "CREATE" => self.patch(request.object, &request.namespace, request.dry_run).await,
            _ => None,
        };
        review::allow(&request.uid, patch)
    }

    async fn patch(&self, pod: Value, namespace: &str, dry_run: bool) -> Option<Patch> {
        let place = self.facts.place(namespace).await?;
        let candidate = Candidate::new(pod, &place, &self.settings)?;
        match self.facts.surroundings(namespace).await {
            Ok(around) => Some(self.try_agent(candidate, &around, namespace, dry_run)),
            Err(error) => {
                warn!(namespace, error = format!("{error:#}"), "a pod gets no agent");
                Some(candidate.refuse(&format!("the limits of its namespace could not be read: {error:#}")))
            }
        }
    }

    /// Puts an agent into a pod, or says in it why there is none. What others like it were refused for is left out.
    fn try_agent(
        &self,
        candidate: Candidate,
        around: &Surroundings,
        namespace: &str,
        dry_run: bool,
    ) -> Patch {
        let maker = candidate.maker().map(str::to_owned);
        let now = Instant::now();
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        let made = maker.as_ref().map(|maker| self.inquiry.made(maker)).unwrap_or_default();
        let way = maker.as_ref().map_or(Way::Redirect, |maker| attempts.way(maker, made, now));
        if way != Way::Redirect {
            warn!(namespace, maker, ?way, "pods did not come to be with an agent as it should be");
        }
        let candidate = match way {
            Way::Redirect => candidate,
            Way::Names => candidate.without_redirect(),
            Way::None => return candidate.refuse(REFUSED),
        };
        match candidate.inject(around, &self.settings) {
            Ok(patch) => {
                if let Some(maker) = maker.filter(|_| !dry_run) {
                    attempts.tried(&maker, made, now);
                }
                patch
            }
            Err(reason) => candidate.refuse(&reason),
        }
    }

    async fn intercept(&self, request: review::Request) -> Value {
        let uid = request.uid.clone();
        match self.judge(request).await {
            Ok(warnings) => review::allow_and_warn(&uid, &warnings),
            Err(refusal) => {
                info!(code = refusal.code, refusal.message, "an intercept is refused");
                review::deny(&uid, &refusal)
            }
        }
    }

    /// The verdict, and what is to be said where it is a yes.
    async fn judge(&self, request: review::Request) -> Result<Vec<String>, Refusal> {
        let read = |object| serde_json::from_value::<Intercept>(object);
        let asked =
            read(request.object).map_err(|error| Refusal::new(422, format!("not an Intercept: {error}")))?;
        let before = read(request.old_object).ok();
        // Labels, finalizers and the like are nobody's business.
        if before.as_ref().is_some_and(|before| before.spec == asked.spec) {
            return Ok(Vec::new());
        }
        let change = Change { namespace: request.namespace, asked, before };
        let known =
            known::gather(&self.client, &self.settings.namespace, &change).await.map_err(|error| {
                debug!(error = format!("{error:#}"), "an intercept could not be judged");
                Refusal::new(
                    503,
                    format!("the manager could not check this intercept ({error:#}); try again"),
                )
            })?;
        judge::judge(&change, &known)?;
        let asked = objects::Intercept {
            namespace: change.namespace.clone(),
            ..objects::intercept(change.asked.clone())
        };
        let outlook = self.inquiry.outlook(asked).await;
        let stands_alone = known.found.is_some_and(|found| found.stands_alone);
        Ok(outlook.map(|outlook| warnings::of(&change, &outlook, stands_alone)).unwrap_or_default())
    }
}
