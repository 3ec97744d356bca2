//! Several developers at once on one workload, and two at the same instant.

use std::path::Path;

use serde_json::{Value, json};
use tpd_api::intercept::ACCEPTED;
use tpd_netstack::key::PrivateKey;
use tpd_tests::{Laptop, Load, Loading, Local, Run, Source, is_pod, until};

use super::SOON;
use crate::peer;
use crate::store::{ALL, MARK, MARKED, connected, intercepted, moment, web};

/// The object of an intercept of the sample, as a user could write it by hand.
fn by_hand(name: &str, user: &str, session: &str, filter: &Value) -> Value {
    json!({
        "apiVersion": "tpd.dev/v1alpha1", "kind": "Intercept", "metadata": { "name": name, "namespace": "store" },
        "spec": {
            "owner": user, "session": session, "workload": { "kind": "Deployment", "name": "web" },
            "ports": [{ "port": "http", "overlayPort": 20_000 }], "filter": filter,
        },
    })
}

/// A fourth developer, whom the cluster knows as its administrator: with a session, and no laptop. It goes when this is dropped.
struct Fourth<'a>(&'a Laptop);

impl<'a> Fourth<'a> {
    fn new(laptop: &'a Laptop) -> Self {
        let key = PrivateKey::generate().expect("the kernel has random numbers");
        laptop.cluster.apply(&peer::session("fourth", "admin", &key.public().to_string()));
        Self(laptop)
    }

    /// Asks for an intercept with this filter.
    fn create(&self, filter: &Value) -> Run {
        let object = by_hand("fourth", "admin", "fourth", filter).to_string();
        self.0.cluster.machine("tests/kubernetes/cluster kubectl create -f -").input(object).run()
    }
}

impl Drop for Fourth<'_> {
    fn drop(&mut self) {
        let _ = self.0.cluster.kubectl("-n store delete intercept fourth --ignore-not-found");
        let _ = self.0.cluster.kubectl("-n tpd-system delete clientsession fourth --ignore-not-found");
    }
}

#[test]
fn two_developers_a_wiretap_and_one_who_is_refused_share_a_workload() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let web = web(&laptop, 2);
    let (_local, _intercept) = intercepted(&laptop, &web, MARKED);
    let (_local2, _intercept2) = intercepted(&second, &web, "--port 9090:http --header x-intercept=second");
    // There are two laptops; the third developer is at the second one, too.
    let tap = Local::start(&second, "127.0.0.1:9191");
    second.try_intercept("store", "web", "--port 9191:http --wiretap --name web-tap").ok();

    let fourth = Fourth::new(&laptop);
    let everything = json!({});
    fourth.create(&everything).ends_with(1).says(&[
        "intercepts the requests with",
        "x-intercept=VALUE",
        "--wiretap",
    ]);
    let exact = json!([{ "name": "X-Intercept", "value": "second" }]);
    let overlapping = json!({ "headers": exact, "paths": ["/api/*"] });
    let words =
        ["dev2 intercepts the requests with header x-intercept=second", "other than `second`", "--wiretap"];
    fourth.create(&overlapping).ends_with(1).says(&words);
    laptop.cluster.kubectl("-n store get intercept fourth").ends_with(1).says(&["not found"]);

    // Who asks for nothing, and one in ten for the first developer; and some for the second.
    let on_the_service = |with: &str| {
        let load = Load::on(Source::Node, &web.url()).with(with);
        load.connections(4).rate(200).start(laptop.cluster)
    };
    let loads = [on_the_service(&format!("-mark {MARK}")), on_the_service("-header x-intercept=second")];
    moment();
    let [mixed, seconds] = loads.map(Loading::finish);
    mixed.none_failed();
    assert!(mixed.marked.keys().all(|name| name == "laptop"), "of the first: {:?}", mixed.marked);
    assert!(!mixed.marked.is_empty(), "no request was the first developer's");
    assert!(mixed.unmarked.keys().all(|name| is_pod(name)), "of nobody's: {:?}", mixed.unmarked);
    seconds.none_failed().all_by(|name| name == "laptop2");

    let asked = mixed.requests + seconds.requests;
    until(SOON, "the tap gets a copy of every request, whoever answers it", || {
        let taps = second.status().intercepts;
        let tapped = taps.iter().find(|one| one.request.name.as_deref() == Some("web-tap"));
        let lost = tapped.and_then(|one| one.status.as_ref()).map_or(0, |status| status.traffic.copies_lost);
        let copies = tap.counts().requests;
        if copies + lost == asked && copies > asked / 2 {
            Ok(())
        } else {
            Err(format!("{copies} copies of {asked} requests, {lost} lost"))
        }
    });
}

/// How often two are created at the same instant, at most.
const ROUNDS: usize = 12;

