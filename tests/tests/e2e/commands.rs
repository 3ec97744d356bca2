//! What the commands of intercepts do beside intercepting: questions, refusals, what is run with them, and what they list.

mod by_hand;

use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::exit::ExitCode;
use tpd_tests::{Cluster, Laptop, Local, Terminal, Workload, is_pod, until};

use crate::store::{ALL, LOCAL, MARKED, answered_by, connected, web};

/// What can be said at once is said within this.
const SOON: Duration = Duration::from_secs(5);

/// What takes a pod that starts, too.
const LATER: Duration = Duration::from_secs(40);

/// The Intercepts in `store`.
#[track_caller]
fn present(laptop: &Laptop) -> Vec<Value> {
    laptop.cluster.object("intercepts -n store")["items"].as_array().cloned().unwrap_or_default()
}

#[track_caller]
fn none_is_left(laptop: &Laptop) {
    let left = present(laptop);
    assert!(left.is_empty(), "an intercept is left behind: {left:?}");
}

/// A workload of another kind than a Deployment, whose pods have its name as their label. It goes when this is dropped.
struct Set {
    cluster: &'static Cluster,
    kind: &'static str,
    name: &'static str,
}

impl Set {
    #[track_caller]
    fn create(cluster: &'static Cluster, kind: &'static str, name: &'static str, replicas: u32) -> Self {
        let labels = json!({ "app": name });
        let mut spec = json!({
            "replicas": replicas, "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": {
                "terminationGracePeriodSeconds": 6,
                "containers": [{
                    "name": "app", "image": "tpd-test/echo:1", "imagePullPolicy": "Never",
                    // Longer than a workload without pods is waited for.
                    "args": ["http", "-linger", "4s", ":8080"],
                    "env": [{ "name": "POD_NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }],
                    "ports": [{ "name": "http", "containerPort": 8080 }],
                    "readinessProbe": { "httpGet": { "path": "/healthz", "port": "http" }, "periodSeconds": 1 },
                    "resources": { "requests": { "cpu": "10m", "memory": "16Mi" } },
                }],
            } },
        });
        if kind == "StatefulSet" {
            spec["serviceName"] = json!(name);
        }
        let set = Self { cluster, kind, name };
        cluster.apply(&json!({
            "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": name, "namespace": "store" }, "spec": spec,
        }));
        set
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        let (kind, name) = (self.kind, self.name);
        let _ =
            self.cluster.kubectl(&format!("-n store delete {kind}/{name} --wait=false --ignore-not-found"));
    }
}

#[test]
fn pods_that_are_gone_before_their_successors_are_restarted_for_a_yes_alone() {
    let laptop = Laptop::take();
    let _set = Set::create(laptop.cluster, "StatefulSet", "vault", 1);
    // Nothing but its Service, which leads to the other's pods.
    let _none = Workload::deploy(laptop.cluster, "vault", 0, &json!({}));
    let vault = Workload::sample(laptop.cluster, "store", "vault");
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    vault.until_ready(1);
    let uid = || laptop.cluster.object("pod vault-0 -n store")["metadata"]["uid"].clone();
    let before = uid();
    let untouched = || {
        none_is_left(&laptop);
        assert_eq!(uid(), before, "the pod was restarted");
    };

    // Nobody is there to be asked.
    let run = laptop.try_intercept("store", "statefulset/vault", ALL);
    run.exits(ExitCode::NoAgent).within(SOON);
    run.says(&["no pod of statefulset/vault has an agent", "their service is interrupted", "--replace-pods"]);
    untouched();

    let command = format!("tpd intercept sts/vault --namespace store {ALL}");
    for (answer, code, words) in
        [("n\n", 1, "nothing was changed"), ("\n", 1, "nothing was changed"), ("\x03", 130, "")]
    {
        let mut terminal = Terminal::open(&laptop, &command);
        terminal.until_shows(SOON, "Go on? [y/N]");
        terminal.types(answer);
        let run = terminal.finish();
        run.ends_with(code).says(&["takes all traffic", "vault-0", "will be restarted one by one", words]);
        untouched();
    }

    let mut terminal = Terminal::open(&laptop, &command);
    terminal.until_shows(SOON, "Go on? [y/N]");
    terminal.types("y\n");
    let run = terminal.finish();
    run.ok().says(&["statefulset/vault: all traffic comes to this machine", "1 of 1 ready pod"]);
    vault.until_ready(1);
    assert_ne!(uid(), before, "it says that the pod is intercepted, and it is the old one");
    assert_eq!(answered_by(&laptop, &vault.url(), ""), "laptop");
    laptop.run("tpd leave vault --namespace store").ok();
}

