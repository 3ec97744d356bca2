//! Corners of intercepts that no other test looks into: killed managers, names of one pod alone, pods that stand alone, taps with a
//! filter and without HTTP, words of namespaces and annotations, and streams of one HTTP/2 connection.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::exit::ExitCode;
use tpd_api::inject::{DISABLED, ENABLED, INJECT};
use tpd_tests::{
    Cluster, Laptop, Load, Local, Record, Source, Stamp, Workload, inside, is_laptop, is_pod, pause, until,
};

use crate::store::{
    ALL, LOCAL, MARK, MARKED, answered_by, connected, intercepted, moment, pod_address, to_the_service, web,
};

/// What can be said at once is said within this.
const SOON: Duration = Duration::from_secs(5);

/// Connections of a load, and so requests that can be under way.
const CONNECTIONS: u32 = 8;

/// The managers' label.
const MANAGERS: &str = "app.kubernetes.io/name=tpd-manager";

/// When this is dropped, managers that have been killed are others, which have never restarted.
struct NewManagers(&'static Cluster);

impl Drop for NewManagers {
    fn drop(&mut self) {
        let _ = self.0.kubectl(&format!("-n tpd-system delete pods -l {MANAGERS}"));
        if !thread::panicking() {
            self.0.managers_ready(2);
        }
    }
}

/// Kills the processes of managers, all at once, as nothing in them can see coming.
#[track_caller]
fn kill(cluster: &Cluster, managers: &[&str]) {
    let uid = |pod: &&str| {
        let pod = cluster.object(&format!("pod {pod} -n tpd-system"));
        pod["metadata"]["uid"].as_str().expect("a pod has a UID").to_owned()
    };
    let uids = managers.iter().map(uid).collect::<Vec<_>>().join("|");
    let find = format!(
        "for p in $(pgrep -x tpd-manager); do grep -qE '{uids}' /proc/$p/cgroup && echo $p; done; true"
    );
    let pids: Vec<_> = cluster.node(&find).ok().out().lines().map(str::to_owned).collect();
    assert_eq!(pids.len(), managers.len(), "processes of {managers:?}");
    cluster.node(&format!("kill -KILL {}", pids.join(" "))).ok();
}

/// Says what it cost: nothing but what was under way.
#[track_caller]
fn cost(what: &str, record: &Record) {
    println!("{what}: {}", record.summary());
    record.failed_at_most(u64::from(CONNECTIONS));
}

#[test]
fn managers_that_are_killed_cost_what_was_under_way() {
    let laptop = Laptop::take();
    let _managers = NewManagers(laptop.cluster);
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (_local, intercept) = intercepted(&laptop, &web, ALL);

    let load = to_the_service(&web, CONNECTIONS);
    moment();
    let killed = Stamp::now();
    kill(laptop.cluster, &[laptop.manager().as_str()]);
    pause(Duration::from_secs(5));
    let record = load.finish();
    cost("one manager of two, killed", &record);
    let settled = record.settled_after(killed, is_laptop);
    println!("the laptop serves again after {settled:?}");
    assert!(settled <= Duration::from_millis(3200), "the other manager takes over only after {settled:?}");
    laptop.cluster.managers_ready(2);
    intercept.until_covered(2);

    // The kubelet lets the one that was killed before wait for a while, and starts the other at once.
    let load = to_the_service(&web, CONNECTIONS);
    moment();
    let killed = Stamp::now();
    kill(laptop.cluster, &["tpd-manager-0", "tpd-manager-1"]);
    pause(Duration::from_secs(7));
    let record = load.finish();
    cost("both managers, killed", &record);
    println!("the laptop serves again after {:?}", record.settled_after(killed, is_laptop));
    intercept.until_covered(2);
}

/// A name server in a pod, and a name that nobody else knows.
struct Oracle {
    workload: Workload,
    address: String,
}

impl Drop for Oracle {
    fn drop(&mut self) {
        let _ = self.workload.kubectl("delete configmap oracle --ignore-not-found");
    }
}

fn oracle(laptop: &Laptop) -> Oracle {
    let corefile = r#".:53 {
    ready
    template IN A vault.hidden.example {
        answer "{{ .Name }} 5 IN A 192.0.2.90"
    }
    template IN AAAA vault.hidden.example {
        authority "hidden.example. 5 IN SOA ns.hidden.example. hostmaster.hidden.example. 1 7200 3600 1209600 5"
    }
    template ANY ANY {
        rcode NXDOMAIN
        authority ". 5 IN SOA a.root. hostmaster.root. 1 7200 3600 1209600 5"
    }
}
"#;
    laptop.cluster.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "oracle", "namespace": "store" },
        "data": { "Corefile": corefile },
    }));
    let spec = json!({
        "containers": [{
            "image": "tpd-test/coredns:1", "args": ["-conf", "/etc/coredns/Corefile"],
            "readinessProbe": { "httpGet": { "path": "/ready", "port": 8181 } },
            "securityContext": {
                "runAsUser": 0, "capabilities": { "add": ["NET_BIND_SERVICE"], "drop": ["ALL"] },
            },
            "volumeMounts": [{ "name": "config", "mountPath": "/etc/coredns", "readOnly": true }],
        }],
        "volumes": [{ "name": "config", "configMap": { "name": "oracle" } }],
    });
    let workload = Workload::deploy(laptop.cluster, "oracle", 1, &json!({ "spec": spec }));
    let pod = workload.until_ready(1).remove(0);
    let address = pod_address(&workload, &pod).to_string();
    Oracle { workload, address }
}

