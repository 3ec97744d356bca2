//! Probes where the kernel has no redirect, as in gVisor: the ports that stand in for probed ones are listened on here, and lead to the
//! app as the kernel would lead them. That is the supervisor's, so that no probe fails for what becomes of a worker.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tpd_api::agent::Protocol;
use tpd_api::inject::ENTRY_PORTS;
use tracing::warn;

use super::heartbeat::{Beat, Heartbeats};
use super::listeners;
use super::redirect::table::StandIn;
use super::sockets::{self, State};

/// How often it is looked which of the app's ports are listened on: twice between two probes, which come every second at most.
const PERIOD: Duration = Duration::from_millis(500);

/// How often while the app starts, and how long that takes: a `postStart` hook asks but once.
const HASTE: Duration = Duration::from_millis(50);
const START: Duration = Duration::from_secs(60);

/// Pause after a port could not be listened on.
const RETRY: Duration = Duration::from_secs(5);

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
    lead(&stand_ins).await;
}

async fn lead(stand_ins: &[StandIn]) {
    let (open, _) = watch::channel(BTreeSet::new());
    let _tasks: JoinSet<()> = stand_ins.iter().map(|probe| stand_in(*probe, open.subscribe())).collect();
    let apps: BTreeSet<u16> = stand_ins.iter().map(|probe| probe.app).collect();
    let mut changed = Instant::now();
    loop {
        let found = listened_on(&apps);
        let starts = found.len() < apps.len();
        if open.send_if_modified(|open| std::mem::replace(open, found.clone()) != found) {
            changed = Instant::now();
        }
        sleep(if starts && changed.elapsed() < START { HASTE } else { PERIOD }).await;
    }
}

/// Whether the rules of the redirect are there: they take a heartbeat. This one claims a UDP port that nobody calls, and is forgotten
/// after two seconds.
fn is_redirected(probe: StandIn) -> bool {
    let beat = Heartbeats::default().beat(Protocol::Udp, probe.port, *ENTRY_PORTS.end());
    matches!(beat, Ok(Beat::Taken))
}

/// Those of the ports to which somebody outside the pod could connect. Where nobody can tell, the attempt will.
fn listened_on(apps: &BTreeSet<u16>) -> BTreeSet<u16> {
    let Ok(sockets) = sockets::tcp() else { return apps.clone() };
    let listening = sockets.iter().filter(|socket| socket.state == State::Listens);
    let reachable = listening.map(|socket| socket.local).filter(|local| !local.ip().is_loopback());
    reachable.map(|local| local.port()).filter(|port| apps.contains(port)).collect()
}

/// Listens while the app does, so that who asks in vain is refused as the app's own port would refuse.
async fn stand_in(probe: StandIn, mut open: watch::Receiver<BTreeSet<u16>>) {
    let mut relays = Relays::default();
    while open.wait_for(|open| open.contains(&probe.app)).await.is_ok() {
        match listeners::bind(probe.port) {
            Ok(listener) => relays.accept(&listener, probe.app, &mut open).await,
            Err(error) => {
                warn!(port = probe.port, %error, "probes find nothing");
                sleep(RETRY).await;
            }
        }
    }
}

/// Connections of one port, the oldest first.
#[derive(Debug, Default)]
struct Relays {
    tasks: JoinSet<()>,
    order: VecDeque<AbortHandle>,
}

impl Relays {
    /// Takes connections for as long as the app listens.
    async fn accept(&mut self, listener: &TcpListener, app: u16, open: &mut watch::Receiver<BTreeSet<u16>>) {
        loop {
            tokio::select! {
                Ok((stream, _)) = listener.accept() => self.begin(relay(stream, app)),
                Some(_) = self.tasks.join_next() => {}
                _ = open.wait_for(|open| !open.contains(&app)) => return,
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
        let _stand_in = tokio::spawn(async move { lead(&[probe]).await });
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
        let _stand_in = tokio::spawn(async move { lead(&[probe]).await });
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
