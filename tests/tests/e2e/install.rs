//! `tpd install` and `tpd uninstall`, as an administrator.

use std::time::Duration;

use serde_json::Value;
use tpd_api::exit::ExitCode;
use tpd_api::inject::ENTRY;
use tpd_tests::{Cluster, Laptop, Local, Run, pause, until};

use crate::store::{ALL, LOCAL, answered_by, connected, intercepted, web};

/// What the tests' cluster was installed with.
const FLAGS: &str = "--image tpd/manager:0.1.0 --developers-group tpd-developers";

/// A pod that is to have an agent.
const NEWCOMER: &str = r#"{ "apiVersion": "v1", "kind": "Pod",
    "metadata": { "name": "newcomer", "labels": { "tpd.dev/inject": "enabled" } },
    "spec": { "containers": [{ "name": "app", "image": "tpd-test/echo:1" }] } }"#;

fn administrator(laptop: &Laptop, command: &str) -> Run {
    let kubeconfig = laptop.cluster.kubeconfig("admin");
    laptop.script(&format!("export KUBECONFIG={kubeconfig}; {command}")).limit(Duration::from_secs(120)).run()
}

/// What identifies the installation: its key, its pods, its generation.
fn identity(cluster: &Cluster) -> [Value; 3] {
    let pods = cluster.object("pods -n tpd-system -l app.kubernetes.io/name=tpd-manager");
    let pods = pods["items"].as_array().expect("a list has items");
    let mut pods: Vec<_> = pods.iter().map(|pod| pod["metadata"]["uid"].to_string()).collect();
    pods.sort_unstable();
    [
        cluster.object("secret tpd-manager-key -n tpd-system")["data"].clone(),
        cluster.object("statefulset tpd-manager -n tpd-system")["metadata"]["generation"].clone(),
        Value::from(pods),
    ]
}

#[test]
fn a_second_installation_changes_nothing() {
    let laptop = Laptop::take();
    administrator(&laptop, &format!("tpd install {FLAGS}")).ok();
    let before = identity(laptop.cluster);
    let _connection = laptop.up("--namespace shop");
    administrator(&laptop, &format!("tpd install {FLAGS}")).ok();
    assert_eq!(identity(laptop.cluster), before);
    laptop.run("curl -sS --max-time 2 http://web").ok();
}

#[test]
fn nothing_is_left_after_uninstalling_and_it_can_be_installed_again() {
    let laptop = Laptop::take();
    let web = web(&laptop, 2);
    {
        let _connection = connected(&laptop);
        drop(intercepted(&laptop, &web, ALL));
    }
    let with_agents = web.until_ready(2);
    {
        let _connection = laptop.up("--namespace shop");
        // People are connected, and nobody is there to be asked.
        let run = administrator(&laptop, "tpd uninstall </dev/null");
        assert_ne!(run.code, Some(0), "{run}");
        laptop.run("curl -sS --max-time 2 http://web").ok();
    }
    administrator(&laptop, "tpd uninstall --yes").ok();
    let kinds = "customresourcedefinitions,clusterroles,clusterrolebindings,validatingadmissionpolicies,\
                 validatingadmissionpolicybindings,mutatingwebhookconfigurations,validatingwebhookconfigurations,namespaces";
    until(Duration::from_secs(30), "nothing of tpd is left in the cluster", || {
        let run = laptop.cluster.kubectl(&format!("get {kinds} -o name"));
        let left: Vec<_> =
            run.ok().out().lines().filter(|name| name.contains("tpd")).map(str::to_owned).collect();
        if left.is_empty() { Ok(()) } else { Err(left.join(" ")) }
    });
    administrator(&laptop, "tpd uninstall --yes").ok();
    administrator(&laptop, "tpd up").exits(ExitCode::NotInstalled).says(&["tpd install"]);

    let create = "kubectl -n store create --dry-run=server -o yaml -f -";
    let run = administrator(&laptop, &format!("tpd install {FLAGS} && echo '{NEWCOMER}' | {create}"));
    run.ok().says(&["installed", ENTRY]);
    let connection = laptop.up("--namespace shop");
    laptop.run("curl -sS --max-time 2 http://web").ok();
    connection.down();

    // Agents know the managers of the installation that put them into their pods, and no others: those pods are replaced, but not
    // before somebody intercepts them.
    let connection = connected(&laptop);
    assert_eq!(web.ready(), with_agents, "pods were replaced for nobody");
    let local = Local::start(&laptop, LOCAL);
    let command = format!("tpd intercept web --namespace store --yes {ALL}");
    laptop.script(&command).limit(Duration::from_secs(90)).run().ok().says(&["earlier installation"]);
    let renewed = web.until_ready(2);
    assert!(!renewed.iter().any(|pod| with_agents.contains(pod)), "{with_agents:?} became {renewed:?}");
    assert_eq!(answered_by(&laptop, &web.url(), ""), "laptop");
    pause(Duration::from_secs(10));
    assert_eq!(web.ready(), renewed, "pods were replaced once more");
    laptop.run("tpd leave --all").ok();
    connection.down();
    drop(local);
    // The other samples as the other tests expect them.
    for namespace in ["store", "locked"] {
        laptop.cluster.kubectl(&format!("-n {namespace} delete pods --all --now")).ok();
    }
    laptop.cluster.machine("tests/kubernetes/cluster samples").limit(Duration::from_secs(180)).run().ok();
}

#[test]
fn an_installation_that_cannot_start_says_why() {
    let laptop = Laptop::take();
    let run = administrator(
        &laptop,
        "tpd install --manager-namespace tpd-broken --image tpd/nosuch:1 --pull-policy Never --timeout 20",
    );
    let _ = administrator(&laptop, "tpd uninstall --yes --manager-namespace tpd-broken");
    // Both installations share the cluster-wide objects; the first one gets them back.
    administrator(&laptop, &format!("tpd install {FLAGS}")).ok();
    assert_ne!(run.code, Some(0), "{run}");
    run.says(&["tpd/nosuch:1"]);
}

#[test]
fn what_would_be_installed_can_be_seen_first() {
    let laptop = Laptop::take();
    for (flag, first) in [("", "apiVersion"), ("--output json", "{")] {
        let run = laptop.run(&format!("KUBECONFIG=/nowhere tpd install --dry-run {flag}"));
        assert!(run.ok().out().contains(first), "{run}");
        run.says(&["StatefulSet", "tpd-manager", "ValidatingAdmissionPolicy"]);
    }
}

#[test]
fn a_developer_cannot_install() {
    let laptop = Laptop::take();
    laptop.run(&format!("tpd install {FLAGS}")).exits(ExitCode::Forbidden).says(&["dev"]);
    laptop.run("tpd uninstall --yes").exits(ExitCode::Forbidden);
    laptop.up("").down();
}