#[test]
fn names_that_only_the_pods_own_name_server_knows_are_resolved_with_an_intercept_alone() {
    let laptop = Laptop::take();
    let oracle = oracle(&laptop);
    let changes = json!({
        "metadata": { "labels": { INJECT: ENABLED } },
        "spec": { "dnsPolicy": "None", "dnsConfig": { "nameservers": [oracle.address], "searches": ["hidden.example"] } },
    });
    let seeker = Workload::deploy(laptop.cluster, "seeker", 1, &changes);
    seeker.until_ready(1);
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let lookup = "getent hosts vault.hidden.example";
    laptop.run(lookup).ends_with(2);
    let intercept = laptop.intercept("store", "seeker", ALL);
    laptop.run(lookup).ends_with(2);
    intercept.change(&format!("{ALL} --dns hidden.example --dns vault"));
    until(SOON, "the name is resolved as the pod resolves it", || {
        let run = laptop.run(lookup);
        if run.code == Some(0) { Ok(()) } else { Err(run) }
    });
    laptop.run(lookup).ok().says(&["192.0.2.90"]);
    // The pod finds it by its search list, too.
    laptop.run("dig +short vault.").ok().says(&["192.0.2.90"]);
    laptop.run("getent hosts nosuch.hidden.example").ends_with(2).within(SOON);
    laptop.run("getent hosts www.example.com").ok();
    intercept.leave();
    until(Duration::from_secs(10), "the name is gone with the intercept", || {
        let run = laptop.run(lookup);
        if run.code == Some(2) { Ok(()) } else { Err(run) }
    });
}

/// A pod that nothing owns and no Service leads to, with two containers. It goes when this is dropped.
struct Solo(&'static Cluster);

impl Solo {
    fn create(cluster: &'static Cluster) -> Self {
        let container = |name: &str, port: Value| {
            let address = format!(":{}", port["containerPort"]);
            json!({
                "name": name, "image": "tpd-test/echo:1", "imagePullPolicy": "Never",
                "args": ["http", "-name", format!("solo-{name}"), address],
                "env": [{ "name": "ROLE", "value": name }], "ports": [port],
                "resources": { "requests": { "cpu": "10m", "memory": "16Mi" } },
            })
        };
        let solo = Self(cluster);
        cluster.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "solo", "namespace": "store", "labels": { "app": "solo", INJECT: ENABLED } },
            "spec": { "terminationGracePeriodSeconds": 1, "containers": [
                container("front", json!({ "containerPort": 8080 })),
                container("meter", json!({ "name": "metrics", "containerPort": 8081 })),
            ] },
        }));
        cluster.kubectl("-n store wait pod/solo --for=condition=Ready --timeout=30s").ok();
        solo
    }

    fn url(&self, port: u16) -> String {
        let pod = self.0.object("pod solo -n store");
        format!("http://{}:{port}", pod["status"]["podIP"].as_str().expect("a running pod has an address"))
    }
}

impl Drop for Solo {
    fn drop(&mut self) {
        let _ = self.0.kubectl("-n store delete pod solo --ignore-not-found");
    }
}

