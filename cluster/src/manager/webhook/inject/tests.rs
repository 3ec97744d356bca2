//! Many pods, and what becomes of them.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, from_value, json};
use tpd_api::inject::{ENTRY, INJECT, INSTALLATION, NOT_INJECTED, installation};
use tpd_api::intercept::{Workload, WorkloadKind};

use super::{Candidate, Place, Settings, Surroundings};

fn settings() -> Settings {
    Settings {
        image: "tpd/agent:1".into(),
        pull_policy: "IfNotPresent".into(),
        namespace: "tpd-system".into(),
        ca: "PEM".into(),
    }
}

fn place(labels: &[(&str, &str)]) -> Place {
    let labels = labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    let web = Workload { kind: WorkloadKind::Deployment, name: "web".into() };
    Place { namespace: "shop".into(), labels, intercepted: vec![web] }
}

fn around() -> Surroundings {
    Surroundings { manager: Some("10.96.0.7:8443".into()), ..Surroundings::default() }
}

fn services(services: Value) -> Surroundings {
    Surroundings { services: from_value(services).unwrap(), ..around() }
}

/// A pod of Deployment `web` as the API server shows it to the webhook.
fn web() -> Value {
    json!({
        "metadata": {
            "generateName": "web-5d9c-",
            "labels": { "app": "web", "pod-template-hash": "5d9c" },
            "annotations": { "team": "shop" },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d9c", "uid": "u", "controller": true,
            }],
        },
        "spec": {
            "initContainers": [
                { "name": "migrate", "image": "app" },
                {
                    "name": "mesh", "image": "mesh", "restartPolicy": "Always",
                    "startupProbe": { "httpGet": { "port": 15021 } },
                },
            ],
            "containers": [
                {
                    "name": "app", "image": "app",
                    "env": [{ "name": "A", "value": "1" }],
                    "ports": [
                        { "name": "http", "containerPort": 8080, "protocol": "TCP" },
                        { "name": "grpc", "containerPort": 9090, "protocol": "TCP" },
                    ],
                    "livenessProbe": { "httpGet": { "path": "/livez", "port": "http" }, "periodSeconds": 5 },
                    "readinessProbe": { "tcpSocket": { "port": 8080 } },
                    "startupProbe": { "grpc": { "port": 9090, "service": "" } },
                    "lifecycle": { "preStop": { "httpGet": { "path": "/bye", "port": "http" } } },
                },
                {
                    "name": "side", "image": "side",
                    "livenessProbe": { "exec": { "command": ["true"] } },
                    "readinessProbe": { "httpGet": { "host": "example.com", "port": 443 } },
                },
            ],
            "volumes": [{ "name": "data", "emptyDir": {} }],
        },
    })
}

/// The pod as it is after the webhook; as it was where the webhook says nothing.
fn after(pod: &Value, place: &Place, around: &Surroundings) -> Value {
    let candidate = Candidate::new(pod.clone(), place, &settings());
    candidate.map_or_else(|| pod.clone(), |candidate| patched(pod, &candidate, around))
}

fn patched(pod: &Value, candidate: &Candidate, around: &Surroundings) -> Value {
    let patch = candidate.inject(around, &settings()).unwrap_or_else(|reason| candidate.refuse(&reason));
    let patch: json_patch::Patch = from_value(patch.into_value()).unwrap();
    let mut result = pod.clone();
    json_patch::patch(&mut result, &patch).unwrap();
    result
}

fn reason(pod: &Value, place: &Place, around: &Surroundings) -> String {
    let result = after(pod, place, around);
    let reason = result["metadata"]["annotations"][NOT_INJECTED].as_str().unwrap_or_default().to_owned();
    let mut without = result;
    if pod["metadata"]["annotations"].is_object() {
        without["metadata"]["annotations"].as_object_mut().unwrap().remove(NOT_INJECTED);
    } else {
        without["metadata"].as_object_mut().unwrap().remove("annotations");
    }
    assert_eq!(without, *pod, "a pod that is not injected is left as it was");
    reason
}