#[test]
fn who_interrupts_an_intercept_before_it_is_proved_takes_it_back() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    // Without pods there is nothing to ask, and a moment to wait.
    let _idle = Workload::deploy(laptop.cluster, "idle", 0, &json!({}));
    let interrupted = |arguments: &str| {
        let mut terminal =
            Terminal::open(&laptop, &format!("tpd intercept idle --namespace store {arguments}"));
        terminal.until_shows(SOON, "waiting for pods");
        terminal.types("\x03");
        let run = terminal.finish();
        run.ends_with(1).says(&["interrupted"]);
        run
    };
    interrupted(ALL).says(&["the intercept was left"]);
    none_is_left(&laptop);

    // What was there before is not taken away, though it has changed.
    laptop.try_intercept("store", "idle", ALL).exits(ExitCode::NoAgent);
    interrupted(MARKED).says(&["the intercept stays", "tpd leave idle-"]);
    let left = present(&laptop);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["spec"]["filter"]["headers"][0]["value"], "dev", "{left:?}");
    laptop.run("tpd leave --all").ok();
}

/// The image of agents that the managers know. When this is dropped, it is the one that it was.
struct AgentImage {
    cluster: &'static Cluster,
    before: String,
}

impl AgentImage {
    #[track_caller]
    fn change(cluster: &'static Cluster, image: &str) -> Self {
        let set = cluster.object("statefulset tpd-manager -n tpd-system");
        let variables = set["spec"]["template"]["spec"]["containers"][0]["env"].as_array().cloned();
        let named = |variable: &&Value| variable["name"] == "TPD_AGENT_IMAGE";
        let before = variables.iter().flatten().find(named).and_then(|variable| variable["value"].as_str());
        let changed = Self { cluster, before: before.expect("the managers know an image").to_owned() };
        changed.set(image);
        cluster.managers_ready(2);
        changed
    }

    /// All managers are made anew at once, which takes half the time of one after the other.
    fn set(&self, image: &str) {
        let kubectl = |arguments: &str| self.cluster.kubectl(&format!("-n tpd-system {arguments}"));
        let _ = kubectl(&format!("set env statefulset/tpd-manager TPD_AGENT_IMAGE={image}"));
        let _ = kubectl("delete pods -l app.kubernetes.io/name=tpd-manager --timeout=60s");
        let _ = kubectl("rollout status statefulset/tpd-manager --timeout=60s");
    }
}

impl Drop for AgentImage {
    fn drop(&mut self) {
        self.set(&self.before);
    }
}

#[test]
fn an_agents_image_that_no_node_finds_is_said_in_seconds_and_harms_nobody() {
    let laptop = Laptop::take();
    let stuck = Workload::deploy(laptop.cluster, "stuck", 1, &json!({}));
    let pod = stuck.until_ready(1).remove(0);
    // A registry that refuses every connection.
    let _image = AgentImage::change(laptop.cluster, "127.0.0.1:1/tpd/agent:nosuch");
    let _connection = connected(&laptop);
    let command = format!("tpd intercept stuck --namespace store --yes {ALL}");
    let running = laptop.script(&command).start();
    until(Duration::from_secs(20), "the Intercept says that the image cannot be pulled", || {
        let status = present(&laptop).first().map(|one| one["status"].to_string()).unwrap_or_default();
        if status.contains("cannot be pulled") { Ok(()) } else { Err(status) }
    });
    assert_eq!(answered_by(&laptop, &stuck.url(), ""), pod, "a pod that is being replaced does not serve");
    let run = running.finish();
    run.exits(ExitCode::NoAgent).within(LATER);
    run.says(&["cannot be pulled", "127.0.0.1:1", "tpd install --agent-image", "tpd leave stuck-"]);
    assert_eq!(answered_by(&laptop, &stuck.url(), ""), pod);

    laptop.run("tpd leave --all").ok();
    until(LATER, "the pod is its ReplicaSet's again, and the only one", || {
        let pods = stuck.pods();
        let is_whole = pods.len() == 1 && pods[0]["metadata"]["ownerReferences"][0]["kind"] == "ReplicaSet";
        if is_whole && stuck.ready() == [pod.clone()] { Ok(()) } else { Err(format!("{pods:?}")) }
    });
    assert_eq!(answered_by(&laptop, &stuck.url(), ""), pod);
}

