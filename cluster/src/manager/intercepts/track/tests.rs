//! The states and the scaling of an intercept, as one workload goes through them.

use std::sync::Arc;
use std::time::Duration;

use kube::runtime::watcher::Event;
use tpd_api::agent::{Config, Entry, Hello, InterceptReport, MAX_SIBLINGS, Mode, Report, TakenPort};
use tpd_api::intercept::{InterceptStatus, State, Workload, WorkloadKind};
use tpd_api::overlay::{DEFAULT_POOL_V4, DEFAULT_POOL_V6, DualAddress, gateway};
use tpd_netstack::key::PublicKey;
use tpd_netstack::server::Pair;

use super::super::configure::Facts;
use super::super::objects::{Intercept, Pod, Service, Target};
use super::super::replace::{GAP, REPLACED, Step as Replace, TURN};
use super::super::samples::{at, header, injected, intercept, pod, service};
use super::super::sessions::Sessions;
use super::super::world::{Change, Known, Laptop, Step};
use super::outlook::{Fault, Unfit};
use super::{Survey, Tracker};
use crate::manager::agents::token::Identity;

/// A cluster with Alice's laptop in it, and one Service of the pods.
struct Scene {
    tracker: Tracker,
    revision: u64,
    keys: u8,
}

const LAPTOP: &str = "fd74:7064::2";

impl Scene {
    fn new() -> Self {
        let gateway = gateway(DEFAULT_POOL_V4, DEFAULT_POOL_V6);
        let facts = Facts {
            key: PublicKey([255; 32]),
            gateway: gateway.ipv6,
            udp: "10.0.0.9:51820".parse().unwrap(),
            stream: "10.0.0.9:8443".parse().unwrap(),
            zone: "cluster.local".into(),
        };
        let mut tracker = Tracker::new(facts, Sessions::new(DEFAULT_POOL_V6));
        let address = DualAddress { ipv4: "100.127.0.2".parse().unwrap(), ipv6: LAPTOP.parse().unwrap() };
        let laptop =
            Laptop { owner: "alice".into(), address: Some(address), keys: vec![PublicKey([254; 32])] };
        tracker.known = Known { laptops: Some([("alices".to_owned(), laptop)].into()), ..Known::default() };
        tracker.carried = [LAPTOP.parse().unwrap()].into();
        let mut scene = Self { tracker, revision: 0, keys: 0 };
        for step in [
            Step::Intercept(Box::new(Event::InitDone)),
            Step::Pod(Box::new(Event::InitDone)),
            Step::Service(Event::InitDone),
            Step::Slice(Event::InitDone),
        ] {
            scene.apply(step);
        }
        scene.service(service("web", 80, Target::Name("http".into())));
        scene
    }

    fn apply(&mut self, step: Step) {
        self.revision += 1;
        self.tracker.world.apply(Change { revision: self.revision, step });
    }

    fn pod(&mut self, pod: Pod) {
        self.apply(Step::Pod(Box::new(Event::Apply((format!("shop/{}", pod.name), pod)))));
    }

    fn service(&mut self, service: Service) {
        self.apply(Step::Service(Event::Apply((format!("shop/{}", service.name), service))));
    }

    fn intercept(&mut self, intercept: Intercept) {
        let key = format!("shop/{}", intercept.name);
        self.apply(Step::Intercept(Box::new(Event::Apply((key, intercept)))));
    }

    /// The agent of a pod connects.
    fn join(&mut self, pod: &str) {
        self.keys += 1;
        let identity = Identity { namespace: "shop".into(), pod: pod.into(), uid: format!("uid-{pod}") };
        let hello = Hello {
            version: "1".into(),
            public_key: PublicKey([self.keys; 32]).to_string(),
            entry: Entry::Redirect,
        };
        self.tracker.sessions.join(identity, self.keys.into(), &hello, |_| false).unwrap();
    }

    fn leave(&mut self, pod: &str) {
        let uid = format!("uid-{pod}");
        let connection = self.tracker.sessions.get(&uid).unwrap().connection;
        self.tracker.sessions.leave(&uid, connection).unwrap();
    }