/// How often both must have passed the webhook for the race to have been seen.
const RACES: usize = 3;

/// Creates one intercept of each user at the same instant. Answers what the API server does, in no order.
fn create_at_once(laptop: &Laptop, intercepts: [(&str, Value); 2]) -> Vec<Value> {
    let kubeconfig = laptop.cluster.kubeconfig("admin");
    let pki = Path::new(&kubeconfig).with_file_name("pki");
    let pki = pki.display();
    let each = intercepts.map(|(credential, object)| {
        format!(
            "--silent --show-error --max-time 10 --cacert {pki}/ca.crt --cert {pki}/{credential}.crt --key {pki}/{credential}.key \
             --header 'Content-Type: application/json' --data '{object}' \
             https://203.0.113.2:6443/apis/tpd.dev/v1alpha1/namespaces/store/intercepts"
        )
    });
    let run = laptop.run(&format!("curl --parallel --parallel-immediate {}", each.join(" --next ")));
    let answers = serde_json::Deserializer::from_str(run.ok().out()).into_iter();
    answers.collect::<Result<_, _>>().unwrap_or_else(|error| panic!("{error}:\n{run}"))
}

/// Whose of two intercepts was created first; within the same second, the order of their UIDs counts.
fn older(list: &Value) -> String {
    let age = |item: &Value| {
        let metadata = &item["metadata"];
        (metadata["creationTimestamp"].to_string(), metadata["uid"].to_string())
    };
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let oldest = items.iter().min_by_key(|item| age(item)).expect("two intercepts");
    oldest["spec"]["owner"].as_str().unwrap_or_default().to_owned()
}

/// Whose of two intercepts is served, if one is and the other's owner is told why that is not.
fn served(list: &Value) -> Result<String, String> {
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let owner = |item: &Value| item["spec"]["owner"].as_str().unwrap_or_default().to_owned();
    let accepted = |item: &Value| {
        let conditions = item["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|one| one["type"] == ACCEPTED).unwrap_or_default()
    };
    let (served, others): (Vec<_>, Vec<_>) =
        items.iter().partition(|item| accepted(item)["status"] == "True");
    let ([served], [other]) = (&*served, &*others) else { return Err(list.to_string()) };
    let told = accepted(other);
    let message = told["message"].as_str().unwrap_or_default();
    let names = [&*owner(served), served["metadata"]["name"].as_str().unwrap_or_default(), "--wiretap"];
    if told["reason"] == "Conflict" && names.iter().all(|name| message.contains(name)) {
        Ok(owner(served))
    } else {
        Err(told.to_string())
    }
}

#[test]
fn of_two_intercepts_made_at_the_same_instant_one_is_served_and_the_other_told_why_not() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let web = web(&laptop, 1);
    // So that the pod has an agent, and nothing is replaced for anybody.
    drop(intercepted(&laptop, &web, ALL));
    let sessions = [laptop.session(), second.session()];
    let list = || laptop.cluster.object("intercepts -n store");
    let mut races = 0;
    for round in 0..ROUNDS {
        let of = |user: &str, session: &str| by_hand(&format!("{user}-{round}"), user, session, &json!({}));
        let both = [("developer", of("dev", &sessions[0])), ("developer2", of("dev2", &sessions[1]))];
        let answers = create_at_once(&laptop, both);
        let (made, refused): (Vec<_>, Vec<_>) =
            answers.iter().partition(|answer| answer["kind"] == "Intercept");
        match (&*made, &*refused) {
            ([_, _], []) => {
                races += 1;
                let what = "one of two is served, and the other told why it is not";
                let (owner, _) = until(SOON, what, || served(&list()));
                assert_eq!(owner, older(&list()), "managers that decide each by itself would not agree");
                laptop.cluster.kubectl(&format!("-n store delete intercept {owner}-{round}")).ok();
                until(SOON, "who waited is served once the other has left", || {
                    let left = list()["items"][0].clone();
                    let conditions = left["status"]["conditions"].as_array().cloned().unwrap_or_default();
                    let served = |one: &Value| one["type"] == ACCEPTED && one["status"] == "True";
                    if conditions.iter().any(served) { Ok(()) } else { Err(left.to_string()) }
                });
            }
            ([made], [refused]) => {
                let owner = made["spec"]["owner"].as_str().expect("an owner");
                let message = refused["message"].as_str().unwrap_or_default();
                let told = message.contains(&format!("{owner} intercepts all traffic"))
                    && message.contains("--wiretap");
                assert!(told, "who comes second is told: {refused}");
            }
            _ => panic!(
                "of two intercepts for the same traffic none can be made, or more than two: {answers:?}"
            ),
        }
        laptop.cluster.kubectl("-n store delete intercepts --all").ok();
        if races == RACES {
            break;
        }
    }
    println!("both of two passed the webhook {races} times");
}