#[test]
fn a_command_has_the_apps_environment_and_hands_on_its_exit_code() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let with = |options: &str, command: &str| {
        let script =
            format!("HOME=/my/own tpd intercept web --namespace store --yes {ALL} {options} -- {command}");
        laptop.script(&script).limit(Duration::from_secs(60)).run()
    };
    let run = with("--env", r#"sh -c 'printf "%s\n" "$PASSWORD" "$DERIVED" "$HOME"; exit 7'"#);
    let pod = web.until_ready(1).remove(0);
    run.ends_with(7);
    assert_eq!(run.stdout, format!("correct horse, battery=staple\nhello from {pod}\n/my/own\n"), "{run}");
    none_is_left(&laptop);
    assert!(is_pod(&answered_by(&laptop, &web.url(), "")));

    let run = with("", r#"sh -c 'echo "${PASSWORD-nothing}"; kill -KILL $$'"#);
    run.ends_with(137);
    assert_eq!(run.out(), "nothing", "Secrets are handed out that nobody asked for");
    none_is_left(&laptop);

    with("", "/nowhere/app").exits(ExitCode::Failure).says(&["/nowhere/app cannot be started"]);
    none_is_left(&laptop);

    // At a terminal the command hears of Ctrl-C itself, and says what becomes of it.
    let command = r#"sh -c 'trap "exit 9" INT; echo at work; while :; do sleep 0.1; done'"#;
    let mut terminal =
        Terminal::open(&laptop, &format!("tpd intercept web --namespace store --yes {ALL} -- {command}"));
    terminal.until_shows(LATER, "at work");
    terminal.types("\x03");
    terminal.finish().ends_with(9);
    none_is_left(&laptop);
    assert!(is_pod(&answered_by(&laptop, &web.url(), "")));
}

#[test]
fn a_name_that_workloads_of_several_kinds_have_takes_a_kind() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _deployment = Workload::deploy(laptop.cluster, "twin", 0, &json!({}));
    let _sets = [("StatefulSet", "twin"), ("ReplicaSet", "single")]
        .map(|(kind, name)| Set::create(laptop.cluster, kind, name, 0));
    let run = laptop.try_intercept("store", "twin", ALL);
    run.exits(ExitCode::Usage).says(&["deployment/twin and statefulset/twin", "--kind"]).within(SOON);
    let run = laptop.try_intercept("store", "deployment/twin", &format!("{ALL} --kind sts"));
    run.exits(ExitCode::Usage).says(&["different kinds"]).within(SOON);
    none_is_left(&laptop);

    // A name that one workload has is enough, whatever its kind. All of them wait for pods at the same time.
    let begin =
        |workload: &str| laptop.start(&format!("tpd intercept {workload} --namespace store --yes {ALL}"));
    let begun = ["twin --kind statefulset", "deploy/twin", "single"].map(begin);
    for running in begun {
        running.finish().exits(ExitCode::NoAgent);
    }
    let mut workloads: Vec<_> = present(&laptop)
        .iter()
        .map(|one| &one["spec"]["workload"])
        .map(|workload| format!("{} {}", workload["kind"], workload["name"]))
        .collect();
    workloads.sort_unstable();
    assert_eq!(workloads, [r#""Deployment" "twin""#, r#""ReplicaSet" "single""#, r#""StatefulSet" "twin""#]);
    laptop.run("tpd leave statefulset/twin single --namespace store").ok();
    assert_eq!(present(&laptop).len(), 1, "`tpd leave KIND/NAME` ends others too, or too few");
    laptop.run("tpd leave twin --namespace store").ok();
    none_is_left(&laptop);
}

/// The right to intercept everywhere, for one user, until this is dropped.
struct Everywhere(&'static Cluster);

impl Everywhere {
    fn grant(cluster: &'static Cluster, user: &str) -> Self {
        let granted = Self(cluster);
        cluster.apply(&json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": { "name": "everywhere" },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "tpd-intercept" },
            "subjects": [{ "kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io" }],
        }));
        granted
    }
}

impl Drop for Everywhere {
    fn drop(&mut self) {
        let _ = self.0.kubectl("delete clusterrolebinding everywhere --ignore-not-found");
    }
}

#[test]
fn list_and_leave_answer_people_and_programs() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let _idle = Workload::deploy(laptop.cluster, "idle", 0, &json!({}));
    let _rest = Workload::deploy_in(laptop.cluster, "locked", "rest", 0, &json!({}));
    let begin = |laptop: &Laptop, namespace: &str, workload: &str| {
        laptop.start(&format!("tpd intercept {workload} --namespace {namespace} --yes {MARKED}"))
    };
    let begun = [begin(&laptop, "store", "idle"), begin(&second, "locked", "rest")];
    for running in begun {
        running.finish().exits(ExitCode::NoAgent);
    }
    let json = |script: &str| -> Value {
        let run = laptop.run(script);
        serde_json::from_str(run.ok().out()).unwrap_or_else(|error| panic!("no JSON: {error}\n{run}"))
    };

    let list = json("tpd list -n locked -o json");
    assert_eq!(list["own"][0]["request"]["workload"]["name"], "idle", "{list}");
    let other = &list["others"][0];
    assert_eq!((&other["owner"], &other["namespace"]), (&json!("dev2"), &json!("locked")), "{list}");
    assert_eq!(other["filter"]["headers"][0]["value"], "dev", "{list}");

    // Who may not look everywhere is told so, and sees the own ones.
    laptop.run("tpd list -A").ok().says(&["idle", "you, here", "not shown", "cluster scope", "tpd list -n"]);
    let list = json("tpd list -A -o json");
    assert!(list["problem"].as_str().is_some_and(|problem| problem.contains("cluster scope")), "{list}");
    assert_eq!(list["own"].as_array().map(Vec::len), Some(1), "{list}");
    let _everywhere = Everywhere::grant(laptop.cluster, "dev");
    let (list, _) = until(Duration::from_secs(10), "every namespace is looked into", || {
        let list = json("tpd list -A -o json");
        if list["problem"].is_null() { Ok(list) } else { Err(list.to_string()) }
    });
    assert_eq!(list["others"][0]["workload"]["name"], "rest", "{list}");
    let list = laptop.run("tpd list -A");
    list.ok().says(&[
        "store",
        "deployment/idle",
        "you, here",
        "locked",
        "deployment/rest",
        "dev2",
        "NoAgent",
    ]);

    let name = present(&laptop)[0]["metadata"]["name"].as_str().expect("it has one").to_owned();
    assert_eq!(json("tpd leave -o json"), json!({ "left": [format!("store/{name}")] }));
    none_is_left(&laptop);
    let run = laptop.run("tpd leave -o json");
    run.exits(ExitCode::NotFound);
    let failure: Value =
        serde_json::from_str(&run.stderr).unwrap_or_else(|error| panic!("no JSON: {error}\n{run}"));
    assert_eq!(failure["code"], "notFound", "{failure}");
    assert_eq!(json("tpd leave --all -o json"), json!({ "left": [] }));
    second.run("tpd leave rest --namespace locked -o json").ok().says(&["locked/rest-"]);
}
