//! Everything that can be wrong before a connection: each has a message that says what to do, and its own exit code.

use std::fs;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tpd_api::exit::ExitCode;
use tpd_tests::{Laptop, Run, Snapshot, until};

/// A command that cannot succeed says so within this.
const SOON: Duration = Duration::from_secs(15);

/// Runs a `tpd up` that has to fail, and checks that it changed nothing.
#[track_caller]
fn refused(laptop: &Laptop, script: &str, code: ExitCode, words: &[&str]) -> Run {
    let before = Snapshot::of(laptop);
    let run = laptop.run(script);
    run.exits(code).says(words).within(SOON);
    assert!(run.stderr.starts_with("error: ") || run.stderr.contains("\nerror: "), "no error line:\n{run}");
    laptop.until_as(&before, Duration::ZERO);
    run
}

/// A file for this test.
fn file(name: &str, text: &str) -> String {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, text).expect("the target directory can be written");
    path.display().to_string()
}

/// The developer's kubeconfig with some text replaced.
fn kubeconfig(laptop: &Laptop, name: &str, from: &str, to: &str) -> String {
    let text = fs::read_to_string(laptop.cluster.kubeconfig("developer")).expect("the cluster made it");
    assert!(text.contains(from), "the developer's kubeconfig has no {from:?}");
    file(name, &text.replace(from, to))
}

#[test]
fn no_kubeconfig() {
    let laptop = Laptop::take();
    let help = ["--kubeconfig", "/nowhere"];
    refused(&laptop, "KUBECONFIG=/nowhere/config tpd up", ExitCode::Kubeconfig, &help);
    refused(&laptop, "env -u KUBECONFIG HOME=/nowhere tpd up", ExitCode::Kubeconfig, &help);
    refused(&laptop, "tpd up --kubeconfig /nowhere/config", ExitCode::Kubeconfig, &["/nowhere/config"]);
    let garbage = file("garbage.kubeconfig", "{ this is: [not YAML");
    refused(&laptop, &format!("tpd up --kubeconfig {garbage}"), ExitCode::Kubeconfig, &[&garbage]);
    let empty = file("empty.kubeconfig", "");
    refused(&laptop, &format!("tpd up --kubeconfig {empty}"), ExitCode::Kubeconfig, &["context"]);
}

#[test]
fn an_unknown_context() {
    let laptop = Laptop::take();
    let known = laptop.run("kubectl config current-context");
    refused(
        &laptop,
        "tpd up --context nosuch",
        ExitCode::Kubeconfig,
        &["nosuch", known.ok().out(), "--context"],
    );
}

#[test]
fn a_command_line_that_makes_no_sense() {
    let laptop = Laptop::take();
    for script in ["tpd up --path pigeon", "tpd sideways", "tpd up --exclude 300.0.0.0/8", "tpd"] {
        laptop.run(script).exits(ExitCode::Usage);
    }
}

#[test]
fn credentials_that_have_expired() {
    let laptop = Laptop::take();
    laptop.cluster.kubectl("-n shop create serviceaccount leaver").ok();
    let token = laptop.cluster.machine("tests/kubernetes/cluster token shop leaver").run();
    // A token ends with its account, which is quicker than ten minutes, the least that one lives.
    laptop.cluster.kubectl("-n shop delete serviceaccount leaver").ok();
    let path = file("expired.kubeconfig", &token.ok().stdout);
    until(Duration::from_secs(20), "the API server refuses the token", || {
        let run = laptop.run(&format!("kubectl --kubeconfig {path} auth whoami"));
        if run.stderr.contains("logged in") || run.stderr.contains("nauthorized") { Ok(()) } else { Err(run) }
    });
    let script = format!("tpd up --kubeconfig {path}");
    refused(&laptop, &script, ExitCode::Unauthenticated, &["203.0.113.2:6443", "expired", "log in"]);
}

#[test]
fn a_credential_plugin_that_fails() {
    let laptop = Laptop::take();
    let config = |command: &str| {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": "https://203.0.113.2:6443", "insecure-skip-tls-verify": true } }],
            "users": [{ "name": "u", "user": { "exec": {
                "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never", "command": command } } }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        })
        .to_string()
    };
    for (name, command) in [("fails", "/bin/false"), ("missing", "/nowhere/login-helper")] {
        let path = file(&format!("plugin-{name}.kubeconfig"), &config(command));
        refused(&laptop, &format!("tpd up --kubeconfig {path}"), ExitCode::Unauthenticated, &[command]);
    }
}

