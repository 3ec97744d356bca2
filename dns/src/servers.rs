//! One question to several servers: the one that answered last first, the others when it is slow or has failed.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until};

use crate::{
    exchange::{self, Request},
    wire::{self, rcode},
};

/// How long an asker waits for its answer, and no longer: glibc gives up after 5 s, so 4 leave it time to hear SERVFAIL from us
/// and not to take us for dead.
pub(crate) const DEADLINE: Duration = Duration::from_secs(4);
/// How long a server may be silent before the next is asked as well.
const STAGGER: Duration = Duration::from_millis(600);
/// Servers that one question goes to at most, as in glibc (MAXNS).
const MAX_SERVERS: usize = 3;
/// Time-outs in a row after which servers count as silent.
const SILENT_AFTER: u32 = 2;

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nobody answered in time, or nobody could be reached.
    Silent,
    /// No server is known.
    NoServer,
    /// Too many questions are on their way.
    Overloaded,
}

/// Which of a list of servers is good, as far as the last questions told.
#[derive(Debug, Default)]
pub(crate) struct Health {
    preferred: AtomicUsize,
    failures: AtomicU32,
}

impl Health {
    /// Has nobody answered for a while?
    pub(crate) fn is_silent(&self) -> bool {
        self.failures.load(Ordering::Relaxed) >= SILENT_AFTER
    }

    /// Asks `servers` and returns the first answer that settles the question. SERVFAIL and REFUSED don't, as long as there is another
    /// server to ask.
    pub(crate) async fn ask(&self, servers: &[SocketAddr], request: &Request) -> Result<Vec<u8>, Failure> {
        if servers.is_empty() {
            return Err(Failure::NoServer);
        }
        let first = self.preferred.load(Ordering::Relaxed) % servers.len();
        let order: Vec<_> =
            (0..servers.len().min(MAX_SERVERS)).map(|offset| (first + offset) % servers.len()).collect();
        let result = in_turn(servers, &order, request).await;
        match &result {
            Ok((index, _)) => {
                self.preferred.store(*index, Ordering::Relaxed);
                self.failures.store(0, Ordering::Relaxed);
            }
            Err(_) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        result.map(|(_, reply)| reply)
    }
}

async fn in_turn(
    servers: &[SocketAddr],
    order: &[usize],
    request: &Request,
) -> Result<(usize, Vec<u8>), Failure> {
    let deadline = Instant::now() + DEADLINE;
    let mut waiting = order.iter().copied();
    let mut asked = FuturesUnordered::new();
    let mut refusal = None;
    let mut next_at = Instant::now();
    loop {
        if asked.is_empty() || Instant::now() >= next_at {
            match waiting.next() {
                Some(index) => {
                    asked.push(async move { (index, exchange::ask(servers[index], request).await) })
                }
                None if asked.is_empty() => break,
                None => {}
            }
            next_at = Instant::now() + STAGGER;
        }
        tokio::select! {
            Some((index, result)) = asked.next() => match result {
                Ok(reply) if settles(&reply) => return Ok((index, reply)),
                Ok(reply) => refusal = Some((index, reply)),
                Err(error) => tracing::debug!(server = %servers[index], %error, "dns server failed"),
            },
            () = sleep_until(next_at.min(deadline)) => {}
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    refusal.ok_or(Failure::Silent)
}

fn settles(reply: &[u8]) -> bool {
    !matches!(wire::code(reply), rcode::SERVER_FAILURE | rcode::REFUSED | rcode::NOT_IMPLEMENTED)
}
