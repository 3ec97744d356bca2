//! Which port of a pod is meant: by number or name, of a container or of a Service that leads to it.

use std::collections::BTreeSet;
use std::fmt;

use tpd_api::agent::{Entry, Protocol, TakenPort};
use tpd_api::intercept::{FoundPort, PortMapping};

use super::objects::{Pod, Service, ServicePort, Target};

/// The port of a pod that a mapping means, with `services` those that lead to the pod.
///
/// # Errors
/// Says what there is instead where there is no such port, or several.
pub fn find(pod: &Pod, services: &[&Service], mapping: &PortMapping) -> Result<FoundPort, String> {
    let protocol = mapping.protocol;
    let number = match &mapping.port {
        None => only(pod, services, protocol),
        Some(text) => match text.parse() {
            Ok(number) => by_number(pod, services, number, protocol),
            Err(_) => by_name(pod, services, text, protocol),
        },
    };
    match number {
        Some(port) => Ok(describe(pod, port, protocol)),
        None => Err(complaint(pod, services, mapping)),
    }
}

/// Where a Service's port leads to in a pod. What an agent has taken over by name is still the app's to everybody else.
#[must_use]
pub fn target(pod: &Pod, port: &ServicePort) -> Option<u16> {
    match &port.target {
        Target::Number(number) => Some(*number),
        Target::Name(name) => named(pod, name, port.protocol),
    }
}

/// Whether injection into a pod made now would put the agent in the path of a port by its name: a Service names it so, and none
/// its number.
#[must_use]
pub fn swappable(pod: &Pod, services: &[&Service], port: u16, protocol: Protocol) -> bool {
    let leading = services.iter().flat_map(|service| &service.ports);
    let mut leading =
        leading.filter(|one| one.protocol == protocol && target(pod, one) == Some(port)).peekable();
    leading.peek().is_some() && leading.all(|one| matches!(one.target, Target::Name(_)))
}

/// A Service that leads past an agent which stands behind a port's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bypass {
    service: String,
    taken: TakenPort,
    /// Whether another Service leads to the agent, so that it gets a part.
    pub partly: bool,
}

impl fmt::Display for Bypass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, taken, partly } = self;
        let part = if *partly { " (another Service, by its name, does not)" } else { "" };
        write!(
            f,
            "Service {service} leads to port {} by its number, past the agent{part}; name the port in the Service's targetPort: {}",
            taken.app, taken.name
        )
    }
}

/// Whether a Service leads past the agent to a port that this has taken over by its name: the webhook takes none that any names by
/// its number, but Services change.
#[must_use]
pub fn bypass(pod: &Pod, services: &[&Service], port: u16, protocol: Protocol) -> Option<Bypass> {
    let taken = taken(pod).iter().find(|taken| (taken.app, taken.protocol) == (port, protocol))?;
    let leads = |service: &Service, target: &Target| {
        service.ports.iter().any(|one| one.protocol == protocol && one.target == *target)
    };
    let past = services.iter().find(|service| leads(service, &Target::Number(port)))?;
    let name = Target::Name(taken.name.clone());
    let partly = services.iter().any(|service| leads(service, &name));
    Some(Bypass { service: past.name.clone(), taken: taken.clone(), partly })
}

/// The ports that the agent has taken over by name.
#[must_use]
pub fn taken(pod: &Pod) -> &[TakenPort] {
    match &pod.entry {
        Some(Entry::Ports { ports }) => ports,
        Some(Entry::Redirect) | None => &[],
    }
}

fn by_number(pod: &Pod, services: &[&Service], number: u16, protocol: Protocol) -> Option<u16> {
    let own = numbers(pod, services, protocol).contains(&number);
    own.then_some(number).or_else(|| {
        let ports = services.iter().flat_map(|service| &service.ports);
        let mut ports = ports.filter(|port| port.port == number && port.protocol == protocol);
        ports.find_map(|port| target(pod, port))
    })
}

fn by_name(pod: &Pod, services: &[&Service], name: &str, protocol: Protocol) -> Option<u16> {
    named(pod, name, protocol).or_else(|| {
        let ports = services.iter().flat_map(|service| &service.ports);
        let mut ports = ports.filter(|port| port.name.as_deref() == Some(name) && port.protocol == protocol);
        ports.find_map(|port| target(pod, port))
    })
}

fn named(pod: &Pod, name: &str, protocol: Protocol) -> Option<u16> {
    let taken = taken(pod).iter().find(|port| port.name == name && port.protocol == protocol);
    let own =
        || pod.ports.iter().find(|port| port.name.as_deref() == Some(name) && port.protocol == protocol);
    taken.map(|port| port.app).or_else(|| own().map(|port| port.port))
}

/// The only port there is: declared by the containers, or else what the Services lead to.
fn only(pod: &Pod, services: &[&Service], protocol: Protocol) -> Option<u16> {
    let declared: BTreeSet<_> =
        pod.ports.iter().filter(|port| port.protocol == protocol).map(|port| port.port).collect();
    let candidates = if declared.is_empty() { numbers(pod, services, protocol) } else { declared };
    candidates.first().filter(|_| candidates.len() == 1).copied()
}

/// Every port of the pod that anybody speaks of.
fn numbers(pod: &Pod, services: &[&Service], protocol: Protocol) -> BTreeSet<u16> {
    let declared = pod.ports.iter().filter(|port| port.protocol == protocol).map(|port| port.port);
    let taken = taken(pod).iter().filter(|port| port.protocol == protocol).map(|port| port.app);
    let leading = services.iter().flat_map(|service| &service.ports);
    let targets = leading.filter(|port| port.protocol == protocol).filter_map(|port| target(pod, port));
    declared.chain(taken).chain(targets).collect()
}

