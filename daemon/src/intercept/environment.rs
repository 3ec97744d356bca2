//! The environment of the app's container, from an agent over the overlay.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use http::Request;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tpd_api::agent::{ENVIRONMENT_PATH, Environment as Answer};
use tpd_api::exit::ExitCode;
use tpd_api::inject::AGENT_SERVICE_PORT;
use tpd_api::local::{self, Environment};

use super::Keeper;
use crate::failure::{self, Failure};

/// Time for one agent: it answers from memory, over a path that may be a slow one.
const LIMIT: Duration = Duration::from_secs(3);

/// Agents that are asked at most.
const MAX_ASKED: usize = 3;

/// Longest answer, bytes. A container's environment has to fit into the kernel's limit for a new process, of which this is half.
const MAX_ANSWER: usize = 1 << 20;

impl Keeper {
    /// The environment of the app of an intercept that asked for it.
    pub(crate) async fn environment(&self, namespace: &str, name: &str) -> Result<Environment, Failure> {
        let intercept = self.get(namespace, name)?;
        if !intercept.request.environment {
            return Err(Failure::new(
                ExitCode::Usage,
                format!("{namespace}/{name} did not ask for the app's environment"),
            )
            .help("ask for it with: tpd intercept --env-file FILE, or --env"));
        }
        let agents = agents(&intercept);
        let cannot = Failure::new(ExitCode::NoAgent, "the app's environment cannot be had");
        if agents.is_empty() {
            return Err(cannot.because("no pod's agent has acknowledged the intercept yet"));
        }
        let mut failure = cannot;
        for (pod, address) in agents {
            match timeout(LIMIT, fetch(address)).await {
                Ok(Ok(answer)) => {
                    return Ok(Environment { pod, container: answer.container, variables: answer.variables });
                }
                Ok(Err(error)) => {
                    failure = failure.because(format!("pod {pod}: {}", failure::chain(&*error)))
                }
                Err(_) => {
                    failure = failure.because(format!("pod {pod}: no answer within {} s", LIMIT.as_secs()))
                }
            }
        }
        Err(failure)
    }
}

/// Pods that may be asked, and the addresses of their agents.
fn agents(intercept: &local::Intercept) -> Vec<(String, Ipv6Addr)> {
    let pods = intercept.status.iter().flat_map(|status| &status.pods);
    let in_force = pods.filter(|pod| pod.acknowledged);
    in_force.filter_map(|pod| Some((pod.name.clone(), pod.address?))).take(MAX_ASKED).collect()
}

async fn fetch(address: Ipv6Addr) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(SocketAddr::from((address, AGENT_SERVICE_PORT))).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::get(ENVIRONMENT_PATH).header("host", "agent").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await?.to_bytes();
    drop(connection);
    if !status.is_success() {
        return Err(format!("its agent answered {status}").into());
    }
    Ok(serde_json::from_slice(&body)?)
}
