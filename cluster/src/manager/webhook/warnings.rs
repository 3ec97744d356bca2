//! What somebody is told who may make an intercept: what it takes, and what becomes of the pods that cannot take part as they are.
//!
//! The API server hands it to whoever asked (kubectl shows it as `Warning:`). `tpd intercept` asks by a dry run before it changes
//! anything, so a developer need not have the right to see pods.

use std::collections::BTreeMap;

use tpd_api::intercept::{InterceptSpec, Mode, RESTARTED, UNDER_WAY, Workload, WorkloadKind};

use super::judge::Change;
use crate::manager::intercepts::objects::shortened;
use crate::manager::intercepts::replace::{GAP, REPLACED, TURN};
use crate::manager::intercepts::track::outlook::{Fault, Outlook, Unfit};

/// Longest warning, characters: that much is always left of each where an API server shortens them.
const LONGEST: usize = 256;

/// Most warnings of one intercept: all together stay below the 4096 characters that an API server hands on. Those about pods
/// that are replaced come first; the status of the intercept says of every pod what is the matter with it.
const MOST: usize = 8;

/// Most pods that are named: as many as fit in a line beside the rest of the sentence.
const NAMED: usize = 5;

/// What becomes of pods, those first that are changed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// Each is replaced once its successor is ready.
    Replaced,
    /// Each is gone until its successor is ready.
    Restarted,
    /// The same would be done if the intercept said so.
    Restartable,
    /// Their Deployment bears no two pods at a time.
    Alone,
    /// Nothing, or nothing that the intercept is the cause of.
    Left(String),
}

impl Fate {
    /// Whether pods have no part in the intercept unless somebody does something.
    fn is_out(&self) -> bool {
        match self {
            Self::Replaced | Self::Restarted => false,
            Self::Restartable | Self::Alone => true,
            Self::Left(why) => !UNDER_WAY.iter().any(|way| why.starts_with(way)),
        }
    }
}

/// The warnings. `stands_alone` tells of a Deployment that starts no pod beside an old one.
#[must_use]
pub fn of(change: &Change, outlook: &Outlook, stands_alone: bool) -> Vec<String> {
    let spec = &change.asked.spec;
    let takes_all = |spec: &InterceptSpec| spec.filter.is_empty() && spec.mode == Mode::Intercept;
    let took_all = change
        .before
        .as_ref()
        .is_some_and(|before| takes_all(&before.spec) && before.spec.workload == spec.workload);
    let mut said = Vec::new();
    if takes_all(spec) && !took_all && outlook.pods > 0 {
        said.push(everything(&change.namespace, spec, outlook.pods));
    }
    let mut groups: BTreeMap<(Fate, Fault), Vec<&str>> = BTreeMap::new();
    for pod in &outlook.unfit {
        let fate = fate(pod, spec.workload.kind, stands_alone);
        groups.entry((fate, pod.fault)).or_default().push(&pod.pod);
    }
    let everybody = !groups.is_empty() && outlook.unfit.len() == outlook.pods;
    if everybody && groups.keys().all(|(fate, _)| fate.is_out()) {
        said.push(spec.workload.without_agents());
    }
    said.extend(groups.iter().map(|((fate, fault), pods)| {
        sentence(&who(pods.len(), *fault), pods, &outcome(fate, &change.namespace, &spec.workload))
    }));
    said.truncate(MOST);
    said
}

fn everything(namespace: &str, spec: &InterceptSpec, pods: usize) -> String {
    let named: Vec<_> = spec.ports.iter().filter_map(|port| port.port.as_deref()).collect();
    let ports = if named.is_empty() { "the port".to_owned() } else { format!("port {}", named.join(", ")) };
    cut(format!(
        "this takes all traffic to {ports} of {}, {} in namespace {namespace}; --header and others (spec.filter) take a part",
        spec.workload,
        count(pods)
    ))
}