#[test]
fn a_pod_that_stands_alone_hands_each_port_of_each_container_to_its_own_process() {
    let laptop = Laptop::take();
    let solo = Solo::create(laptop.cluster);
    let _connection = connected(&laptop);
    let (front, meter) = (Local::start(&laptop, LOCAL), Local::start(&laptop, "127.0.0.1:9091"));
    let file = "/run/solo.env";
    let arguments = format!("--port 9091:metrics --port 9090:8080 --env-file {file}");
    let intercept = laptop.intercept("store", "pod/solo", &arguments);
    intercept.until_covered(1);
    let before = (front.counts().requests, meter.counts().requests);
    for port in [8080, 8081, 8081, 8080, 8081] {
        assert_eq!(answered_by(&laptop, &solo.url(port), ""), "laptop", "port {port}");
    }
    let served = (front.counts().requests - before.0, meter.counts().requests - before.1);
    assert_eq!(served, (2, 3), "requests went to the process of another port");
    let ports = intercept.status().ports;
    let containers: Vec<_> = ports.iter().filter_map(|port| port.container.as_deref()).collect();
    assert_eq!(containers, ["meter", "front"]);
    // Of the container that has the first of the ports.
    let environment = laptop.run(&format!("cat {file}; rm {file}"));
    environment.ok().says(&["ROLE="]);
    assert!(environment.out().contains("meter") && !environment.out().contains("front"), "{environment}");
    intercept.leave();
    for (port, name) in [(8080, "solo-front"), (8081, "solo-meter")] {
        until(SOON, "each app serves its port again", || {
            let who = answered_by(&laptop, &solo.url(port), "");
            if who == name { Ok(()) } else { Err(who) }
        });
    }
}

#[test]
fn a_tap_has_what_its_filter_says_and_what_is_no_http() {
    let laptop = Laptop::take();
    let second = laptop.second();
    let (_connection, _connection2) = (connected(&laptop), connected(&second));
    let web = web(&laptop, 1);
    let (_local, intercept) = intercepted(&laptop, &web, MARKED);
    let (tap, tapped) = intercepted(&second, &web, "--port 9090:http --path '/copy/*' --wiretap");
    let before = intercept.status().traffic;
    for number in 0..10 {
        let mark = if number == 0 { "-H 'X-Intercept: dev'" } else { "" };
        let path = if number < 4 { "copy/x" } else { "x" };
        let who = answered_by(&laptop, &format!("{}/{path}", web.url()), mark);
        assert_eq!(who == "laptop", number == 0, "request {number} is answered by {who}");
    }
    until(SOON, "there is a copy of each of four requests", || {
        let copies = tap.counts().requests;
        if copies == 4 { Ok(()) } else { Err(format!("{copies} copies")) }
    });

    // What went where is told to people and to programs, and whose it is.
    assert_eq!((before.to_laptop, before.to_app), (0, 0), "{before:?}");
    until(Duration::from_secs(6), "`tpd status` has the share", || {
        let run = laptop.run("tpd status");
        if run.stdout.contains("10.0 % came here (1 here, 9 to the app, 0 failed open)") {
            Ok(())
        } else {
            Err(run)
        }
    });
    let list = laptop.run("tpd list --namespace store");
    list.ok().says(&["deployment/web", "you, here", "dev2", "a copy of requests with path /copy/*"]);
    let list: Value = serde_json::from_str(laptop.run("tpd list --namespace store -o json").ok().out())
        .expect("`tpd list -o json` prints JSON");
    assert_eq!(list["own"].as_array().map(Vec::len), Some(1), "{list}");
    assert_eq!(list["others"][0]["owner"], "dev2", "{list}");
    assert_eq!(list["others"][0]["mode"], "Wiretap", "{list}");
    tapped.leave();

    let listener = second.inside(|| TcpListener::bind("127.0.0.1:9091")).expect("the local port is free");
    let (heard, lines) = mpsc::channel();
    thread::spawn(move || {
        // The first ones are proofs of the intercept, with nobody behind them.
        let line = |stream| BufReader::new(stream).lines().map_while(Result::ok).next();
        heard.send(listener.incoming().filter_map(Result::ok).find_map(line))
    });
    let tapped = second.intercept("store", "web", "--port 9091:http --wiretap");
    tapped.until_covered(1);
    let pod = SocketAddr::new(pod_address(&web, &web.ready()[0]), 8080);
    let answer = inside(&laptop.cluster.netns("node"), || {
        let mut stream = TcpStream::connect_timeout(&pod, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"\x01no HTTP\n\r\n\r\n")?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
    });
    let answer = answer.expect("the pod takes the connection");
    assert!(answer.contains("400 Bad Request"), "the app does not answer as always: {answer:?}");
    let copy = lines.recv_timeout(SOON).expect("the tap hears of it");
    assert_eq!(copy.as_deref(), Some("\x01no HTTP"));
}