    /// A pod with an agent that acknowledges all it is told.
    fn grown(&mut self, pod: &str) {
        self.pod(injected(pod));
        self.join(pod);
        self.survey();
        self.acknowledge(pod);
    }

    /// The pod is deleted, and its agent goes with it.
    fn shrunk(&mut self, pod: &str) {
        self.apply(Step::Pod(Box::new(Event::Delete((format!("shop/{pod}"), injected(pod))))));
        self.leave(pod);
    }

    fn acknowledge(&mut self, pod: &str) {
        let config = self.config(pod);
        let intercepts = config.intercepts.iter().map(|intercept| InterceptReport {
            uid: intercept.uid.clone(),
            generation: intercept.generation,
            acknowledged: true,
            ..InterceptReport::default()
        });
        let report = Report { generation: 1, intercepts: intercepts.collect(), held: vec![] };
        let uid = format!("uid-{pod}");
        let connection = self.tracker.sessions.get(&uid).unwrap().connection;
        self.tracker.sessions.report(&uid, connection, report);
    }

    fn survey(&mut self) -> Survey {
        self.tracker.survey(at(100))
    }

    fn status(&mut self) -> InterceptStatus {
        self.survey().statuses["shop/a"].clone()
    }

    fn state(&mut self) -> (State, u32, u32) {
        let status = self.status();
        (status.state, status.counts.ready, status.counts.acknowledged)
    }

    fn config(&self, pod: &str) -> Arc<Config> {
        let agent = self.tracker.sessions.get(&format!("uid-{pod}")).unwrap();
        Arc::clone(agent.config.as_ref().expect("it was told something"))
    }
}

#[test]
fn from_nothing_to_active() {
    let mut scene = Scene::new();
    scene.intercept(intercept("a"));
    assert_eq!(scene.state(), (State::NoAgent, 0, 0));
    scene.pod(Pod { ready: false, running: false, ..injected("p1") });
    assert_eq!(scene.status().pods[0].reason.as_deref(), Some("it is starting"));
    scene.join("p1");
    assert_eq!(scene.state(), (State::Waiting, 0, 0));
    scene.acknowledge("p1");
    assert_eq!(scene.state(), (State::Waiting, 0, 0), "a pod that is not ready gets no traffic");
    scene.pod(injected("p1"));
    assert_eq!(scene.state(), (State::Active, 1, 1));
    let covered = &scene.status().conditions[2];
    assert_eq!((covered.type_.as_str(), covered.status.as_str()), ("Covered", "True"));
}

#[test]
fn an_agent_that_is_there_already_goes_to_active_at_once() {
    let mut scene = Scene::new();
    scene.grown("p1");
    scene.intercept(intercept("a"));
    let survey = scene.survey();
    assert_eq!(survey.configs.len(), 1);
    scene.acknowledge("p1");
    assert_eq!(scene.state(), (State::Active, 1, 1));
}

#[test]
fn scaling_from_three_to_four_to_two_to_one_stays_active() {
    let mut scene = Scene::new();
    scene.intercept(intercept("a"));
    ["p1", "p2", "p3"].into_iter().for_each(|pod| scene.grown(pod));
    assert_eq!(scene.state(), (State::Active, 3, 3));

    scene.pod(injected("p4"));
    assert_eq!(scene.state(), (State::Active, 4, 3));
    scene.join("p4");
    let survey = scene.survey();
    let told = &survey.configs.iter().find(|(uid, _)| uid == "uid-p4").unwrap().1;
    assert_eq!(told.intercepts[0].uid, "uid-a", "the newcomer has the intercept in its first configuration");
    scene.acknowledge("p4");
    assert_eq!(scene.state(), (State::Active, 4, 4));

    for (pod, left) in [("p4", 3), ("p3", 2), ("p2", 1)] {
        scene.shrunk(pod);
        assert_eq!(scene.state(), (State::Active, left, left));
    }
    scene.shrunk("p1");
    assert_eq!(scene.state(), (State::NoAgent, 0, 0));
}

