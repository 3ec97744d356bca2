//! The managers' WireGuard key: one Secret, made by whichever replica comes first, and never changed after.

use std::collections::BTreeMap;

use anyhow::{Context as _, anyhow};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tpd_api::install::KEY_SECRET;
use tpd_netstack::key::PrivateKey;
use tracing::info;

/// Entry of the Secret: the private key in base64, as `wg` writes it.
const ENTRY: &str = "privateKey";

/// The key, which is made if there is none.
///
/// # Errors
/// Fails where the Secret can be neither read nor made, and where it holds something else.
pub async fn load(client: Client, namespace: &str) -> anyhow::Result<PrivateKey> {
    let api: Api<Secret> = Api::namespaced(client, namespace);
    if let Some(secret) = api.get_opt(KEY_SECRET).await.context("read the manager's key")? {
        return read(&secret, namespace);
    }
    let key = PrivateKey::generate().context("generate the manager's key")?;
    match api.create(&PostParams::default(), &secret(&key)).await {
        Ok(_) => {
            info!(secret = KEY_SECRET, "generated the manager's key");
            Ok(key)
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            read(&api.get(KEY_SECRET).await.context("read the manager's key")?, namespace)
        }
        Err(error) => Err(error).context("store the manager's key"),
    }
}

/// What another replica, or an administrator, has put there. A bad key is not replaced: laptops know the old one.
fn read(secret: &Secret, namespace: &str) -> anyhow::Result<PrivateKey> {
    let entry = secret.data.as_ref().and_then(|data| data.get(ENTRY));
    let text = entry.and_then(|value| std::str::from_utf8(&value.0).ok());
    text.and_then(|text| text.parse().ok()).ok_or_else(|| {
        anyhow!(
            "Secret {namespace}/{KEY_SECRET} has no WireGuard key in `{ENTRY}`; delete the Secret to have a new key made \
             (every connected laptop will reconnect)"
        )
    })
}

fn secret(key: &PrivateKey) -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(KEY_SECRET.to_owned()),
            labels: Some(BTreeMap::from([("app.kubernetes.io/part-of".to_owned(), "tpd".to_owned())])),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(ENTRY.to_owned(), ByteString(key.to_base64().into_bytes()))])),
        ..Secret::default()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Secret;
    use tpd_netstack::key::PrivateKey;

    use super::{read, secret};

    #[test]
    fn a_stored_key_is_read_back() {
        let key = PrivateKey::generate().unwrap();
        assert_eq!(read(&secret(&key), "ns").unwrap(), key);
    }

    #[test]
    fn a_foreign_secret_is_named() {
        let error = read(&Secret::default(), "ns").unwrap_err().to_string();
        assert!(error.contains("ns/tpd-manager-key"), "{error}");
    }
}