fn is_injected(pod: &Value, place: &Place) -> bool {
    after(pod, place, &around())["metadata"]["annotations"][ENTRY].is_string()
}

#[test]
fn an_intercepted_workloads_pod_gets_an_agent_in_front() {
    let result = after(&web(), &place(&[]), &around());
    let names: Vec<_> = result["spec"]["initContainers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["tpd-redirect", "tpd-agent", "migrate", "mesh"]);
    let redirect = &result["spec"]["initContainers"][0];
    assert_eq!(redirect["args"], json!(["redirect"]));
    assert_eq!(redirect["securityContext"]["capabilities"], json!({ "drop": ["ALL"], "add": ["NET_ADMIN"] }));
    assert_eq!(redirect["env"][1]["value"], "19950:8080,19951:9090,19952:15021");
    let agent = &result["spec"]["initContainers"][1];
    assert_eq!(agent["args"], json!(["run"]));
    assert_eq!(agent["restartPolicy"], "Always");
    assert_eq!(agent["readinessProbe"]["failureThreshold"], i32::MAX);
    let env: BTreeMap<_, _> = agent["env"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["name"].as_str().unwrap(), one["value"].as_str().unwrap()))
        .collect();
    assert_eq!(env["TPD_APP_0_A"], "1");
    assert_eq!(env["TPD_CONTAINERS"], "app,side");
    assert_eq!(env["TPD_PROBES"], "19950:8080,19951:9090,19952:15021");
    assert_eq!(env["TPD_MANAGER"], "10.96.0.7:8443");
    assert_eq!(env["TPD_ENTRY"], r#"{"type":"redirect"}"#);
    assert_eq!(result["metadata"]["annotations"][ENTRY], r#"{"type":"redirect"}"#);
    assert_eq!(result["metadata"]["annotations"][INSTALLATION], installation("PEM", "10.96.0.7:8443"));
}

#[test]
fn the_app_stays_as_it_was_but_for_its_probes() {
    let before = web();
    let mut result = after(&before, &place(&[]), &around());
    let app = &result["spec"]["containers"][0];
    let http = &app["livenessProbe"]["httpGet"]["port"];
    assert_eq!(http, &app["readinessProbe"]["tcpSocket"]["port"]);
    assert_eq!(http, &app["lifecycle"]["preStop"]["httpGet"]["port"]);
    assert_ne!(http, &app["startupProbe"]["grpc"]["port"]);

    let spec = &mut result["spec"];
    let probes: [(&str, Value); 5] = [
        ("/containers/0/livenessProbe/httpGet/port", "http".into()),
        ("/containers/0/readinessProbe/tcpSocket/port", 8080.into()),
        ("/containers/0/startupProbe/grpc/port", 9090.into()),
        ("/containers/0/lifecycle/preStop/httpGet/port", "http".into()),
        ("/initContainers/3/startupProbe/httpGet/port", 15021.into()),
    ];
    for (path, port) in probes {
        let place = spec.pointer_mut(path).unwrap();
        assert!((19_950..=19_989).contains(&place.as_u64().unwrap()), "{path}");
        *place = port;
    }
    spec["initContainers"].as_array_mut().unwrap().drain(..2);
    assert_eq!(spec["volumes"][0]["name"], "tpd-token");
    spec["volumes"].as_array_mut().unwrap().remove(0);
    let annotations = result["metadata"]["annotations"].as_object_mut().unwrap();
    annotations.retain(|name, _| ![ENTRY, INSTALLATION].contains(&name.as_str()));
    assert_eq!(result, before);
}

#[test]
fn a_pod_with_nothing_optional_gets_an_agent_too() {
    let bare = json!({
        "metadata": { "name": "shell" },
        "spec": { "containers": [{ "name": "sh", "image": "sh" }] },
    });
    let enabled = place(&[(INJECT, "enabled")]);
    let result = after(&bare, &enabled, &around());
    assert_eq!(result["spec"]["initContainers"][0]["name"], "tpd-redirect");
    assert_eq!(result["spec"]["initContainers"][1]["name"], "tpd-agent");
    assert_eq!(result["spec"]["initContainers"][1]["resources"], json!({}));
    assert_eq!(result["spec"]["volumes"].as_array().unwrap().len(), 1);
    assert_eq!(result["spec"]["containers"], bare["spec"]["containers"]);
}

#[test]
fn who_gets_an_agent() {
    let stranger = || {
        let mut pod = web();
        pod["metadata"]["ownerReferences"][0]["name"] = "other-5d9c".into();
        pod
    };
    let says = |mut pod: Value, kind: &str, value: &str| {
        pod["metadata"][kind][INJECT] = value.into();
        pod
    };
    let mirrored = || {
        let mut pod = web();
        pod["metadata"]["annotations"]["kubernetes.io/config.mirror"] = "x".into();
        pod
    };
    for (what, pod, labels, expected) in [
        ("intercepted", web(), None, true),
        ("not intercepted", stranger(), None, false),
        ("opted in by label", says(stranger(), "labels", "enabled"), None, true),
        ("opted in by annotation", says(stranger(), "annotations", "enabled"), None, true),
        ("opted in by namespace", stranger(), Some("enabled"), true),
        ("opted out by annotation", says(web(), "annotations", "disabled"), Some("enabled"), false),
        ("opted out by label", says(web(), "labels", "disabled"), None, false),
        ("opted out by namespace", says(web(), "labels", "enabled"), Some("disabled"), false),
        ("says something else", says(stranger(), "labels", "maybe"), None, false),
        ("mirrored", mirrored(), None, false),
    ] {
        let place = place(&labels.map(|label| (INJECT, label)).into_iter().collect::<Vec<_>>());
        assert_eq!(is_injected(&pod, &place), expected, "{what}");
        if !expected {
            assert_eq!(after(&pod, &place, &around()), pod, "{what}");
        }
    }
    for namespace in ["kube-system", "tpd-system"] {
        let place = Place { namespace: namespace.into(), ..place(&[(INJECT, "enabled")]) };
        assert!(!is_injected(&web(), &place), "{namespace}");
    }
}

#[test]
fn a_second_time_changes_nothing() {
    let once = after(&web(), &place(&[]), &around());
    assert_eq!(after(&once, &place(&[]), &around()), once);
}

#[test]
fn what_cannot_have_an_agent_says_why() {
    let change = |path: &str, value: Value| {
        let mut pod = web();
        pod["spec"][path] = value;
        pod
    };
    for (pod, expected) in [
        (change("hostNetwork", true.into()), "hostNetwork"),
        (change("os", json!({ "name": "windows" })), "Windows"),
        (change("nodeSelector", json!({ "kubernetes.io/os": "windows" })), "Windows"),
        (
            change(
                "containers",
                json!([{ "name": "a", "env": [{ "name": "A", "value": "x".repeat(600_000) }] }]),
            ),
            "too large",
        ),
        (change("volumes", json!([{ "name": "tpd-token" }])), "tpd-token"),
        (change("containers", json!([{ "name": "a", "ports": [{ "containerPort": 19910 }] }])), "port 19910"),
    ] {
        let reason = reason(&pod, &place(&[]), &around());
        assert!(reason.contains(expected), "{reason}");
    }
    let unknown = Surroundings::default();
    assert!(reason(&web(), &place(&[]), &unknown).contains("no address yet"));
    let mut plain = change("hostNetwork", true.into());
    plain["metadata"].as_object_mut().unwrap().remove("annotations");
    assert!(reason(&plain, &place(&[]), &around()).contains("hostNetwork"));
}

#[test]
fn more_probed_ports_than_there_are_stand_ins_are_too_many() {
    let containers: Vec<_> = (0..41)
        .map(|number| {
            json!({ "name": format!("c{number}"), "livenessProbe": { "tcpSocket": { "port": 1000 + number } } })
        })
        .collect();
    let mut pod = web();
    pod["spec"]["initContainers"] = json!([]);
    pod["spec"]["containers"] = json!(containers[..40]);
    assert!(is_injected(&pod, &place(&[])));
    pod["spec"]["containers"] = json!(containers);
    assert!(reason(&pod, &place(&[]), &around()).contains("40 ports"));
}

const RESTRICTED: [(&str, &str); 1] = [("pod-security.kubernetes.io/enforce", "restricted")];

#[test]
fn where_redirecting_is_forbidden_names_are_taken_over() {
    let by_name = services(json!([
        { "metadata": { "name": "web" }, "spec": {
            "selector": { "app": "web" },
            "ports": [{ "port": 80, "targetPort": "http" }, { "port": 90, "targetPort": 9090 }],
        } },
        { "metadata": { "name": "other" }, "spec": {
            "selector": { "app": "other" }, "ports": [{ "port": 80, "targetPort": 8080 }],
        } },
    ]));
    let result = after(&web(), &place(&RESTRICTED), &by_name);
    let entry: Value =
        serde_json::from_str(result["metadata"]["annotations"][ENTRY].as_str().unwrap()).unwrap();
    assert_eq!(
        entry,
        json!({ "type": "ports", "ports": [{ "name": "http", "listen": 19901, "app": 8080, "protocol": "TCP" }] })
    );
    let agent = &result["spec"]["initContainers"][0];
    assert_eq!(agent["name"], "tpd-agent");
    assert_eq!(agent["ports"], json!([{ "name": "http", "containerPort": 19901, "protocol": "TCP" }]));
    assert_eq!(result["spec"]["initContainers"][1]["name"], "migrate", "no container has NET_ADMIN");
    let app = &result["spec"]["containers"][0];
    assert_eq!(app["ports"][0], json!({ "containerPort": 8080, "protocol": "TCP" }));
    assert_eq!(app["ports"][1]["name"], "grpc");
    assert_eq!(app["livenessProbe"]["httpGet"]["port"], 8080);
    assert_eq!(app["lifecycle"]["preStop"]["httpGet"]["port"], 8080);
    assert_eq!(app["readinessProbe"], web()["spec"]["containers"][0]["readinessProbe"]);
}

#[test]
fn where_a_redirect_was_refused_names_are_taken_over_too() {
    let by_name = services(json!([{ "metadata": { "name": "web" }, "spec": {
        "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": "http" }],
    } }]));
    let candidate = Candidate::new(web(), &place(&[]), &settings()).unwrap();
    assert_eq!(candidate.maker(), Some("u"));
    let candidate = candidate.without_redirect();
    let result = patched(&web(), &candidate, &by_name);
    assert_eq!(result["spec"]["initContainers"][0]["name"], "tpd-agent", "no container has NET_ADMIN");
    let result = patched(&web(), &candidate, &around());
    let reason = result["metadata"]["annotations"][NOT_INJECTED].as_str().unwrap();
    assert!(reason.contains("did not come to be") && reason.contains("no Service leads"), "{reason}");
}