#[test]
fn what_is_under_way_passes_the_hub_although_its_intercept_has_ended() {
    let mut scene = Scene::new();
    scene.intercept(intercept("a"));
    scene.grown("p1");
    let pair = scene.survey().pairs.remove(0);
    let uid = "uid-p1";
    let connection = scene.tracker.sessions.get(uid).unwrap().connection;
    let report = Report {
        held: vec![(pair.laptop, pair.ports[0]).into(), (pair.laptop, 1).into()],
        ..Report::default()
    };
    scene.tracker.sessions.report(uid, connection, report);
    scene.apply(Step::Intercept(Box::new(Event::Delete(("shop/a".into(), intercept("a"))))));
    let mut pairs = |now| scene.tracker.survey(at(now)).pairs;
    let lingering = [Pair { services: vec![], ..pair }];
    assert_eq!(pairs(120), lingering);
    assert_eq!(pairs(140), lingering);
    scene.leave("p1");
    let mut pairs = |now| scene.tracker.survey(at(now)).pairs;
    assert_eq!(pairs(169), lingering, "the agent may be back");
    assert_eq!(pairs(170), []);
}

#[test]
fn every_agent_has_the_same_intercept_and_its_own_way_through_the_hub() {
    let mut scene = Scene::new();
    scene.intercept(intercept("a"));
    ["p1", "p2"].into_iter().for_each(|pod| scene.grown(pod));
    let survey = scene.survey();
    assert_eq!(survey.configs, [], "nothing has changed");
    assert_eq!(scene.config("p1").intercepts, scene.config("p2").intercepts);
    assert_eq!(scene.config("p1").intercepts[0].ports[0].port, 8080);
    assert_eq!(survey.pairs.len(), 2);
    assert_ne!(survey.pairs[0].agent, survey.pairs[1].agent);
    assert_eq!((&survey.pairs[0].ports[..], &survey.pairs[0].services[..]), (&[2000][..], &[53][..]));
}

#[test]
fn what_is_not_served_passes_nowhere() {
    let mut scene = Scene::new();
    scene.grown("p1");
    let broken = Intercept { filter_problem: Some("no".into()), ..intercept("a") };
    scene.intercept(broken);
    assert_eq!(scene.survey().pairs, []);
    assert_eq!(scene.config("p1").intercepts, []);

    let mut foreign = intercept("a");
    foreign.spec.owner = "bob".into();
    scene.intercept(foreign);
    assert_eq!(scene.survey().pairs, []);

    scene.intercept(intercept("a"));
    assert_eq!(scene.survey().pairs.len(), 1);
    scene.tracker.known.laptops = Some([].into());
    let survey = scene.survey();
    assert_eq!(survey.pairs, [], "the laptop has left");
    assert_eq!(survey.statuses["shop/a"].conditions[1].reason, "NoSession");
}

#[test]
fn what_is_in_flight_when_an_intercept_ends_still_passes() {
    let mut scene = Scene::new();
    scene.grown("p1");
    scene.intercept(intercept("a"));
    let before = scene.survey().pairs;
    scene.apply(Step::Intercept(Box::new(Event::Delete(("shop/a".into(), intercept("a"))))));
    let after = scene.survey().pairs;
    assert_eq!(scene.config("p1").intercepts, []);
    assert_eq!((after.len(), &after[0].ports), (1, &before[0].ports));
    assert!(after[0].services.is_empty(), "but its environment and its names are nobody's any more");
    assert!(scene.tracker.minds_time());
    assert_eq!(scene.tracker.survey(at(130)).pairs, []);
    assert!(!scene.tracker.minds_time());
}

#[test]
fn a_filter_comes_and_goes_while_active() {
    let mut scene = Scene::new();
    scene.intercept(intercept("a"));
    ["p1", "p2"].into_iter().for_each(|pod| scene.grown(pod));
    for (generation, filter) in [(2, header("dev")), (3, Default::default())] {
        let mut changed = Intercept { generation, ..intercept("a") };
        changed.spec.filter = filter.clone();
        scene.intercept(changed);
        assert_eq!(scene.state(), (State::Active, 2, 0), "active all the while");
        assert_eq!(scene.config("p1").intercepts[0].filter, filter);
        ["p1", "p2"].into_iter().for_each(|pod| scene.acknowledge(pod));
        assert_eq!(scene.state(), (State::Active, 2, 2));
    }
    assert_eq!(scene.config("p1").generation, 4, "the first, a sibling, and two changes");
}

