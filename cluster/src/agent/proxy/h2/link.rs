//! The agent's own connections to either side, one each per connection of a client.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::{Mutex, Notify};
use tokio::task::spawn_local;

use super::tap::Load;
use super::{HEADERS, Window};
use crate::agent::proxy::buffer::{Buffer, LIMIT};
use crate::agent::proxy::rules::Rule;
use crate::agent::proxy::upstream::{Passage, Refusal, Rewound, Side, Transport, Upstreams};

/// The connections that serve one client's.
pub(super) struct Links<U: Upstreams> {
    pub(super) passage: Passage<U>,
    app: Slot<U::App>,
    /// At most as many as there are rules.
    laptops: RefCell<LaptopSlots<U::Laptop>>,
    app_gone: Rc<Notify>,
    /// Of wiretaps.
    pub(super) load: Rc<Load>,
}

/// A place for a connection that is made when it is first needed, and again when it is gone.
type Slot<S> = Mutex<Option<Link<S>>>;

/// Such places, each for where a rule leads.
type LaptopSlots<S> = Vec<(Rc<Rule>, Rc<Slot<S>>)>;

impl<U: Upstreams> Links<U> {
    pub(super) fn new(passage: Passage<U>, app_gone: Rc<Notify>) -> Self {
        Self { passage, app: Slot::default(), laptops: RefCell::default(), app_gone, load: Rc::default() }
    }

    /// Takes over a connection that was made before it was known what is spoken.
    pub(super) async fn adopt(&self, side: Side<U>, answered: Buffer) -> Result<(), h2::Error> {
        match side {
            Side::App(stream) => {
                let link = Self::open_app(stream, answered, &self.app_gone).await?;
                *self.app.lock().await = Some(link);
            }
            Side::Laptop(rule, stream, first) => {
                let link = Self::open_laptop(stream, &first, answered).await?;
                *self.slot(&rule).lock().await = Some(link);
            }
        }
        Ok(())
    }

    /// A connection to the app.
    pub(super) async fn app(&self) -> io::Result<Link<U::App>> {
        reach(&self.app, async || {
            let stream = self.passage.upstreams.app().await?;
            Self::open_app(stream, Buffer::default(), &self.app_gone).await.map_err(io::Error::other)
        })
        .await
    }

    /// A connection to a laptop.
    pub(super) async fn laptop(&self, rule: &Rc<Rule>) -> io::Result<Link<U::Laptop>> {
        if self.passage.upstreams.is_left_out(rule) {
            return Err(io::Error::other(Refusal::Suspended));
        }
        reach(&self.slot(rule), async || {
            let (stream, first) = self.passage.laptop(rule).await.map_err(io::Error::other)?;
            Self::open_laptop(stream, &first, Buffer::default()).await.map_err(io::Error::other)
        })
        .await
    }

    /// Has the next request to a laptop take another connection. What is under way on the present one stays there.
    pub(super) fn leave(&self, rule: &Rule) {
        self.laptops.borrow_mut().retain(|(other, _)| !other.leads_where(rule));
    }

    async fn open_app(
        stream: U::App,
        answered: Buffer,
        gone: &Rc<Notify>,
    ) -> Result<Link<U::App>, h2::Error> {
        Link::open(Rewound::new(answered, stream), Window::NEAR, Some(gone.clone())).await
    }

    async fn open_laptop(
        mut stream: U::Laptop,
        first: &[u8],
        answered: Buffer,
    ) -> Result<Link<U::Laptop>, h2::Error> {
        // Failing, it fails the handshake too.
        let _ = stream.write_all(first).await;
        Link::open(Rewound::new(answered, stream), Window::FAR, None).await
    }

    /// The place for a laptop's connection. Those that no rule leads to any more are given up.
    fn slot(&self, rule: &Rc<Rule>) -> Rc<Slot<U::Laptop>> {
        let mut laptops = self.laptops.borrow_mut();
        if let Some((_, slot)) = laptops.iter().find(|(other, _)| other.leads_where(rule)) {
            return slot.clone();
        }
        let rules = self.passage.port.current();
        laptops.retain(|(other, _)| rules.lead_to(other));
        let slot = Rc::default();
        laptops.push((rule.clone(), Rc::clone(&slot)));
        slot
    }
}

