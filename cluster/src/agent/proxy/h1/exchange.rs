//! One request and its answer, both ways at once: an answer may begin, and end, before the request has.

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use super::body::{Body, Malformed};
use super::head::{Kind, Parsed, Request, end_of_headers, parse_response};
use crate::agent::proxy::buffer::{Buffer, LIMIT, poll_write};
use crate::agent::proxy::rules::Rule;
use crate::agent::proxy::tap::Taps;
use crate::agent::proxy::upstream::{Transport, Upstreams};

/// How long a laptop's TCP may leave a whole request unacknowledged: a dial has as long.
pub(in crate::agent::proxy) const PATIENCE: Duration = Duration::from_millis(500);

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Request and answer are through, and both connections can be used again.
    Kept,
    /// The answer is through, and nothing more is to come.
    Last,
    /// From here on it is bytes both ways with this side.
    Raw,
    /// Where the request ends cannot be told. It may be `whole` in the input still.
    Unclear { whole: bool },
    /// The other side has gone, or never came, without a byte of an answer; the request is still whole in the input, and may be
    /// sent again.
    Undelivered,
    /// The other side broke off.
    Broken,
    /// The client broke off.
    ClientGone,
}

/// The streams of an exchange and what is in between.
#[derive(Debug)]
pub(super) struct Streams<'a, C, S> {
    pub(super) client: &'a mut C,
    pub(super) upstream: &'a mut S,
    /// From the client. Begins with the request, and may go on behind it.
    pub(super) input: &'a mut Buffer,
    /// To the upstream before what is left of the input.
    pub(super) front: &'a mut Buffer,
    /// From the upstream.
    pub(super) output: &'a mut Buffer,
}

/// Whose answer it is.
#[derive(Debug)]
pub(super) enum Whose<'a> {
    /// The app's.
    App,
    /// A laptop's, with the timer for its patience.
    Laptop(&'a Rule, Pin<&'a mut Sleep>),
}

#[derive(Debug)]
pub(super) struct Exchange<'a, C, S, U> {
    streams: Streams<'a, C, S>,
    whose: Whose<'a>,
    taps: &'a mut Taps<U>,
    request: Request,
    /// Header that laptops get in addition.
    forwarded: &'a [u8],
    /// Whether the upstream has answered something else before.
    reused: bool,
    /// What of the request's body has not come yet.
    body: Body,
    /// How much of the input is known to belong to the request.
    known: usize,
    /// How much of that has been sent.
    sent: usize,
    /// Bytes of the request that the taps have got, or need not get.
    copied: u64,
    /// Bytes of the request that are no longer in the input.
    forgotten: u64,
    /// Whether what is sent stays in the input, so that it can be sent again.
    retained: bool,
    /// Bytes that the upstream's connection has taken of this request.
    written: usize,
    client_ended: bool,
    /// Whether the upstream takes nothing more.
    deaf: bool,
    counted: bool,
    answer: Answer,
    /// How much of the output may go to the client.
    passed: usize,
    persists: bool,
    /// Set where it cannot be told where a laptop's answer ends: how many bytes of other requests were in the input by then.
    endless: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Nothing has come.
    None,
    /// A head is to come, of which there were so many bytes when it was last looked at.
    Head(usize),
    Body(Body),
    Done,
}