#[test]
fn services_created_retargeted_and_deleted_change_configurations_and_evict_nobody() {
    let mut scene = Scene::new();
    scene.intercept(intercept("a"));
    scene.grown("p1");
    let first = scene.config("p1");
    assert_eq!(first.services[0].dns_names[0], "web.shop.svc.cluster.local");
    assert_eq!(first.services[0].ports[0].target, Some(8080));

    let changes: [&dyn Fn(&mut Scene); 3] = [
        &|scene| scene.service(service("other", 81, Target::Number(9090))),
        &|scene| scene.service(service("other", 81, Target::Number(9191))),
        &|scene| {
            let other = service("other", 81, Target::Number(9191));
            scene.apply(Step::Service(Event::Delete(("shop/other".into(), other))));
        },
    ];
    let mut generation = first.generation;
    for (change, services) in changes.iter().zip([2, 2, 1]) {
        change(&mut scene);
        let survey = scene.survey();
        assert_eq!(survey.steps, []);
        let [(_, config)] = &survey.configs[..] else { panic!("{:?}", survey.configs) };
        assert_eq!((config.services.len(), config.generation), (services, generation + 1));
        assert!(config.revision > first.revision);
        generation = config.generation;
    }
}

#[test]
fn an_intercept_of_a_services_port_follows_it() {
    let mut scene = Scene::new();
    let mut one = intercept("a");
    one.spec.ports[0].port = Some("81".into());
    scene.intercept(one);
    scene.service(service("other", 81, Target::Number(9090)));
    scene.grown("p1");
    assert_eq!(scene.config("p1").intercepts[0].ports[0].port, 9090);
    scene.service(service("other", 81, Target::Number(9191)));
    assert_eq!(scene.survey().steps, []);
    assert_eq!(scene.config("p1").intercepts[0].ports[0].port, 9191);
}

#[test]
fn siblings_learn_of_each_other() {
    let mut scene = Scene::new();
    ["p1", "p2", "p3"].into_iter().for_each(|pod| scene.grown(pod));
    scene.survey();
    assert_eq!(scene.config("p1").services[0].siblings, ["p2", "p3"]);
    scene.shrunk("p2");
    assert_eq!(scene.survey().configs.len(), 2);
    assert_eq!(scene.config("p1").services[0].siblings, ["p3"]);
}

#[test]
fn of_many_siblings_some_are_named_and_the_others_are_no_news() {
    let mut scene = Scene::new();
    (0..=MAX_SIBLINGS + 1).for_each(|number| scene.pod(injected(&format!("p{number:03}"))));
    scene.join("p000");
    scene.survey();
    assert_eq!(scene.config("p000").services[0].siblings.len(), MAX_SIBLINGS);
    scene.pod(injected("p999"));
    assert_eq!(scene.survey().configs.len(), 0);
}

#[test]
fn pods_without_agents_are_replaced_only_for_an_intercept() {
    let mut scene = Scene::new();
    scene.pod(Pod { ports: injected("x").ports, ..pod("old") });
    assert_eq!(scene.survey().steps, []);
    scene.intercept(intercept("a"));
    let survey = scene.survey();
    assert_eq!(survey.steps, [], "another manager may not know of it");
    assert_eq!(survey.again, Some(Duration::from_millis(500)));
    let survey = scene.tracker.survey(at(101));
    assert!(matches!(&survey.steps[..], [Replace::Release { pod, .. }] if pod.name == "old"));
    assert_eq!(survey.statuses["shop/a"].pods[0].reason.as_deref(), Some("it is being replaced"));
    scene.tracker.hindrances.insert("uid-old".into(), "it cannot be evicted yet: budget".into());
    assert_eq!(scene.status().pods[0].reason.as_deref(), Some("it cannot be evicted yet: budget"));
}

