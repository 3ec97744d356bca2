//! Asking every replica what it has heard of whom.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use bytes::Bytes;
use futures::future::join_all;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tpd_api::HEALTH_PORT;
use tracing::debug;

use super::collect::Report;
use super::endpoints::Replica;
use super::overlay::Overlay;

/// For one replica to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Largest answer, bytes: sixty bytes for each of the 65,533 sessions that the default pool holds.
const ANSWER_SIZE: usize = 4 * 1024 * 1024;

/// The path on the health port.
pub const PATH: &str = "/sessions";

/// What each replica reports, by the UID of its pod; `None` for one that does not answer. A pod that never had
/// an address has never carried a session.
pub async fn ask(
    replicas: &BTreeMap<String, Replica>,
    own: &str,
    overlay: &Overlay,
) -> HashMap<String, Option<Report>> {
    let others = replicas.values().filter(|replica| replica.uid != own);
    let asked = others.filter_map(|replica| Some((replica, *replica.addresses.first()?)));
    let answers = asked.map(async |(replica, address)| {
        let report = match timeout(PATIENCE, fetch(address)).await {
            Ok(Ok(report)) => Some(report),
            Ok(Err(error)) => {
                debug!(replica = replica.name, error = format!("{error:#}"), "no report");
                None
            }
            Err(_) => None,
        };
        (replica.uid.clone(), report)
    });
    let mut reports: HashMap<_, _> = join_all(answers).await.into_iter().collect();
    reports.insert(own.to_owned(), overlay.report().await);
    reports
}

async fn fetch(address: IpAddr) -> anyhow::Result<Report> {
    let address = SocketAddr::from((address, HEALTH_PORT));
    let stream = TcpStream::connect(address).await.context("connect")?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(PATH).header(HOST, address.to_string()).body(Empty::<Bytes>::new())?;
    // It ends with the answer, or when `sender` is dropped.
    tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    ensure!(response.status() == StatusCode::OK, "status {}", response.status());
    let body = Limited::new(response.into_body(), ANSWER_SIZE).collect().await;
    let body = body.map_err(|error| anyhow!(error))?.to_bytes();
    Ok(serde_json::from_slice(&body)?)
}
