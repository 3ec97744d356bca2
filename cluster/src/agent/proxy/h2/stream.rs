//! One request and its answer, both ways at once.

use std::future::{Future as _, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Version};
use tokio::time::sleep;

use super::FORWARDED;
use super::body::{Body, Failure, reason};
use super::link::{Link, Links};
use super::offer::is_extended_connect;
use super::tap::Taps;
use crate::agent::proxy::h1::PATIENCE;
use crate::agent::proxy::rules::{Choice, Rule, Rules};
use crate::agent::proxy::upstream::{Transport, Upstreams};

/// The headers of a request, to be gone through more than once.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a HeaderMap);

impl<'a> IntoIterator for Fields<'a> {
    type Item = (&'a str, &'a [u8]);
    type IntoIter = std::iter::Map<
        http::header::Iter<'a, HeaderValue>,
        fn((&'a HeaderName, &'a HeaderValue)) -> (&'a str, &'a [u8]),
    >;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_bytes()))
    }
}

pub(super) struct Stream<U: Upstreams> {
    head: Parts,
    body: Body,
    respond: SendResponse<Bytes>,
    choice: Choice,
    links: Rc<Links<U>>,
}

/// How a request fared with one side.
enum Fate {
    /// It was answered, or ended otherwise.
    Done,
    /// Nothing came of it, and it may be sent again.
    Undelivered,
    /// It was not sent, because this side does not take its kind.
    Unfit,
}

/// What came of waiting for an answer.
enum Wait {
    Answered(Result<Response<RecvStream>, h2::Error>),
    /// The client has given up, for this reason.
    GivenUp(Reason),
    /// The laptop acknowledges nothing.
    Unheard,
}

impl<U: Upstreams> Stream<U> {
    /// A request, whose side is chosen by these rules.
    pub(super) fn new(
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
        rules: &Rules,
        links: Rc<Links<U>>,
    ) -> Self {
        let (head, body) = request.into_parts();
        // CONNECT names a host alone.
        let host = || head.uri.authority().map_or("/", |host| host.as_str());
        let target = head.uri.path_and_query().map_or_else(host, |target| target.as_str());
        let method = head.method.as_str().as_bytes();
        let choice = rules.choose(method, target.as_bytes(), Fields(&head.headers));
        Self { head, body: Body::new(body, true), respond, choice, links }
    }

    pub(super) async fn run(mut self) {
        let _under_way = self.links.passage.port.begin();
        let mut taps = Taps::begin(&self.links, &self.choice.taps, || self.head(true), self.body.is_absent());
        let links = self.links.clone();
        if let Some(rule) = self.choice.laptop.clone() {
            let Some(link) = self.unless_given_up(links.laptop(&rule)).await else { return };
            if let Ok(link) = link {
                let _engaged = rule.engage();
                match self.attempt(link, Some(&rule), &mut taps).await {
                    Fate::Done => return,
                    Fate::Unfit => {}
                    Fate::Undelivered => {
                        links.leave(&rule);
                        links.passage.upstreams.lost(&rule);
                    }
                }
            }
            rule.counters().failed_open();
        }
        // A connection in use may have been closing; a new one is not.
        for _ in 0..2 {
            let Some(link) = self.unless_given_up(links.app()).await else { return };
            let Ok(link) = link else { break };
            match self.attempt(link, None, &mut taps).await {
                Fate::Done => return,
                Fate::Unfit => return self.turn_away(),
                Fate::Undelivered => {}
            }
        }
        // Nothing has been done on behalf of it (RFC 9113, 8.7).
        self.respond.send_reset(Reason::REFUSED_STREAM);
    }

