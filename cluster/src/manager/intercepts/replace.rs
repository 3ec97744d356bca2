//! How a workload's pods without agents are replaced by such that have one, without an outage and without a loop.
//!
//! A Deployment's pod is released first: without the label that its ReplicaSet knows it by it goes on serving (Services do
//! not select by that label), the ReplicaSet starts another, and once that one is ready the released pod is evicted. So
//! even a single replica is replaced without a gap. The plan is made from the pods alone: a leader that crashed midway left
//! annotations behind, and its successor goes on from those.
//!
//! A released pod whose successor is not ready in time, or that nobody needs replaced any more, gets its label back: the
//! ReplicaSet adopts it, and ends the one that is too many, those first that are not ready. It is then left alone by the
//! intercepts that it was tried for.
//!
//! StatefulSets, DaemonSets and ReplicaSets of their own leave a gap before the successor is there: they are replaced, one
//! pod at a time, only where the intercept says so.

mod fate;
mod lacks;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tpd_api::agent::Protocol;
use tpd_api::intercept::{Workload, WorkloadKind};

pub use self::fate::{Fate, UNNEEDED, Wait, fate};
pub use self::lacks::{Lack, Lacks};
use super::objects::{Pod, Template};

/// A pod that something is done to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID: a successor of the same name is left alone.
    pub uid: String,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Have the ReplicaSet let go of it.
    Release {
        /// The pod.
        pod: Victim,
        /// What it was made from.
        template: Template,
    },
    /// Evict a released pod if its ReplicaSet has all the ready pods that it wants without it; give it back if it never will, or
    /// if nobody waits for that.
    Finish {
        /// The pod.
        pod: Victim,
        /// What it was made from.
        template: Template,
        /// Ready pods of the ReplicaSet.
        ready: usize,
        /// Successors that came without an agent, to be marked so that none is replaced for another of these.
        failed: Vec<Victim>,
        /// How long that is waited for.
        wait: Wait,
    },
    /// Evict it, though it leaves a gap, if the workload has all the other ready pods that it wants.
    Evict {
        /// The pod.
        pod: Victim,
        /// What it is a pod of.
        workload: Workload,
        /// Ready pods beside it.
        others: usize,
    },
}

impl Step {
    /// The pod that it is about.
    #[must_use]
    pub fn pod(&self) -> &Victim {
        match self {
            Self::Release { pod, .. } | Self::Finish { pod, .. } | Self::Evict { pod, .. } => pod,
        }
    }
}

/// What is said of a pod whose replacement has begun, and how everything begins that is said of it until it is over.
pub const REPLACED: &str = "it is being replaced";

/// What is said of a pod that will be replaced after others.
pub const TURN: &str = "it waits for its turn to be replaced";

/// What is said of a pod that is replaced only by an intercept that accepts a gap.
pub const GAP: &str =
    "it would be gone before its successor is there: intercept with --replace-pods, or restart it";

/// What the intercepts of a workload need.
#[derive(Clone, Debug, Default)]
pub struct Need<'a> {
    /// The present time.
    pub now: Timestamp,
    /// When the oldest intercept that is served was created; `None` if there is none.
    pub since: Option<Timestamp>,
    /// Whether a gap is accepted.
    pub gaps: bool,
    /// UIDs of pods whose agent will not do, where that of one made now would, and that have not been replaced for it before.
    pub lacking: BTreeSet<&'a str>,
    /// The intercepts that are served (see [`super::objects::Intercept::version`]).
    pub asked: BTreeSet<String>,
    /// Those and the ones that are not.
    pub present: BTreeSet<String>,
}

impl Need<'_> {
    /// Why replacing a pod need not be tried for these intercepts: because it was.
    fn tried<'b>(&self, pod: &'b Pod) -> Option<&'b str> {
        let kept = pod.kept.as_ref().filter(|kept| self.asked.is_subset(&kept.asked))?;
        Some(&kept.why)
    }
}

/// What is to be done now, and why the other pods without agents stay as they are, by UID.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Steps, which can be taken at the same time.
    pub steps: Vec<Step>,
    /// Reasons.
    pub reasons: BTreeMap<String, String>,
}

/// By how much a pod's creation may seem to be earlier than the release that it followed: a second, since creation times are whole
/// ones, and 4 s by which the API server's clock may be behind the manager's; NTP keeps them within a fraction of that.
const SKEW: SignedDuration = SignedDuration::from_secs(5);

