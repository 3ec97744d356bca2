//! The proof that a name really resolves: a question through the system's own resolver, as any program would ask it.

use std::{collections::BTreeSet, io, net::IpAddr, time::Duration};

use tokio::time::{Instant, sleep, timeout};

use crate::rules::PROOF_LABEL;

/// How long a resolver gets to notice that its configuration has changed.
const PATIENCE: Duration = Duration::from_secs(5);
/// How soon a failed proof is tried again: the first attempt may come before the resolver has taken its new settings.
const RETRY: Duration = Duration::from_millis(20);

/// Why a proof failed.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The system's resolver has no answer.
    #[error("the system's resolver does not resolve {name}")]
    Unresolved {
        /// The name asked for.
        name: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// The system's resolver didn't answer in time.
    #[error("the system's resolver gave no answer for {name} within {PATIENCE:?}")]
    Silent {
        /// The name asked for.
        name: String,
    },
    /// The answer isn't the proxy's: questions go to another server.
    #[error("the system's resolver asks another server for cluster names: {name} resolved to {found:?}")]
    Elsewhere {
        /// The name asked for.
        name: String,
        /// What it resolved to.
        found: BTreeSet<IpAddr>,
    },
}

/// The addresses of `name`, looked up once through the system's resolver (getaddrinfo, and so nsswitch.conf).
///
/// The answer of a name like `kubernetes.default.svc.cluster.local` proves the whole way to the cluster.
pub async fn prove(name: &str) -> Result<BTreeSet<IpAddr>, ProofError> {
    let lookup = tokio::net::lookup_host((name, 0));
    match timeout(PATIENCE, lookup).await {
        Ok(Ok(found)) => Ok(found.map(|address| address.ip()).collect()),
        Ok(Err(source)) => Err(ProofError::Unresolved { name: name.to_owned(), source }),
        Err(_) => Err(ProofError::Silent { name: name.to_owned() }),
    }
}

/// Proves that the system's resolver asks the proxy that listens on `own` for names of `zone`, whether the cluster answers or not.
/// Tries again for up to five seconds.
pub async fn prove_takeover(zone: &str, own: &[IpAddr]) -> Result<(), ProofError> {
    let name = format!("{PROOF_LABEL}.{zone}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let error = match prove(&name).await {
            Ok(found) if found.iter().any(|address| own.contains(address)) => return Ok(()),
            Ok(found) => ProofError::Elsewhere { name: name.clone(), found },
            Err(error) => error,
        };
        if Instant::now() + RETRY > deadline {
            return Err(error);
        }
        sleep(RETRY).await;
    }
}
