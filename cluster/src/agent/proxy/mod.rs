//! What happens to one connection, or one client's datagrams, on an intercepted port.
//!
//! Everything runs in one `LocalSet` and is generic over what carries bytes: kernel sockets and the overlay's streams in the
//! agent, pipes in tests.

mod buffer;
mod datagrams;
mod h1;
mod h2;
mod live;
mod opening;
mod raw;
mod rules;
mod sniff;
mod tap;
#[cfg(test)]
mod tests;
pub mod udp;
mod upstream;

use std::rc::Rc;

pub use self::buffer::held;
pub use self::live::{Activity, connections};
pub use self::rules::{Counters, Port, Rule, Rules};
pub use self::upstream::{Addresses, Refusal, Transport, Upstreams};

use self::opening::Opening;
use self::raw::Client;
use self::sniff::Protocol;
use self::upstream::{Passage, Rewound};

/// Relays one accepted connection until it ends. Must run in a `LocalSet`.
pub async fn serve<C, U>(mut client: C, addresses: Addresses, port: Rc<Port>, upstreams: Rc<U>)
where
    C: Transport + 'static,
    U: Upstreams,
{
    let mut entry = port.enter();
    let passage = Passage { port, upstreams, addresses };
    let mut opening = Opening::default();
    let Ok(protocol) = opening.listen(&mut client, &passage).await else { return client.abort() };
    let Opening { said, answered, early } = opening;
    let client = Client { stream: client, said };
    match protocol {
        Protocol::Http1 => h1::relay(client, early, passage, &mut entry).await,
        Protocol::Http2 => {
            let early = early.map(|side| (side, answered));
            h2::relay(Rewound::new(client.said, client.stream), early, passage, &mut entry).await;
        }
        Protocol::Other => raw::relay(client, early, answered, passage, &mut entry).await,
    }
}