#[test]
fn an_intercept_covers_no_workload_that_services_may_still_lead_past() {
    let mut scene = Scene::new();
    let bare = |name: &str| Pod { ports: injected("x").ports, ..pod(name) };
    let other = WorkloadKind::StatefulSet;
    let other = Pod { workload: Some(Workload { kind: other, name: "db".into() }), ..bare("other") };
    let pods = [bare("old"), Pod { ready: false, ..bare("unready") }, other];
    pods.iter().for_each(|pod| scene.pod(pod.clone()));
    scene.survey();
    // They leave before anybody intercepts anything.
    pods.into_iter().for_each(|pod| scene.pod(Pod { leaving: true, ..pod }));
    scene.intercept(intercept("a"));
    scene.grown("new");
    let survey = scene.survey();
    let status = &survey.statuses["shop/a"];
    assert_eq!((status.state, status.counts.ready, status.counts.acknowledged), (State::Active, 1, 1));
    assert_eq!(status.counts.leaving, 1);
    let covered = status.conditions.iter().find(|found| found.type_ == "Covered").unwrap();
    assert_eq!((&*covered.status, &*covered.reason), ("False", "PodsLeaving"));
    assert_eq!(survey.again, Some(Duration::from_millis(500)));

    // That it is gone altogether is no news.
    scene.apply(Step::Pod(Box::new(Event::Delete(("shop/old".into(), pod("old"))))));
    assert_eq!(scene.tracker.survey(at(101)).statuses["shop/a"].counts.leaving, 1);
    assert_eq!(scene.tracker.survey(at(102)).statuses["shop/a"].counts.leaving, 0);

    // What has an agent hands over to its end.
    scene.pod(Pod { leaving: true, ..injected("new") });
    assert_eq!(scene.status().counts.leaving, 0);
    scene.shrunk("new");
    assert_eq!(scene.status().counts.leaving, 0);
}

#[test]
fn agents_of_an_earlier_installation_are_replaced_once_and_only_for_an_intercept() {
    let mut scene = Scene::new();
    scene.tracker.known.installation = Some("new".into());
    scene.pod(Pod { installation: Some("old".into()), ..injected("p1") });
    for second in [100, 200] {
        assert_eq!(scene.tracker.survey(at(second)).steps, []);
    }
    scene.intercept(intercept("a"));
    let first = scene.tracker.survey(at(300));
    assert_eq!(first.steps, [], "it may be about to come");
    assert_eq!(first.statuses["shop/a"].pods[0].reason.as_deref(), Some("its agent is not connected"));
    let second = scene.tracker.survey(at(305));
    assert!(matches!(&second.steps[..], [Replace::Release { pod, .. }] if pod.name == "p1"));
    assert_eq!(
        second.statuses["shop/a"].pods[0].reason.as_deref(),
        Some("it is being replaced; its agent belongs to an earlier installation of tpd")
    );

    // A successor that is no better is not replaced in turn.
    scene.apply(Step::Pod(Box::new(Event::Delete(("shop/p1".into(), injected("p1"))))));
    scene.pod(Pod { installation: Some("old".into()), created: at(305), ..injected("p2") });
    scene.tracker.survey(at(306));
    let third = scene.tracker.survey(at(400));
    assert_eq!(third.steps, []);
    let reason = third.statuses["shop/a"].pods[0].reason.as_deref();
    assert_eq!(reason, Some("its agent belongs to an earlier installation of tpd"));
}

#[test]
fn an_agent_that_is_connected_is_of_this_installation_whatever_its_pod_says() {
    let mut scene = Scene::new();
    scene.tracker.known.installation = Some("new".into());
    scene.intercept(intercept("a"));
    scene.grown("p1");
    scene.pod(Pod { installation: Some("old".into()), ..injected("p1") });
    assert_eq!(scene.tracker.survey(at(200)).steps, []);
    assert_eq!(scene.tracker.survey(at(300)).steps, []);
    assert_eq!(scene.state(), (State::Active, 1, 1));
}

#[test]
fn who_is_released_waits_only_for_intercepts_that_are_served() {
    let mut scene = Scene::new();
    let old = Pod { ports: injected("x").ports, released: true, released_at: Some(at(90)), ..pod("old") };
    scene.pod(old);
    scene.intercept(intercept("a"));
    let asked = |survey: Survey| match &survey.steps[..] {
        [Replace::Finish { wait, .. }] => (wait.waited.as_secs(), wait.asked.len()),
        other => panic!("{other:?}"),
    };
    assert_eq!(asked(scene.survey()), (10, 1));
    scene.apply(Step::Intercept(Box::new(Event::Delete(("shop/a".into(), intercept("a"))))));
    assert_eq!(asked(scene.survey()), (10, 0));
}

