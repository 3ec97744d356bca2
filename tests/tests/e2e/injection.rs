//! What injection does to pods, and what it leaves alone.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tpd_api::exit::ExitCode;
use tpd_api::inject::{AGENT, AGENT_UID, INJECT};
use tpd_tests::{Agent, Laptop, Local, Workload, is_laptop, is_pod};

use crate::store::{ALL, LOCAL, answered_by, connected, curl, intercepted, pod_address, web};

/// Until the intercept of a workload that cannot have agents has told why, or a policy is in force.
const SOON: Duration = Duration::from_secs(30);

/// A pod template's change that gives it this value of [`INJECT`].
fn labelled(value: &str, spec: &Value) -> Value {
    json!({ "metadata": { "labels": { INJECT: value } }, "spec": spec })
}

/// A container of a pod by its name, sidecars and init containers included.
fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    let lists = [&pod["spec"]["initContainers"], &pod["spec"]["containers"]];
    lists.into_iter().filter_map(Value::as_array).flatten().find(|one| one["name"] == name)
}

#[test]
fn a_label_has_pods_get_an_agent_before_anybody_asks() {
    let laptop = Laptop::take();
    let eager = Workload::deploy(laptop.cluster, "eager", 1, &labelled("enabled", &json!({})));
    let plain = Workload::deploy(laptop.cluster, "plain", 1, &json!({}));
    eager.until_ready(1);
    plain.until_ready(1);
    assert_eq!(eager.injected().len(), 1, "a pod with {INJECT}=enabled has no agent");
    assert_eq!(plain.injected().len(), 0, "a pod that nobody asked for has an agent");
    let pods = eager.ready();
    let _connection = connected(&laptop);
    let (_local, _intercept) = intercepted(&laptop, &eager, ALL);
    assert_eq!(eager.ready(), pods, "a pod that had an agent was replaced");
    assert_eq!(answered_by(&laptop, &eager.url(), ""), "laptop");
}

#[test]
fn a_label_keeps_agents_out_and_the_developer_is_told() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let closed = Workload::deploy(laptop.cluster, "closed", 1, &labelled("disabled", &json!({})));
    let pods = closed.until_ready(1);
    let run = laptop.try_intercept("store", "closed", ALL);
    let _ = laptop.run("tpd leave --all");
    run.exits(ExitCode::NoAgent).says(&[INJECT, "disabled"]).within(Duration::from_secs(15));
    assert_eq!(closed.ready(), pods, "the pod was replaced for nothing");
    assert!(is_pod(&answered_by(&laptop, &closed.url(), "")));
}

#[test]
fn what_will_be_replaced_is_said_before_it_is() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let fresh = Workload::deploy(laptop.cluster, "fresh", 2, &json!({}));
    let pods = fresh.until_ready(2);
    // The developer may not even list pods: it is the manager that says it.
    let command = format!("tpd intercept fresh --namespace store --yes {ALL}");
    let run = laptop.script(&command).limit(Duration::from_secs(60)).run();
    let _ = laptop.run("tpd leave --all");
    run.ok().says(&["takes all traffic", "2 pods without an agent", "will be replaced", &pods[0], &pods[1]]);
    let (announced, made) = (run.stderr.find("will be replaced"), run.stderr.find("creating the intercept"));
    assert!(announced < made, "it is said when it is too late:\n{run}");

    // Kubernetes' own tools say it too.
    let other = Workload::deploy(laptop.cluster, "other", 1, &json!({}));
    other.until_ready(1);
    let session = laptop.session();
    let object = json!({
        "apiVersion": "tpd.dev/v1alpha1", "kind": "Intercept", "metadata": { "name": "by-hand", "namespace": "store" },
        "spec": {
            "owner": "dev", "session": session, "workload": { "kind": "Deployment", "name": "other" },
            "ports": [{ "port": "http", "overlayPort": 40_000 }], "filter": { "paths": ["/x"] },
        },
    });
    laptop
        .script("kubectl create --dry-run=server -f -")
        .input(object.to_string())
        .run()
        .ok()
        .says(&["Warning: 1 pod without an agent"]);
}

