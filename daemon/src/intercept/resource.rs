//! The Intercept that a request becomes.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tpd_api::exit::ExitCode;
use tpd_api::intercept::{Intercept, InterceptSpec, MAX_PORTS, PortMapping};
use tpd_api::local::InterceptRequest;
use tpd_dns::name::Name;

use crate::failure::Failure;
use crate::kube::errors::dns_label;
use crate::kube::session::fnv1a;

/// Longest parts of a name: with the hash's 10 digits and the dashes 57, and 63 are allowed wherever a name may become a label.
const WORKLOAD_PART: usize = 30;

/// See [`WORKLOAD_PART`].
const HOST_PART: usize = 15;

/// Whose intercept it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner<'a> {
    /// User as the API server knows it.
    pub(crate) user: &'a str,
    /// Name of the laptop's ClientSession: one for each user of each machine.
    pub(crate) session: &'a str,
}

/// What can be told to be wrong without asking anyone.
pub(crate) fn check(request: &InterceptRequest) -> Result<(), Failure> {
    let usage = |message: String| Failure::new(ExitCode::Usage, message);
    for name in
        [Some(&request.namespace), Some(&request.workload.name), request.name.as_ref()].into_iter().flatten()
    {
        check_name(name)?;
    }
    if request.ports.is_empty() || request.ports.len() > MAX_PORTS {
        return Err(usage(format!("an intercept has 1 to {MAX_PORTS} ports, not {}", request.ports.len())));
    }
    if let Some(port) = request.ports.iter().find(|port| port.local.port() == 0) {
        return Err(usage(format!("{} is nowhere to connect to: port 0", port.local)));
    }
    request.filter.compile().map_err(|error| usage(error.to_string()))?;
    for domain in &request.dns {
        Name::parse(domain).map_err(|error| usage(error.to_string()))?;
    }
    Ok(())
}

/// Names become parts of URLs, so they are looked at before they do.
pub(crate) fn check_name(name: &str) -> Result<(), Failure> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    // Longest name of an object in Kubernetes.
    if (1..=253).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.') {
        return Ok(());
    }
    Err(Failure::new(ExitCode::Usage, format!("{name:?} cannot be the name of anything in Kubernetes")))
}

/// A name that is the same whenever the same person on the same machine asks for the same ports of the same workload.
pub(crate) fn name(request: &InterceptRequest, owner: Owner<'_>, host: &str) -> String {
    if let Some(name) = &request.name {
        return name.clone();
    }
    let mut ports: Vec<String> =
        request.ports.iter().map(|port| port_key(port.port.as_deref(), port.protocol)).collect();
    ports.sort_unstable();
    let workload = request.workload.to_string();
    let identity: Vec<&str> =
        [owner.user, owner.session, &*workload].into_iter().chain(ports.iter().map(String::as_str)).collect();
    format!(
        "{}-{}-{:010x}",
        part(&request.workload.name, WORKLOAD_PART),
        part(host, HOST_PART),
        fnv1a(&identity) & 0xff_ffff_ffff
    )
}

fn port_key(port: Option<&str>, protocol: tpd_api::intercept::Protocol) -> String {
    format!("{}/{protocol}", port.unwrap_or_default())
}

fn part(text: &str, limit: usize) -> String {
    let label: String = dns_label(text).chars().take(limit).collect();
    label.trim_end_matches('-').to_owned()
}

/// The object. `overlay_ports` are those of the request's ports, in order.
pub(crate) fn object(
    request: &InterceptRequest,
    name: &str,
    owner: Owner<'_>,
    overlay_ports: &[u16],
) -> Intercept {
    let ports = request.ports.iter().zip(overlay_ports).map(|(port, &overlay_port)| PortMapping {
        port: port.port.clone(),
        protocol: port.protocol,
        overlay_port,
    });
    let mut intercept = Intercept::new(
        name,
        InterceptSpec {
            owner: owner.user.into(),
            session: owner.session.into(),
            workload: request.workload.clone(),
            ports: ports.collect(),
            filter: request.filter.clone(),
            mode: request.mode,
            proxy_protocol: request.proxy_protocol,
            environment: request.environment,
            replace_pods: request.replace_pods,
            expires_at: request.ttl_seconds.map(expiry),
        },
    );
    intercept.metadata.namespace = Some(request.namespace.clone());
    intercept.metadata.labels = Some([("app.kubernetes.io/managed-by".to_owned(), "tpd".to_owned())].into());
    intercept
}

