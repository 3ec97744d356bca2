//! Extended CONNECT (RFC 8441), by which WebSockets come over HTTP/2: a client may use it if it was offered first of all, before
//! there is a request that could choose a side. It is offered if, and only if, the app offers it: a request that a laptop does
//! not take goes to the app, as all do that a laptop cannot have.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use h2::ext::Protocol;
use http::Extensions;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};

use super::Window;
use super::link::Link;
use crate::agent::proxy::buffer::Buffer;
use crate::agent::proxy::h1::PATIENCE;
use crate::agent::proxy::upstream::{Passage, Rewound, Upstreams};

/// How long the app's word holds. Another version of it comes in another pod, with another agent; only its configuration can
/// have changed in this one. One connection in so long is nothing to the app.
const VALID: Duration = Duration::from_secs(60);

/// What is known of the app of a port.
#[derive(Debug, Default)]
pub(in crate::agent::proxy) struct Offer {
    offered: Cell<bool>,
    /// When it said so.
    noted: Cell<Option<Instant>>,
}

impl Offer {
    /// Whether clients are to be offered extended CONNECT. An app that has never said is asked first, for as long as clients wait
    /// for a laptop; one that has not said lately, beside the clients that go by its last word.
    pub(super) async fn ask<U: Upstreams>(passage: &Passage<U>) -> bool {
        let offer = passage.port.offer();
        match offer.noted.get() {
            Some(noted) if noted.elapsed() < VALID => {}
            Some(_) => {
                // One asks for all.
                offer.note(offer.offered.get());
                let passage = passage.clone();
                spawn_local(async move { passage.port.offer().learn(&*passage.upstreams).await });
            }
            None => offer.learn(&*passage.upstreams).await,
        }
        offer.offered.get()
    }

    async fn learn<U: Upstreams>(&self, upstreams: &U) {
        match timeout(PATIENCE, is_offered(upstreams)).await {
            Ok(Ok(offered)) => self.note(offered),
            // Nobody is there. To ask again costs no time.
            Ok(Err(_)) => {}
            // The next clients are not to wait for it too.
            Err(_) => self.note(self.offered.get()),
        }
    }

    pub(in crate::agent::proxy) fn note(&self, offered: bool) {
        self.offered.set(offered);
        self.noted.set(Some(Instant::now()));
    }
}

/// Asks the app on a connection of its own: one that served a client and lay idle would be closed by the app some time, and the
/// client sent away with it.
async fn is_offered<U: Upstreams>(upstreams: &U) -> io::Result<bool> {
    let stream = Rewound::new(Buffer::default(), upstreams.app().await?);
    // Whoever does not speak HTTP/2 offers nothing.
    let Ok(link) = Link::open(stream, Window::NEAR, None).await else { return Ok(false) };
    Ok(link.takes_extended_connect().await.unwrap_or(false))
}

/// Whether a request is an extended CONNECT.
pub(super) fn is_extended_connect(extensions: &Extensions) -> bool {
    extensions.get::<Protocol>().is_some()
}
