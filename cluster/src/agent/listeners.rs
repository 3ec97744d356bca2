//! Where intercepted traffic comes in: a port of the agent's for each intercepted port of the app.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep};
use tpd_api::agent::{Entry, Protocol};
use tpd_api::inject::ENTRY_PORTS;
use tracing::warn;

use super::laptop::{Laptops, Ways};
use super::proxy::{self, Activity, Addresses, Port, Rule};
use super::room::Room;
use super::shelf::{Desk, Held};

/// A port of the app.
pub type AppPort = (Protocol, u16);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Pause after a failed accept, and where nothing more fits: only time frees descriptors and memory.
const PAUSE: Duration = Duration::from_millis(50);

/// How long a port is kept after its last rule and connection: the redirect outlives its last heartbeat by 2 s. Of datagrams nobody
/// knows which one is the last; they may be answered for as long as they are kept in mind.
fn linger(protocol: Protocol) -> Duration {
    const REDIRECT: Duration = Duration::from_secs(4);
    match protocol {
        Protocol::Tcp => REDIRECT,
        Protocol::Udp => REDIRECT.saturating_add(proxy::udp::KEPT),
    }
}

/// A client that vanished without a word (its node is gone, or a middlebox has forgotten it) is let go of after two minutes. The
/// app's own keep-alive is answered by the agent, so nobody else would notice, and each of them would stay for ever.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);

/// One port where traffic comes in.
#[derive(Debug)]
struct Listener {
    entry: u16,
    port: Rc<Port>,
    /// Since when nothing needs it.
    unused: Cell<Option<Instant>>,
    task: AbortHandle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// All of them, by the port of the app.
#[derive(Debug)]
pub struct Listeners {
    entry: Entry,
    listeners: BTreeMap<AppPort, Listener>,
    laptops: Rc<Laptops>,
    room: Room,
    /// The pod's own address: where datagrams of the app go, as nothing tells which address a client called.
    pod: IpAddr,
}

impl Listeners {
    /// Those that a worker before this one has left, and those that stand in the pod's path always. The pod's address is the one that it has on the way to `manager`.
    ///
    /// # Errors
    /// Fails where a port that was taken over cannot be listened on: then the pod must not be ready.
    pub fn new(entry: Entry, laptops: Rc<Laptops>, manager: SocketAddr, room: Room) -> io::Result<Self> {
        let pod = proxy::udp::source(manager).unwrap_or_else(|_| Ipv4Addr::LOCALHOST.into());
        let mut listeners = Self { entry, listeners: BTreeMap::new(), laptops, room, pod };
        for Held { app, entry, socket } in Desk.take_over() {
            listeners.start(app, entry, socket.into())?;
        }
        if let Entry::Ports { ports } = listeners.entry.clone() {
            for port in ports {
                let app = (port.protocol, port.app);
                if !listeners.listeners.contains_key(&app) {
                    listeners.open(app, port.listen)?;
                }
            }
        }
        Ok(listeners)
    }

    /// Whether the kernel redirects traffic for as long as heartbeats say so.
    #[must_use]
    pub fn are_redirected(&self) -> bool {
        self.entry == Entry::Redirect
    }

    /// Where a port's traffic comes in, opened if need be.
    ///
    /// # Errors
    /// Says what cannot be done.
    pub fn entry(&mut self, port: AppPort) -> Result<u16, String> {
        if let Some(listener) = self.listeners.get(&port) {
            return Ok(listener.entry);
        }
        if !self.are_redirected() {
            let (protocol, number) = port;
            return Err(format!(
                "port {number}/{protocol} of this pod was not taken over when it was created"
            ));
        }
        let entry = free(port, self.listeners.values().map(|listener| listener.entry))
            .ok_or_else(|| format!("more than {} ports of a pod cannot be intercepted", ENTRY_PORTS.len()))?;
        self.open(port, entry).map_err(|error| format!("listen on port {entry}: {error}"))?;
        Ok(entry)
    }

    /// Puts rules in force, and none on every other port.
    pub fn replace(&self, mut rules: BTreeMap<AppPort, Vec<Rule>>) {
        for (port, listener) in &self.listeners {
            listener.port.replace(rules.remove(port).unwrap_or_default());
        }
    }

    /// Closes what has not been needed for a while.
    pub fn sweep(&mut self, needed: impl Fn(&AppPort) -> bool, now: Instant) {
        let redirected = self.are_redirected();
        self.listeners.retain(|port, listener| {
            if !redirected || needed(port) || listener.port.connections() > 0 {
                listener.unused.set(None);
                return true;
            }
            let since = listener.unused.get().unwrap_or(now);
            listener.unused.set(Some(since));
            let stays = now < since + linger(port.0);
            if !stays {
                Desk.remove(*port, listener.entry);
            }
            stays
        });
    }

    /// Connections on all ports.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.listeners.values().map(|listener| listener.port.connections()).sum()
    }

    /// Ports of laptops that something is still under way with, although nothing more goes there.
    #[must_use]
    pub fn held(&self) -> BTreeSet<SocketAddr> {
        self.listeners.values().flat_map(|listener| listener.port.held()).collect()
    }

