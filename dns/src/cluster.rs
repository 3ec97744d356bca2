//! Questions to the cluster: from the cache, together with the same question on its way, or through the tunnel.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::Instant,
};

use tokio::sync::{Semaphore, watch};

use crate::{
    answer::Answer,
    cache::{Cache, Key},
    exchange::{Request, Transport},
    name::Name,
    random::random_id,
    servers::{Failure, Health},
    stats::Counters,
    wire::{self, Query, rcode},
};

/// Questions on their way to the cluster at most. At 20 ms through the tunnel that is 12,000 a second; with a dead tunnel it is
/// 64 a second, and two sockets each keep within the 1024 descriptors that a process has by default.
const MAX_ASKED: usize = 256;

type Outcome = Result<Arc<Answer>, Failure>;

#[derive(Debug)]
pub(crate) struct Cluster {
    gateways: Vec<SocketAddr>,
    counters: Arc<Counters>,
    pub(crate) health: Health,
    slots: Arc<Semaphore>,
    cache: Mutex<Cache>,
    asked: Mutex<HashMap<Key, watch::Receiver<Option<Outcome>>>>,
}

impl Key {
    pub(crate) fn of(query: &Query, name: Name) -> Self {
        Self {
            name,
            kind: query.kind,
            class: query.class,
            dnssec_ok: query.dnssec_ok(),
            checking_disabled: query.checking_disabled,
        }
    }
}

impl Cluster {
    pub(crate) fn new(gateways: Vec<SocketAddr>, counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Self {
            gateways,
            counters,
            health: Health::default(),
            slots: Arc::new(Semaphore::new(MAX_ASKED)),
            cache: Mutex::default(),
            asked: Mutex::default(),
        })
    }

    /// The answer that is still good.
    pub(crate) fn cached(&self, key: &Key) -> Option<Arc<Answer>> {
        let answer = lock(&self.cache).get(key, Instant::now());
        if answer.is_some() {
            self.counters.cache_hits.fetch_add(1, Relaxed);
        }
        answer
    }

    /// Is this very question on its way?
    pub(crate) fn is_asking(&self, key: &Key) -> bool {
        lock(&self.asked).contains_key(key)
    }

    pub(crate) fn flush(&self) {
        lock(&self.cache).clear();
    }

    /// The answer for the first of `names` that exists, `None` when none does. They are asked for side by side.
    pub(crate) async fn first_existing(
        self: &Arc<Self>,
        query: &Query,
        names: &[Name],
    ) -> Result<Option<(Name, Arc<Answer>)>, Failure> {
        let asked: Vec<_> = names.iter().map(|name| (name, self.ask(Key::of(query, name.clone())))).collect();
        for (name, outcome) in asked {
            let answer = outcome.get().await?;
            match answer.code() {
                rcode::NO_ERROR => return Ok(Some((name.clone(), answer))),
                rcode::NX_DOMAIN => {}
                _ => return Err(Failure::Silent),
            }
        }
        Ok(None)
    }

    /// The answer for one name, whatever it is.
    pub(crate) async fn lookup(self: &Arc<Self>, key: Key) -> Outcome {
        self.ask(key).get().await
    }

    /// Asks a question that is no one's but the proxy's.
    pub(crate) async fn probe(&self, name: &Name, kind: u16) -> Result<Vec<u8>, Failure> {
        let key = Key {
            name: name.clone(),
            kind,
            class: wire::CLASS_IN,
            dnssec_ok: false,
            checking_disabled: false,
        };
        self.health.ask(&self.gateways, &request(&key)).await
    }

    /// Starts asking, or joins who asks the same already. The question goes on when the asker gives up, so that the cache has the
    /// answer when it asks again.
    fn ask(self: &Arc<Self>, key: Key) -> Pending {
        if let Some(answer) = self.cached(&key) {
            return Pending::Known(Ok(answer));
        }
        let mut asked = lock(&self.asked);
        if let Some(outcome) = asked.get(&key) {
            return Pending::Asked(outcome.clone());
        }
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            return Pending::Known(Err(Failure::Overloaded));
        };
        let (sender, receiver) = watch::channel(None);
        asked.insert(key.clone(), receiver.clone());
        drop(asked);

        let cluster = Arc::clone(self);
        tokio::spawn(async move {
            let outcome = cluster.fetch(&key).await;
            // Into the cache before it is no longer on its way, so that nobody asks in between.
            if let Ok(answer) = &outcome {
                lock(&cluster.cache).put(key.clone(), Arc::clone(answer), Instant::now());
            }
            lock(&cluster.asked).remove(&key);
            sender.send_replace(Some(outcome));
            drop(slot);
        });
        Pending::Asked(receiver)
    }

    async fn fetch(&self, key: &Key) -> Outcome {
        self.counters.cluster.fetch_add(1, Relaxed);
        let reply = self.health.ask(&self.gateways, &request(key)).await?;
        Answer::read(&reply, Instant::now()).map(Arc::new).map_err(|_| {
            tracing::debug!(name = %key.name, "broken answer from the cluster");
            Failure::Silent
        })
    }
}

fn request(key: &Key) -> Request {
    let mut packet =
        wire::cluster_question(&key.name, key.kind, key.class, key.dnssec_ok, key.checking_disabled);
    wire::set_id(&mut packet, random_id());
    let question = packet[wire::HEADER..wire::HEADER + key.name.wire().len() + 4].into();
    Request { packet, question, transport: Transport::Udp, complete: true }
}

enum Pending {
    Known(Outcome),
    Asked(watch::Receiver<Option<Outcome>>),
}

impl Pending {
    async fn get(self) -> Outcome {
        match self {
            Self::Known(outcome) => outcome,
            Self::Asked(mut outcome) => match outcome.wait_for(Option::is_some).await {
                Ok(outcome) => outcome.clone().unwrap_or(Err(Failure::Silent)),
                Err(_) => Err(Failure::Silent),
            },
        }
    }
}

/// What these locks guard is whole between any two statements, so a panic elsewhere leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