/// When a pod was released; one that does not say so may have been for as long as it is there.
fn released_at(pod: &Pod) -> Timestamp {
    pod.released_at.unwrap_or(pod.created)
}

/// A transport and number.
pub type PortKey = (u16, Protocol);

/// The share of a workload's pods that is replaced at the same time: a quarter, as a Deployment rolls out.
fn wave(pods: usize) -> usize {
    (pods / 4).max(1)
}

impl Plan {
    /// The plan for one workload with these pods.
    #[must_use]
    pub fn new(workload: &Workload, pods: &[&Pod], need: &Need<'_>) -> Self {
        let mut plan = Self::default();
        let present: Vec<_> = pods.iter().copied().filter(|pod| !pod.leaving).collect();
        plan.finish(&present, need);
        let Some(since) = need.since else { return plan };
        let candidates: Vec<_> = present.iter().copied().filter(|pod| plan.is_candidate(pod, need)).collect();
        match workload.kind {
            WorkloadKind::Deployment => plan.release(&present, candidates, need),
            WorkloadKind::StatefulSet | WorkloadKind::DaemonSet | WorkloadKind::ReplicaSet => {
                plan.evict(workload, pods, candidates, since, need.gaps);
            }
            WorkloadKind::Pod => {
                for pod in candidates {
                    plan.explain(pod, "nothing would make it anew: delete it and create it again");
                }
            }
        }
        plan
    }

    /// Released pods are seen to their end whatever became of the intercept.
    fn finish(&mut self, present: &[&Pod], need: &Need<'_>) {
        let mut templates: BTreeMap<&Template, Vec<&Pod>> = BTreeMap::new();
        for pod in present.iter().filter(|pod| pod.released) {
            if let Some(template) = &pod.template {
                templates.entry(template).or_default().push(pod);
            }
        }
        for (template, released) in templates {
            let made = present.iter().copied().filter(|pod| !pod.released);
            let mut made: Vec<_> = made.filter(|pod| pod.template.as_ref() == Some(template)).collect();
            made.sort_by_key(|pod| std::cmp::Reverse((pod.created, &pod.uid)));
            let ready = made.iter().filter(|pod| pod.ready).count();
            // The youngest are the successors, unless the workload was scaled down meanwhile: then there are fewer, or none.
            let first = released.iter().map(|pod| released_at(pod)).min().unwrap_or_default();
            let is_younger = |pod: &&&Pod| first.duration_since(pod.created) <= SKEW;
            let successors = made.iter().take(released.len()).filter(is_younger);
            let trouble = successors.clone().filter(|pod| !pod.ready).find_map(|pod| pod.trouble.as_ref());
            // Of what was made before any of the intercepts the webhook had no reason to give it an agent.
            let is_due = |pod: &&&Pod| need.since.is_some_and(|since| since <= pod.created);
            let failed =
                successors.filter(is_due).filter(|pod| pod.entry.is_none() && pod.not_injected.is_none());
            let failed: Vec<_> = failed.copied().map(victim).collect();
            for pod in released {
                let wait = Wait {
                    waited: need.now.duration_since(released_at(pod)),
                    asked: need.present.clone(),
                    trouble: trouble.cloned(),
                };
                self.explain(pod, &wait.reason());
                let (pod, template) = (victim(pod), template.clone());
                self.steps.push(Step::Finish { pod, template, ready, failed: failed.clone(), wait });
            }
        }
    }

    /// Whether another pod in its place would be better; where not, and it has no agent, says why.
    fn is_candidate(&mut self, pod: &Pod, need: &Need<'_>) -> bool {
        if pod.released || pod.entry.is_some() && !need.lacking.contains(pod.uid.as_str()) {
            return false;
        }
        if let Some(why) = need.tried(pod) {
            self.explain(pod, why);
        } else if pod.entry.is_some() {
            return true;
        } else if pod.opted_out {
            self.explain(pod, "it is to have no agent (tpd.dev/inject: disabled)");
        } else if pod.host_network {
            self.explain(pod, "it is on its node's network, where other pods' traffic is too");
        } else if let Some(why) = &pod.not_injected {
            self.explain(pod, why);
        } else if pod.running {
            return true;
        } else {
            self.explain(pod, pod.trouble.as_deref().unwrap_or("it has no agent, and does not run"));
        }
        false
    }

