//! Ways to laptops, and to the app beside them: what the proxy needs to relay a connection.

#[cfg(test)]
mod tests;

use std::cell::{Ref, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout};
use tpd_api::agent::Proof;
use tpd_netstack::flow::{Datagrams, DialCause, Stream};
use tpd_netstack::packet::icmp::Unreachable;
use tpd_netstack::uplink::{Uplink, Way};

use super::merge::Managers;
use super::proxy::{self, Refusal, Rule, Transport, Upstreams};
use super::suspension::Suspensions;
use super::uplinks::Uplinks;

/// How long production waits for a laptop. Twice the round trip to the other side of the world.
const PATIENCE: Duration = Duration::from_millis(500);

/// Attempts to get a sign of life from a laptop, spread over the first half of the time that it has: a SYN is repeated only after
/// a second, and not all of three and of their answers are lost on a path that serves for anything.
const ATTEMPTS: u32 = 3;

/// How long a sign of life holds: half as long as a conversation by UDP looks for one again.
const ALIVE: Duration = Duration::from_millis(100);

/// How often a laptop that gives none is asked again: as often as one that refuses connections.
const RETRY: Duration = Duration::from_secs(1);

/// For the app to take a connection. The client would wait as long without us.
const APP_PATIENCE: Duration = Duration::from_secs(30);

/// Every laptop of the intercepts in force.
#[derive(Debug)]
pub struct Laptops {
    uplinks: Rc<Uplinks>,
    /// The managers that carry each, by their own addresses.
    carriers: RefCell<BTreeMap<Ipv6Addr, BTreeSet<SocketAddr>>>,
    suspensions: RefCell<Suspensions>,
    /// Those that are being asked for a sign of life.
    asked: RefCell<BTreeSet<Ipv6Addr>>,
    changed: Rc<Notify>,
}

impl Laptops {
    /// None yet. `changed` is told when one is left out.
    #[must_use]
    pub fn new(uplinks: Rc<Uplinks>, changed: Rc<Notify>) -> Self {
        Self {
            uplinks,
            carriers: RefCell::default(),
            suspensions: RefCell::default(),
            asked: RefCell::default(),
            changed,
        }
    }

    /// Takes over which laptops there are and who carries them.
    pub fn follow(&self, managers: &Managers) {
        let laptops: BTreeSet<_> = managers.intercepts().iter().map(|intercept| intercept.laptop).collect();
        self.suspensions.borrow_mut().retain(&laptops);
        let carriers = laptops.into_iter().map(|laptop| (laptop, managers.carriers(laptop)));
        *self.carriers.borrow_mut() = carriers.collect();
    }

    /// A manager has begun to carry a laptop.
    pub fn heard(&self, laptop: Ipv6Addr) {
        self.suspensions.borrow_mut().heard(laptop);
    }

    /// Whether there is a way to a laptop, whatever may listen there.
    #[must_use]
    pub fn is_reachable(&self, laptop: Ipv6Addr) -> bool {
        !self.ways(laptop).is_empty()
    }

    /// Whether nothing new is to go to a laptop's port: it did not answer lately, or no manager that is connected carries it.
    fn is_left_out(&self, target: SocketAddr) -> bool {
        let carried = matches!(target.ip(), IpAddr::V6(laptop) if self.is_carried(laptop));
        !carried || self.suspensions.borrow().is_suspended(target)
    }

    fn is_carried(&self, laptop: Ipv6Addr) -> bool {
        self.carriers.borrow().get(&laptop).is_some_and(|by| !by.is_empty())
    }

    /// Whether the way by a manager leads to a laptop.
    fn is_led_to_by(&self, laptop: Ipv6Addr, manager: SocketAddr) -> bool {
        let carries = self.carriers.borrow().get(&laptop).is_some_and(|by| by.contains(&manager));
        carries && self.uplinks.ready(manager).is_some()
    }