    /// What goes on on all ports.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.listeners.values().map(|listener| listener.port.activity()).sum()
    }

    /// Connections of a port, held by the agent, that an intercept has not reached yet.
    #[must_use]
    pub fn stragglers(&self, port: AppPort, uid: &str) -> u64 {
        self.listeners.get(&port).map_or(0, |listener| listener.port.stragglers(uid))
    }

    fn open(&mut self, app: AppPort, entry: u16) -> io::Result<()> {
        let socket = listening(app.0, entry)?;
        Desk.put(app, entry, socket.as_fd());
        self.start(app, entry, socket)
    }

    fn start(&mut self, app: AppPort, entry: u16, socket: Socket) -> io::Result<()> {
        let (protocol, number) = app;
        let (port, laptops) = (Rc::new(Port::default()), Rc::clone(&self.laptops));
        let task = match protocol {
            Protocol::Tcp => {
                let listener = TcpListener::from_std(socket.into())?;
                spawn_local(accept(listener, number, Rc::clone(&port), laptops, self.room))
            }
            Protocol::Udp => {
                let socket = UdpSocket::from_std(socket.into())?;
                let ways = Rc::new(Ways { app: (self.pod, number).into(), laptops });
                spawn_local(proxy::udp::serve(socket, Rc::clone(&port), ways))
            }
        };
        let listener = Listener { entry, port, unused: Cell::new(None), task: task.abort_handle() };
        self.listeners.insert(app, listener);
        Ok(())
    }
}

/// An entry port that is free, the same for a port whenever that can be: an agent that is made anew may find what the one before
/// it has told the kernel.
fn free((protocol, app): AppPort, taken: impl Iterator<Item = u16>) -> Option<u16> {
    let taken: Vec<_> = taken.collect();
    let own = 2 * usize::from(app) + usize::from(protocol == Protocol::Udp);
    let ports = ENTRY_PORTS.cycle().skip(own % ENTRY_PORTS.len()).take(ENTRY_PORTS.len());
    ports.into_iter().find(|port| !taken.contains(port))
}

async fn accept(listener: TcpListener, app: u16, port: Rc<Port>, laptops: Rc<Laptops>, room: Room) {
    // Said once until there is room again for more than the next few.
    let mut is_said = false;
    loop {
        is_said &= room.is_crowded();
        if room.is_full() {
            if !std::mem::replace(&mut is_said, true) {
                warn!(app, connections = proxy::connections(), "new connections wait until there is room");
            }
            while room.is_full() {
                sleep(PAUSE).await;
            }
        }
        match listener.accept().await {
            Ok((stream, client)) => {
                let (port, laptops) = (Rc::clone(&port), Rc::clone(&laptops));
                spawn_local(async move {
                    // It fails only on a connection that is gone already.
                    let _ = relay(stream, client, app, port, laptops).await;
                });
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Relays one connection. The app is called as the client called it: some listen on the pod's address alone.
async fn relay(
    stream: TcpStream,
    client: SocketAddr,
    app: u16,
    port: Rc<Port>,
    laptops: Rc<Laptops>,
) -> io::Result<()> {
    prepare(&stream)?;
    let server = SocketAddr::new(stream.local_addr()?.ip().to_canonical(), app);
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    let ways = Rc::new(Ways { app: server, laptops });
    proxy::serve(stream, Addresses { client, server }, port, ways).await;
    Ok(())
}

/// What a client sends in pieces is passed on in pieces, and one that is gone is noticed.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(&KEEPALIVE)
}

/// Listens on every address of either family; of IPv4 alone where there is no IPv6.
///
/// # Errors
/// Fails where the port is taken.
pub(super) fn bind(port: u16) -> io::Result<TcpListener> {
    TcpListener::from_std(listening(Protocol::Tcp, port)?.into())
}

fn listening(protocol: Protocol, port: u16) -> io::Result<Socket> {
    let kind = match protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let socket = one_family((Ipv6Addr::UNSPECIFIED, port).into(), kind)
        .or_else(|_| one_family((Ipv4Addr::UNSPECIFIED, port).into(), kind))?;
    if protocol == Protocol::Tcp {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

/// The address may be in use: by connections of a worker before this one, and by the heartbeats of a UDP port.
fn one_family(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use socket2::SockRef;
    use tokio::net::{TcpListener, TcpStream};
    use tpd_api::inject::ENTRY_PORTS;

    use super::{Protocol, free, prepare};

    #[tokio::test]
    async fn a_client_that_vanishes_is_noticed() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        prepare(&stream).unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        let (time, interval) =
            (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap());
        let noticed = time + interval * socket.tcp_keepalive_retries().unwrap();
        assert_eq!(noticed, Duration::from_secs(120));
    }

    #[test]
    fn a_port_has_the_same_entry_each_time_unless_that_is_taken() {
        let (web, dns) = ((Protocol::Tcp, 8080), (Protocol::Udp, 8080));
        let first = free(web, [].into_iter()).unwrap();
        assert_eq!(free(web, [first + 1].into_iter()), Some(first));
        assert_eq!(free(dns, [].into_iter()), Some(first + 1));
        assert_eq!(free(web, [first, first + 1].into_iter()), Some(first + 2));
        let all_but = |port: u16| ENTRY_PORTS.filter(move |other| *other != port);
        for port in ENTRY_PORTS {
            assert_eq!(free(web, all_but(port)), Some(port));
        }
        assert_eq!(free(web, ENTRY_PORTS), None);
    }
}
