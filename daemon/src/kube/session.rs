//! The laptop's `ClientSession`: its name, making it, and deleting it.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use tokio::time::timeout;
use tpd_api::exit::ExitCode;
use tpd_api::install::FIELD_MANAGER;
use tpd_api::session::{ClientSession, ClientSessionSpec, PROTOCOL, Phase};

use super::cluster::Cluster;
use super::errors::{Call, bounded, dns_label, not_installed};
use crate::failure::Failure;

/// Time for one call while connecting: a slow API server answers within, one that hangs is not waited for.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Where sessions are kept.
#[derive(Clone, Debug)]
pub(crate) struct Sessions {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) namespace: String,
}

impl Sessions {
    /// Creates the session, or takes over the one that a killed daemon left behind: its addresses stay, its keys are
    /// replaced.
    pub(crate) async fn claim(&self, session: &ClientSession) -> Result<ClientSession, Failure> {
        let name = session.metadata.name.as_deref().unwrap_or_default();
        let doing = format!("create ClientSession {}/{name}", self.namespace);
        let (parameters, patch) = (PatchParams::apply(FIELD_MANAGER).force(), Patch::Apply(session));
        let api = self.api().await?;
        let request = api.patch(name, &parameters, &patch);
        match bounded(self.call(&doing), CALL_TIMEOUT, request).await {
            Err(failure) if failure.code == ExitCode::Forbidden => Err(self.installed_or(failure).await),
            other => other,
        }
    }

    /// The API server refuses before it looks whether there is such a resource at all, so the failure may be another.
    /// Every user may ask which resources there are (`system:discovery`).
    async fn installed_or(&self, failure: Failure) -> Failure {
        let path = format!("/apis/{}/v1alpha1", tpd_api::GROUP);
        let request = http::Request::get(path).body(Vec::new()).expect("a constant path is valid");
        let Ok(client) = self.cluster.client().await else { return failure };
        match timeout(CALL_TIMEOUT, client.request_text(request)).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => {
                not_installed(&self.namespace).because("the cluster knows no resources of tpd.dev")
            }
            _ => failure,
        }
    }

    /// Deletes the session; that it is gone already is fine.
    pub(crate) async fn delete(&self, name: &str, limit: Duration) -> Result<(), Failure> {
        let doing = format!("delete ClientSession {}/{name}", self.namespace);
        let api = self.api().await?;
        let request = async {
            match api.delete(name, &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
                other => other.map(|_| ()),
            }
        };
        bounded(self.call(&doing), limit, request).await
    }

    pub(crate) async fn api(&self) -> Result<Api<ClientSession>, Failure> {
        Ok(Api::namespaced(self.cluster.client().await?, &self.namespace))
    }

    pub(crate) fn call<'a>(&'a self, doing: &'a str) -> Call<'a> {
        Call { doing, server: &self.cluster.target().server, namespace: &self.namespace }
    }
}

/// The session that this laptop asks for.
pub(crate) fn wanted(owner: &str, key: &str, namespace: &str, uid: u32) -> ClientSession {
    let host = host();
    let machine = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let mut session = ClientSession::new(
        &name(&host, &[owner, machine.trim(), &uid.to_string()]),
        ClientSessionSpec {
            owner: owner.into(),
            public_keys: vec![key.into()],
            host,
            version: env!("CARGO_PKG_VERSION").into(),
            namespace: namespace.into(),
        },
    );
    session.metadata.labels = Some([("app.kubernetes.io/managed-by".to_owned(), "tpd".to_owned())].into());
    session
}

/// Name of this machine.
pub(crate) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// A name that is the same each time for one person on one machine, and never anyone else's.
fn name(host: &str, identity: &[&str]) -> String {
    format!("{}-{:010x}", dns_label(host), fnv1a(identity) & 0xff_ffff_ffff)
}

