//! Services that are created, edited, led elsewhere and deleted while their pods are intercepted.

mod restricted;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::STREAM_PORT;
use tpd_api::agent::{
    AGENT_PATH, AGENT_UPGRADE, AUDIENCE, Config, Entry, Hello, SERVER_NAME, Service, ToAgent, ToManager,
};
use tpd_api::inject::INJECT;
use tpd_api::intercept::{ACCEPTED, InterceptStatus};
use tpd_netstack::key::PrivateKey;
use tpd_tests::{
    Cluster, Laptop, Load, Local, Running, Source, Stamp, Workload, is_laptop, is_pod, pause, until,
};

use crate::store::{ALL, LOCAL, answered_by, connected, curl, intercepted, moment, pod_address};

/// The node, the managers and the agents follow a Service within this.
const SOON: Duration = Duration::from_secs(5);

/// Long enough for a pod to be replaced, if somebody had a mind to.
const AGES: Duration = Duration::from_secs(5);

/// A pod template's change: another port, `admin`, and this value of [`INJECT`].
fn two_ports(inject: &str) -> Value {
    json!({
        "metadata": { "labels": { INJECT: inject } },
        "spec": { "containers": [{
            "args": ["http", ":8080", ":9000"],
            "ports": [{}, { "name": "admin", "containerPort": 9000 }],
        }] },
    })
}

/// The same, admissible where Pod Security is *restricted*.
fn restricted_ports(inject: &str) -> Value {
    let mut changes = two_ports(inject);
    changes["spec"]["securityContext"] =
        json!({ "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } });
    changes["spec"]["containers"][0]["securityContext"] =
        json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    changes
}

/// The UIDs of a workload's pods: others, and one was replaced.
pub(crate) fn uids(workload: &Workload) -> Vec<String> {
    let mut uids: Vec<_> = workload.pods().iter().map(|pod| pod["metadata"]["uid"].to_string()).collect();
    uids.sort_unstable();
    uids
}

/// Changes what a Service of the workload's namespace says.
#[track_caller]
fn edit(workload: &Workload, service: &str, spec: &Value) {
    let patch = json!({ "spec": spec });
    workload.kubectl(&format!("patch service {service} --type=merge -p '{patch}'")).ok();
}

/// Another Service for a workload, which goes when this is dropped.
struct Extra<'a> {
    workload: &'a Workload,
    name: &'static str,
}

impl<'a> Extra<'a> {
    fn create(workload: &'a Workload, name: &'static str, port: u16, target: &Value) -> Self {
        let extra = Self { workload, name };
        extra.apply(port, target);
        extra
    }

    fn apply(&self, port: u16, target: &Value) {
        self.workload.cluster.apply(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": self.name, "namespace": self.workload.namespace },
            "spec": {
                "selector": { "app": self.workload.name },
                "ports": [{ "name": "extra", "port": port, "targetPort": target }],
            },
        }));
    }

    fn url(&self, port: u16) -> String {
        let name = format!("{}/{}", self.workload.namespace, self.name);
        format!("http://{}:{port}", self.workload.cluster.service(&name)[0])
    }

    fn delete(&self) {
        self.workload.kubectl(&format!("delete service {}", self.name)).ok();
    }
}

impl Drop for Extra<'_> {
    fn drop(&mut self) {
        let _ = self.workload.kubectl(&format!("delete service {} --ignore-not-found", self.name));
    }
}

/// Waits until those answer at a URL.
#[track_caller]
fn until_answered(laptop: &Laptop, url: &str, what: &str, by: impl Fn(&str) -> bool) {
    until(SOON, what, || {
        let run = curl(laptop, url, "--max-time 1");
        let answer: Value = serde_json::from_str(run.out()).unwrap_or_default();
        if answer["server"].as_str().is_some_and(&by) { Ok(()) } else { Err(run) }
    });
}

