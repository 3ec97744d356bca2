//! Tells the API server which CA vouches for the webhooks.
//!
//! An installation cannot know it, since the managers make it. The leader writes it where it is missing or wrong, and looks
//! again for as long as it leads: an upgrade, or an administrator, may have written something else.

use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use kube::api::{Patch, PatchParams};
use kube::core::ClusterResourceScope;
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tpd_api::install::WEBHOOKS;
use tracing::{info, warn};

/// How often the leader looks. Meanwhile pods start without agents, and nobody can begin an intercept.
const LOOK: Duration = Duration::from_secs(5);

/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// For both configurations.
const PATIENCE: Duration = Duration::from_secs(3);

/// Runs for ever.
pub async fn run(client: Client, ca: String, mut leads: watch::Receiver<bool>) {
    let ca = ByteString(ca.into_bytes());
    let mut failing = false;
    while leads.wait_for(|leads| *leads).await.is_ok() {
        let both = async {
            vouch::<MutatingWebhookConfiguration>(&client, &ca).await?;
            vouch::<ValidatingWebhookConfiguration>(&client, &ca).await
        };
        let result = timeout(PATIENCE, both).await.context("the API server took too long").flatten();
        let failed = result.is_err();
        if let Err(error) = result
            && !std::mem::replace(&mut failing, true)
        {
            warn!(error = format!("{error:#}"), "the webhooks are not registered");
        }
        failing &= failed;
        sleep(if failed { RETRY } else { LOOK }).await;
    }
}

/// A configuration of webhooks.
trait Configuration {
    fn clients(&self) -> Vec<&WebhookClientConfig>;
}

impl Configuration for MutatingWebhookConfiguration {
    fn clients(&self) -> Vec<&WebhookClientConfig> {
        self.webhooks.iter().flatten().map(|webhook| &webhook.client_config).collect()
    }
}

impl Configuration for ValidatingWebhookConfiguration {
    fn clients(&self) -> Vec<&WebhookClientConfig> {
        self.webhooks.iter().flatten().map(|webhook| &webhook.client_config).collect()
    }
}

async fn vouch<K>(client: &Client, ca: &ByteString) -> anyhow::Result<()>
where
    K: Configuration + Resource<Scope = ClusterResourceScope, DynamicType = ()>,
    K: Clone + std::fmt::Debug + DeserializeOwned + Serialize,
{
    let kind = K::kind(&());
    let api = Api::<K>::all(client.clone());
    let found = api.get(WEBHOOKS).await.with_context(|| format!("read {kind} {WEBHOOKS}"))?;
    let version = found.meta().resource_version.clone().unwrap_or_default();
    let Some(operations) = operations(&found.clients(), &version, ca) else { return Ok(()) };
    let patch = Patch::<Value>::Json(serde_json::from_value(operations).context("build the patch")?);
    api.patch(WEBHOOKS, &PatchParams::default(), &patch)
        .await
        .with_context(|| format!("write {kind} {WEBHOOKS}"))?;
    info!(%kind, name = WEBHOOKS, "the API server trusts the managers' CA");
    Ok(())
}

/// What is to be changed, if anything is; only in the version that was read, since places in a list are counted.
fn operations(clients: &[&WebhookClientConfig], version: &str, ca: &ByteString) -> Option<Value> {
    let wrong = clients.iter().enumerate().filter(|(_, client)| client.ca_bundle.as_ref() != Some(ca));
    let mut operations: Vec<_> = wrong
        .map(|(index, _)| json!({ "op": "add", "path": format!("/webhooks/{index}/clientConfig/caBundle"), "value": ca }))
        .collect();
    if operations.is_empty() {
        return None;
    }
    operations.insert(0, json!({ "op": "test", "path": "/metadata/resourceVersion", "value": version }));
    Some(operations.into())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use k8s_openapi::api::admissionregistration::v1::WebhookClientConfig;

    use super::operations;

    #[test]
    fn only_what_is_wrong_is_written() {
        let ca = ByteString(b"ca".to_vec());
        let with = |bundle: Option<&[u8]>| WebhookClientConfig {
            ca_bundle: bundle.map(|bundle| ByteString(bundle.to_vec())),
            ..WebhookClientConfig::default()
        };
        let (right, wrong, missing) = (with(Some(b"ca")), with(Some(b"other")), with(None));
        assert_eq!(operations(&[&right], "7", &ca), None);
        let written = operations(&[&right, &wrong, &missing], "7", &ca).unwrap();
        assert_eq!(written.as_array().unwrap().len(), 3);
        assert_eq!(written[0]["value"], "7");
        assert_eq!(written[1]["path"], "/webhooks/1/clientConfig/caBundle");
        assert_eq!(written[2]["value"], "Y2E=");
    }
}