/// FNV-1a, 64 bits: stable across releases, which the standard library's hashers do not promise.
pub(crate) fn fnv1a(parts: &[&str]) -> u64 {
    parts
        .iter()
        .flat_map(|part| part.bytes().chain([0]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Whether a session can be used: `None` while the manager has not answered yet.
pub(crate) fn verdict(session: &ClientSession, namespace: &str) -> Option<Result<(), Failure>> {
    let status = session.status.as_ref()?;
    match status.phase {
        Phase::Pending => None,
        Phase::Rejected => Some(Err(rejected(session))),
        Phase::Ready if PROTOCOL.common(status.protocol).is_none() => {
            Some(Err(incompatible(&status.version, status.protocol.max < PROTOCOL.min, namespace)))
        }
        Phase::Ready => Some(Ok(())),
    }
}

fn rejected(session: &ClientSession) -> Failure {
    let condition = session
        .status
        .iter()
        .flat_map(|status| &status.conditions)
        .find(|condition| condition.type_ == "Ready");
    let why = condition.map_or("it gave no reason", |condition| condition.message.as_str());
    let failure = Failure::new(ExitCode::Failure, "the manager will not serve this session").because(why);
    match condition.map(|condition| condition.reason.as_str()) {
        Some("Incompatible") => Failure { code: ExitCode::Incompatible, ..failure }
            .help("use the same version of tpd on the laptop and in the cluster; tpd version shows both"),
        _ => failure,
    }
}

fn incompatible(manager: &str, manager_is_older: bool, namespace: &str) -> Failure {
    let ours = env!("CARGO_PKG_VERSION");
    let failure = Failure::new(
        ExitCode::Incompatible,
        format!("tpd {ours} and the manager {manager} in namespace {namespace} speak no common protocol"),
    );
    if manager_is_older {
        failure.because("the manager is older").help("an administrator upgrades it with: tpd install")
    } else {
        failure
            .because("the manager is newer")
            .help(format!("install tpd {manager} or newer on this machine"))
    }
}

/// The manager did not answer in time.
pub(crate) fn silent(namespace: &str, waited: Duration) -> Failure {
    Failure::new(
        ExitCode::Timeout,
        format!(
            "the manager in namespace {namespace} did not take up the session within {} s",
            waited.as_secs()
        ),
    )
    .help(format!(
        "it may be starting or down; an administrator sees with: kubectl -n {namespace} get pods,events"
    ))
}

#[cfg(test)]
mod tests {
    use tpd_api::session::{ClientSessionStatus, ProtocolRange};

    use super::*;

    #[test]
    fn names_are_stable_valid_and_personal() {
        let first = name("Ann's MacBook.local", &["ann", "m1", "1000"]);
        assert_eq!(first, name("Ann's MacBook.local", &["ann", "m1", "1000"]));
        assert!(first.starts_with("ann-s-macbook-local-"));
        assert_ne!(first, name("Ann's MacBook.local", &["bob", "m1", "1000"]));
        assert_ne!(fnv1a(&["ab", "c"]), fnv1a(&["a", "bc"]));
    }

    fn answered(phase: Phase, protocol: ProtocolRange) -> ClientSession {
        let mut session = wanted("ann", "k", "default", 0);
        session.status = Some(ClientSessionStatus {
            phase,
            protocol,
            version: "9.0.0".into(),
            ..ClientSessionStatus::default()
        });
        session
    }

    #[test]
    fn the_managers_answer_is_judged() {
        assert!(verdict(&wanted("ann", "k", "default", 0), "n").is_none());
        assert!(verdict(&answered(Phase::Pending, PROTOCOL), "n").is_none());
        assert_eq!(verdict(&answered(Phase::Ready, PROTOCOL), "n"), Some(Ok(())));
        assert_eq!(
            verdict(&answered(Phase::Rejected, PROTOCOL), "n").unwrap().unwrap_err().code,
            ExitCode::Failure
        );

        let newer = ProtocolRange { min: PROTOCOL.max + 1, max: PROTOCOL.max + 1 };
        let failure = verdict(&answered(Phase::Ready, newer), "n").unwrap().unwrap_err();
        assert_eq!(failure.code, ExitCode::Incompatible);
        assert_eq!(failure.causes, ["the manager is newer"]);
        let older = ProtocolRange { min: 0, max: 0 };
        assert_eq!(
            verdict(&answered(Phase::Ready, older), "n").unwrap().unwrap_err().causes,
            ["the manager is older"]
        );
    }
}