    /// What comes of a wait for a connection, or nothing once the client has given up. Such requests go nowhere, and wait for
    /// nothing: a client may reset any number of them at once and send others.
    async fn unless_given_up<T>(&mut self, wait: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            _ = poll_fn(|cx| self.respond.poll_reset(cx)) => None,
            done = wait => Some(done),
        }
    }

    /// The request's head as one side gets it.
    fn head(&self, laptop: bool) -> Request<()> {
        let mut head = self.head.clone();
        if laptop {
            let client = self.links.passage.addresses.client.ip().to_canonical().to_string();
            // An address has no character that a header must not have.
            if let Ok(client) = HeaderValue::try_from(client) {
                head.headers.append(FORWARDED, client);
            }
        }
        if head.uri.authority().is_none() {
            // The client named none, or in `Host`; as HTTP/2, the crate would insist on one.
            head.version = Version::HTTP_11;
        }
        Request::from_parts(head, ())
    }

    /// Answers what nobody here takes, as RFC 9220, 3 advises: the app has offered it lately, and does so no more.
    fn turn_away(mut self) {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::NOT_IMPLEMENTED;
        // Failing, the client is gone.
        let _ = self.respond.send_response(response, true);
    }

    async fn attempt<S: Transport + 'static>(
        &mut self,
        mut link: Link<S>,
        laptop: Option<&Rule>,
        taps: &mut Taps,
    ) -> Fate {
        if let Some(fate) = self.hindrance(&link, laptop).await {
            return fate;
        }
        self.body.rewind();
        let absent = self.body.is_absent();
        let Ok((answer, mut there)) = link.sender.send_request(self.head(laptop.is_some()), absent) else {
            return Fate::Undelivered;
        };
        let mut sending = !absent;
        match self.wait(answer, &mut there, &mut sending, &link, laptop, taps).await {
            Wait::Answered(Ok(response)) => {
                count(laptop);
                self.answer(response, there, sending, taps).await;
                Fate::Done
            }
            Wait::Unheard => Fate::Undelivered,
            Wait::Answered(Err(error)) if self.may_go_again(&error, &link, laptop) => Fate::Undelivered,
            Wait::Answered(Err(error)) => {
                count(laptop);
                self.respond.send_reset(reason(&error));
                Fate::Done
            }
            Wait::GivenUp(reason) => {
                count(laptop);
                there.send_reset(reason);
                Fate::Done
            }
        }
    }

    /// How the request fares if it may not be sent: extended CONNECT is for who has said that it takes it (RFC 8441, 3).
    async fn hindrance<S: Transport + 'static>(
        &mut self,
        link: &Link<S>,
        laptop: Option<&Rule>,
    ) -> Option<Fate> {
        if !is_extended_connect(&self.head.extensions) {
            return None;
        }
        let said = tokio::select! {
            said = link.takes_extended_connect() => said,
            () = sleep(PATIENCE), if laptop.is_some() => return Some(Fate::Undelivered),
            // The client has given up.
            _ = poll_fn(|cx| self.respond.poll_reset(cx)) => return Some(Fate::Done),
        };
        match said {
            Ok(true) => None,
            // A connection in use was closing.
            Err(_) if laptop.is_none() => Some(Fate::Undelivered),
            _ => Some(Fate::Unfit),
        }
    }

    /// Sends the request until there is an answer to it.
    async fn wait<S: Transport + 'static>(
        &mut self,
        mut answer: ResponseFuture,
        there: &mut SendStream<Bytes>,
        sending: &mut bool,
        link: &Link<S>,
        laptop: Option<&Rule>,
        taps: &mut Taps,
    ) -> Wait {
        let before = link.acknowledged();
        let mut patience = pin!(sleep(PATIENCE));
        let mut impatient = laptop.is_some();
        poll_fn(|cx| {
            if *sending {
                match self.body.poll(cx, there, |piece| taps.copy(piece)) {
                    Poll::Ready(Err(Failure::Source(reason))) => return Poll::Ready(Wait::GivenUp(reason)),
                    // Why it wants no more, its answer says.
                    sent => *sending = sent.is_pending(),
                }
            }
            if let Poll::Ready(reset) = self.respond.poll_reset(cx) {
                return Poll::Ready(Wait::GivenUp(reset.unwrap_or(Reason::CANCEL)));
            }
            while let Poll::Ready(Some(Ok(interim))) = answer.poll_informational(cx) {
                // Failing, the client is gone, which the next turn tells.
                let _ = self.respond.send_informational(interim);
            }
            if let Poll::Ready(answer) = Pin::new(&mut answer).poll(cx) {
                return Poll::Ready(Wait::Answered(answer));
            }
            if impatient && patience.as_mut().poll(cx).is_ready() {
                impatient = false;
                if link.is_unacknowledged() && link.acknowledged() == before && self.body.is_retained() {
                    return Poll::Ready(Wait::Unheard);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Whether nothing can have been done yet on behalf of this request, or it does no harm to do it twice.
    fn may_go_again<S: Transport + 'static>(
        &self,
        error: &h2::Error,
        link: &Link<S>,
        laptop: Option<&Rule>,
    ) -> bool {
        if !self.body.is_retained() {
            return false;
        }
        if error.is_reset() || error.is_library() {
            return error.reason() == Some(Reason::REFUSED_STREAM);
        }
        self.head.method.is_idempotent() && (laptop.is_some() || link.reused)
            || laptop.is_some() && link.reused
            || error.is_go_away() && error.reason() == Some(Reason::NO_ERROR)
    }

    /// Passes an answer on, and what is left of the request.
    async fn answer(
        &mut self,
        response: Response<RecvStream>,
        mut there: SendStream<Bytes>,
        mut sending: bool,
        taps: &mut Taps,
    ) {
        self.body.settle();
        let (head, body) = response.into_parts();
        let absent = body.is_end_stream();
        let Ok(mut back) = self.respond.send_response(Response::from_parts(head, ()), absent) else {
            return there.send_reset(Reason::CANCEL);
        };
        let mut body = Body::new(body, false);
        let mut answering = !absent;
        let ended = poll_fn(|cx| {
            if sending {
                match self.body.poll(cx, &mut there, |piece| taps.copy(piece)) {
                    Poll::Ready(Err(failure @ Failure::Source(_))) => {
                        return Poll::Ready(Err(End::Client(failure)));
                    }
                    sent => sending = sent.is_pending(),
                }
            }
            if answering {
                match body.poll(cx, &mut back, |_| ()) {
                    Poll::Ready(Err(Failure::Source(reason))) => {
                        return Poll::Ready(Err(End::Upstream(reason)));
                    }
                    Poll::Ready(Err(failure)) => return Poll::Ready(Err(End::Client(failure))),
                    sent => answering = sent.is_pending(),
                }
            }
            if (sending || answering)
                && let Poll::Ready(reset) = back.poll_reset(cx)
            {
                let reason = reset.unwrap_or(Reason::CANCEL);
                return Poll::Ready(Err(End::Client(Failure::Source(reason))));
            }
            if sending || answering { Poll::Pending } else { Poll::Ready(Ok(())) }
        });
        match ended.await {
            Ok(()) => {}
            Err(End::Upstream(reason)) => back.send_reset(reason),
            Err(End::Client(Failure::Source(reason))) => there.send_reset(reason),
            Err(End::Client(Failure::Sink)) => there.send_reset(Reason::CANCEL),
        }
    }
}

/// Who has ended an answer before its time.
enum End {
    Client(Failure),
    Upstream(Reason),
}

fn count(laptop: Option<&Rule>) {
    if let Some(rule) = laptop {
        rule.counters().went_to_laptop();
    }
}
