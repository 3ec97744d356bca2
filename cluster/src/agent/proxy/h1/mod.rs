//! HTTP/1.1, relayed by its framing (RFC 9112): bytes go through as they came, and each request chooses its side.

mod body;
mod exchange;
mod head;
#[cfg(test)]
mod tests;

pub(super) use self::exchange::PATIENCE;

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::time::{Sleep, sleep, timeout};

use self::exchange::{End, Exchange, Streams, Whose, is_worth_a_look};
use self::head::{HTTP2_OFFER, Parsed, Request, parse_request};
use super::buffer::{Buffer, LIMIT};
use super::live::Entry;
use super::raw::{self, Client};
use super::rules::{Choice, Rule};
use super::tap::Taps;
use super::upstream::{Passage, Side, Transport, Upstreams, close};

/// For a client to take note that its connection has ended, before what it sent too much resets it.
const FAREWELL: Duration = Duration::from_secs(2);

/// What takes the place of `h2c` where it is offered. Servers ignore protocols that they do not know (RFC 9110, 7.8).
const UNKNOWN_PROTOCOL: &[u8; HTTP2_OFFER.len()] = b"x2c";

/// Relays a connection whose first request, or its beginning, is what the client has said. `early` is a connection that was made
/// in the hope that it will be needed.
pub(super) async fn relay<C, U>(
    client: Client<C>,
    early: Option<Side<U>>,
    passage: Passage<U>,
    entry: &mut Entry,
) where
    C: Transport,
    U: Upstreams,
{
    let mut relay = Relay::new(client, early, passage, entry);
    loop {
        match relay.next().await {
            Next::Request(request, choice) => {
                let under_way = relay.passage.port.begin();
                let then = relay.serve(request, &choice).await;
                drop(under_way);
                if then != Then::Next {
                    return relay.finish(then).await;
                }
            }
            Next::End(then) => return relay.finish(then).await,
        }
    }
}

struct Relay<'a, C, U: Upstreams> {
    client: C,
    /// From the client.
    input: Buffer,
    /// To an upstream, before what is in the input.
    front: Buffer,
    /// From an upstream.
    output: Buffer,
    app: Option<Kept<U::App>>,
    laptop: Option<(Rc<Rule>, Kept<U::Laptop>)>,
    /// Whether the last answer was a laptop's.
    at_laptop: bool,
    taps: Taps<U>,
    timer: Option<Pin<Box<Sleep>>>,
    /// The header that laptops get in addition.
    forwarded: Vec<u8>,
    passage: Passage<U>,
    entry: &'a mut Entry,
}

/// A connection that can be used again.
struct Kept<S> {
    stream: S,
    /// Whether it has answered.
    used: bool,
    /// What it must be told before anything else.
    first: Vec<u8>,
}

/// What comes next on a connection.
enum Next {
    Request(Request, Choice),
    End(Then),
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// Another request.
    Next,
    /// An end in good order.
    Close,
    /// A reset.
    Reset,
    /// What follows cannot be told apart, and goes where all goes that is not HTTP.
    Untold,
    /// Bytes both ways with the app.
    RawApp,
    /// Bytes both ways with the laptop.
    RawLaptop,
}

impl<'a, C: Transport, U: Upstreams> Relay<'a, C, U> {
    fn new(client: Client<C>, early: Option<Side<U>>, passage: Passage<U>, entry: &'a mut Entry) -> Self {
        let (app, laptop) = match early {
            Some(Side::App(stream)) => (Some(Kept { stream, used: false, first: Vec::new() }), None),
            Some(Side::Laptop(rule, stream, first)) => {
                (None, Some((rule, Kept { stream, used: false, first })))
            }
            None => (None, None),
        };
        Self {
            client: client.stream,
            input: client.said,
            front: Buffer::default(),
            output: Buffer::default(),
            app,
            laptop,
            at_laptop: false,
            taps: Taps::new(passage.clone()),
            timer: None,
            forwarded: format!("X-Forwarded-For: {}\r\n", passage.addresses.client.ip().to_canonical())
                .into_bytes(),
            passage,
            entry,
        }
    }