fn fate(pod: &Unfit, kind: WorkloadKind, stands_alone: bool) -> Fate {
    let why = pod.why.as_str();
    match kind {
        _ if why == GAP => Fate::Restartable,
        _ if !why.starts_with(REPLACED) && why != TURN => Fate::Left(shortened(why)),
        WorkloadKind::Deployment if stands_alone => Fate::Alone,
        WorkloadKind::Deployment => Fate::Replaced,
        _ => Fate::Restarted,
    }
}

fn who(pods: usize, fault: Fault) -> String {
    let pods = count(pods);
    match fault {
        Fault::NoAgent => format!("{pods} without an agent"),
        Fault::Stranger => format!("{pods} with an agent of an earlier installation of tpd"),
        Fault::Port(port) => format!("{pods} with an agent that port {port} does not lead to"),
    }
}

fn outcome(fate: &Fate, namespace: &str, workload: &Workload) -> String {
    match fate {
        Fate::Replaced => " will be replaced, each once its successor is ready".to_owned(),
        Fate::Restarted => format!(" {RESTARTED} one by one; each is gone until its successor is ready"),
        Fate::Restartable => {
            " will take no part: only with --replace-pods (spec.replacePods) they are restarted one by one"
                .to_owned()
        }
        Fate::Alone => format!(
            " will take no part until you restart them (strategy Recreate): kubectl -n {namespace} rollout restart {workload}"
        ),
        Fate::Left(why) => format!(": {why}"),
    }
}

/// A sentence about pods, with as many of their names as fit.
fn sentence(who: &str, pods: &[&str], outcome: &str) -> String {
    let with = |named: usize| {
        let names = pods[..named].join(", ");
        match pods.len() - named {
            _ if named == 0 => format!("{who}{outcome}"),
            0 => format!("{who} ({names}){outcome}"),
            more => format!("{who} ({names} and {more} more){outcome}"),
        }
    };
    let most = pods.len().min(NAMED);
    let fitting = (1..=most).rev().map(with).find(|sentence| sentence.chars().count() <= LONGEST);
    fitting.unwrap_or_else(|| cut(with(0)))
}

fn cut(text: String) -> String {
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some(_) => text.chars().take(LONGEST - 1).chain(['…']).collect(),
    }
}