    fn release(&mut self, present: &[&Pod], mut candidates: Vec<&Pod>, need: &Need<'_>) {
        let own = || present.iter().filter(|pod| !pod.released);
        let templates: BTreeSet<_> = own().map(|pod| &pod.template).collect();
        let busy = present.len() != own().count() || own().any(|pod| pod.entry.is_some() && !pod.ready);
        let hindrance = if templates.len() > 1 {
            Some("a rollout is under way; the new pods get agents by themselves".to_owned())
        } else if let Some(why) = own().find_map(|pod| pod.not_injected.as_ref()) {
            Some(format!("a pod of the same template could not be given an agent: {why}"))
        } else if let Some(why) = own().find_map(|pod| need.tried(pod)) {
            Some(format!("of a pod of the same template: {why}"))
        } else {
            busy.then(|| TURN.to_owned())
        };
        if let Some(why) = hindrance {
            candidates.iter().for_each(|pod| self.explain(pod, &why));
            return;
        }
        // Those that serve nobody first.
        candidates.sort_by_key(|pod| (pod.ready, pod.created, &pod.uid));
        let wave = wave(present.len());
        for (position, pod) in candidates.into_iter().enumerate() {
            match &pod.template {
                Some(template) if position < wave => {
                    self.explain(pod, REPLACED);
                    self.steps.push(Step::Release { pod: victim(pod), template: template.clone() });
                }
                _ => self.explain(pod, TURN),
            }
        }
    }

    fn evict(
        &mut self,
        workload: &Workload,
        all: &[&Pod],
        candidates: Vec<&Pod>,
        since: Timestamp,
        gaps: bool,
    ) {
        let busy = all.iter().any(|pod| pod.leaving || (pod.entry.is_some() && !pod.ready));
        let mut candidates: Vec<_> = candidates
            .into_iter()
            .filter(|pod| {
                // It is the successor of one that was evicted, or was made past the webhook: another would be no better.
                let young = pod.created > since && pod.entry.is_none();
                if young {
                    self.explain(
                        pod,
                        "it was made without an agent though its workload was intercepted already",
                    );
                } else if !gaps {
                    self.explain(pod, GAP);
                }
                !young && gaps
            })
            .collect();
        candidates.sort_by_key(|pod| (pod.ready, std::cmp::Reverse(&pod.name)));
        for (position, pod) in candidates.into_iter().enumerate() {
            if busy || position > 0 {
                self.explain(pod, TURN);
            } else {
                self.explain(pod, REPLACED);
                let others = all.iter().filter(|other| other.ready && other.uid != pod.uid).count();
                self.steps.push(Step::Evict { pod: victim(pod), workload: workload.clone(), others });
            }
        }
    }

    fn explain(&mut self, pod: &Pod, why: &str) {
        self.reasons.insert(pod.uid.clone(), why.to_owned());
    }
}