#[test]
fn a_name_that_does_not_lead_everywhere_is_left_alone() {
    let service = |ports: Value| {
        services(
            json!([{ "metadata": { "name": "web" }, "spec": { "selector": { "app": "web" }, "ports": ports } }]),
        )
    };
    let both = service(json!([{ "port": 80, "targetPort": "http" }, { "port": 8080 }]));
    let mut policed = service(json!([{ "port": 80, "targetPort": "http" }]));
    policed.policies = from_value(json!([{ "metadata": { "name": "only-http" }, "spec": {
        "podSelector": { "matchLabels": { "app": "web" } },
        "ingress": [{ "ports": [{ "port": 8000, "endPort": 8100 }] }],
    } }]))
    .unwrap();
    for (around, expected) in [
        (around(), "no Service leads to the pod by the port name `http`"),
        (both, "Service web leads to port 8080 by its number; set its targetPort to `http`"),
        (policed.clone(), "NetworkPolicy only-http names port 8080 by its number"),
    ] {
        let reason = reason(&web(), &place(&RESTRICTED), &around);
        assert!(reason.contains(expected) && reason.contains("restricted"), "{reason}");
    }
    policed.policies[0].spec.as_mut().unwrap().pod_selector =
        Some(from_value(json!({ "matchLabels": { "app": "db" } })).unwrap());
    let result = after(&web(), &place(&RESTRICTED), &policed);
    assert!(result["metadata"]["annotations"][ENTRY].is_string());
}

