//! Objects for the tests of the intercepts.

use k8s_openapi::jiff::Timestamp;
use tpd_api::agent::{Entry, Mode, Protocol};
use tpd_api::filter::Filter;
use tpd_api::intercept::{InterceptSpec, PortMapping, Workload, WorkloadKind};

use super::objects::{ContainerPort, Intercept, Pod, Service, ServicePort, Target, Template};

/// A second of the API server's clock.
pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// A ready pod of Deployment `web` in namespace `shop`, without an agent.
pub(super) fn pod(name: &str) -> Pod {
    Pod {
        namespace: "shop".into(),
        name: name.into(),
        uid: format!("uid-{name}"),
        created: at(10),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        maker: None,
        workload: Some(deployment()),
        template: Some(Template { replica_set: "web-7d4b9".into(), hash: "7d4b9".into() }),
        released: false,
        released_at: None,
        kept: None,
        running: true,
        ready: true,
        leaving: false,
        host_network: false,
        containers: vec!["app".into()],
        ports: vec![],
        entry: None,
        installation: None,
        not_injected: None,
        opted_out: false,
        trouble: None,
    }
}

/// The same with an agent.
pub(super) fn injected(name: &str) -> Pod {
    Pod { entry: Some(Entry::Redirect), ..with_port(pod(name), "http", 8080) }
}

pub(super) fn with_port(mut pod: Pod, name: &str, port: u16) -> Pod {
    let name = Some(name.to_owned());
    pod.ports.push(ContainerPort { container: "app".into(), name, port, protocol: Protocol::Tcp });
    pod
}

pub(super) fn deployment() -> Workload {
    Workload { kind: WorkloadKind::Deployment, name: "web".into() }
}

/// A Service of the pods above, whose port has its own name.
pub(super) fn service(name: &str, port: u16, target: Target) -> Service {
    Service {
        namespace: "shop".into(),
        name: name.into(),
        selector: [("app".to_owned(), "web".to_owned())].into(),
        cluster_ips: vec!["10.96.0.5".parse().unwrap()],
        ports: vec![ServicePort { name: Some(name.to_owned()), port, target, protocol: Protocol::Tcp }],
    }
}

/// Alice's intercept of port `http` of Deployment `web`, made in second 20.
pub(super) fn intercept(name: &str) -> Intercept {
    Intercept {
        namespace: "shop".into(),
        name: name.into(),
        uid: format!("uid-{name}"),
        created: at(20),
        resource_version: "1".into(),
        generation: 1,
        spec: InterceptSpec {
            owner: "alice".into(),
            session: "alices".into(),
            workload: deployment(),
            ports: vec![PortMapping {
                port: Some("http".into()),
                protocol: Protocol::Tcp,
                overlay_port: 2000,
            }],
            filter: Filter::default(),
            mode: Mode::Intercept,
            proxy_protocol: false,
            environment: false,
            replace_pods: false,
            expires_at: None,
        },
        filter_problem: None,
        status: None,
    }
}

/// A filter on one header.
pub(super) fn header(value: &str) -> Filter {
    serde_json::from_value(serde_json::json!({ "headers": [{ "name": "x-intercept", "value": value }] }))
        .unwrap()
}
