//! The managers' certificate authority: one Secret, made by whichever replica comes first, and never changed after.
//!
//! Agents and the API server trust it and nothing else. Each replica makes its own serving certificate at its start and keeps
//! it in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::{SignedDuration, Timestamp, tz::TimeZone};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tpd_api::WEBHOOK_SERVICE;
use tpd_api::agent::SERVER_NAME;
use tpd_api::install::CA_SECRET;
use tracing::info;

/// Entries of the Secret, as those of type `kubernetes.io/tls` are called.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// Name of the authority, for people who look at a certificate.
const NAME: &str = "tpd manager CA";

/// How long a certificate lasts, years: longer than a cluster lives without an upgrade. Replacing the authority means
/// replacing every pod that has an agent.
const YEARS: i16 = 10;

/// A certificate counts from so long ago: clocks differ.
const SKEW: SignedDuration = SignedDuration::from_hours(24);

/// The authority of all managers.
pub struct Authority {
    pem: String,
    key: KeyPair,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// Fails where there is no randomness.
    pub fn generate() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let pem = parameters().self_signed(&key)?.pem();
        Ok(Self { pem, key })
    }

    /// Its certificate.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// What a manager in `namespace` serves with: a fresh certificate for its names.
    ///
    /// # Errors
    /// Fails where the authority's certificate does not vouch for what its key signs.
    pub fn server_config(&self, namespace: &str) -> anyhow::Result<Arc<ServerConfig>> {
        let names = [SERVER_NAME.to_owned(), format!("{WEBHOOK_SERVICE}.{namespace}.svc")];
        let key = KeyPair::generate()?;
        let certificate = leaf(&names)?.signed_by(&key, &Issuer::new(parameters(), &self.key))?;
        self.check(certificate.der(), &names)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow!(error))?;
        let mut config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// The Secret may hold anything, and whoever is to trust its certificate would only say that it does not.
    fn check(&self, leaf: &CertificateDer<'_>, names: &[String]) -> anyhow::Result<()> {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.pem.as_bytes()).map_err(|error| anyhow!("{error}"))?)?;
        let verifier = WebPkiServerVerifier::builder(Arc::new(roots)).build()?;
        for name in names {
            let name = ServerName::try_from(name.as_str())?;
            verifier.verify_server_cert(leaf, &[], &name, &[], UnixTime::now())?;
        }
        Ok(())
    }

    fn secret(&self) -> Secret {
        let entry = |name: &str, text: String| (name.to_owned(), ByteString(text.into_bytes()));
        Secret {
            metadata: ObjectMeta {
                name: Some(CA_SECRET.to_owned()),
                labels: Some(BTreeMap::from([("app.kubernetes.io/part-of".to_owned(), "tpd".to_owned())])),
                ..ObjectMeta::default()
            },
            data: Some(BTreeMap::from([
                entry(CERTIFICATE, self.pem.clone()),
                entry(KEY, self.key.serialize_pem()),
            ])),
            ..Secret::default()
        }
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// The authority, which is made if there is none.
///
/// # Errors
/// Fails where the Secret can be neither read nor made, and where it holds something else.
pub async fn load(client: Client, namespace: &str) -> anyhow::Result<Authority> {
    let api: Api<Secret> = Api::namespaced(client, namespace);
    if let Some(secret) = api.get_opt(CA_SECRET).await.context("read the managers' CA")? {
        return read(&secret, namespace);
    }
    let authority = Authority::generate().context("generate the managers' CA")?;
    match api.create(&PostParams::default(), &authority.secret()).await {
        Ok(_) => {
            info!(secret = CA_SECRET, "generated the managers' CA");
            Ok(authority)
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            read(&api.get(CA_SECRET).await.context("read the managers' CA")?, namespace)
        }
        Err(error) => Err(error).context("store the managers' CA"),
    }
}

/// What another replica, or an administrator, has put there. A bad one is not replaced: agents trust the old one.
fn read(secret: &Secret, namespace: &str) -> anyhow::Result<Authority> {
    let entry = |name: &str| {
        let value = secret.data.as_ref().and_then(|data| data.get(name))?;
        String::from_utf8(value.0.clone()).ok()
    };
    let authority = entry(CERTIFICATE).zip(entry(KEY)).and_then(|(pem, key)| {
        let authority = Authority { pem, key: KeyPair::from_pem(&key).ok()? };
        authority.server_config(namespace).is_ok().then_some(authority)
    });
    authority.ok_or_else(|| {
        anyhow!(
            "Secret {namespace}/{CA_SECRET} holds no valid CA of a manager; delete the Secret to have a new one made (pods \
             that have an agent are replaced when they are intercepted then)"
        )
    })
}

/// The authority's own certificate. The same for ever but for its dates, so that what signs can be made from the key alone.
fn parameters() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, NAME);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    date(&mut parameters);
    parameters
}

fn leaf(names: &[String]) -> anyhow::Result<CertificateParams> {
    let mut parameters = CertificateParams::new(names)?;
    parameters.distinguished_name.push(DnType::CommonName, SERVER_NAME);
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    parameters.use_authority_key_identifier_extension = true;
    date(&mut parameters);
    Ok(parameters)
}

fn date(parameters: &mut CertificateParams) {
    let from = (Timestamp::now() - SKEW).to_zoned(TimeZone::UTC).date();
    let day = |year: i16| {
        // The 28th and before are in every month.
        rcgen::date_time_ymd(year.into(), from.month().unsigned_abs(), from.day().unsigned_abs().min(28))
    };
    parameters.not_before = day(from.year());
    parameters.not_after = day(from.year() + YEARS);
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use k8s_openapi::api::core::v1::Secret;

    use super::{Authority, CERTIFICATE, read};

    fn provider() {
        let _ = rustls::crypto::ring::default_provider().install_default();
    }

    #[test]
    fn a_stored_authority_signs_what_the_stored_certificate_vouches_for() {
        provider();
        let authority = Authority::generate().unwrap();
        let again = read(&authority.secret(), "ns").unwrap();
        assert_eq!(again.pem(), authority.pem());
        again.server_config("ns").unwrap();
    }

    #[test]
    fn a_foreign_secret_is_named() {
        provider();
        let mut mixed = Authority::generate().unwrap().secret();
        let other = Authority::generate().unwrap();
        let data = mixed.data.as_mut().unwrap();
        data.insert(CERTIFICATE.into(), ByteString(other.pem().as_bytes().to_vec()));
        for secret in [Secret::default(), mixed] {
            let error = read(&secret, "ns").unwrap_err().to_string();
            assert!(error.contains("ns/tpd-manager-ca"), "{error}");
        }
    }
}
