//! What becomes of a pod that its ReplicaSet was made to let go of.

use std::collections::BTreeSet;

use k8s_openapi::jiff::SignedDuration;

use super::REPLACED;

/// How a released pod waits for its successor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// For how long it has.
    pub waited: SignedDuration,
    /// Which intercepts there are, served or not (see [`super::super::objects::Intercept::version`]); without any nobody needs it any more.
    pub asked: BTreeSet<String>,
    /// What keeps the successor from being ready.
    pub trouble: Option<String>,
}

impl Wait {
    /// What is to be said meanwhile.
    #[must_use]
    pub fn reason(&self) -> String {
        let trouble = self.trouble.as_ref().map(|trouble| format!(": {trouble}")).unwrap_or_default();
        format!("{REPLACED}, and waits for its successor to be ready{trouble}")
    }

    /// What is to be said after it was in vain.
    #[must_use]
    pub fn vain(&self, limit: SignedDuration) -> String {
        let trouble = self.trouble.as_ref().map(|trouble| format!(" ({trouble})")).unwrap_or_default();
        format!(
            "it was to be replaced, and no successor was ready within {} s; leave the intercept and make it anew to have it tried \
             again{trouble}",
            limit.as_secs()
        )
    }
}

/// Why a pod is given back that was to be replaced for intercepts that are over.
pub const UNNEEDED: &str = "nobody intercepts its workload any more";

/// What becomes of a released pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its ReplicaSet is gone.
    Orphan,
    /// Its ReplicaSet is to adopt it again; why.
    GiveBack(String),
    /// Its successor is still waited for.
    Wait,
    /// It is not needed any more.
    Evict,
}

/// What becomes of a released pod whose ReplicaSet wants so many pods, if it is there, and has so many ready ones, where a successor
/// is waited for until a limit.
#[must_use]
pub fn fate(wanted: Option<usize>, ready: usize, wait: &Wait, limit: SignedDuration) -> Fate {
    match wanted {
        None => Fate::Orphan,
        // Then it is ended as the others were, and no disruption budget is asked.
        Some(0) => Fate::GiveBack("its ReplicaSet is to have no pods".to_owned()),
        Some(wanted) if wanted <= ready => Fate::Evict,
        Some(_) if wait.asked.is_empty() => Fate::GiveBack(UNNEEDED.to_owned()),
        Some(_) if wait.waited >= limit => Fate::GiveBack(wait.vain(limit)),
        Some(_) => Fate::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::{Fate, SignedDuration, UNNEEDED, Wait, fate};

    #[test]
    fn a_released_pod_is_never_left_to_itself() {
        let trouble = Some("no such image".to_owned());
        let wait = |waited, asked: &[&str]| Wait {
            waited: SignedDuration::from_secs(waited),
            asked: asked.iter().map(|one| (*one).to_owned()).collect(),
            trouble: trouble.clone(),
        };
        let fate = |wanted, ready, wait: &Wait| fate(wanted, ready, wait, SignedDuration::from_secs(600));
        assert_eq!(fate(Some(2), 2, &wait(0, &["u.1"])), Fate::Evict);
        assert_eq!(fate(Some(2), 2, &wait(900, &[])), Fate::Evict);
        assert_eq!(fate(Some(2), 1, &wait(599, &["u.1"])), Fate::Wait);
        assert_eq!(fate(Some(2), 1, &wait(0, &[])), Fate::GiveBack(UNNEEDED.into()));
        assert!(matches!(fate(Some(0), 0, &wait(0, &["u.1"])), Fate::GiveBack(_)));
        assert_eq!(fate(None, 0, &wait(0, &["u.1"])), Fate::Orphan);
        let Fate::GiveBack(why) = fate(Some(2), 1, &wait(600, &["u.1"])) else { panic!() };
        assert!(why.contains("within 600 s") && why.ends_with("(no such image)"), "{why}");
    }
}
