//! The local API: HTTP and JSON on a Unix socket, for root and for the user who ran `tpd up`.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::net::{UnixListener, UnixStream, unix::SocketAddr};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tpd_api::local::{Down, Phase, Status};

use super::board::Board;
use super::intercepts;
use crate::intercept::Keeper;

/// What the API needs of the daemon.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub(crate) board: Arc<Board>,
    pub(crate) keeper: Arc<Keeper>,
    /// Cancelled by whoever wants the daemon to end.
    pub(crate) stop: CancellationToken,
    /// What could not be undone, once everything else has been.
    pub(crate) undone: watch::Receiver<Option<Vec<String>>>,
}

/// Listens at `path`. A socket that a killed daemon left there is replaced; the caller holds the lock.
pub(crate) fn listen(path: &Path, owner: (u32, u32)) -> io::Result<Listener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let inner = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    chown(path, Some(owner.0), Some(owner.1))?;
    Ok(Listener { inner, uid: owner.0 })
}

/// Serves until `end` is cancelled, then answers what is under way.
pub(crate) async fn serve(listener: Listener, api: Api, end: CancellationToken) {
    let intercepts = intercepts::routes(Arc::clone(&api.keeper));
    let routes = Router::new().route("/v1/status", get(status)).route("/v1/down", post(down)).with_state(api);
    let routes = routes.merge(intercepts);
    let served = axum::serve(listener, routes).with_graceful_shutdown(end.cancelled_owned());
    if let Err(error) = served.await {
        tracing::error!(%error, "local API ended");
    }
}

async fn status(State(api): State<Api>) -> Json<Status> {
    Json(api.board.status())
}

async fn down(State(mut api): State<Api>) -> Result<Json<Down>, StatusCode> {
    api.board.update(|status| status.phase = Phase::Disconnecting);
    api.stop.cancel();
    let undone = api.undone.wait_for(Option::is_some).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(Json(Down { leftovers: undone.clone().unwrap_or_default() }))
}

/// Accepts only root and the owner, whatever became of the socket's mode.
#[derive(Debug)]
pub(crate) struct Listener {
    inner: UnixListener,
    uid: u32,
}

impl Listener {
    fn is_welcome(&self, stream: &UnixStream) -> bool {
        stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == self.uid)
    }
}

impl axum::serve::Listener for Listener {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            match self.inner.accept().await {
                Ok((stream, address)) if self.is_welcome(&stream) => return (stream, address),
                Ok(_) => tracing::warn!("local API: refused another user"),
                Err(error) => {
                    tracing::warn!(%error, "local API: accept");
                    // Out of descriptors; they come back.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}
