//! A question in, its reply out: the rules carried out.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    pin::pin,
    sync::{Arc, Mutex, PoisonError, RwLock, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::timeout};

use crate::{
    answer::{Answer, MAX_MESSAGE, local_reply},
    cache::Key,
    cluster::Cluster,
    exchange::Transport,
    forwards::Forwards,
    name::{Name, NameError},
    recursion::Recursion,
    rules::{Decision, Rules, Scope},
    servers::Failure,
    stats::Counters,
    upstream::Upstream,
    wire::{self, Query, rcode},
};

/// How long a name that the old resolver knows waits for the cluster to say whether it has it too. More than the round trip
/// of a usable tunnel; it is waited for only while the tunnel is silent.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long an asker waits at most, also where one side is asked after the other: below the 5 s after which glibc gives up, and above
/// [`crate::servers::DEADLINE`], so that a silent server is noticed as such.
const LIMIT: Duration = Duration::from_millis(4_500);
/// Namespaces remembered at most; clusters have a few hundred.
const MAX_LEARNED: usize = 1024;

#[derive(Debug)]
pub(crate) struct Core {
    rules: RwLock<Arc<Rules>>,
    pub(crate) cluster: Arc<Cluster>,
    forwards: Forwards,
    upstream: Upstream,
    pub(crate) recursion: Recursion,
    pub(crate) counters: Arc<Counters>,
    /// Where the proxy listens: the answer to the proof.
    own: Vec<IpAddr>,
    /// Namespaces that the cluster has answered for.
    learned: Mutex<HashSet<Vec<u8>>>,
}

impl Core {
    pub(crate) fn new(
        scope: &Scope,
        cluster: Arc<Cluster>,
        upstream: Upstream,
        counters: Arc<Counters>,
        own: Vec<IpAddr>,
    ) -> Result<Self, NameError> {
        Ok(Self {
            rules: RwLock::new(Arc::new(Rules::new(scope)?)),
            cluster,
            forwards: Forwards::new(),
            upstream,
            recursion: Recursion::new(),
            counters,
            own,
            learned: Mutex::default(),
        })
    }

    pub(crate) fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Follows the scope for as long as somebody changes it.
    pub(crate) async fn follow(&self, mut scope: watch::Receiver<Arc<Scope>>) {
        while scope.changed().await.is_ok() {
            let rules = Rules::new(&scope.borrow_and_update());
            match rules {
                Ok(rules) => self.adopt(rules),
                Err(error) => tracing::warn!(%error, "dns scope not followed"),
            }
        }
    }

