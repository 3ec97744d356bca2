//! The beginning of a connection, when it is not known yet what it speaks.
//!
//! A server may speak first, so whoever the connection is joined with if it is not HTTP is connected at once, unless the client
//! has spoken already. The first to speak decides.

use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep};

use super::buffer::{Buffer, LIMIT};
use super::sniff::{self, Protocol};
use super::upstream::{Passage, Side, Transport, Upstreams};

/// How long the rest of a first line may take that could still become HTTP. A browser's or a library's is one segment; somebody
/// else's protocol that looks like one for so long must not wait for ever.
const FIRST_LINE: Duration = Duration::from_secs(1);

/// What has come so far.
pub(super) struct Opening<U: Upstreams> {
    /// From the client.
    pub(super) said: Buffer,
    /// From the other side.
    pub(super) answered: Buffer,
    /// The other side, if it was connected.
    pub(super) early: Option<Side<U>>,
}

impl<U: Upstreams> Default for Opening<U> {
    fn default() -> Self {
        Self { said: Buffer::default(), answered: Buffer::default(), early: None }
    }
}

impl<U: Upstreams> Opening<U> {
    /// Waits until it is known what the connection speaks.
    pub(super) async fn listen<C: Transport>(
        &mut self,
        client: &mut C,
        passage: &Passage<U>,
    ) -> io::Result<Protocol> {
        let mut patience = pin!(sleep(FIRST_LINE));
        // Most clients have spoken by now: then nothing is connected in vain. Of a new socket the runtime knows only after it has
        // asked the kernel, which it does when tasks yield.
        for _ in 0..2 {
            let at_once = poll_fn(|cx| Poll::Ready(self.hear(cx, client, patience.as_mut())));
            if let Poll::Ready(heard) = at_once.await {
                return heard;
            }
            yield_now().await;
        }
        let rules = passage.port.current();
        let mut dial = pin!(passage.side(rules.raw_laptop()));
        let (mut dialling, mut heard) = (true, None);
        poll_fn(|cx| {
            if heard.is_none()
                && let Poll::Ready(protocol) = self.hear(cx, client, patience.as_mut())
            {
                heard = Some(protocol?);
            }
            if dialling {
                // An app that is down is no reason to keep anyone from a laptop, but silence would never end.
                let side = ready!(dial.as_mut().poll(cx));
                dialling = false;
                if side.is_err() && heard.is_none() {
                    patience.as_mut().reset(Instant::now() + FIRST_LINE);
                }
                self.early = side.ok();
            }
            if let Poll::Ready(answer) = self.answer(cx) {
                if let (Some(protocol), Ok(0) | Err(_)) = (heard, &answer) {
                    // What was connected in advance has closed before it was needed.
                    self.early = None;
                    self.answered = Buffer::default();
                    return Poll::Ready(Ok(protocol));
                }
                return Poll::Ready(answer.map(|_| Protocol::Other));
            }
            match heard {
                // Servers of HTTP/1 do not speak first.
                Some(Protocol::Http1) if !self.answered.is_empty() => Poll::Ready(Ok(Protocol::Other)),
                Some(protocol) => Poll::Ready(Ok(protocol)),
                None if self.early.is_some() => Poll::Pending,
                None => {
                    ready!(patience.as_mut().poll(cx));
                    Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into()))
                }
            }
        })
        .await
    }

    /// Hears the client out until it is known what it speaks.
    fn hear<C: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut C,
        mut patience: Pin<&mut Sleep>,
    ) -> Poll<io::Result<Protocol>> {
        loop {
            if let Some(protocol) = sniff::client(self.said.filled()) {
                return Poll::Ready(Ok(protocol));
            }
            let first = self.said.is_empty();
            match self.said.poll_fill(cx, client, LIMIT)? {
                Poll::Ready(0) => return Poll::Ready(Ok(Protocol::Other)),
                Poll::Ready(_) if first => patience.as_mut().reset(Instant::now() + FIRST_LINE),
                Poll::Ready(_) => {}
                Poll::Pending if first => return Poll::Pending,
                Poll::Pending => {
                    ready!(patience.poll(cx));
                    return Poll::Ready(Ok(Protocol::Other));
                }
            }
        }
    }

    /// Completes when the other side has said something that only a server says which speaks first (how much), or says nothing
    /// more (0).
    fn answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(side) = &mut self.early else { return Poll::Pending };
        while self.answered.len() < LIMIT {
            let count = ready!(self.answered.poll_fill(cx, side, LIMIT))?;
            if count == 0 || !sniff::may_be_http2_server(self.answered.filled()) {
                return Poll::Ready(Ok(count));
            }
        }
        Poll::Pending
    }
}