fn describe(pod: &Pod, port: u16, protocol: Protocol) -> FoundPort {
    let own = pod.ports.iter().find(|own| own.port == port && own.protocol == protocol);
    let taken = taken(pod).iter().find(|taken| taken.app == port && taken.protocol == protocol);
    let name = taken.map(|taken| taken.name.clone()).or_else(|| own.and_then(|own| own.name.clone()));
    let container = own.map(|own| own.container.clone()).or_else(|| match pod.containers.as_slice() {
        [one] => Some(one.clone()),
        _ => None,
    });
    FoundPort { port, name, container, protocol }
}

fn complaint(pod: &Pod, services: &[&Service], mapping: &PortMapping) -> String {
    let protocol = mapping.protocol;
    let all = numbers(pod, services, protocol).into_iter().map(|port| {
        let name = describe(pod, port, protocol).name;
        name.map_or_else(|| port.to_string(), |name| format!("{port} ({name})"))
    });
    let all = all.collect::<Vec<_>>().join(", ");
    match &mapping.port {
        _ if all.is_empty() => format!("the pods have no {protocol} port that anything speaks of"),
        Some(port) => format!("there is no {protocol} port `{port}`; there are {all}"),
        None => format!("there are several {protocol} ports, say which: {all}"),
    }
}

#[cfg(test)]
mod tests {
    use tpd_api::agent::{Entry, Protocol, TakenPort};
    use tpd_api::intercept::PortMapping;

    use super::super::objects::{Pod, Service, Target};
    use super::super::samples::{pod, service, with_port};
    use super::{bypass, find, swappable};

    fn mapping(port: Option<&str>, protocol: Protocol) -> PortMapping {
        PortMapping { port: port.map(str::to_owned), protocol, overlay_port: 2000 }
    }

    fn number(pod: &Pod, services: &[&Service], port: Option<&str>) -> Result<u16, String> {
        find(pod, services, &mapping(port, Protocol::Tcp)).map(|found| found.port)
    }

    #[test]
    fn containers_go_before_services() {
        let pod = with_port(pod("web-1"), "http", 8080);
        let web = service("web", 80, Target::Name("http".into()));
        let raw = service("raw", 9000, Target::Number(9090));
        let services = [&web, &raw];
        for (asked, expected) in [
            (None, 8080),
            (Some("http"), 8080),
            (Some("8080"), 8080),
            (Some("80"), 8080),
            (Some("web"), 8080),
            (Some("9000"), 9090),
            (Some("9090"), 9090),
        ] {
            assert_eq!(number(&pod, &services, asked), Ok(expected), "{asked:?}");
        }
        let found = find(&pod, &services, &mapping(Some("80"), Protocol::Tcp)).unwrap();
        assert_eq!((found.name.as_deref(), found.container.as_deref()), (Some("http"), Some("app")));
    }

    #[test]
    fn a_port_that_is_not_there_is_answered_with_those_that_are() {
        let pod = with_port(with_port(pod("web-1"), "http", 8080), "admin", 9000);
        let text = number(&pod, &[], Some("grpc")).unwrap_err();
        assert_eq!(text, "there is no TCP port `grpc`; there are 8080 (http), 9000 (admin)");
        assert!(number(&pod, &[], None).unwrap_err().contains("say which"));
        assert!(find(&pod, &[], &mapping(Some("8080"), Protocol::Udp)).is_err());
    }

    #[test]
    fn a_name_that_the_agent_has_taken_is_still_the_apps() {
        let mut pod = pod("web-1");
        pod.entry = Some(Entry::Ports {
            ports: vec![TakenPort { name: "http".into(), listen: 19901, app: 8080, protocol: Protocol::Tcp }],
        });
        let web = service("web", 80, Target::Name("http".into()));
        for asked in ["http", "80", "8080"] {
            assert_eq!(number(&pod, &[&web], Some(asked)), Ok(8080), "{asked}");
        }
    }

    #[test]
    fn a_service_leads_past_an_agent_that_stands_behind_a_name() {
        let by_name = service("web", 80, Target::Name("http".into()));
        let by_number = service("raw", 81, Target::Number(8080));
        let elsewhere = service("admin", 82, Target::Number(9000));
        let mut pod = with_port(pod("web-1"), "http", 8080);
        pod.entry = Some(Entry::Redirect);
        let past = |pod: &Pod, services: &[&Service]| {
            bypass(pod, services, 8080, Protocol::Tcp).map(|bypass| bypass.partly)
        };
        assert_eq!(past(&pod, &[&by_number]), None, "a redirect is in every path");
        pod.entry = Some(Entry::Ports {
            ports: vec![TakenPort { name: "http".into(), listen: 19901, app: 8080, protocol: Protocol::Tcp }],
        });
        assert_eq!(past(&pod, &[&by_name, &elsewhere]), None);
        assert_eq!(past(&pod, &[&by_number]), Some(false));
        assert_eq!(past(&pod, &[&by_number, &by_name]), Some(true));
        let udp = bypass(&pod, &[&by_number], 8080, Protocol::Udp);
        assert_eq!(udp, None);
    }

    #[test]
    fn a_port_can_be_swapped_where_services_use_its_name_only() {
        let pod = with_port(pod("web-1"), "http", 8080);
        let by_name = service("web", 80, Target::Name("http".into()));
        let by_number = service("raw", 81, Target::Number(8080));
        assert!(swappable(&pod, &[&by_name], 8080, Protocol::Tcp));
        assert!(!swappable(&pod, &[&by_name, &by_number], 8080, Protocol::Tcp));
        assert!(!swappable(&pod, &[], 8080, Protocol::Tcp));
    }
}