#[test]
fn a_pod_on_the_hosts_network_is_left_alone() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    // Another port than the samples of the node itself have.
    let spec = json!({ "hostNetwork": true, "containers": [{
        "args": ["http", ":18080"], "ports": [{ "name": "http", "containerPort": 18080 }] }] });
    let host = Workload::deploy(laptop.cluster, "host", 1, &json!({ "spec": spec }));
    let pods = host.until_ready(1);
    let run = laptop.try_intercept("store", "host", ALL);
    let _ = laptop.run("tpd leave --all");
    run.exits(ExitCode::NoAgent).says(&["hostNetwork"]).within(Duration::from_secs(15));
    assert_eq!(host.ready(), pods, "the pod was replaced for nothing");
    assert_eq!(laptop.cluster.node("nft list tables").ok().out().matches("inet tpd\n").count(), 0);
}

#[test]
fn an_agent_changes_no_pods_class() {
    let laptop = Laptop::take();
    let full = json!({ "cpu": "20m", "memory": "32Mi" });
    let classes = [
        ("guaranteed", json!({ "requests": full, "limits": full }), "Guaranteed"),
        ("burstable", json!({}), "Burstable"),
        ("best-effort", json!({ "requests": null }), "BestEffort"),
    ];
    let workloads: Vec<_> = classes
        .iter()
        .map(|(name, resources, class)| {
            let spec = json!({ "containers": [{ "resources": resources }] });
            (Workload::deploy(laptop.cluster, name, 1, &labelled("enabled", &spec)), class)
        })
        .collect();
    for (workload, class) in &workloads {
        workload.until_ready(1);
        let pod = workload.pods().remove(0);
        assert!(container(&pod, AGENT).is_some(), "{} has no agent", workload.name);
        assert_eq!(pod["status"]["qosClass"], **class, "{}", workload.name);
    }
}

/// Containers with a probe of every kind each second, of which three failures are one too many.
fn probed() -> Value {
    let often = |mut probe: Value| {
        probe["periodSeconds"] = json!(1);
        probe["failureThreshold"] = json!(3);
        probe
    };
    let with = |name: &str, port: u16, probe: Value| {
        json!({ "name": name, "image": "tpd-test/echo:1", "imagePullPolicy": "Never",
            "args": ["http", format!(":{port}")], "ports": [{ "name": name, "containerPort": port }],
            "livenessProbe": often(probe.clone()), "readinessProbe": often(probe) })
    };
    json!([
        { "livenessProbe": often(json!({ "httpGet": { "path": "/healthz", "port": "http" } })) },
        with("number", 8081, json!({ "httpGet": { "path": "/healthz", "port": 8081 } })),
        with("tcp", 8082, json!({ "tcpSocket": { "port": "tcp" } })),
        with("grpc", 8083, json!({ "grpc": { "port": 8083 } })),
        with("exec", 8084, json!({ "exec": { "command": ["/usr/bin/tpd-echo", "connect", "127.0.0.1:8084"] } })),
    ])
}

/// The pod that is ready now is so for eight seconds, and nothing in it is restarted.
fn stays_ready(workload: &Workload) {
    let ready = workload.ready();
    for _ in 0..8 {
        tpd_tests::pause(Duration::from_secs(1));
        assert_eq!(workload.ready(), ready, "the pod is not ready: {}", workload.pods()[0]["status"]);
    }
    assert_eq!(workload.restarts(), 0, "{}", workload.pods()[0]["status"]);
}

#[test]
fn probes_of_every_kind_reach_the_app_whatever_the_laptop_does() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let spec = labelled("enabled", &json!({ "containers": probed() }));
    let probed = Workload::deploy(laptop.cluster, "probed", 1, &spec);
    probed.until_ready(1);
    let ports = "--port 9090:http --port 9090:number --port 9090:tcp --port 9090:grpc --port 9090:exec";
    let (local, _intercept) = intercepted(&laptop, &probed, ports);
    local.signal("STOP");
    stays_ready(&probed);
    local.signal("CONT");
    assert_eq!(answered_by(&laptop, &probed.url(), ""), "laptop");
}

/// As where the runtime is gVisor. The kubelet's probes have been pointed at ports that only a redirect leads to the app.
#[test]
fn a_pod_whose_kernel_has_no_nftables_lives_and_the_developer_is_told() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let spec = json!({ "containers": probed(), "runtimeClassName": "no-nftables" });
    let sandboxed = Workload::deploy(laptop.cluster, "sandboxed", 1, &labelled("enabled", &spec));
    sandboxed.until_ready(1);
    assert_eq!(sandboxed.injected().len(), 1, "it has no agent");
    stays_ready(&sandboxed);
    // Nor does it matter to probes what becomes of the agent's worker.
    let pod = &sandboxed.ready()[0];
    Agent::of(laptop.cluster, "store", pod).expect("an agent").signal_worker(laptop.cluster, "KILL");
    stays_ready(&sandboxed);
    let _local = Local::start(&laptop, LOCAL);
    let run = laptop.try_intercept("store", "sandboxed", ALL);
    assert!(is_pod(&answered_by(&laptop, &sandboxed.url(), "")), "the laptop answers without a redirect");
    let _ = laptop.run("tpd leave --all");
    run.exits(ExitCode::Timeout)
        .says(&["does not lead traffic to this pod's agent", "tpd-redirect", "nftables"])
        .within(Duration::from_secs(20));
}

