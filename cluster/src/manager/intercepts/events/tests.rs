use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::runtime::watcher::Event;
use tpd_api::intercept::{
    FoundPort, InterceptStatus, Mode, PodStatus, Protocol, State, Workload, WorkloadKind,
};

use super::super::evict::Outcome;
use super::super::expire::End;
use super::super::objects::{Intercept, Pod};
use super::super::replace::{Step, TURN, UNNEEDED, Victim};
use super::super::samples::{at, deployment, header, injected, intercept, pod};
use super::super::world::{Change, Step as Watched, World};
use super::{Cause, Entry, Kind, Roll, of_status};

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Condition {
    Condition {
        type_: kind.into(),
        status: status.into(),
        reason: reason.into(),
        message: message.into(),
        observed_generation: None,
        last_transition_time: Time(at(0)),
    }
}

fn status(state: State) -> InterceptStatus {
    let port = FoundPort { port: 8080, name: None, container: None, protocol: Protocol::Tcp };
    InterceptStatus { state, ports: vec![port], ..InterceptStatus::default() }
}

fn refused(reason: &str, message: &str) -> InterceptStatus {
    InterceptStatus {
        conditions: vec![condition("Accepted", "False", reason, message)],
        ..status(State::Waiting)
    }
}

/// What is told where one status becomes another.
fn told(last: Option<InterceptStatus>, next: &InterceptStatus) -> Vec<Entry> {
    of_status(&Intercept { status: last, ..intercept("a") }, next)
}

fn reasons(entries: &[Entry]) -> Vec<(&'static str, bool)> {
    entries.iter().map(|entry| (entry.reason, entry.is_warning)).collect()
}

#[test]
fn each_state_is_told_once_and_counts_never() {
    let (none, waiting, active) = (status(State::NoAgent), status(State::Waiting), status(State::Active));
    assert_eq!(reasons(&told(None, &none)), [("NoAgent", false)]);
    assert_eq!(reasons(&told(Some(none.clone()), &waiting)), [("Waiting", false)]);
    assert_eq!(reasons(&told(Some(waiting), &active)), [("Active", false), ("Intercepted", false)]);
    let mut later = active.clone();
    (later.counts.acknowledged, later.traffic.to_laptop) = (3, 900);
    assert_eq!(told(Some(active), &later), []);
    assert_eq!(told(Some(none.clone()), &none), []);
}

#[test]
fn an_intercept_that_falls_back_is_worth_a_look() {
    let mut waiting = status(State::Waiting);
    waiting.conditions = vec![condition("Connected", "False", "NotCarried", "the laptop is not heard")];
    let entries = told(Some(status(State::Active)), &waiting);
    assert_eq!(reasons(&entries), [("Waiting", true)]);
    assert!(entries[0].note.ends_with("none hands traffic over: the laptop is not heard"), "{entries:?}");
    assert_eq!(reasons(&told(Some(waiting), &status(State::NoAgent))), [("NoAgent", true)]);
}

#[test]
fn what_goes_to_a_laptop_is_told_on_the_workload_with_whose_it_is() {
    let entries = told(None, &status(State::Active));
    let on_workload = &entries[1];
    assert_eq!(on_workload.about.kind, Kind::Workload(WorkloadKind::Deployment));
    assert_eq!(
        on_workload.note,
        "Agents hand all traffic of port 8080 over to the laptop for Intercept shop/a of alice"
    );
    let mut filtered = intercept("a");
    (filtered.spec.filter, filtered.spec.mode) = (header("dev"), Mode::Wiretap);
    let note = &of_status(&filtered, &status(State::Active))[0].note;
    assert!(note.contains("a copy of what its filter matches of port 8080"), "{note}");
}

