//! Questions passed on as they came, and their answers passed back, octet for octet. Nothing is cached, expanded or judged.

use std::net::SocketAddr;

use tokio::sync::Semaphore;

use crate::{
    exchange::{Request, Transport},
    random::random_id,
    servers::{Failure, Health},
    wire::{self, Query},
};

/// Questions on their way at most. Each kind of server has slots of its own, so that a dead one never uses up what others need.
const MAX_ASKED: usize = 128;

#[derive(Debug)]
pub(crate) struct Relay {
    health: Health,
    slots: Semaphore,
}

impl Relay {
    pub(crate) fn new() -> Self {
        Self { health: Health::default(), slots: Semaphore::new(MAX_ASKED) }
    }

    /// The servers' own reply to `query`, asked in the way that the asker came.
    pub(crate) async fn ask(
        &self,
        servers: &[SocketAddr],
        query: &Query,
        transport: Transport,
    ) -> Result<Vec<u8>, Failure> {
        let _slot = self.slots.try_acquire().map_err(|_| Failure::Overloaded)?;
        let mut packet = query.packet.to_vec();
        wire::set_id(&mut packet, random_id());
        let request = Request { packet, question: query.question.clone(), transport, complete: false };
        let mut reply = self.health.ask(servers, &request).await?;
        wire::set_id(&mut reply, query.id);
        Ok(reply)
    }
}
