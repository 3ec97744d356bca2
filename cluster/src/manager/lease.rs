//! One Lease elects the replica that runs the controllers.
//!
//! Every replica knows everything all the time; the leader only is the one that writes. So taking over needs
//! no more than the Lease, and for what a leader's death delays (new sessions, not those that run) it is quick.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tpd_api::install::LEASE;
use tracing::{info, warn};

use super::config::Config;

/// How long a Lease lasts that nobody renews: two renewals may fail, and an API server may restart, before anyone
/// else takes it.
const DURATION: Duration = Duration::from_secs(6);

/// How often the leader renews, and how often the others look: one small request a second or two.
const RENEW: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_secs(1);

/// A leader that could not renew for so long steps back: a second before another may take the Lease.
const DEADLINE: Duration = Duration::from_secs(5);

/// For one request to the API server.
const PATIENCE: Duration = Duration::from_millis(1500);

/// For giving the Lease back at the end, when the process is about to be gone.
const FAREWELL: Duration = Duration::from_millis(150);

/// A pod as the holder of a Lease: the name tells people, the UID tells incarnations apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pod: String,
    uid: String,
}

impl Identity {
    /// The identity of this process.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self { pod: config.pod_name.clone(), uid: config.pod_uid.clone() }
    }

    fn parse(text: &str) -> Option<Self> {
        let (pod, uid) = text.split_once('/')?;
        Some(Self { pod: pod.to_owned(), uid: uid.to_owned() })
    }

    fn text(&self) -> String {
        format!("{}/{}", self.pod, self.uid)
    }

    /// Whether this replica may take or renew a Lease that says `holder`, and has said so unchanged for `age`.
    ///
    /// `alive` are the UIDs of the manager's pods, if they are known. A StatefulSet never runs two pods
    /// of one name, so a holder of the own name is this replica's predecessor; and a holder without a pod is dead.
    fn may_hold(&self, holder: Option<&str>, age: Duration, alive: Option<&BTreeSet<String>>) -> bool {
        let Some(holder) = holder.filter(|holder| !holder.is_empty()) else { return true };
        let Some(holder) = Self::parse(holder) else { return age >= DURATION };
        // The list of pods may be a moment behind a pod that has just started.
        let gone = age >= LOOK && alive.is_some_and(|alive| !alive.contains(&holder.uid));
        holder.pod == self.pod || gone || age >= DURATION
    }
}

/// Takes part in the election until the process ends.
#[derive(Debug)]
pub struct Election {
    api: Api<Lease>,
    identity: Identity,
    alive: watch::Receiver<Option<BTreeSet<String>>>,
    leader: watch::Sender<bool>,
    seen: Option<(String, Instant)>,
    renewed: Option<Instant>,
    failing: bool,
}

impl Election {
    /// A participant; the receiver tells whether it leads.
    #[must_use]
    pub fn new(
        client: Client,
        config: &Config,
        alive: watch::Receiver<Option<BTreeSet<String>>>,
    ) -> (Self, watch::Receiver<bool>) {
        let (leader, leads) = watch::channel(false);
        let api = Api::namespaced(client, &config.namespace);
        let identity = Identity::new(config);
        (Self { api, identity, alive, leader, seen: None, renewed: None, failing: false }, leads)
    }

    /// Renews, or looks whether it may take over, until `stop`; then gives the Lease back.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        loop {
            self.round().await;
            let pause = if *self.leader.borrow() { RENEW } else { LOOK };
            tokio::select! {
                () = sleep(pause) => {}
                // A holder may have gone with its pod.
                Ok(()) = self.alive.changed() => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        if *self.leader.borrow() && timeout(FAREWELL, self.release()).await.is_err() {
            warn!("the lease was not given back in time");
        }
    }