#[test]
fn a_restricted_namespace_lends_its_named_ports() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let till = Workload::sample(laptop.cluster, "locked", "till");
    till.until_ready(1);
    let (local, intercept) = intercepted(&laptop, &till, ALL);
    let pod = till.pods().remove(0);
    assert_eq!(
        container(&pod, tpd_api::inject::INIT),
        None,
        "an init container with a capability was admitted?"
    );
    assert_eq!(answered_by(&laptop, &till.url(), ""), "laptop");
    // A port that the Service knows by its number stays the app's.
    assert!(is_pod(&answered_by(&laptop, &format!("{}:9000", till.url()), "")));
    local.signal("STOP");
    tpd_tests::pause(Duration::from_secs(8));
    local.signal("CONT");
    assert_eq!(till.restarts(), 0, "probes of a taken port do not reach the app");
    intercept.leave();
    let run = laptop.try_intercept("locked", "till", "--port 9090:9000");
    let _ = laptop.run("tpd leave --all");
    assert_ne!(run.code, Some(0), "a port by its number cannot be taken here:\n{run}");
    run.says(&["9000"]).within(Duration::from_secs(15));
    drop(local);
    assert!(is_pod(&answered_by(&laptop, &till.url(), "")));
}

#[test]
fn a_full_quota_lets_pods_start_without_an_agent() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let _namespace = Namespace::create(&laptop, "tight");
    laptop.cluster.apply(&json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "full", "namespace": "tight" },
        "spec": { "hard": { "requests.cpu": "20m", "requests.memory": "33Mi" } },
    }));
    // Room for two pods without an agent, and for nothing else.
    let app = Workload::deploy_in(laptop.cluster, "tight", "app", 1, &json!({}));
    app.until_ready(1);
    let run = laptop.try_intercept("tight", "app", ALL);
    let _ = laptop.run("tpd leave --all");
    run.exits(ExitCode::NoAgent).says(&["quota"]).within(Duration::from_secs(30));
    assert!(is_pod(&answered_by(&laptop, &app.url(), "")));
    app.kubectl("rollout restart deployment app").ok();
    app.kubectl("rollout status deployment app --timeout=30s").ok();
}

#[test]
fn a_limit_range_bounds_agents_as_it_does_apps() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let _namespace = Namespace::create(&laptop, "ranged");
    let range = |least: &str, most: &str| {
        laptop.cluster.apply(&json!({
            "apiVersion": "v1", "kind": "LimitRange", "metadata": { "name": "range", "namespace": "ranged" },
            "spec": { "limits": [{
                "type": "Container", "min": { "cpu": "10m", "memory": least }, "max": { "cpu": "1", "memory": most },
                "default": { "cpu": "500m", "memory": most }, "defaultRequest": { "cpu": "20m", "memory": least },
                "maxLimitRequestRatio": { "memory": "3" },
            }] },
        }));
    };
    range("80Mi", "240Mi");
    let resources = json!({ "requests": { "memory": "80Mi" } });
    let app = Workload::deploy_in(
        laptop.cluster,
        "ranged",
        "app",
        1,
        &json!({ "spec": { "containers": [{ "resources": resources }] } }),
    );
    app.until_ready(1);
    laptop.try_intercept("ranged", "app", ALL).ok();
    assert_eq!(answered_by(&laptop, &app.url(), ""), "laptop");
    laptop.run("tpd leave --all").ok();

    // Where an agent cannot live within the range, pods start without one, and it is said.
    range("4Mi", "12Mi");
    let small = json!({ "requests": { "memory": "4Mi" }, "limits": { "memory": "12Mi" } });
    let small = Workload::deploy_in(
        laptop.cluster,
        "ranged",
        "small",
        1,
        &json!({ "spec": { "containers": [{ "resources": small }] } }),
    );
    small.until_ready(1);
    let run = laptop.try_intercept("ranged", "small", ALL);
    let _ = laptop.run("tpd leave --all");
    run.exits(ExitCode::NoAgent).says(&["LimitRange range"]).within(Duration::from_secs(30));
    assert!(is_pod(&answered_by(&laptop, &small.url(), "")));
}

