//! Does the cluster's resolver ask this machine's?
//!
//! In a cluster on the same machine (kind, minikube) it does, for names that it doesn't serve itself. A reverse name that we send there
//! could come back to us, and go there again. So a reverse name that nobody else can know is asked for once: if it arrives here, the
//! cluster's resolver leads back, and from then on a reverse name that is on its way to the cluster isn't sent there again.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use crate::{cluster::Cluster, name::Name, random::nonce, wire};

/// The tunnel may not be up yet: how often the question is repeated, and how often at most.
const RETRY: Duration = Duration::from_secs(5);
const ATTEMPTS: usize = 12;

#[derive(Debug)]
pub(crate) struct Recursion {
    label: String,
    found: AtomicBool,
}

impl Recursion {
    pub(crate) fn new() -> Self {
        Self { label: format!("tpd-loop-{:016x}", nonce()), found: AtomicBool::new(false) }
    }

    pub(crate) fn is_found(&self) -> bool {
        self.found.load(Relaxed)
    }

    /// Is this our own question, come back?
    pub(crate) fn is_own(&self, name: &Name) -> bool {
        let own = name.labels().next() == Some(self.label.as_bytes());
        if own && !self.found.swap(true, Relaxed) {
            tracing::info!(
                "the cluster's resolver forwards to this machine's; reverse names are guarded against a loop"
            );
        }
        own
    }

    /// Asks the cluster for the name until it answers.
    pub(crate) async fn probe(&self, cluster: &Cluster, zone: Option<Name>) {
        let Some(name) = zone.and_then(|zone| Name::parse(&self.label).ok()?.within(&zone)) else { return };
        for _ in 0..ATTEMPTS {
            if cluster.probe(&name, wire::TYPE_PTR).await.is_ok() {
                return;
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}
