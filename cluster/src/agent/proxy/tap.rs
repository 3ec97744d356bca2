//! Wiretaps: copies for a laptop, whose answers nobody reads. A tap that is slow or dead loses copies and delays nobody.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::task::spawn_local;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::buffer::{Buffer, LIMIT, poll_write};
use super::rules::Rule;
use super::upstream::{Passage, Transport, Upstreams};

/// Most that waits for one tap of one connection, bytes: what a laptop 50 ms away takes in at 5 MB/s while it says so.
pub(super) const QUEUE: usize = 256 << 10;

/// For the laptop to take what is left and to answer the last copy, after the client is gone.
pub(super) const FAREWELL: Duration = Duration::from_secs(10);

/// A laptop that has taken nothing of what waits for it for so long has stopped. Lost segments are repeated in less.
const STALL: Duration = Duration::from_secs(2);

/// The taps of one connection.
#[derive(Debug)]
pub(super) struct Taps<U> {
    passage: Passage<U>,
    taps: Vec<Tap>,
}

#[derive(Debug)]
struct Tap {
    rule: Rc<Rule>,
    queue: Rc<Queue>,
    copying: Copying,
}

/// How it stands with the copy of the current request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copying {
    /// This tap has none.
    Off,
    /// Nothing of it has come yet.
    Due,
    /// All that came so far is in the queue, or at the laptop.
    Begun,
}

impl<U: Upstreams> Taps<U> {
    pub(super) fn new(passage: Passage<U>) -> Self {
        Self { passage, taps: Vec::new() }
    }

    /// A request, or a connection that is none of HTTP, begins, and these rules want a copy.
    pub(super) fn begin(&mut self, rules: &[Rc<Rule>]) {
        if !self.taps.is_empty() {
            let current = self.passage.port.current();
            self.taps.retain_mut(|tap| {
                tap.copying = Copying::Off;
                !tap.queue.is_dead() && current.lead_to(&tap.rule)
            });
        }
        for rule in rules {
            match self.taps.iter_mut().find(|tap| tap.rule.uid == rule.uid && tap.rule.leads_where(rule)) {
                Some(tap) => {
                    tap.rule = rule.clone();
                    tap.copying = Copying::Due;
                }
                None => self.connect(rule),
            }
        }
    }

    /// Whether any of them wants what comes.
    pub(super) fn are_copying(&self) -> bool {
        self.taps.iter().any(|tap| tap.copying != Copying::Off)
    }

    /// Copies what came from the client.
    pub(super) fn copy(&mut self, bytes: &[u8]) {
        for tap in &mut self.taps {
            tap.copy(bytes);
        }
    }

    fn connect(&mut self, rule: &Rc<Rule>) {
        let queue = Rc::new(Queue::default());
        spawn_local(carry(self.passage.clone(), rule.clone(), queue.clone()));
        self.taps.push(Tap { rule: rule.clone(), queue, copying: Copying::Due });
    }
}

impl Tap {
    fn copy(&mut self, bytes: &[u8]) {
        let fits = !self.queue.is_dead() && self.queue.waiting() + bytes.len() <= QUEUE;
        match self.copying {
            Copying::Off => {}
            Copying::Due if fits => {
                self.queue.begin();
                self.queue.push(bytes);
                self.copying = Copying::Begun;
            }
            Copying::Begun if fits => self.queue.push(bytes),
            Copying::Due => self.lose(),
            Copying::Begun => {
                // The laptop has the beginning; only the end of the connection tells it that there is no more.
                // It is counted once: here, or among those that wait.
                if self.queue.copies.borrow().is_empty() {
                    self.lose();
                }
                self.queue.die(&self.rule);
            }
        }
    }

    fn lose(&mut self) {
        self.rule.counters().lost_copy();
        self.copying = Copying::Off;
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.queue.end();
    }
}

/// What waits for one laptop.
#[derive(Debug, Default)]
struct Queue {
    bytes: RefCell<Buffer>,
    /// How many bytes have ever been written out of it.
    written: Cell<u64>,
    /// Where the copies begin, in bytes ever put in, that are not written yet as far as they have come.
    copies: RefCell<VecDeque<u64>>,
    state: Cell<State>,
    writer: RefCell<Option<Waker>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// Nothing more comes.
    Ended,
    /// The laptop is not there, or too slow.
    Dead,
}

impl Queue {
    fn waiting(&self) -> usize {
        self.bytes.borrow().len()
    }

    fn is_dead(&self) -> bool {
        self.state.get() == State::Dead
    }

    fn is_ended(&self) -> bool {
        self.state.get() == State::Ended
    }

    fn begin(&self) {
        self.copies.borrow_mut().push_back(self.written.get() + self.waiting() as u64);
    }

    fn push(&self, bytes: &[u8]) {
        self.bytes.borrow_mut().push(bytes);
        self.wake();
    }

    fn end(&self) {
        if self.state.get() == State::Open {
            self.state.set(State::Ended);
            self.wake();
        }
    }

