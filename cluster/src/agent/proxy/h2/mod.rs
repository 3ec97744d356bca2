//! HTTP/2 by prior knowledge (RFC 9113): the agent is a server to the client and a client to either side, and each stream
//! chooses its side.

mod body;
mod link;
mod offer;
mod stream;
mod tap;
#[cfg(test)]
mod tests;

pub(super) use self::offer::Offer;

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{self, Connection, SendResponse};
use http::{HeaderName, Request};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use self::link::Links;
use self::stream::Stream;
use super::buffer::{Buffer, LIMIT};
use super::live::Entry;
use super::upstream::{Passage, Rewound, Side, Transport, Upstreams};

/// Most streams of a connection at a time; RFC 9113, 6.5.2 advises at least 100, and servers' own limits are 100 to 250.
const STREAMS: u32 = 250;

/// Most tasks that a connection has at a time, each for a stream: as many again as there may be streams, because a stream that
/// the client has reset no longer counts, and its task ends only when it has its turn.
const TASKS: usize = 2 * STREAMS as usize;

/// How much may wait of what one stream brings, and of what all of a connection do, bytes.
///
/// The connection's is that of all its streams together: however many of them stall, at a breakpoint or before a client that
/// does not read, no other waits for them. It is a promise that is hardly ever used; what does wait is counted with all that
/// waits in the agent, see [`FULL`].
#[derive(Clone, Copy, Debug)]
struct Window {
    stream: u32,
    connection: u32,
}

impl Window {
    /// Of clients and the app. A stream may hold what a connection of HTTP/1 may, and brings 65 MB/s from 1 ms away, and 3 MB/s
    /// from 20 ms; the 16 MiB of a connection leave the agent able to take others.
    const NEAR: Self = Self::of(64 << 10);

    /// Of laptops: 13 MB/s from 20 ms away, and 3 MB/s from 100 ms.
    const FAR: Self = Self::of(256 << 10);

    const fn of(stream: u32) -> Self {
        Self { stream, connection: STREAMS * stream }
    }
}

/// What may wait in the agent, bytes, before a stream that stalls and brings more is ended: half of the agent's 64 MiB. The
/// overlay has a quarter, and the rest does the work. New connections go past the agent before that, at 24 MiB, so only those
/// from before ever come this far.
const FULL: usize = 32 << 20;

/// Longest headers, bytes: as in HTTP/1.
const HEADERS: u32 = LIMIT as u32;

/// A request, and the place for its answer.
type Accepted = Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>;

/// The header that tells laptops of the client.
const FORWARDED: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Relays a connection. `early` is a connection that was made in the hope that it will be needed, and what came from it.
pub(super) async fn relay<C, U>(
    client: Rewound<C>,
    early: Option<(Side<U>, Buffer)>,
    passage: Passage<U>,
    entry: &mut Entry,
) where
    C: Transport,
    U: Upstreams,
{
    let mut server = server::Builder::new();
    server
        .initial_window_size(Window::NEAR.stream)
        .initial_connection_window_size(Window::NEAR.connection)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADERS)
        .max_send_buffer_size(LIMIT);
    if Offer::ask(&passage).await {
        server.enable_connect_protocol();
    }
    let Ok(mut connection) = server.handshake(client).await else { return };
    let app_gone = Rc::new(Notify::new());
    let links = Rc::new(Links::new(passage.clone(), app_gone.clone()));
    if let Some((side, answered)) = early {
        // Failing, another one is opened for the first request.
        let _ = links.adopt(side, answered).await;
    }
    let mut streams = JoinSet::new();
    let port = passage.port.clone();
    let mut released = pin!(port.released());
    let mut leaving = false;
    loop {
        tokio::select! {
            accepted = next(&mut connection, streams.len() < TASKS) => {
                let Some(Ok((request, respond))) = accepted else { return };
                let rules = port.current();
                entry.judged_by(&rules);
                let stream = Stream::new(request, respond, &rules, links.clone());
                streams.spawn_local(stream.run());
            }
            Some(_) = streams.join_next() => {}
            // The client's next connection goes straight to the app.
            () = &mut released, if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
            }
            // And where the app leaves, the client does well to leave too.
            () = app_gone.notified(), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
            }
        }
    }
}

/// The next request, if one is `wanted` now; those that come meanwhile wait in the connection, which bounds them, too. It is
/// kept going in any case.
async fn next<C: Transport>(connection: &mut Connection<C, Bytes>, wanted: bool) -> Option<Accepted> {
    if wanted {
        return connection.accept().await;
    }
    // There is nothing left to accept on a connection that is closed.
    let _ = poll_fn(|cx| connection.poll_closed(cx)).await;
    None
}