fn expiry(seconds: u64) -> Time {
    Time(Timestamp::now().saturating_add(Duration::from_secs(seconds)).unwrap_or(Timestamp::MAX))
}

#[cfg(test)]
mod tests {
    use tpd_api::filter::{Filter, HeaderCondition, Match};
    use tpd_api::intercept::Protocol;

    use super::*;
    use crate::intercept::example;

    const OWNER: Owner<'static> = Owner { user: "ann", session: "laptop-1" };

    #[test]
    fn names_are_stable_and_valid() {
        let request = example("web", &["8080"]);
        let first = name(&request, OWNER, "Ann's Laptop");
        assert_eq!(first, name(&request, OWNER, "Ann's Laptop"));
        assert!(
            first.starts_with("web-ann-s-laptop-") && first.len() == "web-ann-s-laptop-".len() + 10,
            "{first}"
        );
        let filtered = InterceptRequest {
            filter: Filter { methods: vec!["GET".into()], ..Filter::default() },
            ports: example("web", &["8080"])
                .ports
                .into_iter()
                .map(|port| tpd_api::local::LocalPort { local: "127.0.0.1:1".parse().unwrap(), ..port })
                .collect(),
            ..request.clone()
        };
        assert_eq!(name(&filtered, OWNER, "Ann's Laptop"), first);
        for other in [example("web", &["8081"]), example("web", &["8080", "8081"]), example("api", &["8080"])]
        {
            assert_ne!(name(&other, OWNER, "h"), name(&request, OWNER, "h"));
        }
        assert_ne!(name(&request, Owner { session: "laptop-2", ..OWNER }, "h"), name(&request, OWNER, "h"));
        assert_eq!(
            name(&example("web", &["a", "b"]), OWNER, "h"),
            name(&example("web", &["b", "a"]), OWNER, "h")
        );

        let long = name(&example(&"x".repeat(253), &["8080"]), OWNER, &"y".repeat(64));
        assert!(long.len() <= 63 && !long.contains("--"));
        assert_eq!(name(&InterceptRequest { name: Some("mine".into()), ..request }, OWNER, "h"), "mine");
    }

    #[test]
    fn the_object_names_no_local_address() {
        let mut request = example("web", &["http"]);
        request.ttl_seconds = Some(60);
        let object = object(&request, "x", OWNER, &[20_007]);
        let text = serde_json::to_string(&object).unwrap();
        assert!(!text.contains("127.0.0.1") && !text.contains("9090"), "{text}");
        assert_eq!(
            object.spec.ports,
            [PortMapping { port: Some("http".into()), protocol: Protocol::Tcp, overlay_port: 20_007 }]
        );
        let expires = object.spec.expires_at.unwrap().0.as_second() - Timestamp::now().as_second();
        assert!((58..=60).contains(&expires));
    }

    #[test]
    fn nonsense_is_refused_before_anyone_is_asked() {
        let good = example("web", &["8080"]);
        assert_eq!(check(&good), Ok(()));
        let header = HeaderCondition { name: "x".into(), value: "(".into(), r#match: Match::Regex };
        let filter = Filter { headers: vec![header], ..Filter::default() };
        let bad = [
            InterceptRequest { ports: Vec::new(), ..good.clone() },
            InterceptRequest { namespace: "a/b".into(), ..good.clone() },
            InterceptRequest { name: Some(String::new()), ..good.clone() },
            InterceptRequest { filter, ..good.clone() },
            InterceptRequest { dns: vec!["a..b".into()], ..good },
        ];
        for request in bad {
            assert_eq!(check(&request).unwrap_err().code, ExitCode::Usage);
        }
    }
}
