//! The sockets: UDP and TCP on the same addresses.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use futures::{StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket, tcp::OwnedReadHalf},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::Cluster,
    core::Core,
    exchange::{Transport, framed},
    name::NameError,
    rules::Scope,
    stats::{Counters, Stats},
    upstream::Upstream,
    wire::{Query, rcode},
};

/// Questions in work at most, whomever they wait for. Further ones are answered SERVFAIL at once: REFUSED would leave musl waiting
/// for its time-out, and silence everybody.
const MAX_QUERIES: usize = 1024;
/// Connections at most. They serve the few answers that are too large for UDP.
const MAX_CONNECTIONS: usize = 64;
/// Questions of one connection that are in work at a time (RFC 7766, 6.2.1.1).
const MAX_PIPELINED: usize = 16;
/// How long an idle connection is kept, and how long its peer may take to read (RFC 7766, 6.2.3: a few seconds).
const IDLE: Duration = Duration::from_secs(10);
/// Longest question over UDP: EDNS options fit many times over.
const MAX_QUESTION: usize = 4096;

/// What a [`Proxy`] is made of.
#[derive(Debug)]
pub struct Config {
    /// What belongs to the cluster. Followed as it changes.
    pub scope: watch::Receiver<Arc<Scope>>,
    /// The cluster's DNS over the tunnel, in order of preference: the gateway's addresses, port 53.
    pub gateways: Vec<SocketAddr>,
    /// Where to listen, UDP and TCP: the laptop's own overlay addresses, port 53. With port 0 the kernel picks one for both.
    pub listen: Vec<SocketAddr>,
    /// The servers that the system used before, from [`crate::takeover::System::upstreams`]. Followed as they change.
    pub upstreams: watch::Receiver<Arc<[SocketAddr]>>,
}

/// Why a [`Proxy`] can't be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another program listens there.
    #[error("cannot listen on {address} ({protocol}): the port is taken; find who listens with `ss -lpn sport = :{}` and stop it, or bind it to its own address", address.port())]
    Taken {
        /// The address.
        address: SocketAddr,
        /// `UDP` or `TCP`.
        protocol: &'static str,
    },
    /// The address can't be listened on.
    #[error("cannot listen on {address} ({protocol})")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// `UDP` or `TCP`.
        protocol: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The zone, the namespace or another name in the [`Scope`] is no domain name.
    #[error("the cluster's DNS names cannot be used")]
    Name(#[from] NameError),
}

/// A DNS server that answers cluster names from the cluster and leaves everything else to the resolver that was there before.
#[derive(Debug)]
pub struct Proxy {
    core: Arc<Core>,
    scope: watch::Receiver<Arc<Scope>>,
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
}

/// A view of a running [`Proxy`].
#[derive(Debug, Clone)]
pub struct Handle(Arc<Core>);

impl Handle {
    /// What the proxy has done so far.
    pub fn stats(&self) -> Stats {
        self.0.counters.read()
    }

    /// Has the cluster not answered for several questions in a row?
    pub fn cluster_is_silent(&self) -> bool {
        self.0.cluster.health.is_silent()
    }

    /// Does the cluster's own resolver forward to this machine's, as with clusters on the same machine?
    pub fn is_recursive(&self) -> bool {
        self.0.recursion.is_found()
    }

    /// Forgets the cluster's answers, for when another cluster is at the other end.
    pub fn flush(&self) {
        self.0.cluster.flush();
    }
}

impl Proxy {
    /// Listens on every address of [`Config::listen`]. Nothing is answered before [`Self::run`].
    pub async fn bind(config: Config) -> Result<Self, BindError> {
        let counters = Arc::new(Counters::default());
        let cluster = Cluster::new(config.gateways, Arc::clone(&counters));
        let own: Vec<IpAddr> = config.listen.iter().map(SocketAddr::ip).collect();
        let upstream = Upstream::new(config.upstreams, own.clone(), Arc::clone(&counters));
        let scope = Arc::clone(&config.scope.borrow());
        let core = Arc::new(Core::new(&scope, cluster, upstream, counters, own)?);

        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for address in config.listen {
            let socket = UdpSocket::bind(address).await.map_err(|source| refusal(address, "UDP", source))?;
            let address = socket.local_addr().map_err(|source| refusal(address, "UDP", source))?;
            tcp.push(TcpListener::bind(address).await.map_err(|source| refusal(address, "TCP", source))?);
            udp.push(socket);
        }
        Ok(Self { core, scope: config.scope, udp, tcp })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.udp.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    /// For asking how it does while it runs.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.core))
    }

