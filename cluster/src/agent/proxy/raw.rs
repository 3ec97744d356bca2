//! Bytes both ways, with half-closes and resets as they come.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};

use super::buffer::{Buffer, LIMIT};
use super::live::Entry;
use super::tap::Taps;
use super::upstream::{Passage, Side, Transport, Upstreams};

/// Where what is not HTTP, or no longer, comes from.
#[derive(Debug)]
pub(super) struct Client<C> {
    pub(super) stream: C,
    /// What it has said already.
    pub(super) said: Buffer,
}

/// Relays a connection that is not HTTP. `early` is a connection that was made in the hope that it is the right one; what it has
/// `answered` already makes it so.
pub(super) async fn relay<C, U>(
    client: Client<C>,
    early: Option<Side<U>>,
    answered: Buffer,
    passage: Passage<U>,
    entry: &mut Entry,
) where
    C: Transport,
    U: Upstreams,
{
    let Client { mut stream, said } = client;
    let rules = passage.port.current();
    entry.judged_by(&rules);
    let choice = rules.choose_raw();
    let fits = |side: &Side<U>| match (side, &choice.laptop) {
        (Side::App(_), rule) => rule.is_none(),
        // Much may have happened since it was dialled: a client may say nothing for hours.
        (Side::Laptop(dialled, ..), Some(rule)) => {
            dialled.leads_where(rule) && !passage.upstreams.is_left_out(rule)
        }
        (Side::Laptop(..), None) => false,
    };
    let side = match early.filter(|side| !answered.is_empty() || fits(side)) {
        Some(side) => Ok(side),
        None => passage.side(choice.laptop.as_ref()).await,
    };
    let mut taps = Taps::new(passage);
    taps.begin(&choice.taps);
    taps.copy(said.filled());
    match (side, &choice.laptop) {
        (Ok(Side::Laptop(rule, laptop, mut first)), _) => {
            rule.counters().went_to_laptop();
            let _engaged = rule.engage();
            first.extend_from_slice(said.filled());
            join(stream, laptop, first.into(), answered, &mut taps, entry).await;
        }
        (Ok(Side::App(app)), rule) => {
            if let Some(rule) = rule {
                rule.counters().failed_open();
            }
            join(stream, app, said, answered, &mut taps, entry).await;
        }
        (Err(_), _) => stream.abort(),
    }
}

/// Joins two connections until both are closed. What was read before goes first; of what is read from the client from here on,
/// `taps` get a copy.
pub(super) async fn join<C, S, U>(
    mut client: C,
    mut upstream: S,
    to_upstream: Buffer,
    to_client: Buffer,
    taps: &mut Taps<U>,
    entry: &Entry,
) where
    C: Transport,
    S: Transport,
    U: Upstreams,
{
    let mut there = Direction { buffer: to_upstream, state: State::Open };
    let mut back = Direction { buffer: to_client, state: State::Open };
    let joined = poll_fn(|cx| {
        let there = there.poll(cx, &mut client, &mut upstream, |bytes| {
            entry.moved();
            taps.copy(bytes);
        })?;
        let back = back.poll(cx, &mut upstream, &mut client, |_| entry.moved())?;
        if there.is_ready() && back.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    });
    let joined: io::Result<()> = joined.await;
    if joined.is_err() {
        client.abort();
        upstream.abort();
    }
}

struct Direction {
    buffer: Buffer,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The source sends no more.
    Ended,
    /// The sink knows.
    Shut,
}

impl Direction {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
        mut heed: impl FnMut(&[u8]),
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            let drained = self.buffer.poll_drain(cx, sink)?;
            match self.state {
                State::Open if self.buffer.len() < LIMIT => {
                    let before = self.buffer.len();
                    match ready!(self.buffer.poll_fill(cx, source, LIMIT))? {
                        0 => self.state = State::Ended,
                        _ => heed(&self.buffer.filled()[before..]),
                    }
                }
                State::Open => return Poll::Pending,
                State::Ended => {
                    ready!(drained);
                    ready!(Pin::new(&mut *sink).poll_shutdown(cx))?;
                    self.state = State::Shut;
                }
                State::Shut => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tpd_api::agent::Mode;

    use crate::agent::proxy::Refusal;
    use crate::agent::proxy::rules::tests::{counts, rule};
    use crate::agent::proxy::tests::{Stage, play, unfiltered};

    #[test]
    fn a_laptop_that_was_dialled_in_advance_and_has_gone_since_is_not_waited_for() {
        play(async {
            let (rules, counters) = unfiltered();
            let mut stage = Stage::new(rules);
            let _gone = stage.laptop().await;
            stage.world.refusal.set(Some(Refusal::Suspended));
            stage.client.send("\x16\x03\x01").await;
            let mut app = stage.app().await;
            app.expect("\x16\x03\x01").await;
            app.send("N").await;
            stage.client.expect("N").await;
            assert_eq!(counts(&counters), [0, 0, 1, 0]);
        });
    }

    #[test]
    fn who_has_spoken_first_keeps_the_connection_whatever_the_rules_say_by_then() {
        play(async {
            let (rules, counters) = unfiltered();
            let mut stage = Stage::new(rules);
            let mut laptop = stage.laptop().await;
            let (mut elsewhere, other) = rule("b", None, Mode::Intercept);
            elsewhere.laptop.set_port(4001);
            stage.port.replace(vec![elsewhere]);
            laptop.send("220 a\r\n").await;
            stage.client.expect("220 a\r\n").await;
            stage.client.send("EHLO\r\n").await;
            laptop.expect("EHLO\r\n").await;
            assert!(stage.nothing_was_dialled(), "two servers greet one client");
            assert_eq!((counts(&counters), counts(&other)), ([1, 0, 0, 0], [0; 4]));
        });
    }
}