#[test]
fn an_api_server_that_is_not_there() {
    let laptop = Laptop::take();
    for server in ["203.0.113.77:6443", "203.0.113.2:6444", "nosuch.example.com:6443"] {
        let path = kubeconfig(&laptop, "elsewhere.kubeconfig", "203.0.113.2:6443", server);
        refused(&laptop, &format!("tpd up --kubeconfig {path}"), ExitCode::Unreachable, &[server]);
    }
}

#[test]
fn an_api_server_with_another_certificate() {
    let laptop = Laptop::take();
    let text = fs::read_to_string(laptop.cluster.kubeconfig("developer")).expect("the cluster made it");
    let before: Vec<_> = text.split("certificate-authority-data: ").collect();
    let authority = before[1].split_whitespace().next().expect("data").trim_end_matches(',');
    let other = laptop.cluster.machine(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=other -keyout /dev/null 2>/dev/null | base64 -w0",
    );
    let path = file("other-ca.kubeconfig", &text.replace(authority, other.run().ok().out()));
    refused(&laptop, &format!("tpd up --kubeconfig {path}"), ExitCode::Unreachable, &["certificate"]);
}

/// A ServiceAccount that is bound to one Role of its own.
struct Account<'a> {
    laptop: &'a Laptop,
    kubeconfig: String,
}

impl<'a> Account<'a> {
    fn create(laptop: &'a Laptop) -> Self {
        let cluster = laptop.cluster;
        cluster.kubectl("-n shop create serviceaccount least").ok();
        let account = json!([{ "kind": "ServiceAccount", "name": "least", "namespace": "shop" }]);
        cluster.apply(&json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": { "name": "least", "namespace": "tpd-system" }, "subjects": account,
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "least" },
        }));
        let token = cluster.machine("tests/kubernetes/cluster token shop least").run();
        let kubeconfig = file("least.kubeconfig", &token.ok().stdout);
        Self { laptop, kubeconfig }
    }

    /// Gives it just these rules, and waits until the API server acts on them.
    fn may(&self, rules: &Value) {
        self.laptop.cluster.apply(&json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
            "metadata": { "name": "least", "namespace": "tpd-system" }, "rules": rules,
        }));
        for rule in rules.as_array().expect("a list") {
            for (verb, resource) in pairs(rule) {
                let name =
                    rule["resourceNames"][0].as_str().map(|name| format!("/{name}")).unwrap_or_default();
                let (base, sub) = resource.split_once('/').unwrap_or((&resource, ""));
                let group = rule["apiGroups"][0].as_str().filter(|group| !group.is_empty());
                let base = group.map_or_else(|| base.to_owned(), |group| format!("{base}.{group}"));
                let sub = if sub.is_empty() { String::new() } else { format!("--subresource={sub}") };
                until(Duration::from_secs(10), "the API server acts on the Role", || {
                    let script = format!(
                        "kubectl --kubeconfig {} -n tpd-system auth can-i {verb} {base}{name} {sub}",
                        self.kubeconfig
                    );
                    let run = self.laptop.run(&script);
                    if run.out().ends_with("yes") { Ok(()) } else { Err(run) }
                });
            }
        }
    }

    fn up(&self, arguments: &str) -> String {
        format!("tpd up --kubeconfig {} {arguments}", self.kubeconfig)
    }
}

impl Drop for Account<'_> {
    fn drop(&mut self) {
        let cluster = self.laptop.cluster;
        let _ = self.laptop.run("tpd down");
        let _ = cluster.kubectl("-n tpd-system delete clientsessions --all --ignore-not-found");
        let _ = cluster.kubectl("-n tpd-system delete role/least rolebinding/least --ignore-not-found");
        let _ = cluster.kubectl("-n shop delete serviceaccount/least --ignore-not-found");
    }
}

/// Each verb with each resource of a rule.
fn pairs(rule: &Value) -> Vec<(String, String)> {
    let list = |key: &str| -> Vec<String> {
        let items = rule[key].as_array().cloned().unwrap_or_default();
        items.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect()
    };
    let verbs = list("verbs");
    list("resources")
        .into_iter()
        .flat_map(|resource| verbs.iter().map(move |verb| (verb.clone(), resource.clone())))
        .collect()
}