    /// Answers until `stop` is cancelled; then the sockets are closed and unanswered questions dropped.
    pub async fn run(self, stop: CancellationToken) {
        let mut tasks = JoinSet::new();
        let queries = Arc::new(Semaphore::new(MAX_QUERIES));
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        for socket in self.udp {
            tasks.spawn(serve_udp(Arc::clone(&self.core), Arc::new(socket), Arc::clone(&queries)));
        }
        for listener in self.tcp {
            tasks.spawn(serve_tcp(Arc::clone(&self.core), listener, Arc::clone(&connections)));
        }
        let core = Arc::clone(&self.core);
        tasks.spawn(async move {
            let zone = core.rules().reverse_zone();
            core.recursion.probe(&core.cluster, zone).await;
        });
        tasks.spawn(async move { self.core.follow(self.scope).await });
        stop.cancelled().await;
        tasks.shutdown().await;
    }
}

fn refusal(address: SocketAddr, protocol: &'static str, source: io::Error) -> BindError {
    match source.kind() {
        io::ErrorKind::AddrInUse => BindError::Taken { address, protocol },
        _ => BindError::Listen { address, protocol, source },
    }
}

async fn serve_udp(core: Arc<Core>, socket: Arc<UdpSocket>, queries: Arc<Semaphore>) {
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; MAX_QUESTION];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            Some(_) = tasks.join_next() => continue,
        };
        let (length, asker) = match received {
            Ok(received) => received,
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        let Ok(query) = Query::read(&buffer[..length]) else {
            core.counters.garbage.fetch_add(1, Relaxed);
            continue;
        };
        let Ok(slot) = Arc::clone(&queries).try_acquire_owned() else {
            core.counters.overloaded.fetch_add(1, Relaxed);
            // A full socket buffer loses this reply as it would any other datagram: the asker asks again.
            let _ = socket.try_send_to(&query.empty_reply(rcode::SERVER_FAILURE), asker);
            continue;
        };
        let (core, socket) = (Arc::clone(&core), Arc::clone(&socket));
        tasks.spawn(async move {
            let reply = core.answer(&query, Transport::Udp).await;
            if let Err(error) = socket.send_to(&reply, asker).await {
                tracing::debug!(%asker, %error, "dns reply not sent");
            }
            drop(slot);
        });
    }
}

async fn serve_tcp(core: Arc<Core>, listener: TcpListener, connections: Arc<Semaphore>) {
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                if let Ok(slot) = Arc::clone(&connections).try_acquire_owned() {
                    let core = Arc::clone(&core);
                    tasks.spawn(async move {
                        if let Err(error) = serve_connection(&core, stream).await {
                            tracing::debug!(%error, "dns connection ended");
                        }
                        drop(slot);
                    });
                }
            }
            Err(error) => pause(&error).await,
        }
    }
}

/// Answers the questions of one connection in the order in which their answers come, until it falls idle or sends garbage.
async fn serve_connection(core: &Core, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (reader, mut writer) = stream.into_split();
    let packets = stream::unfold(reader, |mut reader| async {
        let packet = timeout(IDLE, read_message(&mut reader)).await.ok()?.ok()?;
        Some((packet, reader))
    });
    let answers = packets.map(|packet| async move {
        match Query::read(&packet) {
            Ok(query) => Some(core.answer(&query, Transport::Tcp).await),
            Err(_) => {
                core.counters.garbage.fetch_add(1, Relaxed);
                None
            }
        }
    });
    let mut answers = pin!(answers.buffer_unordered(MAX_PIPELINED));
    while let Some(Some(reply)) = answers.next().await {
        timeout(IDLE, writer.write_all(&framed(&reply))).await??;
    }
    writer.shutdown().await
}

async fn read_message(reader: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let length = reader.read_u16().await?;
    let mut message = vec![0; length.into()];
    reader.read_exact(&mut message).await?;
    Ok(message)
}

/// Out of descriptors or of memory: both pass, and neither is helped by trying again at once.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "dns socket failed; trying again");
    tokio::time::sleep(Duration::from_millis(100)).await;
}