    fn adopt(&self, rules: Rules) {
        if *rules.zone() != *self.rules().zone() {
            self.cluster.flush();
        }
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// The reply, if it takes no waiting.
    pub(crate) fn immediate(&self, query: &Query, limit: usize) -> Option<Vec<u8>> {
        if let Some(code) = query.unsupported {
            return Some(query.empty_reply(code));
        }
        if query.edns.is_some_and(|edns| edns.version > 0) {
            return Some(query.empty_reply(rcode::BAD_VERSION));
        }
        if self.recursion.is_own(&query.name) {
            return Some(query.empty_reply(rcode::NX_DOMAIN));
        }
        match self.decide(query) {
            Decision::Loopback => {
                let addresses = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                Some(local_reply(query, &addresses, None))
            }
            Decision::Proof => Some(local_reply(query, &self.own, Some(0))),
            Decision::NxDomain => Some(query.empty_reply(rcode::NX_DOMAIN)),
            Decision::Cluster(names) => {
                let [name] = &*names else { return None };
                let answer = self.cluster.cached(&Key::of(query, name.clone()))?;
                Some(self.compose(query, name, &answer, limit))
            }
            Decision::Short { .. } | Decision::Forward(_) | Decision::Upstream => None,
        }
    }

    /// The reply, within [`LIMIT`].
    pub(crate) async fn answer(&self, query: &Query, transport: Transport) -> Vec<u8> {
        let started = Instant::now();
        self.counters.queries.fetch_add(1, Relaxed);
        let limit = match transport {
            Transport::Udp => query.limit(),
            Transport::Tcp => MAX_MESSAGE,
        };
        let reply = match self.immediate(query, limit) {
            Some(reply) => reply,
            None => match timeout(LIMIT, self.resolve(query, transport, limit))
                .await
                .unwrap_or(Err(Failure::Silent))
            {
                Ok(reply) => reply,
                Err(failure) => self.fail(query, failure),
            },
        };
        self.counters.took(started.elapsed());
        reply
    }

    async fn resolve(&self, query: &Query, transport: Transport, limit: usize) -> Result<Vec<u8>, Failure> {
        match self.decide(query) {
            Decision::Cluster(names) => self.ask_cluster(query, &names, limit).await,
            Decision::Short { candidates, certain: true } => {
                match self.expand(query, &candidates, limit).await? {
                    Some(reply) => Ok(reply),
                    None => self.elsewhere(query, transport).await,
                }
            }
            Decision::Short { candidates, certain: false } => {
                self.race(query, &candidates, transport, limit).await
            }
            // Our own question, come back through the cluster's resolver: asking on would never end.
            Decision::Forward(_) if self.recursion.is_found() && self.forwards.is_asking(query) => {
                self.upstream.relay(query, transport).await
            }
            Decision::Forward(servers) => self.forwards.relay(&servers, query, transport).await,
            Decision::Upstream => self.upstream.relay(query, transport).await,
            Decision::Loopback | Decision::Proof | Decision::NxDomain => {
                Ok(query.empty_reply(rcode::SERVER_FAILURE))
            }
        }
    }

    async fn ask_cluster(&self, query: &Query, names: &[Name], limit: usize) -> Result<Vec<u8>, Failure> {
        let Some(name) = names.first() else { return Ok(query.empty_reply(rcode::NX_DOMAIN)) };
        let key = Key::of(query, name.clone());
        if self.recursion.is_found() && !name.is_within(self.rules().zone()) && self.cluster.is_asking(&key) {
            // Our own question, come back through the cluster's resolver: asking on would never end.
            return Ok(query.empty_reply(rcode::NX_DOMAIN));
        }
        let answer = self.cluster.lookup(key).await?;
        if answer.exists() {
            self.learn(name);
        }
        Ok(self.compose(query, name, &answer, limit))
    }

    /// The cluster's reply for a short form, `None` if none of `candidates` exists.
    async fn expand(
        &self,
        query: &Query,
        candidates: &[Name],
        limit: usize,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let Some((full, answer)) = self.cluster.first_existing(query, candidates).await? else {
            return Ok(None);
        };
        self.learn(&full);
        Ok(Some(self.compose(query, &full, &answer, limit)))
    }

    /// Both sides at once. What the cluster has wins; what it hasn't is the old resolver's reply.
    async fn race(
        &self,
        query: &Query,
        candidates: &[Name],
        transport: Transport,
        limit: usize,
    ) -> Result<Vec<u8>, Failure> {
        let mut cluster = pin!(self.expand(query, candidates, limit));
        let mut elsewhere = pin!(self.elsewhere(query, transport));
        tokio::select! {
            biased;
            expanded = &mut cluster => match expanded {
                Ok(Some(reply)) => Ok(reply),
                Ok(None) => elsewhere.await,
                Err(failure) => only_if_exists(elsewhere.await?, failure),
            },
            other = &mut elsewhere => {
                let patience = match &other {
                    _ if self.cluster.health.is_silent() => Duration::ZERO,
                    Ok(reply) if exists(reply) => PATIENCE,
                    _ => Duration::MAX,
                };
                match timeout(patience, cluster).await {
                    Ok(Ok(Some(reply))) => Ok(reply),
                    Ok(Ok(None)) | Err(_) => other,
                    Ok(Err(failure)) => only_if_exists(other?, failure),
                }
            }
        }
    }

    /// The old resolver's reply to a name that the cluster may have had. Without an old resolver it is NXDOMAIN, so that the asker goes
    /// on with its search list.
    async fn elsewhere(&self, query: &Query, transport: Transport) -> Result<Vec<u8>, Failure> {
        match self.upstream.relay(query, transport).await {
            Err(Failure::NoServer) => Ok(query.empty_reply(rcode::NX_DOMAIN)),
            result => result,
        }
    }

    fn decide(&self, query: &Query) -> Decision {
        if query.class != wire::CLASS_IN {
            return Decision::Upstream;
        }
        let learned =
            |label: &[u8]| self.learned.lock().unwrap_or_else(PoisonError::into_inner).contains(label);
        self.rules().decide(&query.name, query.kind, learned)
    }

    fn learn(&self, full: &Name) {
        let Some(namespace) = self.rules().namespace_of(full) else { return };
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        if learned.len() < MAX_LEARNED {
            learned.insert(namespace);
        }
    }

    fn compose(&self, query: &Query, full: &Name, answer: &Answer, limit: usize) -> Vec<u8> {
        if query.name == *full {
            answer.reply(query, Instant::now(), limit)
        } else {
            answer.aliased_reply(query, full, Instant::now(), limit)
        }
    }

    fn fail(&self, query: &Query, failure: Failure) -> Vec<u8> {
        let counter = match failure {
            Failure::Overloaded => &self.counters.overloaded,
            Failure::Silent | Failure::NoServer => &self.counters.failures,
        };
        counter.fetch_add(1, Relaxed);
        tracing::debug!(name = %query.name, kind = query.kind, ?failure, "dns question failed");
        query.empty_reply(rcode::SERVER_FAILURE)
    }
}

fn exists(reply: &[u8]) -> bool {
    wire::code(reply) == rcode::NO_ERROR
}

/// With the cluster silent, an old resolver that knows the name is believed. One that doesn't says nothing about the cluster, and
/// an NXDOMAIN would be remembered.
fn only_if_exists(reply: Vec<u8>, failure: Failure) -> Result<Vec<u8>, Failure> {
    if exists(&reply) { Ok(reply) } else { Err(failure) }
}