/// The rules of the documented role, as installed.
fn developer_rules(laptop: &Laptop) -> Value {
    laptop.cluster.object("role tpd-developer -n tpd-system")["rules"].clone()
}

/// The same without one verb on one resource.
fn without(rules: &Value, verb: &str, resource: &str) -> Value {
    let mut rules = rules.clone();
    for rule in rules.as_array_mut().expect("a list") {
        if rule["resources"][0] == resource {
            rule["verbs"].as_array_mut().expect("a list").retain(|other| other != verb);
        }
    }
    let rules = rules.as_array().expect("a list");
    rules
        .iter()
        .filter(|rule| rule["verbs"].as_array().is_some_and(|verbs| !verbs.is_empty()))
        .cloned()
        .collect()
}

#[test]
fn no_permission_at_all() {
    let laptop = Laptop::take();
    let account = Account::create(&laptop);
    account.may(&json!([]));
    let words = [
        "system:serviceaccount:shop:least",
        "clientsessions",
        "create",
        "kind: Role",
        "pods/proxy",
        "rolebinding",
    ];
    refused(&laptop, &account.up(""), ExitCode::Forbidden, &words);
}

#[test]
fn the_documented_role_is_enough_and_none_of_it_is_too_much() {
    let laptop = Laptop::take();
    let account = Account::create(&laptop);
    let rules = developer_rules(&laptop);
    account.may(&rules);
    for path in ["auto", "proxy", "forward", "udp"] {
        laptop.run(&account.up(&format!("--namespace shop --path {path}"))).ok();
        laptop.run("curl -sS --max-time 5 http://web.shop").ok();
        laptop.run("tpd down").ok();
    }
    let needed = [
        ("create", "clientsessions", "auto"),
        ("watch", "clientsessions", "auto"),
        ("patch", "clientsessions", "auto"),
        ("get", "pods/proxy", "proxy"),
        ("get", "pods/portforward", "forward"),
        ("create", "pods/portforward", "forward"),
    ];
    for (verb, resource, path) in needed {
        account.may(&without(&rules, verb, resource));
        // The API server goes on allowing for a moment what it allowed before.
        let (run, _) = until(Duration::from_secs(10), &format!("without {verb} on {resource}"), || {
            let run = laptop.run(&account.up(&format!("--path {path}")));
            let _ = laptop.run("tpd down");
            if run.code == Some(0) { Err("tpd up goes well all the same") } else { Ok(run) }
        });
        run.exits(ExitCode::Forbidden).says(&[verb, resource]).within(SOON);
    }
    // With one of the two ways through the API server forbidden, the other one carries the session.
    account.may(&without(&rules, "get", "pods/proxy"));
    laptop.run(&account.up("--namespace shop")).ok();
    laptop.run("curl -sS --max-time 5 http://web.shop").ok();
    laptop.run("tpd down").ok();
}

#[test]
fn a_manager_that_is_not_installed() {
    let laptop = Laptop::take();
    let admin = laptop.cluster.kubeconfig("admin");
    let script = format!("tpd up --kubeconfig {admin} --manager-namespace nosuch");
    refused(&laptop, &script, ExitCode::NotInstalled, &["nosuch", "tpd install", "--manager-namespace"]);
    // To a developer the API server does not even say that there is no such namespace.
    refused(&laptop, "tpd up --manager-namespace nosuch", ExitCode::Forbidden, &["nosuch"]);
}

#[test]
fn a_manager_that_does_not_answer() {
    let laptop = Laptop::take();
    laptop.cluster.scale(0);
    let before = Snapshot::of(&laptop);
    let run = laptop.run("tpd up");
    run.exits(ExitCode::Timeout).says(&["tpd-system", "manager"]).within(Duration::from_secs(40));
    laptop.until_as(&before, Duration::ZERO);
    laptop.cluster.scale(2);
}

/// Answers in the managers' place as one that speaks another protocol.
fn speaks(laptop: &Laptop, version: &str, protocol: u32, words: &[&str]) {
    let up = laptop.start("tpd up");
    let (session, _) = until(Duration::from_secs(10), "tpd up creates a session", || {
        let sessions = laptop.cluster.object("clientsessions -n tpd-system");
        let name = sessions["items"][0]["metadata"]["name"].as_str().map(str::to_owned);
        name.ok_or("there is none")
    });
    let patch = json!({ "status": {
        "phase": "Ready", "version": version, "protocol": { "min": protocol, "max": protocol },
        "managerKey": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "address": { "ipv4": "100.127.0.2", "ipv6": "fd74:7064::2" },
        "gateway": { "ipv4": "100.127.0.1", "ipv6": "fd74:7064::1" },
    } });
    let script =
        format!("-n tpd-system patch clientsession {session} --subresource=status --type=merge -p '{patch}'");
    laptop.cluster.kubectl(&script).ok();
    up.finish().exits(ExitCode::Incompatible).says(words);
}