#[test]
fn an_agent_in_nobodys_path_is_replaced_once_if_that_helps() {
    let mut scene = Scene::new();
    let taken = |name: &str| {
        Some(Entry::Ports {
            ports: vec![TakenPort {
                name: name.into(),
                listen: 19901,
                app: 9000,
                protocol: Default::default(),
            }],
        })
    };
    scene.intercept(intercept("a"));
    scene.grown("p1");
    scene.pod(Pod { entry: taken("admin"), ..injected("p1") });
    let survey = scene.tracker.survey(at(101));
    assert_eq!(scene.config("p1").intercepts, []);
    assert!(matches!(&survey.steps[..], [Replace::Release { pod, .. }] if pod.name == "p1"));

    scene.shrunk("p1");
    scene.pod(Pod { entry: taken("admin"), created: at(101), ..injected("p2") });
    scene.join("p2");
    let survey = scene.tracker.survey(at(102));
    assert_eq!(survey.steps, [], "its successor is no better");
    assert!(survey.statuses["shop/a"].pods[0].reason.as_ref().unwrap().contains("not in their path"));
}

/// A pod whose agent stands behind the name of port 8080.
fn behind_a_name(name: &str) -> Pod {
    let http = TakenPort { name: "http".into(), listen: 19901, app: 8080, protocol: Default::default() };
    Pod { entry: Some(Entry::Ports { ports: vec![http] }), ..injected(name) }
}

#[test]
fn what_goes_past_an_agent_behind_a_name_is_not_covered() {
    let mut scene = Scene::new();
    scene.intercept(intercept("a"));
    scene.grown("p1");
    scene.pod(behind_a_name("p1"));
    scene.survey();
    scene.acknowledge("p1");
    assert_eq!(scene.state(), (State::Active, 1, 1));

    scene.service(service("raw", 81, Target::Number(8080)));
    assert_eq!(scene.state(), (State::Active, 1, 0), "a part comes by the name");
    assert_eq!(
        scene.status().pods[0].reason.as_deref(),
        Some(
            "Service raw leads to port 8080 by its number, past the agent (another Service, by its name, does not); name the \
             port in the Service's targetPort: http"
        )
    );

    scene.service(service("web", 80, Target::Number(8080)));
    let raw = service("raw", 81, Target::Number(8080));
    scene.apply(Step::Service(Event::Delete(("shop/raw".into(), raw))));
    assert_eq!(scene.state(), (State::Waiting, 1, 0), "nothing comes to the agent");
    assert_eq!(
        scene.status().pods[0].reason.as_deref(),
        Some(
            "Service web leads to port 8080 by its number, past the agent; name the port in the Service's targetPort: http"
        )
    );
    assert_eq!(scene.survey().steps, [], "another pod would be no better");

    scene.service(service("web", 80, Target::Name("http".into())));
    assert_eq!(scene.state(), (State::Active, 1, 1));
}

#[test]
fn two_developers_and_a_wiretap_share_a_workload() {
    let mut scene = Scene::new();
    for (name, created, change) in [
        ("c", 23, &(|one: &mut Intercept| one.spec.mode = Mode::Wiretap) as &dyn Fn(&mut Intercept)),
        ("b", 22, &|one| one.spec.filter = header("b")),
        ("a", 21, &|one| one.spec.filter = header("a")),
        ("d", 24, &|_| {}),
    ] {
        let mut one = Intercept { created: at(created), ..intercept(name) };
        change(&mut one);
        scene.intercept(one);
    }
    scene.grown("p1");
    let told: Vec<_> = scene.config("p1").intercepts.iter().map(|one| one.name.clone()).collect();
    assert_eq!(told, ["a", "b", "c"], "the oldest first, and the one that conflicts not at all");
    let accepted = &scene.survey().statuses["shop/d"].conditions[0];
    assert_eq!((accepted.status.as_str(), accepted.reason.as_str()), ("False", "Conflict"));
}