    /// Waits for the next request.
    async fn next(&mut self) -> Next {
        let mut looked_at = 0;
        let mut app_ended = false;
        poll_fn(|cx| self.poll_next(cx, &mut looked_at, &mut app_ended)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, looked_at: &mut usize, app_ended: &mut bool) -> Poll<Next> {
        loop {
            if let Some(then) = self.mind_upstreams(cx, app_ended) {
                return Poll::Ready(Next::End(then));
            }
            if is_worth_a_look(self.input.filled(), *looked_at) {
                match self.parse() {
                    Parsed::Complete((request, choice)) => {
                        return Poll::Ready(Next::Request(request, choice));
                    }
                    Parsed::Malformed => return Poll::Ready(Next::End(Then::Untold)),
                    Parsed::Partial => *looked_at = self.input.len(),
                }
            }
            let filled = match self.input.poll_fill(cx, &mut self.client, LIMIT) {
                // Idle, or slower than the app's patience: the client is told as the app told us.
                Poll::Pending if *app_ended && !self.at_laptop => return Poll::Ready(Next::End(Then::Close)),
                filled => ready!(filled),
            };
            match filled {
                Ok(1..) => {}
                Ok(0) if self.input.is_empty() => return Poll::Ready(Next::End(Then::Close)),
                Ok(0) => return Poll::Ready(Next::End(Then::Untold)),
                Err(_) => return Poll::Ready(Next::End(Then::Reset)),
            }
        }
    }

    /// Drops upstreams that have closed. An app that says something unasked is not understood any more.
    fn mind_upstreams(&mut self, cx: &mut Context<'_>, app_ended: &mut bool) -> Option<Then> {
        if let Some((_, kept)) = &mut self.laptop
            && self.output.poll_fill(cx, &mut kept.stream, LIMIT).is_ready()
        {
            self.laptop = None;
            self.output = Buffer::default();
        }
        let app = self.app.as_mut()?;
        match self.output.poll_fill(cx, &mut app.stream, LIMIT) {
            Poll::Pending => return None,
            Poll::Ready(Ok(1..)) if !self.at_laptop => return Some(Then::RawApp),
            Poll::Ready(_) => {}
        }
        self.app = None;
        self.output = Buffer::default();
        *app_ended = true;
        None
    }

    /// Reads the head of a request, and chooses its side by the rules as they are now.
    fn parse(&mut self) -> Parsed<(Request, Choice)> {
        let mut offers = Vec::new();
        let parsed = parse_request(self.input.filled(), |head| {
            let rules = self.passage.port.current();
            self.entry.judged_by(&rules);
            if rules.have_filters() {
                offers = head.offers_of_http2(self.input.filled());
            }
            let headers = head.headers.iter().map(|header| (header.name, header.value));
            (head.request, rules.choose(head.method.as_bytes(), head.target.as_bytes(), headers))
        });
        // Taken up, one would lead all later requests past the filters. Nobody needs to: RFC 9113 has dropped it.
        for offer in offers {
            self.input.overwrite(offer, UNKNOWN_PROTOCOL);
        }
        parsed
    }

    async fn serve(&mut self, request: Request, choice: &Choice) -> Then {
        self.taps.begin(&choice.taps);
        let mut copied = 0;
        if let Some(rule) = &choice.laptop {
            if self.reach_laptop(rule).await {
                let engaged = rule.engage();
                let (end, so_far) = self.at_laptop(rule, request).await;
                drop(engaged);
                match end {
                    End::Undelivered => self.passage.upstreams.lost(rule),
                    End::Unclear { whole: true } => return self.leave_laptop(),
                    End::Kept => return Then::Next,
                    End::Last => return Then::Close,
                    End::Raw => return Then::RawLaptop,
                    // Half an answer must not look whole, nor half a request go on as it likes.
                    End::Unclear { whole: false } | End::Broken | End::ClientGone => return Then::Reset,
                }
                self.leave_laptop();
                copied = so_far;
            }
            rule.counters().failed_open();
        }
        self.serve_by_app(request, copied).await
    }

    /// Whether there is a connection to this laptop.
    async fn reach_laptop(&mut self, rule: &Rc<Rule>) -> bool {
        let is_left_out = self.passage.upstreams.is_left_out(rule);
        let kept = self.laptop.take().filter(|(other, _)| other.leads_where(rule) && !is_left_out);
        self.laptop = match kept {
            Some((_, kept)) => Some((rule.clone(), kept)),
            None => match self.passage.laptop(rule).await {
                Ok((stream, first)) => Some((rule.clone(), Kept { stream, used: false, first })),
                Err(_) => None,
            },
        };
        self.laptop.is_some()
    }

    fn leave_laptop(&mut self) -> Then {
        self.laptop = None;
        self.front = Buffer::default();
        Then::Untold
    }

    async fn at_laptop(&mut self, rule: &Rule, request: Request) -> (End, u64) {
        let Some((_, kept)) = &mut self.laptop else { return (End::Undelivered, 0) };
        self.at_laptop = true;
        self.front.push(&kept.first);
        kept.first = Vec::new();
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
        let streams = Streams {
            client: &mut self.client,
            upstream: &mut kept.stream,
            input: &mut self.input,
            front: &mut self.front,
            output: &mut self.output,
        };
        let whose = Whose::Laptop(rule, timer.as_mut());
        let reused = std::mem::replace(&mut kept.used, true);
        Exchange::new(streams, whose, &mut self.taps, (request, &self.forwarded), reused, 0).run().await
    }

    async fn serve_by_app(&mut self, request: Request, mut copied: u64) -> Then {
        loop {
            if self.app.is_none() {
                let Ok(stream) = self.passage.upstreams.app().await else { return Then::Reset };
                self.app = Some(Kept { stream, used: false, first: Vec::new() });
            }
            let (end, so_far) = self.at_app(request, copied).await;
            match end {
                End::Kept => return Then::Next,
                End::Last => return Then::Close,
                End::Raw | End::Unclear { .. } => return Then::RawApp,
                End::Broken | End::ClientGone => return Then::Reset,
                // Only a connection that was used before leaves something undelivered: this happens once.
                End::Undelivered => self.app = None,
            }
            copied = so_far;
        }
    }

    async fn at_app(&mut self, request: Request, copied: u64) -> (End, u64) {
        let Some(kept) = &mut self.app else { return (End::Broken, copied) };
        self.at_laptop = false;
        let streams = Streams {
            client: &mut self.client,
            upstream: &mut kept.stream,
            input: &mut self.input,
            front: &mut self.front,
            output: &mut self.output,
        };
        let reused = std::mem::replace(&mut kept.used, true);
        let request = (request, &self.forwarded[..]);
        Exchange::new(streams, Whose::App, &mut self.taps, request, reused, copied).run().await
    }

    async fn finish(mut self, then: Then) {
        match then {
            Then::Next => {}
            Then::Close => self.close().await,
            Then::Reset => self.reset(),
            Then::Untold => self.untold().await,
            Then::RawApp => match self.app.take() {
                Some(app) => self.join(app.stream).await,
                None => self.reset(),
            },
            Then::RawLaptop => match self.laptop.take() {
                Some((rule, laptop)) => {
                    let _engaged = rule.engage();
                    self.join(laptop.stream).await;
                }
                None => self.reset(),
            },
        }
    }

    async fn close(mut self) {
        if let Some((_, laptop)) = self.laptop.take() {
            close(laptop.stream).await;
        }
        drop(self.app);
        // Whatever it sends now is answered by nobody, but to reset it at once could cost it the answer.
        let _ = timeout(FAREWELL, async {
            self.client.shutdown().await?;
            tokio::io::copy(&mut self.client, &mut tokio::io::sink()).await
        })
        .await;
    }

    fn reset(mut self) {
        self.client.abort();
        if let Some(app) = &mut self.app {
            app.stream.abort();
        }
        if let Some((_, laptop)) = &mut self.laptop {
            laptop.stream.abort();
        }
    }

    async fn untold(mut self) {
        let client = Client { stream: self.client, said: self.input };
        let early = self.app.take().map(|app| Side::App(app.stream));
        raw::relay(client, early, Buffer::default(), self.passage, self.entry).await;
    }

    async fn join<S: Transport>(mut self, upstream: S) {
        self.taps.copy(self.input.filled());
        self.front.push(self.input.filled());
        raw::join(self.client, upstream, self.front, self.output, &mut self.taps, self.entry).await;
    }
}
