//! Which intercepts are served. The webhook refuses at creation what cannot be; this is what counts where two replicas let
//! a conflict pass at the same time, or where the world has changed since.

use std::fmt;

use k8s_openapi::jiff::Timestamp;
use tpd_api::agent::Mode;
use tpd_api::intercept::FoundPort;

use super::objects::{Intercept, Pod, Service};
use super::ports;

/// What was decided on an intercept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Why it is not served, if it is not.
    pub refusal: Option<Refusal>,
    /// Its ports, as they were found in the first pod that has them all. Empty where none has.
    pub ports: Vec<FoundPort>,
}

/// Why an intercept is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its filter makes no sense.
    Filter(String),
    /// Its session is another user's.
    ForeignSession,
    /// Its time is over.
    Expired,
    /// The pods have no such port.
    Port(String),
    /// Somebody else has that traffic.
    Conflict {
        /// Name of the older intercept.
        name: String,
        /// Whose it is.
        owner: String,
        /// Port that both name.
        port: u16,
    },
}

impl Refusal {
    /// One word for the condition's `reason`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Filter(_) => "InvalidFilter",
            Self::ForeignSession => "ForeignSession",
            Self::Expired => "Expired",
            Self::Port(_) => "NoSuchPort",
            Self::Conflict { .. } => "Conflict",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filter(why) | Self::Port(why) => f.write_str(why),
            Self::ForeignSession => f.write_str("the session belongs to another user"),
            Self::Expired => f.write_str("its time is over"),
            Self::Conflict { name, owner, port } => write!(
                f,
                "{owner} has intercept {name} on port {port}, and a request could match both; a filter on a header value of \
                 your own would not conflict, and neither would --wiretap"
            ),
        }
    }
}

/// Decides the intercepts of one workload, which come with the oldest first. `owner` tells whose a session is.
#[must_use]
pub fn decide<'a>(
    intercepts: &[&Intercept],
    pods: &[(&'a Pod, Vec<&'a Service>)],
    owner: impl Fn(&str) -> Option<&'a str>,
    now: Timestamp,
) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = Vec::with_capacity(intercepts.len());
    for (position, intercept) in intercepts.iter().enumerate() {
        let found = find(intercept, pods);
        let (ports, missing) = match found {
            Ok(ports) => (ports, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        let older = intercepts[..position].iter().zip(&verdicts);
        let mut older = older.filter(|(_, verdict)| verdict.refusal.is_none());
        let refusal = own(intercept, owner(&intercept.spec.session), now)
            .or_else(|| missing.map(Refusal::Port))
            .or_else(|| older.find_map(|(older, verdict)| conflict(older, verdict, intercept, &ports)));
        verdicts.push(Verdict { refusal, ports });
    }
    verdicts
}

/// What is wrong with an intercept by itself. One whose session is not there is merely not connected.
fn own(intercept: &Intercept, owner: Option<&str>, now: Timestamp) -> Option<Refusal> {
    let spec = &intercept.spec;
    if let Some(why) = &intercept.filter_problem {
        return Some(Refusal::Filter(why.clone()));
    }
    if owner.is_some_and(|owner| owner != spec.owner) {
        return Some(Refusal::ForeignSession);
    }
    let expired = spec.expires_at.as_ref().is_some_and(|end| end.0 <= now);
    expired.then_some(Refusal::Expired)
}

/// The ports, as the first pod has them that has all. Without pods nothing is wrong yet.
fn find(intercept: &Intercept, pods: &[(&Pod, Vec<&Service>)]) -> Result<Vec<FoundPort>, String> {
    let mut complaint = None;
    for (pod, services) in pods {
        let found: Result<Vec<_>, _> =
            intercept.spec.ports.iter().map(|mapping| ports::find(pod, services, mapping)).collect();
        match found {
            Ok(ports) => return Ok(ports),
            Err(why) => complaint = complaint.or(Some(why)),
        }
    }
    complaint.map_or(Ok(Vec::new()), Err)
}

fn conflict(
    older: &Intercept,
    verdict: &Verdict,
    intercept: &Intercept,
    ports: &[FoundPort],
) -> Option<Refusal> {
    let (theirs, ours) = (&older.spec, &intercept.spec);
    if theirs.mode == Mode::Wiretap || ours.mode == Mode::Wiretap || !theirs.filter.overlaps(&ours.filter) {
        return None;
    }
    let same = |one: &&FoundPort| {
        verdict.ports.iter().any(|other| (other.port, other.protocol) == (one.port, one.protocol))
    };
    let port = ports.iter().find(same)?.port;
    Some(Refusal::Conflict { name: older.name.clone(), owner: theirs.owner.clone(), port })
}

#[cfg(test)]
mod tests {
    use tpd_api::agent::Mode;

    use super::super::objects::Intercept;
    use super::super::samples::{at, header, injected, intercept};
    use super::{Refusal, Verdict, decide};

    fn decided(intercepts: &[Intercept]) -> Vec<Verdict> {
        let pod = injected("web-1");
        let list: Vec<_> = intercepts.iter().collect();
        decide(&list, &[(&pod, vec![])], |_| Some("alice"), at(100))
    }

    fn of(owner: &str, change: impl Fn(&mut Intercept)) -> Intercept {
        let mut one = intercept(owner);
        change(&mut one);
        one
    }

    #[test]
    fn of_two_with_the_same_traffic_the_younger_waits() {
        let verdicts = decided(&[intercept("a"), intercept("b")]);
        assert_eq!(verdicts[0].refusal, None);
        assert!(
            matches!(&verdicts[1].refusal, Some(Refusal::Conflict { name, port: 8080, .. }) if name == "a")
        );
    }

    #[test]
    fn one_that_is_refused_itself_is_in_nobodys_way() {
        let broken = of("a", |one| one.filter_problem = Some("no".into()));
        let verdicts = decided(&[broken, intercept("b")]);
        assert_eq!(verdicts[0].refusal.as_ref().unwrap().reason(), "InvalidFilter");
        assert_eq!(verdicts[1].refusal, None);
    }

    #[test]
    fn filters_that_cannot_meet_and_wiretaps_do_not_conflict() {
        let one = of("a", |one| one.spec.filter = header("a"));
        let other = of("b", |one| one.spec.filter = header("b"));
        let tap = of("c", |one| one.spec.mode = Mode::Wiretap);
        let verdicts = decided(&[one, other, tap]);
        assert!(verdicts.iter().all(|verdict| verdict.refusal.is_none()), "{verdicts:?}");
    }

    #[test]
    fn other_reasons() {
        let foreign = of("a", |one| one.spec.owner = "bob".into());
        let expired = of("b", |one| {
            one.spec.expires_at = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(99)));
        });
        let missing = of("c", |one| one.spec.ports[0].port = Some("grpc".into()));
        let reasons: Vec<_> = decided(&[foreign, expired, missing])
            .into_iter()
            .map(|verdict| verdict.refusal.unwrap().reason())
            .collect();
        assert_eq!(reasons, ["ForeignSession", "Expired", "NoSuchPort"]);
    }

    #[test]
    fn without_pods_nothing_is_wrong_yet() {
        let one = intercept("a");
        let verdicts = decide(&[&one], &[], |_| None, at(1));
        assert_eq!(verdicts, [Verdict { refusal: None, ports: vec![] }]);
    }
}
