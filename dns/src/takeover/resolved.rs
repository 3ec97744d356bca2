//! systemd-resolved: the cluster's domains are routed to the proxy, everything else stays with the servers that resolved has.
//!
//! resolved forgets the settings of an interface together with the interface, so a killed daemon leaves nothing behind.
//!
//! A name goes where the longest matching domain points to:
//! - the three search domains make `web` (which resolved completes) and `web.shop` (which the C library completes) cluster names;
//! - `~svc`, `~pod` and one domain for each known namespace have `web.shop` asked of the proxy at once. Where namespaces can't be listed, those
//!   of other namespaces go through the C library's search list, once the network's own server has said that it doesn't know them;
//! - the reverse zones of the cluster's networks;
//! - the domains that a person wants resolved as a pod resolves them.
//!
//! The domain `.` would need no list, and isn't used unless it is among those last ones: it would take every name away from the servers, DNS over TLS and DNSSEC that
//! the system has configured, and no name at all would resolve while the daemon is stopped in a debugger.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream};
use tokio::sync::watch;
use zbus::{
    Connection,
    fdo::{DBusProxy, PropertiesProxy},
    wire::OwnedObjectPath,
};

use super::{Guard, Hold, Link, TakeoverError, WayBack};
use crate::{
    name::Name,
    rules::{Scope, is_namespace_domain},
};

pub(super) const SERVICE: &str = "org.freedesktop.resolve1";
pub(super) const PATH: &str = "/org/freedesktop/resolve1";

/// Address families, as on the wire of D-Bus (Linux's numbers).
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
const PORT: u16 = 53;
/// Domains of one interface at most: resolved refuses more than 1024, and walks them for each question.
const MAX_DOMAINS: usize = 512;
/// Several changes come together; one look afterwards is enough.
const SETTLE: Duration = Duration::from_millis(200);
/// How often it is tried again to tell a resolved that has not taken what it was told, or has not answered.
const AGAIN: Duration = Duration::from_secs(5);

