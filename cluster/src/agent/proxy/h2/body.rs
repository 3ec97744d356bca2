//! Bodies and trailers, piece by piece from one stream to another.

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;

use super::FULL;
use crate::agent::proxy::buffer::{LIMIT, Share, held};

/// What comes at once.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// Bytes; the `last` ones, if nothing follows.
    Data { bytes: Bytes, last: bool },
    /// The end of what has trailers.
    Trailers(HeaderMap),
}

/// Which side has ended a body before its time.
#[derive(Debug)]
pub(super) enum Failure {
    /// The one that sends it, for this reason.
    Source(Reason),
    /// The one that it goes to.
    Sink,
}

/// A body on its way.
///
/// All that has come of it is here and in no window, so that it is known what it takes; its stream's window opens again as it
/// moves on.
#[derive(Debug)]
pub(super) struct Body {
    source: RecvStream,
    /// What has come and was not sent, or may have to be sent again.
    pieces: VecDeque<Piece>,
    /// The piece that is sent next, and how much of it is sent.
    next: (usize, usize),
    /// Bytes that ever came, and those of them that were sent, at this attempt and for which the window was opened.
    come: usize,
    sent: usize,
    released: usize,
    /// Whether the pieces are all that ever came.
    retained: bool,
    /// How the source has ended, if it has.
    ended: Option<Result<(), Reason>>,
    /// What the pieces take, bytes.
    taken: usize,
    share: Share,
}

impl Body {
    pub(super) fn new(source: RecvStream, retained: bool) -> Self {
        Self {
            source,
            pieces: VecDeque::new(),
            next: (0, 0),
            come: 0,
            sent: 0,
            released: 0,
            retained,
            ended: None,
            taken: 0,
            share: Share::default(),
        }
    }

    /// Whether there is nothing of it, not even trailers.
    pub(super) fn is_absent(&self) -> bool {
        self.pieces.is_empty() && self.retained && self.source.is_end_stream()
    }

    /// Whether it can be sent from its beginning.
    pub(super) fn is_retained(&self) -> bool {
        self.retained
    }

    /// Will be sent from its beginning.
    pub(super) fn rewind(&mut self) {
        self.next = (0, 0);
        self.sent = 0;
    }

    /// Will not be sent again.
    pub(super) fn settle(&mut self) {
        self.retained = false;
        self.make_room();
    }

    /// Moves it on, with what comes shown to `copy`. Completes with its end.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut SendStream<Bytes>,
        mut copy: impl FnMut(&Piece),
    ) -> Poll<Result<(), Failure>> {
        let grown = self.take_in(cx, &mut copy);
        match (self.pass_on(cx, sink)?, self.ended) {
            (Moved::Whole, _) => Poll::Ready(Ok(())),
            (Moved::Part, Some(Err(reason))) => Poll::Ready(Err(Failure::Source(reason))),
            (Moved::Stalled, _) if grown && held() >= FULL => {
                Poll::Ready(Err(Failure::Source(Reason::ENHANCE_YOUR_CALM)))
            }
            (Moved::Part | Moved::Stalled, _) => Poll::Pending,
        }
    }

    /// Takes what has come; says whether there was something.
    fn take_in(&mut self, cx: &mut Context<'_>, mut copy: impl FnMut(&Piece)) -> bool {
        let mut grown = false;
        while self.ended.is_none() {
            match self.poll_piece(cx) {
                Poll::Ready(Ok(piece)) => {
                    copy(&piece);
                    self.keep(piece);
                    grown = true;
                }
                Poll::Ready(Err(reason)) => self.ended = Some(Err(reason)),
                Poll::Pending => break,
            }
        }
        grown
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Reason>> {
        let piece = match ready!(self.source.poll_data(cx)) {
            Some(Ok(bytes)) => Piece::Data { bytes, last: self.source.is_end_stream() },
            Some(Err(error)) => return Poll::Ready(Err(reason(&error))),
            None => match ready!(self.source.poll_trailers(cx)) {
                Ok(Some(trailers)) => Piece::Trailers(trailers),
                Ok(None) => Piece::Data { bytes: Bytes::new(), last: true },
                Err(error) => return Poll::Ready(Err(reason(&error))),
            },
        };
        Poll::Ready(Ok(piece))
    }

    fn keep(&mut self, piece: Piece) {
        if let Piece::Data { bytes, .. } = &piece {
            self.come += bytes.len();
        }
        if matches!(piece, Piece::Data { last: true, .. } | Piece::Trailers(_)) {
            self.ended = Some(Ok(()));
        }
        self.taken += cost(&piece);
        self.pieces.push_back(piece);
        self.retained &= self.come <= LIMIT;
        self.make_room();
    }

    /// Sends what there is.
    fn pass_on(&mut self, cx: &mut Context<'_>, sink: &mut SendStream<Bytes>) -> Result<Moved, Failure> {
        while let Some(piece) = self.pieces.get(self.next.0) {
            let (at, sent) = self.next;
            let (rest, last) = match piece {
                Piece::Data { bytes, last } => (bytes.slice(sent..), *last),
                Piece::Trailers(trailers) => {
                    sink.send_trailers(trailers.clone()).map_err(|_| Failure::Sink)?;
                    return Ok(Moved::Whole);
                }
            };
            let Poll::Ready(capacity) = poll_capacity(cx, sink, rest.len()) else {
                return Ok(Moved::Stalled);
            };
            let count = rest.len().min(capacity?);
            let all = count == rest.len();
            if count > 0 || last {
                sink.send_data(rest.slice(..count), last && all).map_err(|_| Failure::Sink)?;
            }
            self.release(count);
            if last && all {
                return Ok(Moved::Whole);
            }
            self.next = if all { (at + 1, 0) } else { (at, sent + count) };
            self.make_room();
        }
        Ok(Moved::Part)
    }

    /// Opens the window for so many bytes more, unless it was when they were sent before.
    fn release(&mut self, count: usize) {
        self.sent += count;
        if let Some(more @ 1..) = self.sent.checked_sub(self.released) {
            // Failing, nothing more comes.
            let _ = self.source.flow_control().release_capacity(more);
            self.released = self.sent;
        }
    }

    /// Gives up the pieces that were sent, unless they may be sent again.
    fn make_room(&mut self) {
        if !self.retained {
            for piece in self.pieces.drain(..self.next.0) {
                self.taken -= cost(&piece);
            }
            self.next.0 = 0;
        }
        self.share.set(self.taken);
    }
}

/// How far what there is has moved on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    /// To its end.
    Whole,
    /// As far as it has come.
    Part,
    /// Until the other side wanted no more.
    Stalled,
}

/// What a piece takes, bytes. Trailers are few, and at most [`super::HEADERS`].
fn cost(piece: &Piece) -> usize {
    let bytes = if let Piece::Data { bytes, .. } = piece { bytes.len() } else { 0 };
    size_of::<Piece>() + bytes
}

/// Why a stream has ended.
pub(super) fn reason(error: &h2::Error) -> Reason {
    error.reason().unwrap_or(Reason::INTERNAL_ERROR)
}

/// Waits until some of so many bytes may be sent.
pub(super) fn poll_capacity(
    cx: &mut Context<'_>,
    sink: &mut SendStream<Bytes>,
    wanted: usize,
) -> Poll<Result<usize, Failure>> {
    if wanted == 0 {
        return Poll::Ready(Ok(0));
    }
    sink.reserve_capacity(wanted);
    while sink.capacity() == 0 {
        match ready!(sink.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return Poll::Ready(Err(Failure::Sink)),
        }
    }
    Poll::Ready(Ok(sink.capacity()))
}