#[test]
fn a_refusal_is_told_once_and_so_is_its_end() {
    let conflict = refused("Conflict", "bob has intercept b");
    let entries = told(None, &conflict);
    assert_eq!(reasons(&entries), [("NotAccepted", true)]);
    assert_eq!(entries[0].note, "It is not served: bob has intercept b");
    let mut later = conflict.clone();
    later.state = State::NoAgent;
    assert_eq!(told(Some(conflict.clone()), &later), []);
    let other = refused("NoSuchPort", "there is no port 9");
    assert_eq!(reasons(&told(Some(conflict.clone()), &other)), [("NotAccepted", true)]);
    assert_eq!(reasons(&told(Some(conflict), &status(State::Waiting))), [("Waiting", false)]);
    assert_eq!(told(Some(status(State::Active)), &refused("Expired", "its time is over")), []);
}

fn with_pods(reasons: &[(&str, &str)]) -> InterceptStatus {
    let row = |(name, reason): &(&str, &str)| PodStatus {
        name: (*name).into(),
        reason: Some((*reason).into()),
        ..PodStatus::default()
    };
    InterceptStatus { pods: reasons.iter().map(row).collect(), ..status(State::NoAgent) }
}

#[test]
fn pods_that_get_no_agent_are_told_by_their_reasons() {
    let replaced = with_pods(&[("web-1", "it is being replaced"), ("web-2", TURN)]);
    assert_eq!(reasons(&told(None, &replaced)), [("NoAgent", false)]);
    let host = "it is on its node's network";
    let left = with_pods(&[("web-1", host), ("web-2", "the quota is full"), ("web-3", host)]);
    let entries = told(Some(replaced), &left);
    assert_eq!(reasons(&entries), [("PodWithoutAgent", true); 2]);
    assert_eq!(entries[0].note, "Pod web-1 and 1 more have no agents: it is on its node's network");
    assert_eq!(entries[1].note, "Pod web-2 has no agent: the quota is full");
    let scaled = with_pods(&[("web-1", host), ("web-4", host), ("web-2", "the quota is full")]);
    assert_eq!(told(Some(left), &scaled), []);
    let each: Vec<_> = (0..50).map(|pod| (format!("web-{pod}"), format!("reason {pod}"))).collect();
    let each: Vec<_> = each.iter().map(|(pod, why)| (pod.as_str(), why.as_str())).collect();
    assert_eq!(told(Some(status(State::NoAgent)), &with_pods(&each)).len(), 4);
}

fn victim(name: &str) -> Victim {
    Victim { namespace: "shop".into(), name: name.into(), uid: format!("uid-{name}") }
}

fn release(name: &str) -> Step {
    Step::Release { pod: victim(name), template: pod(name).template.unwrap() }
}

/// Why a step is taken with a pod while there are these intercepts with these statuses.
fn cause(step: &Step, pod: Pod, intercepts: &[(Intercept, InterceptStatus)]) -> Cause {
    let mut world = World::default();
    let mut statuses = BTreeMap::new();
    for (intercept, status) in intercepts {
        let key = format!("shop/{}", intercept.name);
        let event = Event::Apply((key.clone(), intercept.clone()));
        world.apply(Change { revision: 1, step: Watched::Intercept(Box::new(event)) });
        statuses.insert(key, status.clone());
    }
    let event = Event::Apply((format!("shop/{}", pod.name), pod));
    world.apply(Change { revision: 1, step: Watched::Pod(Box::new(event)) });
    Cause::of(step, &world, &statuses, Some("1"))
}

#[test]
fn a_pod_and_its_workload_say_for_whom_it_is_replaced() {
    let served = (intercept("a"), status(State::NoAgent));
    let foreign = (intercept("b"), refused("Conflict", "alice has it"));
    let mut elsewhere = intercept("c");
    elsewhere.spec.workload.name = "other".into();
    let intercepts = [served, foreign, (elsewhere, status(State::NoAgent))];
    let entries = cause(&release("web-1"), pod("web-1"), &intercepts).entries(&Outcome::Released);
    assert_eq!(reasons(&entries), [("PodReleased", false); 2]);
    let [on_pod, on_workload] = &entries[..] else { panic!("{entries:?}") };
    assert_eq!(
        on_pod.note,
        "Pod web-1: replaced by tpd for Intercept shop/a of alice: it needs an agent; it serves until its successor is ready"
    );
    assert_eq!(on_workload.note, on_pod.note);
    assert_eq!(on_pod.about.uid.as_deref(), Some("uid-web-1"));
    assert_eq!(on_pod.related.as_ref().unwrap().name, "a");
    assert_eq!(on_workload.about.kind, Kind::Workload(WorkloadKind::Deployment));
    assert_eq!(on_workload.related.as_ref(), Some(&on_pod.about));
}