#[test]
fn a_policy_that_nobody_told_tpd_of_costs_an_agent_and_no_pod() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let _local = Local::start(&laptop, LOCAL);
    let _namespace = Namespace::create(&laptop, "guarded");
    let _policy = Policy::create(&laptop, "guarded");
    let agent = labelled("enabled", &json!({}));
    let deploy = |name| Workload::deploy_in(laptop.cluster, "guarded", name, 1, &agent);
    let (named, bare) = (deploy("named"), deploy("bare"));

    // Without the container that may do more than others, the agent has what is sent to the port's name.
    named.until_ready(1);
    assert_eq!(named.injected().len(), 1, "a pod has no agent, though nothing forbids it one");
    assert_eq!(container(&named.pods()[0], tpd_api::inject::INIT), None);
    laptop.try_intercept("guarded", "named", ALL).ok();
    assert_eq!(answered_by(&laptop, &named.url(), ""), "laptop");
    laptop.run("tpd leave --all").ok();

    bare.until_ready(1);
    assert_eq!(bare.injected().len(), 0, "the policy forbids it");
    let run = laptop.try_intercept("guarded", "bare", ALL);
    let _ = laptop.run("tpd leave --all");
    run.exits(ExitCode::NoAgent).says(&["pods like it did not come to be", "policy"]).within(SOON);
    assert!(is_pod(&answered_by(&laptop, &bare.url(), "")));
}

/// A policy of the cluster's for one namespace: no container may have NET_ADMIN, and pods of the app `bare` no agent.
struct Policy<'a> {
    laptop: &'a Laptop,
    name: &'static str,
}

impl<'a> Policy<'a> {
    fn create(laptop: &'a Laptop, namespace: &'static str) -> Self {
        let every = |holds: &str| {
            format!("!has(object.spec.initContainers) || object.spec.initContainers.all(c, {holds})")
        };
        let capable = "!has(c.securityContext) || !has(c.securityContext.capabilities) || \
                       !has(c.securityContext.capabilities.add) || !('NET_ADMIN' in c.securityContext.capabilities.add)";
        let bare =
            format!("object.metadata.labels['app'] != 'bare' || {}", every(&format!("c.name != '{AGENT}'")));
        let (name, kind) = (namespace, "ValidatingAdmissionPolicy");
        laptop.cluster.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": [
            { "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": { "name": name },
              "spec": {
                  "matchConstraints": { "resourceRules": [{
                      "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"] }] },
                  "validations": [{ "expression": every(capable) }, { "expression": bare }],
              } },
            { "apiVersion": "admissionregistration.k8s.io/v1", "kind": format!("{kind}Binding"),
              "metadata": { "name": name },
              "spec": { "policyName": name, "validationActions": ["Deny"], "matchResources": { "namespaceSelector": {
                  "matchLabels": { "kubernetes.io/metadata.name": namespace } } } } },
        ] }));
        let policy = Self { laptop, name };
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "probe", "namespace": namespace, "labels": { "app": "probe" } },
            "spec": {
                "initContainers": [{ "name": "init", "image": "none", "securityContext": { "capabilities": { "add": ["NET_ADMIN"] } } }],
                "containers": [{ "name": "app", "image": "none" }],
            },
        });
        tpd_tests::until(SOON, "the policy is in force", || {
            let create = "tests/kubernetes/cluster kubectl create --dry-run=server -f -";
            let run = laptop.cluster.machine(create).input(pod.to_string()).run();
            if run.code == Some(0) { Err("pods with NET_ADMIN are admitted") } else { Ok(()) }
        });
        policy
    }
}

impl Drop for Policy<'_> {
    fn drop(&mut self) {
        let kinds = "validatingadmissionpolicybinding,validatingadmissionpolicy";
        let _ = self.laptop.cluster.kubectl(&format!("delete {kinds} {}", self.name));
    }
}

/// A namespace where developers may intercept.
struct Namespace<'a> {
    laptop: &'a Laptop,
    name: &'static str,
}