impl<'a, C: Transport, S: Transport, U: Upstreams> Exchange<'a, C, S, U> {
    /// Begins with the request at the start of the input, of which the taps have got the first `copied` bytes already.
    pub(super) fn new(
        streams: Streams<'a, C, S>,
        whose: Whose<'a>,
        taps: &'a mut Taps<U>,
        (request, forwarded): (Request, &'a [u8]),
        reused: bool,
        copied: u64,
    ) -> Self {
        let retained = match whose {
            Whose::App => reused && request.is_idempotent,
            Whose::Laptop(..) => true,
        };
        Self {
            streams,
            whose,
            taps,
            request,
            forwarded,
            reused,
            body: request.body,
            known: 0,
            sent: 0,
            copied,
            forgotten: 0,
            retained,
            written: 0,
            client_ended: false,
            deaf: false,
            counted: false,
            answer: Answer::None,
            passed: 0,
            persists: false,
            endless: None,
        }
    }

    /// Carries it out. Also says how much of the request the taps have got.
    pub(super) async fn run(mut self) -> (End, u64) {
        let end = match self.explore() {
            Ok(()) => {
                self.begin();
                poll_fn(|cx| self.poll(cx)).await
            }
            Err(Malformed) => End::Unclear { whole: true },
        };
        if matches!(end, End::Raw | End::Unclear { whole: false }) {
            self.forget();
        }
        if !matches!(end, End::Undelivered | End::Unclear { whole: true }) {
            self.count();
        }
        (end, self.copied)
    }

    /// Sees how far the request goes in the input.
    fn explore(&mut self) -> Result<(), Malformed> {
        let input = self.streams.input.filled();
        let head = self.request.head.saturating_sub(self.forgotten as usize);
        let start = self.known.max(head);
        self.known = start + self.body.advance(&input[start..])?;
        let copied = self.copied.saturating_sub(self.forgotten) as usize;
        if copied < self.known {
            self.copy(copied);
        }
        Ok(())
    }

    /// Copies to the taps what is known from here on.
    fn copy(&mut self, mut start: usize) {
        let input = self.streams.input.filled();
        if self.copied == 0 && self.taps.are_copying() {
            start = end_of_headers(&self.request);
            self.taps.copy(&[&input[..start], self.forwarded].concat());
        }
        self.taps.copy(&input[start..self.known]);
        self.copied = self.forgotten + self.known as u64;
    }

    /// For a laptop, puts what is known of the request into the front, with the header in addition: one write takes it all.
    fn begin(&mut self) {
        let Whose::Laptop(_, timer) = &mut self.whose else { return };
        timer.as_mut().reset(Instant::now() + PATIENCE);
        let input = self.streams.input.filled();
        let end = end_of_headers(&self.request);
        for part in [&input[..end], self.forwarded, &input[end..self.known]] {
            self.streams.front.push(part);
        }
        self.sent = self.known;
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if let Poll::Ready(end) = self.send(cx) {
            return Poll::Ready(end);
        }
        if let Poll::Ready(end) = self.receive(cx) {
            return Poll::Ready(end);
        }
        self.watch(cx)
    }

    /// Moves the request on. Completes only if that ends everything.
    fn send(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            if self.deaf {
                return Poll::Pending;
            }
            if !self.streams.front.is_empty() || self.sent < self.known {
                ready!(self.write(cx));
                continue;
            }
            if self.client_ended {
                return self.pass_end(cx);
            }
            if self.streams.input.len() > self.known && !self.body.is_done() {
                let Ok(()) = self.explore() else {
                    // The app goes on with the same connection.
                    let whole = self.retained && matches!(self.whose, Whose::Laptop(..));
                    return Poll::Ready(End::Unclear { whole });
                };
                continue;
            }
            if self.retained && !self.body.is_done() && self.streams.input.len() >= self.request.head + LIMIT
            {
                self.forget();
            }
            let limit = if self.retained { self.request.head + LIMIT } else { LIMIT };
            if self.streams.input.len() >= limit {
                // Requests that wait for their turn.
                return Poll::Pending;
            }
            match ready!(self.streams.input.poll_fill(cx, self.streams.client, limit)) {
                Ok(0) => self.client_ended = true,
                Ok(_) => {}
                Err(_) => return Poll::Ready(End::ClientGone),
            }
        }
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Streams { upstream, input, front, .. } = &mut self.streams;
        let from_front = !front.is_empty();
        let bytes = if from_front { front.filled() } else { &input.filled()[self.sent..self.known] };
        match ready!(poll_write(cx, *upstream, bytes)) {
            // What it has answered, if anything, is still to be read.
            Err(_) => self.deaf = true,
            Ok(count) => {
                self.written += count;
                if from_front {
                    front.consume(count);
                } else {
                    self.sent += count;
                    if !self.retained {
                        self.forget();
                    }
                }
            }
        }
        Poll::Ready(())
    }

    /// Tells the upstream that the client sends no more, unless requests wait in the input.
    fn pass_end(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if self.streams.input.len() == self.known || self.endless.is_some() {
            // Failing, it takes nothing more either.
            let _ = ready!(Pin::new(&mut *self.streams.upstream).poll_shutdown(cx));
            self.deaf = true;
        }
        Poll::Pending
    }

    /// Gives up what has been sent.
    fn forget(&mut self) {
        self.retained = false;
        self.streams.input.consume(self.sent);
        self.forgotten += self.sent as u64;
        self.known -= self.sent;
        self.sent = 0;
    }

