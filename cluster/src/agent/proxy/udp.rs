//! Datagrams on an intercepted port. There are no connections: what comes from one address and port within a minute is one
//! exchange, and keeps its side unless the rules change.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::datagrams::{Datagram, Queue};
use super::rules::{Choice, Port, Rule};
use super::upstream::Refusal;

/// Most clients at a time. Each may cost two sockets, and the memory of a datagram.
const CLIENTS: usize = 1024;

/// A client that has been silent for so long is forgotten: conntrack's `nf_conntrack_udp_timeout_stream` is 120 s, its time-out
/// for single exchanges 30.
const IDLE: Duration = Duration::from_secs(60);

/// How often silent ones are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// How long a laptop's answer is awaited before it is looked whether the laptop is there, and how often from then on. One that
/// is gone has half a second to give a sign of life, and is left at the fourth look, 0.8 s after what was sent to it in vain.
const BEAT: Duration = Duration::from_millis(200);

/// How long that goes on, twice as long as it may take. What is not answered by then wants no answer, and has arrived.
const DOUBT: Duration = Duration::from_secs(2);

/// Most datagrams of a client that are kept until it is known that the laptop takes any: half of what may wait, in number. In bytes
/// they are no more than one may have, a third of it.
const OPENING: usize = 32;

/// Longest datagram, bytes.
const LONGEST: usize = 65_535;

/// Datagrams to and from one destination.
pub trait Datagrams {
    /// Sends one.
    fn send(&self, datagram: &[u8]) -> impl Future<Output = io::Result<()>>;

    /// Receives one.
    fn recv(&self, buffer: &mut [u8]) -> impl Future<Output = io::Result<usize>>;
}

impl Datagrams for UdpSocket {
    async fn send(&self, datagram: &[u8]) -> io::Result<()> {
        Self::send(self, datagram).await.map(drop)
    }

    async fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Self::recv(self, buffer).await
    }
}

/// Ways to the app and to the laptops.
pub trait Channels: 'static {
    /// Datagrams to the app.
    type App: Datagrams + 'static;
    /// Datagrams to a laptop.
    type Laptop: Datagrams + 'static;

    /// Opens a channel to the app.
    fn app(&self) -> impl Future<Output = io::Result<Self::App>>;

    /// Opens a channel to the laptop that a rule names.
    fn laptop(&self, rule: &Rule) -> impl Future<Output = Result<Self::Laptop, Refusal>>;

    /// Whether the laptop that a rule names is left out, or no longer where a channel leads.
    fn is_left_out(&self, rule: &Rule, channel: &Self::Laptop) -> bool;

    /// Has the laptop that a rule names give a sign of life; it is left out if it gives none.
    fn ask(&self, rule: &Rule);
}

/// Who has sent something lately, with what is kept of each.
#[derive(Debug)]
struct Table<T> {
    clients: HashMap<SocketAddr, Association<T>>,
}

#[derive(Debug)]
struct Association<T> {
    /// Of the rules that chose its side.
    generation: u64,
    seen: Instant,
    kept: T,
}

impl<T> Table<T> {
    /// What is kept of a client whose side was chosen by rules of this generation.
    fn find(&mut self, client: SocketAddr, generation: u64, now: Instant) -> Option<&mut T> {
        let association = self.clients.get_mut(&client).filter(|one| one.generation == generation)?;
        association.seen = now;
        Some(&mut association.kept)
    }

    /// Adds a client, in place of the one that has been silent for longest if there is no room.
    fn insert(&mut self, client: SocketAddr, generation: u64, now: Instant, kept: T) {
        if self.clients.len() >= CLIENTS && !self.clients.contains_key(&client) {
            let oldest = self.clients.iter().min_by_key(|(_, one)| one.seen).map(|(client, _)| *client);
            oldest.and_then(|oldest| self.clients.remove(&oldest));
        }
        self.clients.insert(client, Association { generation, seen: now, kept });
    }

    fn expire(&mut self, now: Instant) {
        self.clients.retain(|_, one| now.duration_since(one.seen) < IDLE);
    }
}

/// Relays the datagrams that come to `socket`, for ever. Must run in a `LocalSet`.
pub async fn serve<C: Channels>(socket: UdpSocket, port: Rc<Port>, channels: Rc<C>) {
    let socket = Rc::new(socket);
    let mut table = Table::<Queue> { clients: HashMap::new() };
    // An exchange ends when the table lets go of its queue.
    let mut exchanges = JoinSet::new();
    let mut buffer = vec![0; LONGEST];
    let mut sweep = interval(SWEEP);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            received = socket.recv_from(&mut buffer) => {
                // An error is the echo of an answer that a client did not want.
                let Ok((length, client)) = received else { continue };
                let (rules, now) = (port.current(), Instant::now());
                let known = table.find(client, rules.generation(), now);
                // One whose exchange has failed leads nowhere.
                let queue = match known.filter(|queue| !queue.is_closed()) {
                    Some(queue) => queue.clone(),
                    None => {
                        let (queue, datagrams) = Queue::new();
                        let answers = Answers { socket: socket.clone(), client };
                        exchanges.spawn_local(exchange(rules.choose_raw(), channels.clone(), datagrams, answers));
                        table.insert(client, rules.generation(), now, queue.clone());
                        queue
                    }
                };
                // Without room it is lost.
                queue.push(&buffer[..length]);
            }
            _ = sweep.tick() => table.expire(Instant::now()),
            Some(_) = exchanges.join_next() => {}
        }
    }
}

/// The way back to one client.
struct Answers {
    socket: Rc<UdpSocket>,
    client: SocketAddr,
}

impl Answers {
    async fn send(&self, datagram: &[u8]) {
        // As lost as any datagram may be.
        let _ = self.socket.send_to(datagram, self.client).await;
    }
}