/// The connection in a slot, or a new one. Whoever asks meanwhile waits for the same.
async fn reach<S: Transport + 'static>(
    slot: &Slot<S>,
    open: impl AsyncFnOnce() -> io::Result<Link<S>>,
) -> io::Result<Link<S>> {
    let mut place = slot.lock().await;
    if let Some(link) = &mut *place
        && poll_fn(|cx| link.sender.poll_ready(cx)).await.is_ok()
    {
        link.reused = true;
        return Ok(link.clone());
    }
    *place = None;
    let link = open().await?;
    *place = Some(link.clone());
    Ok(link)
}

/// A connection that takes requests.
pub(super) struct Link<S> {
    pub(super) sender: SendRequest<Bytes>,
    /// Whether it has taken one before.
    pub(super) reused: bool,
    pings: Rc<Mutex<PingPong>>,
    socket: Weak<Socket<S>>,
}

impl<S> Clone for Link<S> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            reused: self.reused,
            pings: self.pings.clone(),
            socket: self.socket.clone(),
        }
    }
}

impl<S: Transport + 'static> Link<S> {
    /// Begins to speak on a connection; `gone` is told when it takes no more requests.
    pub(super) async fn open(
        stream: Rewound<S>,
        window: Window,
        gone: Option<Rc<Notify>>,
    ) -> Result<Self, h2::Error> {
        let socket = Rc::new(Socket { stream: RefCell::new(stream), written: Cell::new(0) });
        let weak = Rc::downgrade(&socket);
        let mut client = client::Builder::new();
        client
            .enable_push(false)
            .initial_window_size(window.stream)
            .initial_connection_window_size(window.connection)
            .max_header_list_size(HEADERS)
            .max_send_buffer_size(LIMIT);
        let (sender, mut connection) = client.handshake(Handle(socket)).await?;
        let pings = connection.ping_pong().expect("a new connection's were not taken before");
        let pings = Rc::new(Mutex::new(pings));
        spawn_local(async move {
            // What went wrong the streams are told.
            let _ = connection.await;
            if let Some(gone) = gone {
                gone.notify_one();
            }
        });
        Ok(Self { sender, reused: false, pings, socket: weak })
    }

    /// Whether the other side takes extended CONNECT. It says so before anything else, and so before it answers a PING.
    pub(super) async fn takes_extended_connect(&self) -> io::Result<bool> {
        if !self.sender.is_extended_connect_protocol_enabled() {
            let pings = self.pings.clone();
            // Whoever waits no longer leaves no PING behind whose answer the next would take for the answer to theirs.
            let asked = spawn_local(async move { pings.lock().await.ping(Ping::opaque()).await });
            asked.await?.map_err(io::Error::other)?;
        }
        Ok(self.sender.is_extended_connect_protocol_enabled())
    }

    /// How many bytes the other side's TCP has acknowledged so far; `None` if the connection is gone.
    pub(super) fn acknowledged(&self) -> Option<u64> {
        let socket = self.socket.upgrade()?;
        let waiting = socket.stream.borrow().unacknowledged() as u64;
        Some(socket.written.get().saturating_sub(waiting))
    }

    /// Whether something of what was written is not acknowledged.
    pub(super) fn is_unacknowledged(&self) -> bool {
        self.socket.upgrade().is_some_and(|socket| socket.stream.borrow().unacknowledged() > 0)
    }
}

/// The stream below a connection, which is looked at while the connection has it.
struct Socket<S> {
    stream: RefCell<Rewound<S>>,
    written: Cell<u64>,
}

struct Handle<S>(Rc<Socket<S>>);

impl<S: Transport> AsyncRead for Handle<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.stream.borrow_mut()).poll_read(cx, buffer)
    }
}

impl<S: Transport> AsyncWrite for Handle<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut *self.0.stream.borrow_mut()).poll_write(cx, bytes))?;
        self.0.written.update(|before| before + written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut *self.0.stream.borrow_mut()).poll_write_vectored(cx, slices))?;
        self.0.written.update(|before| before + written as u64);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.stream.borrow().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.stream.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.stream.borrow_mut()).poll_shutdown(cx)
    }
}