#[zbus::proxy(
    interface = "org.freedesktop.resolve1.Manager",
    default_service = "org.freedesktop.resolve1",
    default_path = "/org/freedesktop/resolve1"
)]
trait Manager {
    #[zbus(name = "SetLinkDNS")]
    fn set_link_dns(&self, link: i32, servers: &[(i32, Vec<u8>)]) -> zbus::Result<()>;
    fn set_link_domains(&self, link: i32, domains: &[(String, bool)]) -> zbus::Result<()>;
    fn set_link_default_route(&self, link: i32, enable: bool) -> zbus::Result<()>;
    #[zbus(name = "SetLinkLLMNR")]
    fn set_link_llmnr(&self, link: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkMulticastDNS")]
    fn set_link_multicast_dns(&self, link: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkDNSSEC")]
    fn set_link_dnssec(&self, link: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkDNSOverTLS")]
    fn set_link_dns_over_tls(&self, link: i32, mode: &str) -> zbus::Result<()>;
    fn revert_link(&self, link: i32) -> zbus::Result<()>;
    fn flush_caches(&self) -> zbus::Result<()>;
    fn get_link(&self, link: i32) -> zbus::Result<OwnedObjectPath>;

    #[zbus(property(emits_changed_signal = "false"), name = "DNS")]
    fn dns(&self) -> zbus::Result<Vec<(i32, i32, Vec<u8>)>>;
    #[zbus(property(emits_changed_signal = "false"), name = "FallbackDNS")]
    fn fallback_dns(&self) -> zbus::Result<Vec<(i32, i32, Vec<u8>)>>;
}

#[zbus::proxy(interface = "org.freedesktop.resolve1.Link", default_service = "org.freedesktop.resolve1")]
trait ResolvedLink {
    #[zbus(property(emits_changed_signal = "false"))]
    fn default_route(&self) -> zbus::Result<bool>;
}

/// A system that resolves names with systemd-resolved.
#[derive(Debug)]
pub struct Resolved {
    connection: Connection,
    manager: ManagerProxy<'static>,
    upstreams: watch::Sender<Arc<[SocketAddr]>>,
}

impl Resolved {
    pub(super) async fn new(connection: Connection) -> Result<Self, TakeoverError> {
        let manager = ManagerProxy::new(&connection).await.map_err(refused("the connection"))?;
        let (upstreams, _) = watch::channel(Arc::from([]));
        let resolved = Self { connection, manager, upstreams };
        resolved.read_upstreams(None).await;
        Ok(resolved)
    }

    pub(super) fn upstreams(&self) -> watch::Receiver<Arc<[SocketAddr]>> {
        self.upstreams.subscribe()
    }

    pub(super) async fn take(
        self,
        link: Link,
        scope: watch::Receiver<Arc<Scope>>,
    ) -> Result<Guard, TakeoverError> {
        let session = Session { manager: self.manager.clone(), link: link.index as i32 };
        let current = Arc::clone(&scope.borrow());
        session.apply(&link, &current).await?;
        let (hold, held) = watch::channel(Hold::Held);
        let keeper = Keeper { resolved: self, session: session.clone(), link, scope, hold };
        Ok(Guard::new(WayBack::Resolved(session), held, tokio::spawn(keeper.keep())))
    }

    /// The servers of the interfaces that take any name, those that are configured for the machine, or else resolved's own defaults.
    async fn read_upstreams(&self, own: Option<i32>) {
        // A resolved that says nothing has the servers that it had.
        let Ok(entries) = self.manager.dns().await else { return };
        let mut servers = Vec::new();
        for (link, _, address) in entries {
            if Some(link) != own && (link == 0 || self.takes_any_name(link).await) {
                servers.extend(server(link, &address));
            }
        }
        if servers.is_empty() {
            let fallback = match self.manager.fallback_dns().await {
                Err(zbus::Error::InputOutput(_)) => return,
                // Without the property there are none.
                other => other.unwrap_or_default(),
            };
            servers.extend(fallback.iter().filter_map(|(link, _, address)| server(*link, address)));
        }
        let servers: Arc<[SocketAddr]> = servers.into();
        self.upstreams.send_if_modified(|known| {
            let news = *known != servers;
            *known = servers;
            news
        });
    }

    async fn takes_any_name(&self, link: i32) -> bool {
        let read = async {
            let path = self.manager.get_link(link).await?;
            ResolvedLinkProxy::builder(&self.connection).path(path).build().await?.default_route().await
        };
        // Without the property (before systemd 240) every interface does.
        read.await.unwrap_or(true)
    }
}

fn server(link: i32, address: &[u8]) -> Option<SocketAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(address) {
        return Some((Ipv4Addr::from(octets), PORT).into());
    }
    let address = Ipv6Addr::from(<[u8; 16]>::try_from(address).ok()?);
    let scope = if address.is_unicast_link_local() { link as u32 } else { 0 };
    Some(SocketAddrV6::new(address, PORT, 0, scope).into())
}

/// The settings of one interface.
#[derive(Debug, Clone)]
pub(super) struct Session {
    manager: ManagerProxy<'static>,
    link: i32,
}

impl Session {
    async fn apply(&self, link: &Link, scope: &Scope) -> Result<(), TakeoverError> {
        let Self { manager, link: index } = self;
        let (family, octets) = match link.server {
            IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
            IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
        };
        // Before the server is known, so that no question about anything else is ever sent to it.
        optional("SetLinkDefaultRoute", manager.set_link_default_route(*index, false).await)?;
        optional("SetLinkLLMNR", manager.set_link_llmnr(*index, "no").await)?;
        optional("SetLinkMulticastDNS", manager.set_link_multicast_dns(*index, "no").await)?;
        // The zone isn't signed, and the tunnel is encrypted.
        optional("SetLinkDNSSEC", manager.set_link_dnssec(*index, "no").await)?;
        optional("SetLinkDNSOverTLS", manager.set_link_dns_over_tls(*index, "no").await)?;
        manager.set_link_domains(*index, &domains(scope)?).await.map_err(refused("SetLinkDomains"))?;
        manager.set_link_dns(*index, &[(family, octets)]).await.map_err(refused("SetLinkDNS"))?;
        // What was not found before we came may be found now.
        optional("FlushCaches", manager.flush_caches().await)
    }

    pub(super) async fn revert(&self) -> Result<(), TakeoverError> {
        match self.manager.revert_link(self.link).await {
            // The interface is gone, and its settings with it.
            Err(error) if is_error(&error, "org.freedesktop.resolve1.NoSuchLink") => {}
            result => result.map_err(refused("RevertLink"))?,
        }
        optional("FlushCaches", self.manager.flush_caches().await)
    }
}

/// A call that older versions lack, and that a build without the feature refuses.
fn optional(call: &'static str, result: zbus::Result<()>) -> Result<(), TakeoverError> {
    const LACKING: [&str; 2] =
        ["org.freedesktop.DBus.Error.UnknownMethod", "org.freedesktop.DBus.Error.NotSupported"];
    match result {
        Err(error) if LACKING.iter().any(|name| is_error(&error, name)) => {
            tracing::debug!(call, "not known to this systemd-resolved");
            Ok(())
        }
        result => result.map_err(refused(call)),
    }
}

fn is_error(error: &zbus::Error, name: &str) -> bool {
    matches!(error, zbus::Error::MethodError(found, _, _) if found.as_str() == name)
}

fn refused(call: &'static str) -> impl FnOnce(zbus::Error) -> TakeoverError {
    move |source| TakeoverError::Resolved { call, source }
}

/// The domains that the proxy is asked for; with `true` those that are no search domains. What a person asked for comes before
/// what there may be too much of.
fn domains(scope: &Scope) -> Result<Vec<(String, bool)>, TakeoverError> {
    let Scope { zone, namespace, .. } = scope;
    let search = [format!("{namespace}.svc.{zone}"), format!("svc.{zone}"), zone.clone()];
    for name in &search {
        Name::parse(name)?;
    }
    let others = scope.namespaces.iter().filter(|name| *name != namespace);
    let short = ["svc", "pod"].into_iter().chain([&**namespace]).chain(others.map(String::as_str));
    let short =
        short.filter(|label| matches!(*label, "svc" | "pod") || is_namespace_domain(label, namespace));
    let reverse = scope.networks.iter().flat_map(Name::reverse_zones).map(|zone| zone.to_string());
    let forwards =
        scope.forwards.iter().map(|forward| Name::parse(&forward.domain).map(|name| name.to_string()));
    let forwards: Vec<String> = forwards.collect::<Result<_, _>>()?;
    let routed =
        forwards.into_iter().chain(short.map(str::to_owned)).chain(reverse).map(|domain| (domain, true));
    Ok(search.into_iter().map(|domain| (domain, false)).chain(routed).take(MAX_DOMAINS).collect())
}

/// Keeps the settings in force, and the upstreams up to date.
struct Keeper {
    resolved: Resolved,
    session: Session,
    link: Link,
    scope: watch::Receiver<Arc<Scope>>,
    hold: watch::Sender<Hold>,
}

impl Keeper {
    async fn keep(mut self) {
        let mut changes = match changes(&self.resolved.connection).await {
            Ok(changes) => changes,
            Err(error) => {
                tracing::warn!(%error, "systemd-resolved cannot be watched; its restart would go unnoticed");
                stream::pending().boxed()
            }
        };
        loop {
            let disturbed = *self.hold.borrow() == Hold::Disturbed;
            let scoped = tokio::select! {
                Some(()) = changes.next() => false,
                Ok(()) = self.scope.changed() => true,
                () = tokio::time::sleep(AGAIN), if disturbed => true,
                else => return,
            };
            tokio::time::sleep(SETTLE).await;
            while let Some(Some(())) = changes.next().now_or_never() {}
            if scoped || !self.is_in_force().await {
                self.apply().await;
            }
            self.resolved.read_upstreams(Some(self.session.link)).await;
        }
    }

    async fn is_in_force(&self) -> bool {
        let entries = self.resolved.manager.dns().await.unwrap_or_default();
        entries.iter().any(|(link, _, address)| {
            *link == self.session.link
                && server(*link, address).is_some_and(|server| server.ip() == self.link.server)
        })
    }

    async fn apply(&mut self) {
        let scope = Arc::clone(&self.scope.borrow_and_update());
        let hold = match self.session.apply(&self.link, &scope).await {
            Ok(()) => Hold::Held,
            Err(error) => {
                tracing::warn!(%error, "systemd-resolved has lost the cluster's domains");
                Hold::Disturbed
            }
        };
        self.hold.send_replace(hold);
    }
}

/// Something about resolved has changed: its settings, or the process itself.
async fn changes(connection: &Connection) -> zbus::Result<stream::BoxStream<'static, ()>> {
    let bus = DBusProxy::new(connection).await?;
    let owner = bus.receive_name_owner_changed_with_args(&[(0, SERVICE)]).await?;
    let properties = PropertiesProxy::builder(connection).destination(SERVICE).path(PATH).build().await?;
    let settings = properties.receive_properties_changed().await?;
    Ok(stream::select(owner.map(drop), settings.map(drop)).boxed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Forward;

    fn scope(namespaces: &[&str]) -> Scope {
        Scope {
            zone: "cluster.local".into(),
            namespace: "shop".into(),
            namespaces: namespaces.iter().map(|name| (*name).to_owned()).collect(),
            networks: vec!["10.96.0.0/16".parse().unwrap()],
            ..Scope::default()
        }
    }

    #[test]
    fn routes_what_the_cluster_answers() {
        let domains = domains(&scope(&["shop", "dev", "com", "io"])).unwrap();
        let routed: Vec<_> = domains.iter().filter(|domain| domain.1).map(|domain| &*domain.0).collect();
        assert_eq!(routed, ["svc", "pod", "shop", "dev", "96.10.in-addr.arpa"]);
        let search: Vec<_> = domains.iter().filter(|domain| !domain.1).map(|domain| &*domain.0).collect();
        assert_eq!(search, ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
    }

    #[test]
    fn routes_the_domains_that_have_servers_of_their_own() {
        let forward = |domain: &str| Forward { domain: domain.into(), servers: [].into() };
        let scope = Scope { forwards: vec![forward("Corp.example."), forward(".")], ..scope(&[]) };
        let domains = domains(&scope).unwrap();
        assert_eq!(domains[3..5], [("corp.example".to_owned(), true), (".".to_owned(), true)]);
    }

    #[test]
    fn stays_within_what_resolved_accepts() {
        let names: Vec<_> = (0..2000).map(|index| format!("ns-{index}")).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        assert_eq!(domains(&scope(&names)).unwrap().len(), MAX_DOMAINS);
    }

    #[test]
    fn link_local_servers_keep_their_interface() {
        let address = "fe80::1".parse::<Ipv6Addr>().unwrap().octets();
        assert_eq!(server(7, &address).unwrap().to_string(), "[fe80::1%7]:53");
        assert_eq!(server(7, &[192, 0, 2, 1]).unwrap().to_string(), "192.0.2.1:53");
        assert_eq!(server(7, &[1, 2, 3]), None);
    }
}