#[test]
fn a_manager_of_another_protocol() {
    let laptop = Laptop::take();
    laptop.cluster.scale(0);
    let before = Snapshot::of(&laptop);
    let ours = tpd_api::session::PROTOCOL;
    speaks(&laptop, "9.9.9", ours.max + 1, &["9.9.9", "newer", "install"]);
    speaks(&laptop, "0.0.1", ours.min - 1, &["0.0.1", "older", "tpd install"]);
    laptop.until_as(&before, Duration::ZERO);
    laptop.cluster.scale(2);
}

#[test]
fn not_root() {
    let laptop = Laptop::take();
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    laptop.run(&format!("{nobody} tpd up")).exits(ExitCode::Privilege).says(&["root", "sudo tpd up"]);
    laptop.run(&format!("{nobody} tpd status")).exits(ExitCode::NotConnected);
    let _connection = laptop.up("");
    for command in ["status", "down", "logs"] {
        let run = laptop.run(&format!("{nobody} tpd {command}"));
        run.exits(ExitCode::Privilege).says(&["another user"]);
    }
    laptop.run("tpd status").ok();
}

#[test]
fn no_tun_device() {
    let laptop = Laptop::take();
    let without = "unshare --mount sh -c 'mount -t tmpfs -o ro tmpfs /dev/net && exec tpd up'";
    refused(&laptop, without, ExitCode::NoTun, &["TUN", "/dev/net/tun"]);
    let forbidden = "setpriv --bounding-set=-net_admin --inh-caps=-net_admin tpd up";
    refused(&laptop, forbidden, ExitCode::NoTun, &["NET_ADMIN"]);
}

#[test]
fn networks_that_overlap() {
    let laptop = Laptop::take();
    let _route = Route::add(&laptop, "10.244.0.128/25");
    let words = [
        "10.244.0.128/25",
        "10.244.0.0/20",
        "eth0",
        "--exclude 10.244.0.128/25",
        "--prefer-cluster 10.244.0.128/25",
    ];
    refused(&laptop, "tpd up --namespace shop", ExitCode::Overlap, &words);

    let way = "ip route get 10.244.0.200";
    let connection = laptop.up("--namespace shop --exclude 10.244.0.128/25");
    laptop.run(way).ok().says(&["dev eth0"]);
    laptop.run("curl -sS --max-time 5 http://web.shop").ok();
    laptop.run("tpd status").ok().says(&["10.244.0.128/25", "--exclude"]);
    connection.down();

    let connection = laptop.up("--namespace shop --prefer-cluster 10.244.0.128/25");
    laptop.run(way).ok().says(&["dev tpd0"]);
    laptop.run("curl -sS --max-time 5 http://web.shop").ok();
    connection.down();
    laptop.run(way).ok().says(&["dev eth0"]);
}

/// A route that the laptop has of its own.
struct Route<'a>(&'a Laptop, &'static str);

impl<'a> Route<'a> {
    fn add(laptop: &'a Laptop, network: &'static str) -> Self {
        laptop.run(&format!("ip route add {network} via 198.51.100.1")).ok();
        Self(laptop, network)
    }
}

impl Drop for Route<'_> {
    fn drop(&mut self) {
        let _ = self.0.run("tpd down");
        let _ = self.0.run(&format!("ip route del {} via 198.51.100.1", self.1));
    }
}

#[test]
fn port_53_taken() {
    let laptop = Laptop::take();
    for address in ["0.0.0.0:53", "[::]:53"] {
        let taken = laptop.inside(|| UdpSocket::bind(address)).expect("port 53 is free on the laptop");
        refused(&laptop, "tpd up", ExitCode::Dns, &["53"]);
        drop(taken);
    }
    let elsewhere = laptop.inside(|| UdpSocket::bind("127.0.0.1:53")).expect("port 53 is free on the laptop");
    laptop.up("").down();
    drop(elsewhere);
}
