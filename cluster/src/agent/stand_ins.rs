//! Probes where the kernel has no redirect, as in gVisor: the ports that stand in for probed ones are listened on here, and lead to the
//! app as the kernel would lead them. That is the supervisor's, so that no probe fails for what becomes of a worker.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{interval, sleep};
use tpd_api::agent::Protocol;
use tpd_api::inject::ENTRY_PORTS;
use tracing::warn;

use super::heartbeat::{Beat, Heartbeats};
use super::listeners;
use super::redirect::table::StandIn;
use super::sockets::{self, State};

/// How often it is looked whether the app listens: twice between two probes, which come every second at most.
const PERIOD: Duration = Duration::from_millis(500);

/// Most connections to one port at a time: the kubelet has one for each kind of probe of each container. The oldest makes way, so
/// that nobody keeps a probe out by keeping others open.
const MOST: usize = 32;

/// Leads probes to the app for ever, if the kernel does not.
pub async fn serve(stand_ins: Vec<StandIn>) {
    let Some(first) = stand_ins.first() else { return };
    if is_redirected(*first) {
        return;
    }
    warn!("the kernel has no redirect: probes go through the agent, and nothing can be intercepted");
    let mut tasks: JoinSet<()> = stand_ins.into_iter().map(stand_in).collect();
    while tasks.join_next().await.is_some() {}
}

/// Whether the rules of the redirect are there: they take a heartbeat. This one claims a UDP port that nobody calls, and is forgotten
/// after two seconds.
fn is_redirected(probe: StandIn) -> bool {
    let beat = Heartbeats::default().beat(Protocol::Udp, probe.port, *ENTRY_PORTS.end());
    matches!(beat, Ok(Beat::Taken))
}

/// Listens while the app does, so that who asks in vain is refused as the app's own port would refuse.
async fn stand_in(probe: StandIn) {
    let mut relays = Relays::default();
    loop {
        while !is_listened_on(probe.app) {
            sleep(PERIOD).await;
        }
        match listeners::bind(probe.port) {
            Ok(listener) => relays.accept(&listener, probe.app).await,
            Err(error) => {
                warn!(port = probe.port, %error, "probes find nothing");
                sleep(PERIOD).await;
            }
        }
    }
}

/// Whether somebody outside the pod could connect to the port. Where nobody can tell, the attempt will.
fn is_listened_on(port: u16) -> bool {
    let reachable = |local: SocketAddr| local.port() == port && !local.ip().is_loopback();
    sockets::tcp().map_or(true, |sockets| {
        sockets.iter().any(|socket| socket.state == State::Listens && reachable(socket.local))
    })
}

/// Connections of one port, the oldest first.
#[derive(Debug, Default)]
struct Relays {
    tasks: JoinSet<()>,
    order: VecDeque<AbortHandle>,
}

impl Relays {
    /// Takes connections for as long as the app listens.
    async fn accept(&mut self, listener: &TcpListener, app: u16) {
        let mut looks = interval(PERIOD);
        loop {
            tokio::select! {
                Ok((stream, _)) = listener.accept() => self.begin(relay(stream, app)),
                Some(_) = self.tasks.join_next() => {}
                _ = looks.tick() => if !is_listened_on(app) { return },
            }
        }
    }

    fn begin(&mut self, relay: impl Future<Output = ()> + Send + 'static) {
        self.order.retain(|relay| !relay.is_finished());
        if self.order.len() >= MOST
            && let Some(oldest) = self.order.pop_front()
        {
            oldest.abort();
        }
        self.order.push_back(self.tasks.spawn(relay));
    }
}

/// The app is called as the kubelet called us: some listen on the pod's address alone.
async fn relay(mut stream: TcpStream, app: u16) {
    let Ok(here) = stream.local_addr() else { return };
    match TcpStream::connect((here.ip().to_canonical(), app)).await {
        Ok(mut app) => {
            // How it ends, each side sees for itself.
            let _ = copy_bidirectional(&mut stream, &mut app).await;
        }
        Err(_) => {
            let _ = reset_when_closed(&stream);
        }
    }
}

fn reset_when_closed(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A port of this machine that nobody has.
    fn free() -> u16 {
        let listener = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        listener.local_addr().unwrap().port()
    }

    /// The app's greeting, if there is one.
    async fn ask(port: u16) -> Option<String> {
        let mut said = String::new();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
        stream.read_to_string(&mut said).await.ok()?;
        Some(said)
    }

    #[tokio::test]
    async fn a_port_is_there_while_the_apps_is() {
        let probe = StandIn { port: free(), app: free() };
        let _stand_in = tokio::spawn(stand_in(probe));
        sleep(PERIOD).await;
        assert_eq!(ask(probe.port).await, None, "the app does not listen yet");
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, probe.app)).await.unwrap();
        let app = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.write_all(b"hello").await.unwrap();
            }
        });
        let greeted = async {
            while ask(probe.port).await.as_deref() != Some("hello") {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, greeted).await.expect("in time");
        app.abort();
        let refused = async {
            while TcpStream::connect((Ipv4Addr::LOCALHOST, probe.port)).await.is_ok() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, refused).await.expect("in time");
    }

    #[tokio::test]
    async fn the_oldest_connection_makes_way() {
        let probe = StandIn { port: free(), app: free() };
        let _app = TcpListener::bind((Ipv4Addr::UNSPECIFIED, probe.app)).await.unwrap();
        let _stand_in = tokio::spawn(stand_in(probe));
        until_open(probe.port).await;
        let mut kept = Vec::new();
        for _ in 0..=MOST {
            kept.push(TcpStream::connect((Ipv4Addr::LOCALHOST, probe.port)).await.unwrap());
        }
        // The app says nothing, so only the end can be read.
        let end = timeout(PATIENCE, kept[0].read(&mut [0])).await.expect("in time");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        assert!(timeout(PERIOD, kept[1].read(&mut [0])).await.is_err(), "that one was not to go");
    }

    async fn until_open(port: u16) {
        let open = async {
            while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, open).await.expect("in time");
    }
}