/// A namespace where developers may intercept, with this value of [`INJECT`]. It goes when this is dropped.
struct Namespace(&'static Cluster, &'static str);

impl Namespace {
    fn create(cluster: &'static Cluster, name: &'static str, inject: &str) -> Self {
        cluster.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": [
            { "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": { INJECT: inject } } },
            { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
              "metadata": { "name": "developers", "namespace": name },
              "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "tpd-intercept" },
              "subjects": [{ "kind": "Group", "name": "tpd-developers", "apiGroup": "rbac.authorization.k8s.io" }] },
        ] }));
        Self(cluster, name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kubectl(&format!("delete namespace {} --wait=false", self.1));
    }
}

#[test]
fn namespaces_labels_and_annotations_say_which_pods_get_agents() {
    let laptop = Laptop::take();
    let (_open, _shut) = (
        Namespace::create(laptop.cluster, "open", ENABLED),
        Namespace::create(laptop.cluster, "shut", DISABLED),
    );
    let annotated = |value: &str| json!({ "metadata": { "annotations": { INJECT: value } } });
    let labelled = json!({ "metadata": { "labels": { INJECT: ENABLED } } });
    let cases = [
        ("open", "plain", json!({}), 1),
        ("open", "never", annotated(DISABLED), 0),
        ("store", "asked", annotated(ENABLED), 1),
        ("store", "unasked", json!({}), 0),
        ("shut", "asked", labelled, 0),
    ];
    let deploy = |(namespace, name, changes, agents): &(&str, &str, Value, usize)| {
        (Workload::deploy_in(laptop.cluster, namespace, name, 1, changes), *agents)
    };
    let workloads: Vec<_> = cases.iter().map(deploy).collect();
    for (workload, agents) in &workloads {
        let pods = workload.until_ready(1);
        assert_eq!(workload.injected().len(), *agents, "{pods:?} in {}", workload.namespace);
    }

    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let refused = |workload: &Workload, code, words: &[&str]| {
        let pods = workload.ready();
        let run = laptop.try_intercept(&workload.namespace, &workload.name, ALL);
        let _ = laptop.run("tpd leave --all");
        run.exits(code).says(words).within(SOON);
        assert_eq!(workload.ready(), pods, "a pod was replaced for nothing");
        assert!(is_pod(&answered_by(&laptop, &workload.url(), "")));
    };
    refused(&workloads[1].0, ExitCode::NoAgent, &["deployment/never", INJECT, DISABLED]);
    refused(
        &workloads[4].0,
        ExitCode::Forbidden,
        &["namespace shut", INJECT, DISABLED, "kubectl label namespace shut"],
    );
    let (_intercept, asked) = (laptop.intercept("store", "asked", ALL), &workloads[2].0);
    assert_eq!(answered_by(&laptop, &asked.url(), ""), "laptop");
}

#[test]
fn streams_of_one_http2_connection_go_each_their_way_and_change_side_without_a_failure() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let (_local, intercept) = intercepted(&laptop, &web, MARKED);
    let load = || {
        let load = Load::on(Source::Node, &web.url()).with(&format!("-http2 -mark {MARK} -mark-every 2"));
        load.connections(CONNECTIONS)
    };
    let record = load().requests(400).run(laptop.cluster);
    record.none_failed();
    assert!(record.marked.keys().all(|name| is_laptop(name)), "{:?}", record.marked);
    assert!(record.unmarked.keys().all(|name| is_pod(name)), "{:?}", record.unmarked);
    assert!(!record.marked.is_empty() && !record.unmarked.is_empty(), "{}", record.summary());

    let load = load().rate(400).start(laptop.cluster);
    moment();
    intercept.change(ALL);
    let unfiltered = Stamp::now();
    moment();
    let filtering = Stamp::now();
    intercept.change(MARKED);
    moment();
    intercept.leave();
    let left = Stamp::now();
    moment();
    let record = load.finish();
    println!("{}", record.summary());
    record.none_failed();
    let settled =
        [record.settled_between(unfiltered, filtering, is_laptop), record.settled_after(left, is_pod)];
    println!("every connection has changed side after {settled:?}");
    let soon = Duration::from_millis(500);
    assert!(settled.iter().all(|time| *time <= soon), "connections change side only after {settled:?}");
}
