//! The Helm chart and `tpd install` install the same: rendered by the real helm, which is built from Go modules the
//! first time, and compared object by object.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize as _;
use serde_json::Value;
use tpd_api::install::{Options, UdpService, objects};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Objects by kind and name. The namespace is helm's to make.
fn by_name(objects: impl IntoIterator<Item = Value>) -> BTreeMap<String, Value> {
    let name = |object: &Value| format!("{} {}", object["kind"], object["metadata"]["name"]);
    objects
        .into_iter()
        .filter(|object| object["kind"] != "Namespace")
        .map(|object| (name(&object), object))
        .collect()
}

fn rendered(values: &[&str]) -> BTreeMap<String, Value> {
    let mut helm = Command::new(deploy().join("helm.sh"));
    helm.args(["template", "tpd"]).arg(deploy().join("chart")).args(["--namespace", "tpd-system"]);
    for value in values {
        helm.args(["--set", value]);
    }
    let output = helm.output().expect("deploy/helm.sh runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("helm prints text");
    let documents = serde_yaml::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).expect("helm prints YAML"));
    by_name(documents.filter(|document| !document.is_null()))
}

fn assert_same(options: &Options, values: &[&str]) {
    let (ours, chart) = (by_name(objects(options)), rendered(values));
    let names = |objects: &BTreeMap<String, Value>| objects.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&chart), "{values:?}");
    for (name, object) in ours {
        assert_eq!(object, chart[&name], "{name} with {values:?}: left is `tpd install`, right is the chart");
    }
}

#[test]
fn the_chart_installs_what_tpd_install_does() {
    assert_same(&Options::default(), &[]);

    let most = Options {
        image: "registry.example/tpd:v7".into(),
        agent_image: "registry.example/agent:v8".into(),
        pull_policy: "Never".into(),
        pull_secrets: vec!["registry".into()],
        replicas: 3,
        udp_service: UdpService::LoadBalancer,
        pod_networks: vec!["10.8.0.0/16".parse().unwrap(), "fd08::/64".parse().unwrap()],
        service_networks: vec!["10.9.0.0/16".parse().unwrap()],
        pool_v4: "100.64.0.0/16".parse().unwrap(),
        pool_v6: "fd00:7::/64".parse().unwrap(),
        session_timeout: 60,
        developer_groups: vec!["developers".into(), "oidc:testers".into()],
        intercept_namespaces: vec!["shop".into(), "search".into()],
        ..Options::default()
    };
    assert_same(
        &most,
        &[
            "image.repository=registry.example/tpd,image.tag=v7,image.pullPolicy=Never,image.pullSecrets={registry}",
            "replicas=3,udp.service=LoadBalancer,sessionTimeout=60",
            "networks.pods={10.8.0.0/16,fd08::/64},networks.services={10.9.0.0/16}",
            "overlay.poolV4=100.64.0.0/16,overlay.poolV6=fd00:7::/64",
            "developers.groups={developers,oidc:testers},developers.interceptNamespaces={shop,search}",
            "agent.image.repository=registry.example/agent,agent.image.tag=v8",
        ],
    );

    let least = Options {
        replicas: 1,
        udp_service: UdpService::None,
        watch_pods: false,
        port_forward: false,
        ..Options::default()
    };
    assert_same(
        &least,
        &["replicas=1,udp.service=None,networks.watchPods=false,developers.portForward=false"],
    );
}

#[test]
fn helm_finds_nothing_to_say() {
    let output = Command::new(deploy().join("helm.sh"))
        .arg("lint")
        .arg(deploy().join("chart"))
        .arg("--strict")
        .output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
