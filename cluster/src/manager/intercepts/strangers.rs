//! Pods whose agents belong to an earlier installation of tpd: those trust another authority, or dial an address that nobody has,
//! so they never come, and let everything through to their apps for ever.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::objects::Pod;

/// Why such a pod takes no part.
pub const REASON: &str = "its agent belongs to an earlier installation of tpd";

/// How long an agent may be away before its pod is taken for a stranger's: agents are back within 3 s of a manager's start.
const GRACE: SignedDuration = SignedDuration::from_secs(5);

/// UIDs of the pods that look like strangers', and since when.
#[derive(Clone, Debug, Default)]
pub struct Strangers(BTreeMap<String, Timestamp>);

impl Strangers {
    /// Takes in the pods that matter. Returns the UIDs of those whose agents are strangers by now.
    ///
    /// An agent that is connected is none, whatever its pod says; and so is one whose pod says nothing, which no webhook has made:
    /// it may be the template's own, and its successor would be no better.
    pub fn see<'a>(
        &mut self,
        pods: impl Iterator<Item = &'a Pod>,
        installation: Option<&str>,
        connected: impl Fn(&str) -> bool,
        now: Timestamp,
    ) -> BTreeSet<&'a str> {
        let suspects = suspects(pods, installation, connected);
        self.0.retain(|uid, _| suspects.contains(uid.as_str()));
        for uid in &suspects {
            self.0.entry((*uid).to_owned()).or_insert(now);
        }
        suspects.into_iter().filter(|uid| now.duration_since(self.0[*uid]) >= GRACE).collect()
    }
}

/// UIDs of the pods whose agents will be strangers if they stay away.
pub fn suspects<'a>(
    pods: impl Iterator<Item = &'a Pod>,
    installation: Option<&str>,
    connected: impl Fn(&str) -> bool,
) -> BTreeSet<&'a str> {
    let Some(installation) = installation else { return BTreeSet::new() };
    let suspects = pods.filter(|pod| {
        let foreign = pod.installation.as_deref().is_some_and(|own| own != installation);
        foreign && pod.entry.is_some() && pod.running && !connected(&pod.uid)
    });
    suspects.map(|pod| pod.uid.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::objects::Pod;
    use super::super::samples::{at, injected};
    use super::Strangers;

    fn of(name: &str, installation: Option<&str>) -> Pod {
        Pod { installation: installation.map(Into::into), ..injected(name) }
    }

    #[test]
    fn who_stays_away_and_is_of_another_installation_is_a_stranger() {
        let pods =
            [of("ours", Some("1")), of("theirs", Some("0")), of("silent", None), of("back", Some("0"))];
        let mut strangers = Strangers::default();
        let mut see = |second| {
            let seen = strangers.see(pods.iter(), Some("1"), |uid| uid == "uid-back", at(second));
            seen.into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(see(100), [""; 0]);
        assert_eq!(see(104), [""; 0]);
        assert_eq!(see(105), ["uid-theirs"]);
    }

    #[test]
    fn an_agent_that_was_back_has_its_time_again() {
        let pod = of("theirs", Some("0"));
        let mut strangers = Strangers::default();
        let mut see = |connected: bool, second| {
            strangers.see([&pod].into_iter(), Some("1"), |_| connected, at(second)).len()
        };
        assert_eq!([see(false, 100), see(true, 104), see(false, 106), see(false, 111)], [0, 0, 0, 1]);
    }

    #[test]
    fn nobody_is_a_stranger_while_it_is_not_known_who_we_are() {
        let pod = of("theirs", Some("0"));
        let mut strangers = Strangers::default();
        for second in [100, 200] {
            assert!(strangers.see([&pod].into_iter(), None, |_| false, at(second)).is_empty());
        }
    }
}
