//! Wiretaps of streams: each copy is a stream to the laptop, behind a bounded queue.
//!
//! That of a WebSocket (an extended CONNECT) may last for hours, and be answered all the while.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;

use bytes::Bytes;
use h2::SendStream;
use h2::client::ResponseFuture;
use http::Request;
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::body::{Piece, poll_capacity};
use super::link::Links;
use super::offer::is_extended_connect;
use crate::agent::proxy::rules::Rule;
use crate::agent::proxy::tap::{FAREWELL, QUEUE};
use crate::agent::proxy::upstream::Upstreams;

/// Most copies of one connection that are under way, each of which costs a task.
const COPIES: usize = 64;

/// What the copies of one connection take.
#[derive(Debug, Default)]
pub(super) struct Load {
    copies: Cell<usize>,
    /// Bytes in all queues.
    waiting: Cell<usize>,
}

/// The copies of one request.
pub(super) struct Taps {
    copies: Vec<(Rc<Rule>, mpsc::UnboundedSender<Piece>)>,
    load: Rc<Load>,
}

impl Taps {
    /// Begins a copy for each of the rules.
    pub(super) fn begin<U: Upstreams>(
        links: &Rc<Links<U>>,
        rules: &[Rc<Rule>],
        head: impl Fn() -> Request<()>,
        absent: bool,
    ) -> Self {
        let load = links.load.clone();
        let mut copies = Vec::new();
        for rule in rules {
            if load.copies.get() == COPIES {
                rule.counters().lost_copy();
                continue;
            }
            let (sender, queue) = mpsc::unbounded_channel();
            let copy = Copy::new(rule.clone(), queue, load.clone());
            spawn_local(copy.carry(links.clone(), head(), absent));
            copies.push((rule.clone(), sender));
        }
        Self { copies, load }
    }

    /// Copies what came from the client.
    pub(super) fn copy(&mut self, piece: &Piece) {
        let (load, size) = (&self.load, size(piece));
        self.copies.retain(|(rule, queue)| {
            if load.waiting.get() + size > QUEUE {
                // Without its end, it is not taken for whole.
                rule.counters().lost_copy();
                return false;
            }
            // Failing, the copy was lost before and counted.
            let queued = queue.send(piece.clone()).is_ok();
            if queued {
                load.waiting.update(|waiting| waiting + size);
            }
            queued
        });
    }
}

/// One copy on its way.
struct Copy {
    rule: Rc<Rule>,
    queue: mpsc::UnboundedReceiver<Piece>,
    load: Rc<Load>,
}

impl Copy {
    fn new(rule: Rc<Rule>, queue: mpsc::UnboundedReceiver<Piece>, load: Rc<Load>) -> Self {
        load.copies.update(|copies| copies + 1);
        Self { rule, queue, load }
    }

    async fn carry<U: Upstreams>(mut self, links: Rc<Links<U>>, head: Request<()>, absent: bool) {
        if self.send(&links, head, absent).await.is_err() {
            self.rule.counters().lost_copy();
        }
    }

    async fn send<U: Upstreams>(
        &mut self,
        links: &Links<U>,
        head: Request<()>,
        absent: bool,
    ) -> io::Result<()> {
        let mut link = links.laptop(&self.rule).await?;
        if is_extended_connect(head.extensions())
            && !timeout(FAREWELL, link.takes_extended_connect()).await??
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let (answer, mut stream) = link.sender.send_request(head, absent).map_err(io::Error::other)?;
        self.rule.counters().went_to_laptop();
        let mut answered = pin!(hear_out(answer));
        let mut heard = false;
        let whole = {
            let mut passed = pin!(self.pass_on(&mut stream, absent));
            loop {
                tokio::select! {
                    whole = &mut passed => break whole?,
                    () = &mut answered, if !heard => heard = true,
                }
            }
        };
        if !whole {
            stream.send_reset(h2::Reason::CANCEL);
        } else if !heard {
            // Bounded, and the client is served already.
            let _ = timeout(FAREWELL, answered).await;
        }
        Ok(())
    }

    /// Sends what comes, until nothing more does; says whether that was all.
    async fn pass_on(&mut self, stream: &mut SendStream<Bytes>, absent: bool) -> io::Result<bool> {
        let mut whole = absent;
        while let Some(piece) = self.queue.recv().await {
            self.load.waiting.update(|waiting| waiting - size(&piece));
            whole |= timeout(FAREWELL, push(stream, piece)).await??;
        }
        Ok(whole)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.queue.close();
        while let Ok(piece) = self.queue.try_recv() {
            self.load.waiting.update(|waiting| waiting - size(&piece));
        }
        self.load.copies.update(|copies| copies - 1);
    }
}

/// Takes in an answer, whatever it says: its connection has others to carry.
async fn hear_out(answer: ResponseFuture) {
    let Ok(answer) = answer.await else { return };
    let mut body = answer.into_body();
    while let Some(Ok(bytes)) = body.data().await {
        // It fails only where nothing more comes.
        let _ = body.flow_control().release_capacity(bytes.len());
    }
}

/// Sends one piece; says whether it is the last.
async fn push(stream: &mut SendStream<Bytes>, piece: Piece) -> io::Result<bool> {
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    match piece {
        Piece::Data { mut bytes, last } => loop {
            let count = poll_fn(|cx| poll_capacity(cx, stream, bytes.len())).await.map_err(|_| gone())?;
            let part = bytes.split_to(count.min(bytes.len()));
            stream.send_data(part, last && bytes.is_empty()).map_err(|_| gone())?;
            if bytes.is_empty() {
                return Ok(last);
            }
        },
        Piece::Trailers(trailers) => {
            stream.send_trailers(trailers).map_err(|_| gone())?;
            Ok(true)
        }
    }
}

/// What a piece takes, bytes.
fn size(piece: &Piece) -> usize {
    match piece {
        Piece::Data { bytes, .. } => bytes.len(),
        Piece::Trailers(trailers) => {
            trailers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum()
        }
    }
}