    /// Laptops that are left out.
    #[must_use]
    pub fn suspensions(&self) -> Ref<'_, Suspensions> {
        self.suspensions.borrow()
    }

    /// Connects to every one of these ports of a laptop once; the longest round trip, or why there is none.
    pub async fn prove(&self, targets: &[SocketAddr]) -> Proof {
        let mut micros = 0;
        for target in targets {
            let begun = Instant::now();
            match self.dial(*target).await {
                Ok(_) => micros = micros.max(begun.elapsed().as_micros() as u64),
                Err(refusal) => return Proof { micros: None, problem: Some(refusal.to_string()) },
            }
        }
        Proof { micros: Some(micros), problem: None }
    }

    /// Connects to a laptop, unless it did not answer lately.
    async fn connect(&self, target: SocketAddr) -> Result<Stream, Refusal> {
        if self.suspensions.borrow().is_suspended(target) {
            return Err(Refusal::Suspended);
        }
        self.dial(target).await
    }

    async fn dial(&self, target: SocketAddr) -> Result<Stream, Refusal> {
        let IpAddr::V6(laptop) = target.ip() else { return Err(Refusal::Refused) };
        let ways = self.ways(laptop);
        let Some(share) = PATIENCE.checked_div(ways.len() as u32) else { return Err(Refusal::Suspended) };
        let mut refusal = Refusal::Timeout;
        for (_, uplink) in ways {
            refusal = match uplink.connect(target, share).await {
                Ok(stream) => {
                    self.suspensions.borrow_mut().proved(target);
                    return Ok(stream);
                }
                // The laptop is there, and its other ports may serve.
                Err(cause) if is_answer(Some(cause)) => Refusal::Refused,
                // There is no room here, and nothing is wrong with the laptop.
                Err(DialCause::Limit) => return Err(Refusal::Suspended),
                Err(_) => Refusal::Timeout,
            };
        }
        self.leave_out(target, refusal);
        Err(refusal)
    }

    fn leave_out(&self, target: SocketAddr, refusal: Refusal) {
        let mut suspensions = self.suspensions.borrow_mut();
        match refusal {
            Refusal::Refused => suspensions.refused(target),
            Refusal::Timeout | Refusal::Suspended => suspensions.silent(target),
        }
        self.changed.notify_one();
    }

    /// Has a laptop give a sign of life, unless it is being asked. While it gives none it is left out. Datagrams need that:
    /// nothing of their own shows that they arrive.
    fn ask(self: &Rc<Self>, target: SocketAddr) {
        let IpAddr::V6(laptop) = target.ip() else { return };
        if !self.asked.borrow_mut().insert(laptop) {
            return;
        }
        let laptops = Rc::clone(self);
        spawn_local(async move {
            while laptops.is_carried(laptop) && !laptops.is_alive(laptop, target).await {
                laptops.leave_out(target, Refusal::Timeout);
                sleep(RETRY).await;
            }
            sleep(ALIVE).await;
            laptops.asked.borrow_mut().remove(&laptop);
        });
    }

    /// Whether a laptop answers an attempt to connect. That it refuses is an answer as well: the port may be meant for datagrams
    /// alone.
    async fn is_alive(&self, laptop: Ipv6Addr, target: SocketAddr) -> bool {
        let ways = self.ways(laptop);
        if ways.is_empty() {
            // It cannot be asked, and is not reached by anyone; but one that is left out has to be asked again.
            return !self.suspensions.borrow().is_suspended(target);
        }
        let pause = PATIENCE / 2 / ATTEMPTS;
        let attempts: FuturesUnordered<_> = (ways.iter().cycle().zip(0..ATTEMPTS))
            .map(|((_, uplink), number)| async move {
                let begun = pause * number;
                sleep(begun).await;
                is_answer(uplink.connect(target, PATIENCE - begun).await.err())
            })
            .collect();
        let alive = attempts.any(std::future::ready).await;
        if alive {
            self.suspensions.borrow_mut().answered(laptop);
        }
        alive
    }

    /// Ways to a laptop, each with its manager, those by UDP first.
    fn ways(&self, laptop: Ipv6Addr) -> Vec<(SocketAddr, Rc<Uplink>)> {
        let carriers = self.carriers.borrow();
        let managers = carriers.get(&laptop).into_iter().flatten();
        let ways = managers.filter_map(|manager| Some((*manager, self.uplinks.ready(*manager)?)));
        let mut ways: Vec<_> = ways.collect();
        ways.sort_by_key(|(_, (way, _))| *way != Way::Udp);
        ways.into_iter().map(|(manager, (_, uplink))| (manager, uplink)).collect()
    }
}