fn count(pods: usize) -> String {
    format!("{pods} pod{}", if pods == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};
    use tpd_api::intercept::Intercept;

    use super::*;

    fn intercept(changes: &Value) -> Intercept {
        let mut spec = json!({
            "owner": "alice", "session": "alice-1", "workload": { "name": "web" },
            "ports": [{ "port": "http", "overlayPort": 2000 }], "filter": { "paths": ["/"] },
        });
        spec.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let metadata = json!({ "name": "mine", "namespace": "shop" });
        from_value(json!({ "apiVersion": "tpd.dev/v1alpha1", "kind": "Intercept", "metadata": metadata, "spec": spec })).unwrap()
    }

    fn change(changes: Value) -> Change {
        Change { namespace: "shop".into(), asked: intercept(&changes), before: None }
    }

    fn unfit(pod: &str, fault: Fault, why: &str) -> Unfit {
        Unfit { pod: pod.into(), fault, why: why.into() }
    }

    fn lonely(pods: usize, why: &str) -> Outlook {
        let unfit = (0..pods).map(|index| unfit(&format!("web-{index}"), Fault::NoAgent, why));
        Outlook { pods, unfit: unfit.collect() }
    }

    #[test]
    fn taking_everything_is_said_once() {
        let pods = Outlook { pods: 2, unfit: Vec::new() };
        let all = json!({ "filter": {} });
        let said = of(&change(all.clone()), &pods, false);
        assert_eq!(
            said,
            [
                "this takes all traffic to port http of deployment/web, 2 pods in namespace shop; --header and others (spec.filter) take a part"
            ]
        );
        let since = |before: &Value| Change { before: Some(intercept(before)), ..change(all.clone()) };
        assert!(of(&since(&all), &pods, false).is_empty());
        assert_eq!(of(&since(&json!({})), &pods, false), said, "it has lost its filter");
        for other in [json!({}), json!({ "filter": {}, "mode": "Wiretap" })] {
            assert!(of(&change(other), &pods, false).is_empty());
        }
        assert!(of(&change(all), &Outlook::default(), false).is_empty());
    }

    #[test]
    fn pods_that_are_replaced_are_named() {
        let outlook = Outlook {
            pods: 9,
            unfit: vec![
                unfit("web-a", Fault::NoAgent, REPLACED),
                unfit("web-b", Fault::NoAgent, TURN),
                unfit("web-c", Fault::Stranger, TURN),
                unfit("web-d", Fault::Port(9000), TURN),
            ],
        };
        assert_eq!(
            of(&change(json!({})), &outlook, false),
            [
                "2 pods without an agent (web-a, web-b) will be replaced, each once its successor is ready",
                "1 pod with an agent of an earlier installation of tpd (web-c) will be replaced, each once its successor is ready",
                "1 pod with an agent that port 9000 does not lead to (web-d) will be replaced, each once its successor is ready",
            ]
        );
        let many = of(&change(json!({})), &lonely(7, TURN), false);
        assert!(many[0].contains("(web-0, web-1, web-2, web-3, web-4 and 2 more)"), "{many:?}");
    }

    #[test]
    fn what_is_felt_is_said_to_be() {
        let stateful = |more: Value| {
            let mut changes = json!({ "workload": { "kind": "StatefulSet", "name": "web" } });
            changes.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            change(changes)
        };
        assert_eq!(
            of(&stateful(json!({ "replacePods": true })), &lonely(1, TURN), false),
            [
                "1 pod without an agent (web-0) will be restarted one by one; each is gone until its successor is ready"
            ]
        );
        let only = "1 pod without an agent (web-0) will take no part: only with --replace-pods (spec.replacePods) they are \
                    restarted one by one";
        assert_eq!(
            of(&stateful(json!({})), &lonely(1, GAP), false),
            ["no pod of statefulset/web has an agent that this traffic would come to", only]
        );
        let one_of_two = Outlook { pods: 2, ..lonely(1, GAP) };
        assert_eq!(of(&stateful(json!({})), &one_of_two, false), [only]);
    }

    #[test]
    fn what_stays_as_it_is_is_said_to() {
        let said = of(&change(json!({})), &lonely(2, REPLACED), true);
        assert_eq!(
            said[1],
            "2 pods without an agent (web-0, web-1) will take no part until you restart them (strategy Recreate): kubectl -n \
             shop rollout restart deployment/web"
        );
        let bare = change(json!({ "workload": { "kind": "Pod", "name": "web" } }));
        let said = of(&bare, &lonely(1, "nothing would make it anew: delete it and create it again"), false);
        assert_eq!(said[0], bare.asked.spec.workload.without_agents());
        assert!(said[1].ends_with("(web-0): nothing would make it anew: delete it and create it again"));
    }

    #[test]
    fn warnings_are_never_longer_than_is_handed_on() {
        let name = "x".repeat(253);
        let why = "is it\nso? ".repeat(80);
        let unfit = |index: usize| unfit(&name, Fault::NoAgent, &format!("{index} {why}"));
        let outlook = Outlook { pods: 40, unfit: (0..40).map(unfit).collect() };
        let workload = json!({ "workload": { "name": name }, "filter": {} });
        let said = of(&change(workload), &outlook, true);
        assert_eq!(said.len(), MOST);
        assert!(said.iter().all(|warning| !warning.contains('\n')));
        // That of the workload itself has its name, and nothing else that is long.
        assert!(said.iter().map(|warning| warning.chars().count()).sum::<usize>() < 4096);
    }
}