/// Relays what one client sends, and the answers.
async fn exchange<C: Channels>(
    choice: Choice,
    channels: Rc<C>,
    mut datagrams: mpsc::Receiver<Datagram>,
    answers: Answers,
) {
    let taps = Taps::new(&choice.taps, &channels);
    let mut undelivered = VecDeque::new();
    if let Some(rule) = &choice.laptop {
        if let Ok(laptop) = channels.laptop(rule).await {
            let is_out = || {
                let is_out = channels.is_left_out(rule, &laptop);
                if !is_out {
                    channels.ask(rule);
                }
                is_out
            };
            match pump(&laptop, &mut datagrams, &answers, &taps, Some((rule, &is_out))).await {
                Ok(()) => return,
                Err(unanswered) => undelivered = unanswered,
            }
        }
        rule.counters().failed_open();
    }
    let Ok(app) = channels.app().await else { return };
    for datagram in undelivered {
        let _ = app.send(&datagram).await;
    }
    // The app's refusals are the client's own business: it asks again, or not.
    while pump(&app, &mut datagrams, &answers, &taps, None).await.is_err() {}
}

/// Relays until the client has been forgotten. Fails when the other side refuses, with what it has not answered: with the last
/// datagram, and with all of them while it has taken none.
///
/// For a laptop, counts the exchange once it is known not to have been refused; and fails while it answers nothing and `is_out`.
async fn pump(
    channel: &impl Datagrams,
    datagrams: &mut mpsc::Receiver<Datagram>,
    answers: &Answers,
    taps: &Taps,
    laptop: Option<(&Rc<Rule>, &dyn Fn() -> bool)>,
) -> Result<(), VecDeque<Datagram>> {
    let (mut uncounted, is_out) = laptop.unzip();
    let mut buffer = vec![0; LONGEST];
    let mut unanswered = VecDeque::new();
    let (mut first, mut sent) = (Instant::now(), Instant::now());
    let mut beat = interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            datagram = datagrams.recv() => {
                let taken = !unanswered.is_empty() && first.elapsed() >= DOUBT;
                if taken || datagram.is_none() {
                    count(&mut uncounted);
                }
                let Some(datagram) = datagram else { return Ok(()) };
                taps.copy(&datagram);
                sent = Instant::now();
                if unanswered.is_empty() {
                    first = sent;
                    beat.reset();
                }
                // What a way does not take is lost, as it may be anywhere: a way that has ended takes nothing, and says nothing.
                let result = timeout(BEAT, channel.send(&datagram)).await;
                // Only a laptop's is sent to somebody else.
                if is_out.is_some() {
                    keep(&mut unanswered, datagram, if uncounted.is_some() { OPENING } else { 1 });
                }
                if let Ok(Err(_)) = result {
                    return Err(unanswered);
                }
            }
            _ = beat.tick(), if !unanswered.is_empty() => {
                if sent.elapsed() >= DOUBT {
                    count(&mut uncounted);
                    unanswered.clear();
                } else if is_out.is_some_and(|is_out| is_out()) {
                    return Err(unanswered);
                }
            }
            received = channel.recv(&mut buffer) => {
                let Ok(length) = received else { return Err(unanswered) };
                count(&mut uncounted);
                unanswered.clear();
                answers.send(&buffer[..length]).await;
            }
        }
    }
}

/// Adds a datagram to those that may have to be sent again, and lets go of the oldest where they are too many.
fn keep(unanswered: &mut VecDeque<Datagram>, datagram: Datagram, most: usize) {
    unanswered.push_back(datagram);
    let bytes = |kept: &VecDeque<Datagram>| kept.iter().map(|one| one.len()).sum::<usize>();
    while unanswered.len() > most || bytes(unanswered) > LONGEST {
        unanswered.pop_front();
    }
}

/// Counts an exchange as the laptop's, once.
fn count(uncounted: &mut Option<&Rc<Rule>>) {
    if let Some(rule) = uncounted.take() {
        rule.counters().went_to_laptop();
    }
}

/// Copies of what one client sends. What a tap does not take at once is lost.
struct Taps {
    queues: Vec<(Rc<Rule>, Queue)>,
    _carriers: JoinSet<()>,
}

impl Taps {
    fn new<C: Channels>(rules: &[Rc<Rule>], channels: &Rc<C>) -> Self {
        let mut carriers = JoinSet::new();
        let queues = rules.iter().map(|rule| {
            let (queue, copies) = Queue::new();
            carriers.spawn_local(carry(rule.clone(), channels.clone(), copies));
            (rule.clone(), queue)
        });
        Self { queues: queues.collect(), _carriers: carriers }
    }

    fn copy(&self, datagram: &[u8]) {
        for (rule, queue) in &self.queues {
            if !queue.push(datagram) {
                rule.counters().lost_copy();
            }
        }
    }
}

async fn carry<C: Channels>(rule: Rc<Rule>, channels: Rc<C>, mut copies: mpsc::Receiver<Datagram>) {
    let mut channel: Option<C::Laptop> = None;
    let mut counted = false;
    while let Some(copy) = copies.recv().await {
        // A laptop that is not there may come back, and by another way.
        if channel.as_ref().is_none_or(|open| channels.is_left_out(&rule, open)) {
            channel = channels.laptop(&rule).await.ok();
        }
        let Some(open) = &channel else {
            rule.counters().lost_copy();
            continue;
        };
        if open.send(&copy).await.is_err() {
            // It was an earlier one that did not arrive; this one has not been sent yet.
            rule.counters().lost_copy();
            let _ = open.send(&copy).await;
        } else if !std::mem::replace(&mut counted, true) {
            rule.counters().went_to_laptop();
        }
    }
}