/// Whether a laptop has answered an attempt to connect that failed for this cause, if it did.
fn is_answer(cause: Option<DialCause>) -> bool {
    match cause {
        None | Some(DialCause::Refused) => true,
        Some(DialCause::Unreachable(why)) => matches!(why, Unreachable::Port | Unreachable::Prohibited),
        Some(_) => false,
    }
}

impl Transport for Stream {
    /// To be dropped unfinished is to be reset.
    fn abort(&mut self) {}

    fn unacknowledged(&self) -> usize {
        Self::unacknowledged(self)
    }
}

/// Where one client's connection may go.
#[derive(Debug)]
pub struct Ways {
    /// The app, at the address that the client called.
    pub app: SocketAddr,
    /// The laptops.
    pub laptops: Rc<Laptops>,
}

impl Upstreams for Ways {
    type App = TcpStream;
    type Laptop = Stream;

    async fn app(&self) -> io::Result<TcpStream> {
        let stream = timeout(APP_PATIENCE, TcpStream::connect(self.app)).await??;
        // What the client sent in pieces is passed on in pieces.
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn laptop(&self, rule: &Rule) -> Result<Stream, Refusal> {
        self.laptops.connect(rule.laptop).await
    }

    fn is_left_out(&self, rule: &Rule) -> bool {
        self.laptops.is_left_out(rule.laptop)
    }

    fn lost(&self, rule: &Rule) {
        self.laptops.leave_out(rule.laptop, Refusal::Timeout);
    }
}

/// Datagrams to and from a laptop.
#[derive(Debug)]
pub struct Channel {
    datagrams: Datagrams,
    /// The manager that they go by.
    manager: SocketAddr,
}

impl proxy::udp::Datagrams for Channel {
    async fn send(&self, datagram: &[u8]) -> io::Result<()> {
        self.datagrams.send(datagram).await
    }

    async fn recv(&self, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        let receive = |cx: &mut Context<'_>| {
            proxy::udp::with_buffer(|buffer| {
                let length = ready!(self.datagrams.poll_recv(cx, buffer))?;
                take(&buffer[..length]);
                Poll::Ready(Ok(()))
            })
        };
        poll_fn(receive).await
    }
}

impl proxy::udp::Channels for Ways {
    type App = UdpSocket;
    type Laptop = Channel;

    async fn app(&self) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((self.app.ip(), 0)).await?;
        socket.connect(self.app).await?;
        Ok(socket)
    }

    async fn laptop(&self, rule: &Rule) -> Result<Channel, Refusal> {
        let target = rule.laptop;
        let IpAddr::V6(laptop) = target.ip() else { return Err(Refusal::Refused) };
        if self.laptops.suspensions().is_suspended(target) {
            return Err(Refusal::Suspended);
        }
        let (manager, way) = self.laptops.ways(laptop).into_iter().next().ok_or(Refusal::Suspended)?;
        let datagrams = way.open_datagrams(target).map_err(|_| Refusal::Refused)?;
        Ok(Channel { datagrams, manager })
    }

    fn is_left_out(&self, rule: &Rule, channel: &Channel) -> bool {
        let target = rule.laptop;
        let is_led_to = |laptop| self.laptops.is_led_to_by(laptop, channel.manager);
        let led_to = matches!(target.ip(), IpAddr::V6(laptop) if is_led_to(laptop));
        !led_to || self.laptops.suspensions().is_suspended(target)
    }

    fn ask(&self, rule: &Rule) {
        self.laptops.ask(rule.laptop);
    }
}
