//! Datagrams on an intercepted port. There are no connections: what comes from one address and port within a minute is one
//! conversation, and keeps its side unless the rules change, or the laptop goes or comes back.

mod conversation;
mod entry;
mod taps;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use self::conversation::{Answers, converse};
pub use self::entry::source;
use self::entry::{Call, Entry};
use super::datagrams::Queue;
use super::rules::{Port, Rule};
use super::upstream::Refusal;

/// Most clients at a time. Each may cost two sockets.
const CLIENTS: usize = 1024;

/// A client that has been silent for so long is forgotten: conntrack's `nf_conntrack_udp_timeout_stream` is 120 s, its time-out
/// for single exchanges 30.
const IDLE: Duration = Duration::from_secs(60);

/// How often silent ones are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// How long a client may get answers after what it has sent.
pub const KEPT: Duration = IDLE.saturating_add(SWEEP);

/// Longest datagram, bytes.
const LONGEST: usize = 65_535;

/// Datagrams to and from one destination.
pub trait Datagrams {
    /// Sends one.
    fn send(&self, datagram: &[u8]) -> impl Future<Output = io::Result<()>>;

    /// Receives one, and has `take` see it.
    fn recv(&self, take: impl FnMut(&[u8])) -> impl Future<Output = io::Result<()>>;
}

impl Datagrams for UdpSocket {
    async fn send(&self, datagram: &[u8]) -> io::Result<()> {
        Self::send(self, datagram).await.map(drop)
    }

    async fn recv(&self, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        // That an earlier one was refused is told by an error alone.
        self.async_io(Interest::READABLE | Interest::ERROR, || {
            with_buffer(|buffer| {
                let (length, _) = rustix::net::recv(self, &mut *buffer, RecvFlags::DONTWAIT)?;
                take(&buffer[..length]);
                Ok(())
            })
        })
        .await
    }
}

thread_local! {
    /// Where datagrams are between two sockets. 64 KiB for every conversation would be all the memory that an agent has.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; LONGEST].into());
}

/// Lends the buffer of this thread, which has room for any datagram.
pub fn with_buffer<T>(receive: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| receive(buffer))
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
    clients: HashMap<Call, Association<T>>,
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
    fn find(&mut self, client: Call, generation: u64, now: Instant) -> Option<&mut T> {
        let association = self.clients.get_mut(&client).filter(|one| one.generation == generation)?;
        association.seen = now;
        Some(&mut association.kept)
    }

    /// Adds a client, in place of the one that has been silent for longest if there is no room.
    fn insert(&mut self, client: Call, generation: u64, now: Instant, kept: T) {
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
    let entry = Rc::new(Entry::new(socket));
    let mut table = Table::<Queue> { clients: HashMap::new() };
    // A conversation ends when the table lets go of its queue.
    let mut conversations = JoinSet::new();
    let mut buffer = vec![0; LONGEST];
    let mut sweep = interval(SWEEP);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            received = entry.recv(&mut buffer) => {
                // An error is the echo of an answer that a client did not want.
                let Ok((length, client)) = received else { continue };
                let (rules, now) = (port.current(), Instant::now());
                let known = table.find(client, rules.generation(), now);
                // One whose conversation has failed leads nowhere.
                let queue = match known.filter(|queue| !queue.is_closed()) {
                    Some(queue) => queue.clone(),
                    None => {
                        let (queue, datagrams) = Queue::new();
                        let answers = Answers::new(&entry, client);
                        conversations.spawn_local(converse(rules.choose_raw(), channels.clone(), datagrams, answers));
                        table.insert(client, rules.generation(), now, queue.clone());
                        queue
                    }
                };
                // Without room it is lost.
                queue.push(&buffer[..length]);
            }
            _ = sweep.tick() => table.expire(Instant::now()),
            Some(_) = conversations.join_next() => {}
        }
    }
}