fn victim(pod: &Pod) -> Victim {
    Victim { namespace: pod.namespace.clone(), name: pod.name.clone(), uid: pod.uid.clone() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tpd_api::intercept::{Workload, WorkloadKind};

    use super::super::objects::{Kept, Pod, Template};
    use super::super::samples::{at, deployment, injected, pod};
    use super::{Need, Plan, Step};

    fn needed() -> Need<'static> {
        let asked: BTreeSet<_> = ["u.1".to_owned()].into();
        Need { now: at(100), since: Some(at(20)), present: asked.clone(), asked, ..Need::default() }
    }

    fn plan(pods: &[Pod]) -> Plan {
        Plan::new(&deployment(), &pods.iter().collect::<Vec<_>>(), &needed())
    }

    #[test]
    fn a_scale_down_makes_no_successor_of_an_old_pod() {
        // The successor, the youngest and not ready, was the first to go.
        let scaled = plan(&[released("old"), pod("a"), Pod { created: at(34), ..pod("b") }]);
        let [Step::Finish { failed, ready: 2, .. }] = &scaled.steps[..] else { panic!("{scaled:?}") };
        assert_eq!(failed, &[]);
        // Released in second 40 by another clock.
        let made = plan(&[released("old"), pod("a"), Pod { created: at(35), ..pod("b") }]);
        let [Step::Finish { failed, .. }] = &made.steps[..] else { panic!("{made:?}") };
        assert_eq!(failed[0].name, "b");
    }

    #[test]
    fn a_pod_that_is_older_than_the_intercepts_is_no_successor_however_young_it_is() {
        let pods = [released("old"), Pod { created: at(38), ..pod("a") }];
        let failed = |since| {
            let need = Need { since, ..needed() };
            let plan = Plan::new(&deployment(), &pods.iter().collect::<Vec<_>>(), &need);
            let [Step::Finish { failed, .. }] = &plan.steps[..] else { panic!("{plan:?}") };
            failed.len()
        };
        assert_eq!([failed(Some(at(39))), failed(None), failed(Some(at(38)))], [0, 0, 1]);
    }

    fn released(name: &str) -> Pod {
        Pod { released: true, released_at: Some(at(40)), ..pod(name) }
    }

    fn names(plan: &Plan) -> Vec<(&'static str, &str)> {
        let name = |step: &'_ Step| match step {
            Step::Release { .. } => "release",
            Step::Finish { .. } => "finish",
            Step::Evict { .. } => "evict",
        };
        plan.steps.iter().map(|step| (name(step), step.pod().name.as_str())).collect()
    }

    #[test]
    fn a_single_replica_is_released_and_evicted_once_its_successor_is_ready() {
        assert_eq!(names(&plan(&[pod("old")])), [("release", "old")]);

        let starting = Pod { ready: false, created: at(41), ..injected("new") };
        let midway = plan(&[released("old"), starting]);
        let [Step::Finish { ready: 0, failed, .. }] = &midway.steps[..] else { panic!("{midway:?}") };
        assert!(failed.is_empty());

        let ready = plan(&[released("old"), Pod { created: at(41), ..injected("new") }]);
        let [Step::Finish { ready: 1, .. }] = &ready.steps[..] else { panic!("{ready:?}") };
    }

    #[test]
    fn a_wave_is_a_quarter_and_the_next_waits_for_it() {
        let pods: Vec<_> = (0..8).map(|n| pod(&format!("p{n}"))).collect();
        let first = plan(&pods);
        assert_eq!(names(&first), [("release", "p0"), ("release", "p1")]);
        assert_eq!(first.reasons["uid-p7"], "it waits for its turn to be replaced");

        let mut midway = pods.clone();
        midway[0].released = true;
        assert_eq!(names(&plan(&midway)), [("finish", "p0")]);

        let mut after: Vec<_> = pods[2..].to_vec();
        after.extend([injected("n0"), Pod { ready: false, ..injected("n1") }]);
        assert_eq!(names(&plan(&after)), [], "a successor is not ready yet");
    }

    #[test]
    fn what_a_crashed_leader_released_is_finished_even_if_nobody_intercepts_any_more() {
        let pods = [released("old"), injected("new")];
        let plan = Plan::new(&deployment(), &pods.iter().collect::<Vec<_>>(), &Need::default());
        assert_eq!(names(&plan), [("finish", "old")]);
    }

    #[test]
    fn without_an_intercept_nothing_is_replaced() {
        let pods = [pod("a"), pod("b")];
        let plan = Plan::new(&deployment(), &pods.iter().collect::<Vec<_>>(), &Need::default());
        assert_eq!(plan, Plan::default());
    }

    #[test]
    fn a_successor_without_an_agent_ends_the_replacing() {
        let successor = Pod { created: at(41), ..pod("new") };
        let plan_midway = plan(&[released("old"), pod("other"), successor.clone()]);
        let [Step::Finish { failed, ready: 2, .. }] = &plan_midway.steps[..] else { panic!() };
        assert_eq!(failed[0].name, "new");

        let marked = Pod { not_injected: Some("it came without".into()), ..successor };
        let after = plan(&[pod("other"), marked]);
        assert_eq!(after.steps, []);
        assert_eq!(
            after.reasons["uid-other"],
            "a pod of the same template could not be given an agent: it came without"
        );
        assert_eq!(after.reasons["uid-new"], "it came without");
    }

    #[test]
    fn who_waits_says_how_long_and_for_what() {
        let trouble = Some("the image of the agent cannot be pulled: no such image".to_owned());
        let starting = Pod { ready: false, created: at(50), trouble, ..injected("new") };
        let midway = plan(&[released("old"), starting.clone()]);
        assert!(
            midway.reasons["uid-old"]
                .ends_with("to be ready: the image of the agent cannot be pulled: no such image")
        );
        let [Step::Finish { wait, .. }] = &midway.steps[..] else { panic!("{midway:?}") };
        assert_eq!((wait.waited.as_secs(), wait.asked.len()), (60, 1));

        let pods = [released("old"), starting];
        let over = Need { now: at(100), ..Need::default() };
        let over = Plan::new(&deployment(), &pods.iter().collect::<Vec<_>>(), &over);
        let [Step::Finish { wait, .. }] = &over.steps[..] else { panic!("{over:?}") };
        assert!(wait.asked.is_empty());
    }

    #[test]
    fn what_was_given_back_is_not_tried_again_before_an_intercept_is_new() {
        let kept = Kept { why: "in vain".into(), asked: ["u.1".to_owned()].into() };
        let pods = [Pod { kept: Some(kept), ..pod("old") }, pod("other")];
        let again = plan(&pods);
        assert_eq!(again.steps, []);
        assert_eq!(again.reasons["uid-old"], "in vain");
        assert_eq!(again.reasons["uid-other"], "of a pod of the same template: in vain");

        let changed = Need { asked: ["u.1".to_owned(), "u.2".to_owned()].into(), ..needed() };
        let changed = Plan::new(&deployment(), &pods.iter().collect::<Vec<_>>(), &changed);
        assert_eq!(names(&changed), [("release", "old")]);
    }

    #[test]
    fn a_rollout_is_left_to_itself() {
        let template = Some(Template { replica_set: "web-2".into(), hash: "2".into() });
        let plan = plan(&[pod("old"), Pod { template, ..injected("new") }]);
        assert_eq!(plan.steps, []);
        assert!(plan.reasons["uid-old"].contains("rollout"));
    }

    #[test]
    fn who_is_to_have_no_agent_is_left_alone() {
        let plan = plan(&[
            Pod { opted_out: true, ..pod("out") },
            Pod { host_network: true, ..pod("host") },
            Pod { running: false, ready: false, ..pod("pending") },
            Pod { leaving: true, ..pod("leaving") },
        ]);
        assert_eq!(plan.steps, []);
        assert_eq!(plan.reasons.len(), 3);
    }

    #[test]
    fn a_stateful_set_needs_a_yes_and_goes_one_by_one() {
        let set = Workload { kind: WorkloadKind::StatefulSet, name: "db".into() };
        let mut pods = vec![pod("db-0"), pod("db-1")];
        let made = |pods: &[Pod], gaps| {
            Plan::new(&set, &pods.iter().collect::<Vec<_>>(), &Need { gaps, ..needed() })
        };
        let without = made(&pods, false);
        assert_eq!(without.steps, []);
        assert!(without.reasons["uid-db-0"].contains("--replace-pods"));
        assert_eq!(names(&made(&pods, true)), [("evict", "db-1")]);

        pods[1].leaving = true;
        assert_eq!(names(&made(&pods, true)), []);
        pods[1] = Pod { ready: false, ..injected("db-1") };
        assert_eq!(names(&made(&pods, true)), []);
        pods[1] = injected("db-1");
        assert_eq!(names(&made(&pods, true)), [("evict", "db-0")]);
        pods[0].created = at(30);
        let looped = made(&pods, true);
        assert_eq!(looped.steps, [], "a successor without an agent is not replaced");
        assert!(looped.reasons["uid-db-0"].contains("intercepted already"));
    }

    #[test]
    fn a_bare_pod_stays() {
        let bare = Workload { kind: WorkloadKind::Pod, name: "shell".into() };
        let pod = pod("shell");
        let plan = Plan::new(&bare, &[&pod], &Need { gaps: true, ..needed() });
        assert_eq!(plan.steps, []);
        assert!(plan.reasons.contains_key("uid-shell"));
    }

    #[test]
    fn a_pod_whose_agent_will_not_do_is_replaced_too() {
        let (old, lacking) = (injected("old"), ["uid-old"].into());
        let plan = Plan::new(&deployment(), &[&old], &Need { lacking, ..needed() });
        assert_eq!(names(&plan), [("release", "old")]);
    }
}