#[test]
fn a_name_that_two_containers_have_is_left_alone() {
    let mut pod = web();
    pod["spec"]["containers"][1]["ports"] = json!([{ "name": "http", "containerPort": 8081 }]);
    let around = services(json!([{ "metadata": { "name": "web" }, "spec": {
        "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": "http" }],
    } }]));
    let reason = reason(&pod, &place(&RESTRICTED), &around);
    assert!(reason.contains("two containers have a port named `http`"), "{reason}");
}

#[test]
fn garbage_is_left_alone() {
    let enabled = place(&[(INJECT, "enabled")]);
    for garbage in [
        json!(null),
        json!([]),
        json!({ "spec": 7 }),
        json!({ "metadata": {} }),
        json!({ "metadata": { "labels": [] }, "spec": { "containers": [] } }),
    ] {
        assert!(Candidate::new(garbage.clone(), &enabled, &settings()).is_none(), "{garbage}");
    }
}

/// A container with any of what injection looks at.
fn any_container() -> impl Strategy<Value = Value> {
    let probe = prop_oneof![
        (1..u16::MAX).prop_map(|port| json!({ "tcpSocket": { "port": port } })),
        (1..u16::MAX).prop_map(|port| json!({ "httpGet": { "path": "/", "port": port, "scheme": "HTTPS" } })),
        Just(json!({ "httpGet": { "port": "main" } })),
        Just(json!({ "httpGet": { "port": "nobody" } })),
        Just(json!({ "grpc": { "port": 9000 } })),
        Just(json!({ "exec": { "command": ["true"] } })),
        Just(Value::Null),
    ];
    let env = prop::collection::vec(("[A-C]", "[$()A-C]{0,8}"), 0..3);
    (probe.clone(), probe, 1..19_000_u16, env, any::<bool>()).prop_map(
        |(liveness, readiness, port, env, asks)| {
            let env: Vec<_> =
                env.iter().map(|(name, value)| json!({ "name": name, "value": value })).collect();
            let resources = if asks { json!({ "requests": { "cpu": "10m" } }) } else { json!({}) };
            json!({
                "name": "c", "image": "i", "env": env, "resources": resources,
                "ports": [{ "name": "main", "containerPort": port }],
                "livenessProbe": liveness, "readinessProbe": readiness,
            })
        },
    )
}

