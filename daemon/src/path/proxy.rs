//! Through the API server's proxy: `pods/proxy` with an HTTP Upgrade. The API server copies bytes, and nothing else.

use std::future::Future;
use std::pin::Pin;

use kube::client::Body;
use tpd_api::STREAM_PATH;

use super::{Refusal, Replicas, upgrade};
use crate::overlay::{BoxStream, DialError, PathKind, StreamDialer};

/// Dials the manager's replicas through the proxy.
#[derive(Debug)]
pub(crate) struct Proxy(pub(crate) Replicas);

impl StreamDialer for Proxy {
    fn kind(&self) -> PathKind {
        PathKind::Proxy
    }

    fn target(&self) -> String {
        self.0.target()
    }

    fn dial(&self) -> Pin<Box<dyn Future<Output = Result<BoxStream, DialError>> + Send + '_>> {
        Box::pin(self.0.first(move |endpoint| async move {
            let client = self.0.cluster.stream_client().await?;
            let path = format!(
                "/api/v1/namespaces/{}/pods/{}:{}/proxy{STREAM_PATH}",
                self.0.namespace, endpoint.pod, endpoint.port
            );
            let response = client
                .send(upgrade::request(&path, Body::empty()))
                .await
                .map_err(|error| Refusal::from(&error))?;
            upgrade::accept(response).await
        }))
    }
}