    async fn round(&mut self) {
        let tried = match timeout(PATIENCE, self.try_hold()).await {
            Ok(result) => result,
            Err(_) => Err(anyhow!("the API server does not answer")),
        };
        let was_failing = std::mem::replace(&mut self.failing, tried.is_err());
        let held = match tried {
            Ok(held) => held,
            Err(error) => {
                if !was_failing {
                    warn!(error = format!("{error:#}"), "the lease can be neither read nor renewed");
                }
                self.still_leads()
            }
        };
        let changed = self.leader.send_if_modified(|leader| std::mem::replace(leader, held) != held);
        if changed {
            info!(leader = held, "leadership");
        }
    }

    /// Whether an earlier renewal still counts though this one failed.
    fn still_leads(&self) -> bool {
        *self.leader.borrow() && self.renewed.is_some_and(|renewed| renewed.elapsed() < DEADLINE)
    }

    async fn try_hold(&mut self) -> anyhow::Result<bool> {
        let current = self.api.get_opt(LEASE).await.context("read the Lease")?;
        let asked = Instant::now();
        let written = match current {
            None => self.api.create(&PostParams::default(), &self.fill(Lease::default())).await,
            Some(lease) if self.may_take(&lease) => {
                self.api.replace(LEASE, &PostParams::default(), &self.fill(lease)).await
            }
            Some(_) => return Ok(false),
        };
        match written {
            Ok(_) => {
                self.renewed = Some(asked);
                Ok(true)
            }
            // Another was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error).context("write the Lease"),
        }
    }

    /// The age of a Lease is how long this process has seen it unchanged: clocks of nodes differ.
    fn may_take(&mut self, lease: &Lease) -> bool {
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let now = Instant::now();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => now,
        };
        self.seen = Some((version, since));
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        self.identity.may_hold(holder, now - since, self.alive.borrow().as_ref())
    }

    fn fill(&self, mut lease: Lease) -> Lease {
        let now = MicroTime(Timestamp::now());
        let old = lease.spec.take().unwrap_or_default();
        let renewal = old.holder_identity.as_deref() == Some(&*self.identity.text());
        lease.metadata = ObjectMeta {
            name: Some(LEASE.to_owned()),
            resource_version: lease.metadata.resource_version,
            ..ObjectMeta::default()
        };
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.identity.text()),
            lease_duration_seconds: Some(i32::try_from(DURATION.as_secs()).expect("a few seconds")),
            acquire_time: if renewal { old.acquire_time } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(old.lease_transitions.unwrap_or_default() + i32::from(!renewal)),
            ..LeaseSpec::default()
        });
        lease
    }

    async fn release(&self) {
        let Ok(mut lease) = self.api.get(LEASE).await else { return };
        let Some(spec) = lease.spec.as_mut() else { return };
        if spec.holder_identity.as_deref() == Some(&*self.identity.text()) {
            spec.holder_identity = Some(String::new());
            // Where this fails the Lease runs out by itself.
            let _ = self.api.replace(LEASE, &PostParams::default(), &lease).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Identity;

    #[test]
    fn who_may_hold() {
        let me = Identity { pod: "tpd-manager-0".into(), uid: "new".into() };
        let alive = Some(["new".to_owned(), "other".to_owned()].into());
        let (now, look, long) = (Duration::ZERO, Duration::from_secs(1), Duration::from_secs(6));
        for (holder, age, alive, expected) in [
            (None, now, &None, true),
            (Some(""), now, &None, true),
            (Some("tpd-manager-0/new"), now, &None, true),
            (Some("tpd-manager-0/old"), now, &None, true),
            (Some("tpd-manager-1/other"), now, &alive, false),
            (Some("tpd-manager-1/other"), look, &alive, false),
            (Some("tpd-manager-1/other"), long, &alive, true),
            (Some("tpd-manager-1/gone"), now, &alive, false),
            (Some("tpd-manager-1/gone"), look, &alive, true),
            (Some("tpd-manager-1/gone"), look, &None, false),
            (Some("somebody"), look, &alive, false),
            (Some("somebody"), long, &alive, true),
        ] {
            assert_eq!(me.may_hold(holder, age, alive.as_ref()), expected, "{holder:?} {age:?} {alive:?}");
        }
    }
}
