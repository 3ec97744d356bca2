//! Questions below a domain that has servers of its own.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{exchange::Transport, name::Name, relay::Relay, servers::Failure, wire::Query};

#[derive(Debug)]
pub(crate) struct Forwards {
    relay: Relay,
    /// Names and types on their way. As many as there are questions in work.
    asked: Mutex<HashSet<(Name, u16)>>,
}

impl Forwards {
    pub(crate) fn new() -> Self {
        Self { relay: Relay::new(), asked: Mutex::default() }
    }

    /// Is this very question on its way?
    pub(crate) fn is_asking(&self, query: &Query) -> bool {
        self.lock().contains(&(query.name.clone(), query.kind))
    }

    /// The servers' own reply to `query`.
    pub(crate) async fn relay(
        &self,
        servers: &[SocketAddr],
        query: &Query,
        transport: Transport,
    ) -> Result<Vec<u8>, Failure> {
        let key = (query.name.clone(), query.kind);
        self.lock().insert(key.clone());
        let _asking = Asking { forwards: self, key };
        self.relay.ask(servers, query, transport).await
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<(Name, u16)>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that a question is no longer on its way, also when its asker gave up.
struct Asking<'a> {
    forwards: &'a Forwards,
    key: (Name, u16),
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.forwards.lock().remove(&self.key);
    }
}