/// A pod without what injection adds, and without the ports of its probes.
fn stripped(mut pod: Value) -> Value {
    for list in ["containers", "initContainers"] {
        let containers = pod["spec"][list].as_array_mut();
        for container in containers.into_iter().flatten() {
            for probe in ["livenessProbe", "readinessProbe"] {
                for action in ["httpGet", "tcpSocket", "grpc"] {
                    let port = container.pointer_mut(&format!("/{probe}/{action}/port"));
                    port.map(Value::take);
                }
            }
        }
    }
    for (list, own) in [("initContainers", ["tpd-agent", "tpd-redirect"]), ("volumes", ["tpd-token", ""])] {
        let mut items = pod["spec"][list].as_array().cloned().unwrap_or_default();
        items.retain(|item| !own.contains(&item["name"].as_str().unwrap_or_default()));
        pod["spec"][list] = items.into();
    }
    if let Some(annotations) = pod["metadata"]["annotations"].as_object_mut() {
        annotations.retain(|name, _| ![ENTRY, INSTALLATION].contains(&name.as_str()));
    }
    pod
}

proptest! {
    #[test]
    fn whatever_the_pod_it_keeps_what_it_had(
        containers in prop::collection::vec(any_container(), 1..4),
        inits in prop::collection::vec(any_container(), 0..3),
    ) {
        let mut pod = web();
        pod["spec"]["containers"] = containers.into();
        pod["spec"]["initContainers"] = inits.into();
        let result = after(&pod, &place(&[]), &around());
        prop_assert!(result["metadata"]["annotations"][ENTRY].is_string());
        prop_assert_eq!(stripped(result), stripped(pod));
    }
}