impl<'a> Namespace<'a> {
    fn create(laptop: &'a Laptop, name: &'static str) -> Self {
        laptop.cluster.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": [
            { "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } },
            { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
              "metadata": { "name": "developers", "namespace": name },
              "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "tpd-intercept" },
              "subjects": [{ "kind": "Group", "name": "tpd-developers", "apiGroup": "rbac.authorization.k8s.io" }] },
        ] }));
        Self { laptop, name }
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        let _ = self.laptop.cluster.kubectl(&format!("delete namespace {} --wait=false", self.name));
    }
}

#[test]
fn the_environment_of_the_app_is_that_of_its_container() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let _local = Local::start(&laptop, LOCAL);
    let file = "/run/web.env";
    let _intercept = laptop.intercept("store", "web", &format!("{ALL} --env-file {file}"));
    let pod = web.ready().pop().expect("one pod");
    laptop.run(&format!("cat {file}")).ok().says(&[
        "GREETING=",
        "hello",
        &format!("hello from {pod}"),
        "correct horse, battery=staple",
    ]);
    let mode = laptop.run(&format!("stat -c %a {file}; rm {file}"));
    assert_eq!(mode.ok().out(), "600", "others can read the Secrets of the environment");
}

#[test]
fn an_app_that_listens_only_on_its_pods_address_is_reached() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let spec = json!({ "containers": [{
        "args": ["http", "$(POD_IP):8080"],
        "env": [{}, { "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }],
    }] });
    let narrow = Workload::deploy(laptop.cluster, "narrow", 1, &json!({ "spec": spec }));
    narrow.until_ready(1);
    let (_local, _intercept) = intercepted(&laptop, &narrow, &format!("{ALL} --header x-intercept=dev"));
    assert!(is_laptop(&answered_by(&laptop, &narrow.url(), "-H 'X-Intercept: dev'")));
    assert!(is_pod(&answered_by(&laptop, &narrow.url(), "")));
}

#[test]
fn an_agent_may_do_nothing_and_needs_little() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (_local, _intercept) = intercepted(&laptop, &web, ALL);
    let name = web.ready().pop().expect("one pod");
    let pod = web.pods().remove(0);
    let agent = container(&pod, AGENT).expect("an agent");
    let context = &agent["securityContext"];
    assert_eq!(context["readOnlyRootFilesystem"], true);
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }));
    let processes = Agent::of(laptop.cluster, "store", &name).expect("a supervisor and a worker");
    for pid in [processes.supervisor, processes.worker] {
        let status = laptop.cluster.node(&format!("cat /proc/{pid}/status"));
        let field = |name: &str| {
            let line = status.out().lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_whitespace().nth(1).unwrap_or_default().to_owned()
        };
        assert_eq!(field("Uid:"), AGENT_UID.to_string());
        assert_eq!(field("CapEff:"), "0000000000000000");
        let resident: u64 = field("VmRSS:").parse().expect("KiB");
        println!("process {pid} of the agent has {resident} KiB");
        assert!(resident < 24 << 10, "an agent with one intercept needs {resident} KiB");
    }
}

#[test]
fn pods_start_as_ever_while_no_manager_answers() {
    let laptop = Laptop::take();
    laptop.cluster.scale(0);
    let orphan = Workload::deploy(laptop.cluster, "orphan", 1, &labelled("enabled", &json!({})));
    let began = Instant::now();
    orphan.until_ready(1);
    println!("ready after {:?}", began.elapsed());
    assert!(is_pod(&answered_by(&laptop, &orphan.url(), "")));
    laptop.cluster.scale(2);
}

#[test]
fn nothing_but_pods_is_changed() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 2);
    let versions = || {
        ["service web", "ingress web", "hpa web"]
            .map(|what| laptop.cluster.object(&format!("{what} -n store"))["spec"].clone())
    };
    let template = || laptop.cluster.object("deployment web -n store")["metadata"]["generation"].clone();
    let before = (versions(), template());
    let (_local, intercept) = intercepted(&laptop, &web, ALL);
    assert_eq!((versions(), template()), before, "an intercept changes what it must not");
    let endpoints = laptop.cluster.object("endpointslices -n store -l kubernetes.io/service-name=web");
    for pod in web.ready() {
        let address = pod_address(&web, &pod).to_string();
        assert!(endpoints.to_string().contains(&address), "{pod} is no endpoint any more: {endpoints}");
    }
    intercept.leave();
    assert_eq!((versions(), template()), before, "leaving changes what it must not");
    curl(&laptop, &web.url(), "").ok();
}