#[test]
fn nothing_is_said_before_the_lists_are_complete() {
    let mut scene = Scene::new();
    scene.grown("p1");
    scene.tracker.known.laptops = None;
    scene.intercept(intercept("a"));
    assert_eq!(scene.survey(), Survey::default());
}

#[test]
fn an_agent_whose_pod_is_another_is_told_nothing() {
    let mut scene = Scene::new();
    scene.intercept(intercept("a"));
    scene.pod(Pod { uid: "uid-of-its-successor".into(), ..injected("p1") });
    scene.join("p1");
    let survey = scene.survey();
    assert_eq!((survey.configs.len(), survey.pairs.len()), (0, 0));
    assert_eq!(survey.statuses["shop/a"].counts.agents, 0);
}

/// What would become of pods: their names, what they lack, and why.
fn foreseen(scene: &Scene, asked: &Intercept) -> Vec<(String, Fault, String)> {
    let outlook = scene.tracker.foresee(asked, at(1000)).unwrap();
    outlook.unfit.into_iter().map(|Unfit { pod, fault, why }| (pod, fault, why)).collect()
}

#[test]
fn what_an_intercept_would_mean_is_what_it_means_then() {
    let mut scene = Scene::new();
    let ports = injected("x").ports;
    for name in ["a", "b"] {
        scene.pod(Pod { ports: ports.clone(), ..pod(name) });
    }
    scene.grown("p1");
    scene.pod(Pod { opted_out: true, ..pod("out") });
    scene.pod(Pod { leaving: true, ..pod("gone") });
    let asked = intercept("a");
    let foreseen = foreseen(&scene, &asked);
    let expected =
        [("a", REPLACED), ("b", TURN), ("out", "it is to have no agent (tpd.dev/inject: disabled)")];
    assert_eq!(foreseen, expected.map(|(pod, why)| (pod.into(), Fault::NoAgent, why.into())));
    assert_eq!(scene.tracker.foresee(&asked, at(1000)).unwrap().pods, 4);
    assert_eq!(scene.survey().steps, [], "it was only a question");

    scene.intercept(asked);
    let status = scene.status();
    for (pod, _, why) in foreseen {
        let told = status.pods.iter().find(|told| told.name == pod).unwrap();
        assert_eq!(told.reason, Some(why));
    }
}

#[test]
fn what_an_intercept_would_mean_depends_on_what_it_accepts() {
    let mut scene = Scene::new();
    let set = Workload { kind: WorkloadKind::StatefulSet, name: "web".into() };
    scene.pod(Pod {
        workload: Some(set.clone()),
        template: None,
        created: at(500),
        ports: injected("x").ports,
        ..pod("web-0")
    });
    let mut asked = intercept("mine");
    asked.spec.workload = set;
    // The one that is asked for is new, whatever it says of itself.
    assert_eq!(foreseen(&scene, &asked), [("web-0".into(), Fault::NoAgent, GAP.into())]);
    asked.spec.replace_pods = true;
    assert_eq!(foreseen(&scene, &asked), [("web-0".into(), Fault::NoAgent, REPLACED.into())]);
}

#[test]
fn agents_that_will_not_do_are_foreseen() {
    let mut scene = Scene::new();
    scene.tracker.known.installation = Some("new".into());
    scene.pod(Pod { installation: Some("old".into()), ..injected("p1") });
    let asked = intercept("mine");
    assert_eq!(foreseen(&scene, &asked), [("p1".into(), Fault::Stranger, REPLACED.into())]);
    scene.join("p1");
    assert_eq!(foreseen(&scene, &asked), [], "it is there");

    let mut scene = Scene::new();
    let entry = Some(Entry::Ports { ports: Vec::new() });
    scene.pod(Pod { entry, ..injected("p1") });
    assert_eq!(foreseen(&scene, &asked), [("p1".into(), Fault::Port(8080), REPLACED.into())]);
    scene.tracker.known.laptops = None;
    assert_eq!(scene.tracker.foresee(&asked, at(1000)), None, "before the lists are complete nobody knows");
}