#[test]
fn an_intercept_of_a_services_port_goes_where_the_service_leads() {
    let laptop = Laptop::take();
    let moved = Workload::deploy(laptop.cluster, "moved", 2, &two_ports("enabled"));
    let pod = moved.until_ready(2).remove(0);
    let before = uids(&moved);
    let _connection = connected(&laptop);
    let (_local, intercept) = intercepted(&laptop, &moved, "--port 9090:80");
    let leads_to = |status: &InterceptStatus, port: u16| status.ports.iter().all(|one| one.port == port);
    assert!(leads_to(&intercept.status(), 8080), "{:?}", intercept.status().ports);
    let at = |port: u16| format!("http://{}", SocketAddr::new(pod_address(&moved, &pod), port));

    let load = Load::on(Source::Node, &moved.url()).with("-close").connections(4).rate(100);
    let load = load.start(laptop.cluster);
    moment();
    let retargeted = Stamp::now();
    edit(&moved, "moved", &json!({ "ports": [{ "name": "http", "port": 80, "targetPort": "admin" }] }));
    pause(Duration::from_secs(3));
    let record = load.finish();
    record.none_failed();
    let settled = record.settled_after(retargeted, is_laptop);
    println!("{}; the laptop has the other port after {settled:?}", record.summary());

    intercept.until(SOON, "the status names the other port", |status| leads_to(status, 9000));
    assert_eq!(answered_by(&laptop, &at(9000), ""), "laptop");
    assert_eq!(answered_by(&laptop, &at(8080), ""), pod, "a port that the Service has left is still taken");
    // And back, by its number.
    edit(&moved, "moved", &json!({ "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] }));
    until_answered(&laptop, &at(8080), "the intercept has followed back", is_laptop);
    until_answered(&laptop, &at(9000), "the other port is the app's again", is_pod);
    intercept.until_covered(2);
    assert_eq!(answered_by(&laptop, &moved.url(), ""), "laptop");
    assert_eq!(uids(&moved), before, "an edited Service has replaced pods");
}

#[test]
fn a_service_that_is_led_to_another_workload_takes_its_traffic_along() {
    let laptop = Laptop::take();
    let blue = Workload::deploy(laptop.cluster, "blue", 1, &two_ports("enabled"));
    let green = Workload::deploy(laptop.cluster, "green", 1, &two_ports("enabled"));
    blue.until_ready(1);
    green.until_ready(1);
    let before = (uids(&blue), uids(&green));
    let _connection = connected(&laptop);
    let (_local, intercept) = intercepted(&laptop, &blue, ALL);
    let front = Extra::create(&blue, "front", 82, &json!(8080));
    let url = front.url(82);
    until_answered(&laptop, &url, "a Service that is created leads to the laptop", is_laptop);
    edit(&blue, "front", &json!({ "selector": { "app": "green" } }));
    until_answered(&laptop, &url, "the Service leads to the other app", |who| who.starts_with("green"));
    assert_eq!(answered_by(&laptop, &blue.url(), ""), "laptop", "what was not edited is disturbed");
    edit(&blue, "front", &json!({ "selector": { "app": "blue" } }));
    until_answered(&laptop, &url, "the Service leads to the laptop again", is_laptop);
    intercept.until_covered(1);
    assert_eq!((uids(&blue), uids(&green)), before, "an edited Service has replaced pods");
}

#[test]
fn a_deleted_service_ends_what_was_asked_for_by_its_port_and_nothing_else() {
    let laptop = Laptop::take();
    let kept = Workload::deploy(laptop.cluster, "kept", 1, &two_ports("enabled"));
    let pod = kept.until_ready(1).remove(0);
    let before = uids(&kept);
    let _connection = connected(&laptop);
    let at = |port: u16| format!("http://{}", SocketAddr::new(pod_address(&kept, &pod), port));

    // Asked for by the container's port: whoever knows the pod's address comes to the laptop, with or without a Service.
    let (_local, intercept) = intercepted(&laptop, &kept, ALL);
    kept.kubectl("delete service kept").ok();
    pause(Duration::from_secs(3));
    intercept.until_covered(1);
    assert_eq!(answered_by(&laptop, &at(8080), ""), "laptop", "the intercept went with a Service");
    intercept.leave();

    // Asked for by the Service's port: nobody can say any more which of the pod's ports that was.
    let extra = Extra::create(&kept, "kept-too", 81, &json!("admin"));
    let intercept = laptop.intercept("store", "kept", "--port 9090:81");
    intercept.until_covered(1);
    assert_eq!(answered_by(&laptop, &at(9000), ""), "laptop");
    extra.delete();
    intercept.until(SOON, "it is said that the port is gone", |status| {
        let mut conditions = status.conditions.iter();
        conditions.any(|one| one.type_ == ACCEPTED && one.status == "False" && one.message.contains("`81`"))
    });
    until_answered(&laptop, &at(9000), "the app serves without the Service", is_pod);
    laptop.run("tpd status").ok().says(&["kept", "`81`"]);
    extra.apply(81, &json!("admin"));
    until_answered(&laptop, &at(9000), "the intercept is back with the Service", is_laptop);
    intercept.until_covered(1);
    assert_eq!(uids(&kept), before, "a deleted Service has replaced pods");
}

/// Where no port may be redirected, what an agent can take depends on what Services said when its pod was made.
#[test]
fn edited_services_evict_nobody_before_an_intercept_needs_it_and_then_once() {
    let laptop = Laptop::take();
    let drawer = Workload::deploy_in(laptop.cluster, "locked", "drawer", 0, &restricted_ports("enabled"));
    // The Service is there before the pod.
    drawer.scale(1);
    drawer.until_ready(1);
    assert_eq!(drawer.injected().len(), 1, "{}", drawer.pods()[0]["metadata"]["annotations"]);
    let before = uids(&drawer);
    let _connection = connected(&laptop);

    // Made anew, the agent would have `admin` too. Nobody needs that.
    let both = json!([
        { "name": "http", "port": 80, "targetPort": "http" },
        { "name": "admin", "port": 9000, "targetPort": "admin" },
    ]);
    edit(&drawer, "drawer", &json!({ "ports": both }));
    drop(Extra::create(&drawer, "drawer-too", 82, &json!("http")));
    pause(AGES);
    assert_eq!(uids(&drawer), before, "an edited Service has replaced a pod that nobody intercepts");
    let (_local, intercept) = intercepted(&laptop, &drawer, ALL);
    let admin = format!("{}:9000", drawer.url());
    assert_eq!(answered_by(&laptop, &drawer.url(), ""), "laptop");
    assert!(is_pod(&answered_by(&laptop, &admin, "")));
    pause(AGES);
    assert_eq!(uids(&drawer), before, "a pod was replaced for a port that no intercept needs");
    intercept.leave();

    let intercept = laptop.intercept("locked", "drawer", "--port 9090:admin");
    intercept.until_covered(1);
    assert_eq!(answered_by(&laptop, &admin, ""), "laptop");
    assert!(is_pod(&answered_by(&laptop, &drawer.url(), "")));
    let after = uids(&drawer);
    assert_ne!(after, before, "an agent has a port that it had not taken");
    pause(AGES);
    assert_eq!(uids(&drawer), after, "a pod was replaced again");
}

/// What a manager tells an agent, as long as this lives: one by hand, with the token of a pod that has none.
pub(crate) struct Told {
    file: PathBuf,
    _control: Running,
}

impl Told {
    pub(crate) fn begin(cluster: &Cluster, pod: &str) -> Self {
        let key = PrivateKey::generate().expect("the kernel has random numbers");
        let hello = ToManager::Hello(Box::new(Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            public_key: key.public().to_string(),
            entry: Entry::Redirect,
        }));
        let bound = format!("--audience {AUDIENCE} --bound-object-kind Pod --bound-object-name {pod}");
        let token = cluster.kubectl(&format!("-n store create token default {bound}"));
        let request = format!(
            "GET {AGENT_PATH} HTTP/1.1\r\nHost: {SERVER_NAME}\r\nConnection: upgrade\r\nUpgrade: {AGENT_UPGRADE}\r\n\
             Authorization: Bearer {}\r\n\r\n{}\n",
            token.ok().out(),
            json!(hello)
        );
        let manager = cluster.object("pod tpd-manager-0 -n tpd-system")["status"]["podIP"].clone();
        let manager: IpAddr =
            manager.as_str().and_then(|ip| ip.parse().ok()).expect("a running manager has an address");
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("told-to-an-agent");
        fs::write(&file, "").expect("the target directory can be written");
        let script = format!(
            "exec openssl s_client -quiet -servername {SERVER_NAME} -connect {} >{} 2>&1",
            SocketAddr::new(manager, STREAM_PORT),
            file.display()
        );
        let control = cluster.node_script(&script).input(request).limit(Duration::from_secs(300)).start();
        Self { file, _control: control }
    }

    /// Every configuration so far.
    fn configs(&self) -> Vec<Config> {
        let text = fs::read(&self.file).expect("the file is there");
        let config = |line: &str| match serde_json::from_str(line).ok()? {
            ToAgent::Config(config) => Some(*config),
            _ => None,
        };
        String::from_utf8_lossy(&text).lines().filter_map(config).collect()
    }

    /// Waits until the newest one says so of the pod's Services.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, is_so: impl Fn(&[Service]) -> bool) -> Config {
        let newest = || -> Result<Config, String> {
            let newest = self.configs().pop().ok_or("none was sent")?;
            if is_so(&newest.services) { Ok(newest) } else { Err(format!("{:#?}", newest.services)) }
        };
        until(SOON, what, newest).0
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

#[test]
fn agents_are_told_of_every_change_to_the_services_of_their_pods() {
    let laptop = Laptop::take();
    // Without an agent of its own, whose place one by hand would take.
    let told = Workload::deploy(laptop.cluster, "told", 2, &two_ports("disabled"));
    let mut pods = told.until_ready(2);
    let (pod, sibling) = (pods.remove(0), pods.remove(0));
    let agent = Told::begin(laptop.cluster, &pod);

    let first = agent.until("the first configuration has the Service", |services| services.len() == 1);
    let service = &first.services[0];
    assert_eq!((service.name.as_str(), &service.siblings), ("told", &vec![sibling.clone()]));
    assert_eq!(service.cluster_ips, laptop.cluster.service("store/told"));
    let port = &service.ports[0];
    assert_eq!((port.name.as_deref(), port.port, port.target), (Some("http"), 80, Some(8080)));
    for name in ["told", "told.store", "told.store.svc", "told.store.svc.cluster.local"] {
        assert!(service.dns_names.iter().any(|one| one == name), "{name} is missing: {service:?}");
    }
    assert_eq!(first.workload, "deployment/told");

    let extra = Extra::create(&told, "told-too", 81, &json!("admin"));
    let target = |services: &[Service]| {
        let extra = services.iter().find(|service| service.name == "told-too")?;
        extra.ports[0].target
    };
    agent.until("a new Service", |services| target(services) == Some(9000));
    let ports = json!({ "ports": [{ "name": "extra", "port": 81, "targetPort": 9191 }] });
    edit(&told, "told-too", &ports);
    agent.until("another target", |services| target(services) == Some(9191));
    edit(&told, "told-too", &json!({ "selector": { "app": "nobody" } }));
    agent.until("a Service that leads elsewhere", |services| services.len() == 1);
    edit(&told, "told-too", &json!({ "selector": { "app": "told" } }));
    agent.until("a Service that leads here again", |services| services.len() == 2);
    extra.delete();
    agent.until("a Service that is gone", |services| services.len() == 1);

    told.kubectl(&format!("delete pod {sibling} --wait=false")).ok();
    let others = |services: &[Service]| {
        let siblings = services.first().map(|service| service.siblings.clone()).unwrap_or_default();
        siblings.len() == 1 && siblings[0] != sibling
    };
    agent.until("another pod beside it", others);
    let generations: Vec<_> = agent.configs().iter().map(|config| config.generation).collect();
    assert!(generations.is_sorted_by(|one, next| one < next), "generations do not grow: {generations:?}");
    assert!(told.until_ready(2).contains(&pod), "the pod was replaced");
}

#[test]
fn a_workload_that_no_service_leads_to_can_be_intercepted() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let quiet = Workload::deploy(laptop.cluster, "quiet", 1, &json!({}));
    quiet.kubectl("delete service quiet").ok();
    quiet.until_ready(1);
    let _local = Local::start(&laptop, LOCAL);
    let intercept = laptop.intercept("store", "quiet", "--port 9090");
    intercept.until_covered(1);
    let pod = quiet.ready().pop().expect("one pod");
    let url = format!("http://{}", SocketAddr::new(pod_address(&quiet, &pod), 8080));
    assert_eq!(answered_by(&laptop, &url, ""), "laptop");
    intercept.leave();
    until_answered(&laptop, &url, "the app serves again", |who| who == pod);
}