    /// Counts what was not written as lost, once.
    fn die(&self, rule: &Rule) {
        if self.state.replace(State::Dead) != State::Dead {
            self.copies.borrow().iter().for_each(|_| rule.counters().lost_copy());
            // Nobody reads it any more.
            *self.bytes.borrow_mut() = Buffer::default();
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(waker) = self.writer.borrow_mut().take() {
            waker.wake();
        }
    }

    fn wrote(&self, count: usize, rule: &Rule) {
        let mut bytes = self.bytes.borrow_mut();
        bytes.consume(count);
        self.written.update(|written| written + count as u64);
        let mut copies = self.copies.borrow_mut();
        let is_out = |copies: &VecDeque<u64>| match copies.get(1) {
            Some(next) => *next <= self.written.get(),
            None => bytes.is_empty() && !copies.is_empty(),
        };
        while is_out(&copies) {
            copies.pop_front();
            rule.counters().went_to_laptop();
        }
    }

    /// Writes what waits, until nothing more comes.
    fn poll_write<W>(&self, cx: &mut Context<'_>, stream: &mut W, rule: &Rule) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        loop {
            match self.state.get() {
                State::Dead => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                State::Ended if self.waiting() == 0 => return Poll::Ready(Ok(())),
                State::Open if self.waiting() == 0 => {
                    *self.writer.borrow_mut() = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                _ => {
                    *self.writer.borrow_mut() = Some(cx.waker().clone());
                    let written = ready!(poll_write(cx, stream, self.bytes.borrow().filled()))?;
                    self.wrote(written, rule);
                }
            }
        }
    }
}

/// Carries what is in the queue to the laptop.
async fn carry<U: Upstreams>(passage: Passage<U>, rule: Rc<Rule>, queue: Rc<Queue>) {
    let Ok((stream, header)) = passage.laptop(&rule).await else { return queue.die(&rule) };
    let mut carrier = Carrier {
        stream,
        header: header.into(),
        answers: Buffer::default(),
        watch: Watch::default(),
        rule: rule.clone(),
        queue: queue.clone(),
    };
    let open = poll_fn(|cx| if queue.is_ended() { Poll::Ready(Ok(())) } else { carrier.poll(cx) });
    let open: io::Result<()> = open.await;
    if open.is_ok() {
        // Bounded, and whatever comes of it, the client is long gone.
        let _ = timeout(FAREWELL, carrier.finish()).await;
    }
    // Of what has arrived, nothing is left to count.
    queue.die(&rule);
}

/// A queue on its way out.
struct Carrier<S> {
    stream: S,
    /// What comes before the copies.
    header: Buffer,
    answers: Buffer,
    watch: Watch,
    rule: Rc<Rule>,
    queue: Rc<Queue>,
}

impl<S: Transport> Carrier<S> {
    /// Writes what comes, until nothing more does; fails once the laptop takes none of it.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // It never completes but with an error.
        let _ = poll_discard(cx, &mut self.answers, &mut self.stream)?;
        if self.poll_write(cx)?.is_ready() {
            return Poll::Ready(Ok(()));
        }
        let unacknowledged = self.stream.unacknowledged();
        let outstanding = !self.header.is_empty() || self.queue.waiting() + unacknowledged.min(1) > 0;
        let arrived = self.queue.written.get().saturating_sub(unacknowledged as u64);
        self.watch.poll(cx, outstanding.then_some(arrived)).map(Err)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.header.poll_drain(cx, &mut self.stream))?;
        self.queue.poll_write(cx, &mut self.stream, &self.rule)
    }

    /// Writes what is left, and hears the answers out.
    async fn finish(mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll(cx)).await?;
        self.stream.shutdown().await?;
        poll_fn(|cx| poll_discard(cx, &mut self.answers, &mut self.stream)).await
    }
}

/// Notices when a laptop takes nothing more.
#[derive(Default)]
struct Watch {
    timer: Option<Pin<Box<Sleep>>>,
    /// How much had arrived when the timer was set.
    arrived: Option<u64>,
}

impl Watch {
    /// Completes when something has been on its way for too long, given how much has `arrived` if something is.
    fn poll(&mut self, cx: &mut Context<'_>, arrived: Option<u64>) -> Poll<io::Error> {
        let moved = std::mem::replace(&mut self.arrived, arrived) != arrived;
        if arrived.is_none() {
            return Poll::Pending;
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(STALL)));
        if moved {
            timer.as_mut().reset(Instant::now() + STALL);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }
}

/// Reads answers, for ever; their end is an error.
fn poll_discard<R>(cx: &mut Context<'_>, answers: &mut Buffer, stream: &mut R) -> Poll<io::Result<()>>
where
    R: AsyncRead + Unpin,
{
    loop {
        match ready!(answers.poll_fill(cx, stream, LIMIT))? {
            0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            count => answers.consume(count),
        }
    }
}