#[test]
fn what_a_pod_lacks_is_told() {
    let note = |pod: Pod| {
        let cause = cause(&release("web-1"), pod, &[(intercept("a"), status(State::NoAgent))]);
        cause.entries(&Outcome::Evicted)[0].note.clone()
    };
    let of =
        |installation: Option<&str>| Pod { installation: installation.map(Into::into), ..injected("web-1") };
    assert!(note(pod("web-1")).contains(": it needs an agent; its successor is ready"));
    assert!(note(of(Some("0"))).contains("an earlier installation"));
    assert!(note(of(Some("1"))).contains("not in the path"));
    assert!(note(of(None)).contains("not in the path"));
}

#[test]
fn a_pod_that_leaves_a_gap_says_so() {
    let set = Workload { kind: WorkloadKind::StatefulSet, name: "db".into() };
    let mut asked = intercept("a");
    asked.spec.workload = set.clone();
    let step = Step::Evict { pod: victim("db-0"), workload: set.clone(), others: 2 };
    let cause = cause(&step, Pod { workload: Some(set), ..pod("db-0") }, &[(asked, status(State::NoAgent))]);
    let entries = cause.entries(&Outcome::Evicted);
    assert!(entries[0].note.ends_with("its successor comes once it is gone"), "{entries:?}");
    assert_eq!(entries[1].about.kind, Kind::Workload(WorkloadKind::StatefulSet));
}

#[test]
fn what_becomes_of_a_pod_in_the_end_is_told() {
    let over = cause(&release("web-1"), pod("web-1"), &[]);
    let entries = over.entries(&Outcome::GivenBack(UNNEEDED.into()));
    assert_eq!(reasons(&entries), [("PodGivenBack", false); 2]);
    assert!(entries[0].note.contains("for an Intercept that is over: nobody intercepts"), "{entries:?}");

    let several: Vec<_> = ["a", "b", "c", "d"].map(|name| (intercept(name), status(State::NoAgent))).into();
    let cause = cause(&release("web-1"), pod("web-1"), &several);
    let entries = cause.entries(&Outcome::GivenBack("no successor was ready".into()));
    assert_eq!(reasons(&entries), [("PodGivenBack", true); 2]);
    let whom = "Intercepts shop/a of alice, shop/b of alice, shop/c of alice and 1 more:";
    assert!(entries[0].note.contains(whom), "{entries:?}");
    assert_eq!(reasons(&cause.entries(&Outcome::Deleted))[0], ("PodDeleted", false));
    let kept = cause.entries(&Outcome::NotYet("it cannot be evicted yet: no".into()));
    assert_eq!(reasons(&kept), [("PodKept", true); 2]);
    assert_eq!(cause.entries(&Outcome::NotYet(TURN.into())), []);
}

#[test]
fn an_intercept_that_is_gone_is_told_once_with_why() {
    let all = [intercept("a"), intercept("b"), intercept("c")];
    let mut roll = Roll::default();
    assert_eq!(roll.follow(all.iter()), []);
    assert_eq!(roll.follow(all.iter()), []);
    roll.ends("uid-a", End::Expired);
    assert_eq!(roll.follow(all.iter()), [], "it is not gone yet");
    let entries = roll.follow(all[2..].iter());
    let reasons: Vec<_> = entries.iter().map(|entry| entry.reason).collect();
    assert_eq!(reasons, ["Expired", "InterceptEnded", "Ended", "InterceptEnded"]);
    assert_eq!(entries[1].note, "Intercept shop/a of alice is over: its time is over");
    assert_eq!(entries[1].about.name, deployment().name);
    assert_eq!(roll.follow(all[2..].iter()), []);
    roll.forget();
    assert_eq!(roll.follow([].iter()), [], "another replica tells of it");
}