    /// Moves the answer on.
    fn receive(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            while self.passed > 0 {
                let passed = &self.streams.output.filled()[..self.passed];
                let Ok(count) = ready!(poll_write(cx, self.streams.client, passed)) else {
                    return Poll::Ready(End::ClientGone);
                };
                self.streams.output.consume(count);
                self.passed -= count;
            }
            if let Some(end) = self.judge() {
                return Poll::Ready(end);
            }
            if self.passed > 0 {
                continue;
            }
            let filled = self.streams.output.poll_fill(cx, self.streams.upstream, LIMIT);
            if filled.is_pending() && self.is_past_endless() {
                return Poll::Ready(End::Last);
            }
            match ready!(filled) {
                Ok(1..) => self.hear(),
                ended => return Poll::Ready(self.without_upstream(ended.is_ok())),
            }
        }
    }

    /// Something has come from the upstream: the request is there.
    fn hear(&mut self) {
        if self.answer == Answer::None {
            self.answer = Answer::Head(0);
            self.forget();
            self.count();
        }
    }

    /// Looks at what has come, and says how much of it goes to the client.
    fn judge(&mut self) -> Option<End> {
        match self.answer {
            Answer::None => None,
            Answer::Head(looked_at) => self.judge_head(looked_at),
            Answer::Body(mut body) => match body.advance(self.streams.output.filled()) {
                Ok(count) => {
                    self.passed = count;
                    self.answer = if body.is_done() { Answer::Done } else { Answer::Body(body) };
                    None
                }
                Err(Malformed) => self.lose_track(),
            },
            Answer::Done => self.judge_rest(),
        }
    }

    fn judge_head(&mut self, looked_at: usize) -> Option<End> {
        let output = self.streams.output.filled();
        if !is_worth_a_look(output, looked_at) {
            return None;
        }
        match parse_response(output, &self.request) {
            Parsed::Partial => {
                self.answer = Answer::Head(output.len());
                None
            }
            Parsed::Malformed => self.lose_track(),
            Parsed::Complete(response) => match response.kind {
                Kind::Switch => Some(End::Raw),
                Kind::Interim => {
                    self.passed = response.head;
                    self.answer = Answer::Head(0);
                    None
                }
                Kind::Final(mut body) => {
                    self.persists = response.persists;
                    let Ok(count) = body.advance(&output[response.head..]) else { return self.lose_track() };
                    self.passed = response.head + count;
                    self.answer = if body.is_done() { Answer::Done } else { Answer::Body(body) };
                    None
                }
            },
        }
    }

    /// Where the answer ends cannot be told. The app may say on what it likes. Of a laptop the client gets what it says to this
    /// request, but nothing that it is asked later: that may be for others.
    fn lose_track(&mut self) -> Option<End> {
        if matches!(self.whose, Whose::App) {
            return Some(End::Raw);
        }
        let waiting = if self.body.is_done() { self.streams.input.len() - self.known } else { 0 };
        self.endless = Some(waiting);
        self.persists = false;
        self.passed = self.streams.output.len();
        self.answer = Answer::Body(Body::UntilClose);
        None
    }

    /// Whether the client has understood an answer without an end, and asks for more.
    fn is_past_endless(&self) -> bool {
        let waiting = self.streams.input.len() - self.known;
        self.body.is_done() && self.endless.is_some_and(|before| waiting > before)
    }

    /// The answer is through; the request may not be.
    fn judge_rest(&mut self) -> Option<End> {
        let sent = self.body.is_done() && self.known == 0 && self.streams.front.is_empty();
        if !self.persists || self.deaf || !self.streams.output.is_empty() {
            Some(End::Last)
        } else if sent {
            Some(End::Kept)
        } else if self.client_ended {
            Some(End::Last)
        } else {
            None
        }
    }

    /// The upstream sends no more.
    fn without_upstream(&self, orderly: bool) -> End {
        match (self.answer, &self.whose) {
            (Answer::Done, _) => End::Last,
            (Answer::Body(Body::UntilClose), _) if orderly => End::Last,
            (Answer::None, _) if self.may_go_again() => End::Undelivered,
            // The client gets the end as it came.
            (_, Whose::App) if orderly => End::Raw,
            _ => End::Broken,
        }
    }

    /// Whether nothing can have been done yet on behalf of this request, or it does no harm to do it twice.
    fn may_go_again(&self) -> bool {
        let untouched = match self.whose {
            Whose::App => false,
            // On a connection in use it was closing anyway.
            Whose::Laptop(..) => self.reused || self.is_unacknowledged(),
        };
        self.retained && (untouched || self.request.is_idempotent)
    }

    fn is_unacknowledged(&self) -> bool {
        self.streams.upstream.unacknowledged() >= self.written
    }

    /// Gives a laptop up whose TCP has not acknowledged anything of the request.
    fn watch(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if self.counted {
            return Poll::Pending;
        }
        let Whose::Laptop(_, timer) = &mut self.whose else { return Poll::Pending };
        ready!(timer.as_mut().poll(cx));
        if self.is_unacknowledged() {
            return Poll::Ready(if self.retained { End::Undelivered } else { End::Broken });
        }
        self.count();
        if !self.may_go_again() {
            self.forget();
        }
        Poll::Pending
    }

    /// Counts the request as the laptop's, once.
    fn count(&mut self) {
        if let Whose::Laptop(rule, _) = self.whose
            && !self.counted
        {
            rule.counters().went_to_laptop();
        }
        self.counted = true;
    }
}

/// Whether a head that was in vain looked at when it had so many bytes may be complete now. A head that comes byte by byte is
/// read in proportion to its length, not to its square.
pub(super) fn is_worth_a_look(bytes: &[u8], looked_at: usize) -> bool {
    let new = &bytes[looked_at.saturating_sub(2).min(bytes.len())..];
    bytes.len() >= (2 * looked_at).min(LIMIT)
        || new.windows(2).any(|two| two == b"\n\n")
        || new.windows(3).any(|three| three == b"\n\r\n")
}
