//! The health port: whether the manager lives, whether it is ready, what it counts, and whom it has heard.
//!
//! Nothing here changes anything or tells a secret, so it needs no authentication.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;

use super::cluster::Kind;
use super::http::{self, Reply};
use super::liveness;
use super::metrics::Metrics;
use super::overlay::Overlay;

/// The kubelet, a Prometheus or two, and the leader.
const CONNECTIONS: usize = 32;

/// For the lane to answer that it lives. It turns around in milliseconds, however busy.
const PATIENCE: Duration = Duration::from_millis(1500);

/// What the port can tell.
#[derive(Clone, Debug)]
pub struct Health {
    /// The overlay, once it runs.
    pub overlay: watch::Receiver<Option<Arc<Overlay>>>,
    /// What is still awaited of the API server.
    pub awaited: watch::Receiver<Vec<Kind>>,
    /// Whether this replica leads.
    pub leads: watch::Receiver<bool>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Answers for ever.
pub async fn serve(listener: TcpListener, health: Health) {
    http::serve(listener, CONNECTIONS, move |request| {
        let health = health.clone();
        async move { health.answer(&request).await }
    })
    .await;
}

impl Health {
    async fn answer(&self, request: &Request<Incoming>) -> Reply {
        if request.method() != Method::GET {
            return http::text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match request.uri().path() {
            "/livez" => self.live().await,
            "/readyz" => self.ready(),
            "/metrics" => self.scrape().await,
            liveness::PATH => self.sessions().await,
            _ => http::text(StatusCode::NOT_FOUND, "there are /livez, /readyz, /metrics and /sessions\n"),
        }
    }

    fn overlay(&self) -> Option<Arc<Overlay>> {
        self.overlay.borrow().clone()
    }

    /// Before it runs, the overlay cannot be stuck.
    async fn live(&self) -> Reply {
        let Some(overlay) = self.overlay() else { return http::text(StatusCode::OK, "starting\n") };
        match timeout(PATIENCE, overlay.snapshot()).await {
            Ok(Some(_)) => http::text(StatusCode::OK, "ok\n"),
            Ok(None) => http::text(StatusCode::SERVICE_UNAVAILABLE, "the overlay lane has ended\n"),
            Err(_) => http::text(StatusCode::SERVICE_UNAVAILABLE, "the overlay lane is stuck\n"),
        }
    }

    fn ready(&self) -> Reply {
        if self.overlay().is_none() {
            return http::text(
                StatusCode::SERVICE_UNAVAILABLE,
                "waiting for the API server and the manager's key\n",
            );
        }
        let awaited = self.awaited.borrow();
        if awaited.is_empty() {
            return http::text(StatusCode::OK, "ok\n");
        }
        http::text(StatusCode::SERVICE_UNAVAILABLE, format!("waiting for the first list of {awaited:?}\n"))
    }

    async fn scrape(&self) -> Reply {
        let snapshot = match self.overlay() {
            Some(overlay) => overlay.snapshot().await,
            None => None,
        };
        match self.metrics.encode(*self.leads.borrow(), snapshot.as_ref()) {
            Ok(text) => http::typed(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                text,
            ),
            Err(error) => http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    async fn sessions(&self) -> Reply {
        let report = match self.overlay() {
            Some(overlay) => overlay.report().await,
            None => None,
        };
        match report.map(|report| serde_json::to_vec(&report)) {
            Some(Ok(json)) => http::typed(StatusCode::OK, "application/json", json),
            _ => http::text(StatusCode::SERVICE_UNAVAILABLE, "the overlay lane does not run\n"),
        }
    }
}
