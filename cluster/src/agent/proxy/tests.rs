//! A client, an app and a laptop made of pipes, and what is true of every connection.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{sleep, timeout};
use tpd_api::agent::Mode;

use super::rules::tests::{counts, rule};
use super::{Addresses, Counters, Port, Refusal, Rule, Transport, Upstreams, serve};

/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a pipe holds: less than the relay's buffers.
const PIPE: usize = 16 << 10;

/// The relay's end of a connection.
pub(super) struct Pipe {
    stream: DuplexStream,
    signs: Rc<Signs>,
}

/// What shows of a connection beside its bytes.
#[derive(Default)]
pub(super) struct Signs {
    aborted: Cell<bool>,
    /// Whether the other side acknowledges nothing.
    pub(super) unheard: Cell<bool>,
}

impl Transport for Pipe {
    fn abort(&mut self) {
        self.signs.aborted.set(true);
    }

    fn unacknowledged(&self) -> usize {
        if self.signs.unheard.get() { usize::MAX } else { 0 }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The other end of a connection: a client's, an app's or a laptop's.
pub(super) struct Far {
    pub(super) stream: DuplexStream,
    pub(super) signs: Rc<Signs>,
}

fn pair() -> (Pipe, Far) {
    let (near, far) = tokio::io::duplex(PIPE);
    let signs = Rc::new(Signs::default());
    (Pipe { stream: near, signs: signs.clone() }, Far { stream: far, signs })
}

impl Far {
    pub(super) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        timeout(PATIENCE, self.stream.write_all(bytes.as_ref())).await.unwrap().unwrap();
    }

    pub(super) async fn expect(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        let mut got = vec![0; bytes.len()];
        let mut length = 0;
        while length < got.len() {
            match timeout(PATIENCE, self.stream.read(&mut got[length..])).await {
                Ok(Ok(count @ 1..)) => length += count,
                other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&got[..length])),
            }
        }
        assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(bytes));
    }

    /// All that comes until the end.
    pub(super) async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await.unwrap().unwrap();
        rest
    }

    pub(super) async fn expect_end(&mut self) {
        assert_eq!(String::from_utf8_lossy(&self.rest().await), "");
        assert!(!self.signs.aborted.get(), "a reset");
    }

    pub(super) async fn expect_reset(&mut self) {
        self.rest().await;
        assert!(self.signs.aborted.get(), "an end in good order");
    }

    pub(super) async fn end(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    async fn expect_nothing(&mut self) {
        let mut byte = [0];
        let read = timeout(Duration::from_millis(50), self.stream.read(&mut byte)).await;
        assert!(read.is_err(), "{read:?} {byte:?}");
    }
}

/// Ways that lead to pipes.
pub(super) struct World {
    apps: mpsc::UnboundedSender<Far>,
    laptops: mpsc::UnboundedSender<Far>,
    pub(super) refusal: Cell<Option<Refusal>>,
    pub(super) app_is_down: Cell<bool>,
    pub(super) lost: Cell<usize>,
    /// Whether laptops acknowledge nothing.
    pub(super) unheard: Cell<bool>,
}

impl Upstreams for World {
    type App = Pipe;
    type Laptop = Pipe;

    async fn app(&self) -> io::Result<Pipe> {
        if self.app_is_down.get() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = pair();
        self.apps.send(far).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(near)
    }

    async fn laptop(&self, _: &Rule) -> Result<Pipe, Refusal> {
        if let Some(refusal) = self.refusal.get() {
            return Err(refusal);
        }
        let (near, far) = pair();
        far.signs.unheard.set(self.unheard.get());
        self.laptops.send(far).map_err(|_| Refusal::Refused)?;
        Ok(near)
    }

    fn is_left_out(&self, _: &Rule) -> bool {
        self.refusal.get() == Some(Refusal::Suspended)
    }

    fn lost(&self, _: &Rule) {
        self.lost.update(|lost| lost + 1);
    }
}

/// One connection of a client, and those that are made for it.
pub(super) struct Stage {
    pub(super) client: Far,
    pub(super) apps: mpsc::UnboundedReceiver<Far>,
    pub(super) laptops: mpsc::UnboundedReceiver<Far>,
    pub(super) port: Rc<Port>,
    pub(super) world: Rc<World>,
}

impl Stage {
    pub(super) fn new(rules: Vec<Rule>) -> Self {
        let port = Rc::new(Port::default());
        port.replace(rules);
        let (apps, apps_made) = mpsc::unbounded_channel();
        let (laptops, laptops_made) = mpsc::unbounded_channel();
        let world = Rc::new(World {
            apps,
            laptops,
            refusal: Cell::default(),
            app_is_down: Cell::default(),
            lost: Cell::default(),
            unheard: Cell::default(),
        });
        let client = enter(&port, &world);
        Self { client, apps: apps_made, laptops: laptops_made, port, world }
    }

    /// A connection of another client to the same port.
    pub(super) fn another_client(&self) -> Far {
        enter(&self.port, &self.world)
    }

    /// The next connection to the app.
    pub(super) async fn app(&mut self) -> Far {
        timeout(PATIENCE, self.apps.recv()).await.expect("a connection to the app").unwrap()
    }

    /// The next connection to a laptop.
    pub(super) async fn laptop(&mut self) -> Far {
        timeout(PATIENCE, self.laptops.recv()).await.expect("a connection to the laptop").unwrap()
    }

    /// The client's end, to be used by itself.
    pub(super) fn take_client(&mut self) -> Far {
        std::mem::replace(&mut self.client, pair().1)
    }

    /// A connection to either side, if there is one already.
    pub(super) fn server_now(&mut self) -> Option<Far> {
        self.apps.try_recv().ok().or_else(|| self.laptops.try_recv().ok())
    }

    /// The next connection to either side.
    pub(super) async fn next_server(
        apps: &mut mpsc::UnboundedReceiver<Far>,
        laptops: &mut mpsc::UnboundedReceiver<Far>,
    ) -> Far {
        tokio::select! {
            Some(app) = apps.recv() => app,
            Some(laptop) = laptops.recv() => laptop,
        }
    }

    pub(super) fn nothing_was_dialled(&mut self) -> bool {
        self.apps.try_recv().is_err() && self.laptops.try_recv().is_err()
    }
}

/// A client's connection to a port.
fn enter(port: &Rc<Port>, world: &Rc<World>) -> Far {
    let (near, client) = pair();
    let addresses =
        Addresses { client: "10.0.0.9:5000".parse().unwrap(), server: "10.0.0.2:80".parse().unwrap() };
    spawn_local(serve(near, addresses, port.clone(), world.clone()));
    client
}

pub(super) fn play(scene: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, scene);
}

/// What takes the requests with `x-dev: a`.
pub(super) fn filtered() -> (Vec<Rule>, Rc<Counters>) {
    let (rule, counters) = rule("a", Some("a"), Mode::Intercept);
    (vec![rule], counters)
}

/// What takes everything.
pub(super) fn unfiltered() -> (Vec<Rule>, Rc<Counters>) {
    let (rule, counters) = rule("a", None, Mode::Intercept);
    (vec![rule], counters)
}

#[test]
fn a_request_is_under_way_until_it_is_answered_and_what_has_none_moves() {
    play(async {
        let mut stage = Stage::new(vec![]);
        let under_way = |stage: &Stage| stage.port.activity().under_way;
        let request = "GET / HTTP/1.1\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n";
        stage.client.send(request).await;
        let mut app = stage.app().await;
        app.expect(request).await;
        assert_eq!(under_way(&stage), 1);
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";
        app.send(answer).await;
        stage.client.expect(answer).await;
        assert_eq!(under_way(&stage), 1, "half an answer");
        app.send("ok").await;
        stage.client.expect("ok").await;
        assert_eq!(under_way(&stage), 0, "kept alive");

        stage.client.send(request).await;
        app.expect(request).await;
        let switch = "HTTP/1.1 101 Switching Protocols\r\n\r\n";
        app.send(switch).await;
        stage.client.expect(switch).await;
        assert_eq!(under_way(&stage), 0, "no request is");
        let before = stage.port.activity().moved;
        stage.client.send("there").await;
        app.expect("there").await;
        let between = stage.port.activity().moved;
        app.send("back").await;
        stage.client.expect("back").await;
        assert!(before < between && between < stage.port.activity().moved);
    });
}

#[test]
fn what_is_under_way_holds_a_laptop_whose_rule_is_gone() {
    play(async {
        let mut stage = Stage::new(unfiltered().0);
        let held = |stage: &Stage| stage.port.held().len();
        stage.client.send("GET / HTTP/1.1\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n").await;
        let mut laptop = stage.laptop().await;
        laptop.expect("GET / ").await;
        assert_eq!(held(&stage), 0, "its rule is in force");
        stage.port.replace(vec![]);
        assert_eq!(held(&stage), 1, "a request");
        let switch = "HTTP/1.1 101 Switching Protocols\r\n\r\n";
        laptop.send(switch).await;
        stage.client.expect(switch).await;
        assert_eq!(held(&stage), 1, "bytes both ways");
        laptop.end().await;
        stage.client.expect_end().await;
        assert_eq!(held(&stage), 1, "one half");
        stage.client.end().await;
        laptop.rest().await;
        assert_eq!(held(&stage), 0);
    });
}

#[test]
fn a_server_that_speaks_first_is_heard() {
    play(async {
        let (rules, counters) = filtered();
        let mut stage = Stage::new(rules);
        let mut app = stage.app().await;
        app.send("220 mail\r\n").await;
        stage.client.expect("220 mail\r\n").await;
        stage.client.send("EHLO a\r\n").await;
        app.expect("EHLO a\r\n").await;
        app.end().await;
        stage.client.expect_end().await;
        assert_eq!(counts(&counters), [0, 1, 0, 0]);
    });
}

#[test]
fn what_is_not_http_goes_where_all_of_it_goes() {
    play(async {
        let (rules, counters) = unfiltered();
        let mut stage = Stage::new(rules);
        stage.client.send(b"\0\0\0\x08\x04\xd2\x16\x2f").await;
        let mut laptop = stage.laptop().await;
        laptop.expect(b"\0\0\0\x08\x04\xd2\x16\x2f").await;
        laptop.send("N").await;
        stage.client.expect("N").await;
        stage.client.end().await;
        laptop.expect_end().await;
        laptop.send("half-closed").await;
        laptop.end().await;
        assert_eq!(stage.client.rest().await, b"half-closed");
        assert_eq!(counts(&counters), [1, 0, 0, 0]);
    });
}

#[test]
fn what_is_not_http_goes_to_the_app_where_the_laptop_does_not_answer() {
    play(async {
        let (rules, counters) = unfiltered();
        let mut stage = Stage::new(rules);
        stage.world.refusal.set(Some(Refusal::Timeout));
        stage.client.send("\x16\x03\x01").await;
        stage.app().await.expect("\x16\x03\x01").await;
        assert_eq!(counts(&counters), [0, 0, 1, 0]);
    });
}

#[test]
fn a_connection_made_in_advance_is_matched_by_its_first_request() {
    play(async {
        let (rules, counters) = filtered();
        let mut stage = Stage::new(rules);
        let mut app = stage.app().await;
        sleep(Duration::from_millis(20)).await;
        stage.client.send("GET / HTTP/1.1\r\nX-").await;
        sleep(Duration::from_millis(20)).await;
        stage.client.send("Dev: a\r\n\r\n").await;
        let mut laptop = stage.laptop().await;
        laptop.expect("GET / HTTP/1.1\r\nX-Dev: a\r\nX-Forwarded-For: 10.0.0.9\r\n\r\n").await;
        laptop.send("HTTP/1.1 204 No\r\n\r\n").await;
        stage.client.expect("HTTP/1.1 204 No\r\n\r\n").await;
        // And the app's is there for the next.
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        app.expect("GET / HTTP/1.1\r\n\r\n").await;
        assert_eq!(counts(&counters), [1, 1, 0, 0]);
    });
}

#[test]
fn a_request_that_comes_at_once_has_nothing_dialled_in_vain() {
    play(async {
        let (rules, _) = filtered();
        let mut stage = Stage::new(rules);
        stage.client.send("GET / HTTP/1.1\r\nX-Dev: a\r\n\r\n").await;
        stage.laptop().await.expect("GET / HTTP/1.1\r\n").await;
        assert!(stage.nothing_was_dialled());
    });
}

#[test]
fn sockets_work_like_pipes() {
    play(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nX-Dev: a\r\n\r\n").await.unwrap();
        let mut stage = Stage::new(vec![]);
        stage.app().await;
        stage.port.replace(filtered().0);
        let (socket, from) = listener.accept().await.unwrap();
        let addresses = Addresses { client: from, server: from };
        spawn_local(serve(socket, addresses, stage.port.clone(), stage.world.clone()));
        let mut laptop = stage.laptop().await;
        laptop.expect("GET / HTTP/1.1\r\nX-Dev: a\r\nX-Forwarded-For: 127.0.0.1\r\n\r\n").await;
        assert!(stage.nothing_was_dialled(), "the request was there already");
        laptop.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel").await;
        drop(laptop);
        let mut answer = Vec::new();
        let error = client.read_to_end(&mut answer).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn an_app_that_closes_before_anyone_spoke_closes_the_client() {
    play(async {
        let (rules, _) = filtered();
        let mut stage = Stage::new(rules);
        stage.app().await.end().await;
        stage.client.expect_end().await;
    });
}

#[test]
fn an_app_that_is_down_keeps_nobody_from_the_laptop() {
    play(async {
        let (rules, _) = filtered();
        let mut stage = Stage::new(rules);
        stage.world.app_is_down.set(true);
        sleep(Duration::from_millis(20)).await;
        stage.client.send("GET / HTTP/1.1\r\nX-Dev: a\r\n\r\n").await;
        stage.laptop().await.expect("GET / HTTP/1.1\r\n").await;

        let mut silent = Stage::new(filtered().0);
        silent.world.app_is_down.set(true);
        silent.client.expect_reset().await;
    });
}

#[test]
fn a_reset_is_passed_on() {
    play(async {
        let mut stage = Stage::new(unfiltered().0);
        stage.client.send("\x16\x03\x01").await;
        let laptop = stage.laptop().await;
        drop(laptop);
        stage.client.send("more").await;
        stage.client.expect_reset().await;
    });
}

#[test]
fn the_proxy_header_comes_first_where_it_is_asked_for() {
    play(async {
        let (mut rule, _) = rule("a", None, Mode::Intercept);
        rule.proxy_protocol = true;
        let mut stage = Stage::new(vec![rule]);
        stage.client.send("\x16\x03\x01").await;
        stage.laptop().await.expect("PROXY TCP4 10.0.0.9 10.0.0.2 5000 80\r\n\x16\x03\x01").await;

        let (mut rule, _) = self::rule("a", None, Mode::Intercept);
        rule.proxy_protocol = true;
        let mut stage = Stage::new(vec![rule]);
        let header = "PROXY TCP4 10.0.0.9 10.0.0.2 5000 80\r\n";
        stage.client.send("GET /1 HTTP/1.1\r\n\r\n").await;
        let mut laptop = stage.laptop().await;
        laptop.expect(format!("{header}GET /1 HTTP/1.1\r\nX-Forwarded-For: 10.0.0.9\r\n\r\n")).await;
        laptop.send("HTTP/1.1 204 No\r\n\r\n").await;
        stage.client.expect("HTTP/1.1 204 No\r\n\r\n").await;
        stage.client.send("GET /2 HTTP/1.1\r\n\r\n").await;
        laptop.expect("GET /2 HTTP/1.1\r\nX-Forwarded-For: 10.0.0.9\r\n\r\n").await;
    });
}

#[test]
fn taps_get_the_clients_bytes_and_delay_nobody() {
    play(async {
        let (tap, counters) = rule("tap", None, Mode::Wiretap);
        let mut stage = Stage::new(vec![tap]);
        let mut app = stage.app().await;
        app.send("220\r\n").await;
        stage.client.expect("220\r\n").await;
        let mut laptop = stage.laptop().await;
        stage.client.send("EHLO\r\n").await;
        app.expect("EHLO\r\n").await;
        laptop.expect("EHLO\r\n").await;
        laptop.send("discarded").await;
        // The laptop reads no more: what does not fit is lost, and the app gets all of it.
        let much = vec![b'x'; 1 << 20];
        let (sent, got) = (stage.client.send(&much), app.expect(&much));
        tokio::join!(sent, got);
        app.send("250\r\n").await;
        stage.client.expect("250\r\n").await;
        assert_eq!(counts(&counters), [1, 0, 0, 1]);
    });
}

#[test]
fn a_tap_that_has_stopped_is_given_up_and_its_copies_counted() {
    play(async {
        tokio::time::pause();
        let (tap, counters) = rule("tap", None, Mode::Wiretap);
        let mut stage = Stage::new(vec![tap]);
        stage.world.unheard.set(true);
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        let (mut app, mut laptop) = (stage.app().await, stage.laptop().await);
        app.expect("GET / HTTP/1.1\r\n\r\n").await;
        app.send("HTTP/1.1 204 No\r\n\r\n").await;
        stage.client.expect("HTTP/1.1 204 No\r\n\r\n").await;
        sleep(Duration::from_secs(1)).await;
        assert!(!laptop.signs.aborted.get());
        // It has taken nothing for two seconds by then: the connection ends, and with it what is kept for it.
        sleep(Duration::from_secs(2)).await;
        assert!(laptop.rest().await.starts_with(b"GET / "));
        stage.world.refusal.set(Some(Refusal::Suspended));
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        app.expect("GET / HTTP/1.1\r\n\r\n").await;
        sleep(Duration::from_millis(1)).await;
        assert_eq!(counts(&counters)[3], 1);
    });
}

#[test]
fn a_tap_that_takes_no_more_holds_nothing_once_its_client_is_gone() {
    play(async {
        tokio::time::pause();
        let (tap, counters) = rule("tap", None, Mode::Wiretap);
        let mut stage = Stage::new(vec![tap]);
        let long = [b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n", &[b'x'; 100_000][..]].concat();
        let mut client = stage.take_client();
        let (_, mut app) = tokio::join!(client.send(&long), async {
            let mut app = stage.app().await;
            app.expect(&long).await;
            app
        });
        let mut laptop = stage.laptop().await;
        app.send("HTTP/1.1 204 No\r\n\r\n").await;
        client.expect("HTTP/1.1 204 No\r\n\r\n").await;
        drop(client);
        sleep(Duration::from_secs(3)).await;
        assert_eq!(counts(&counters), [0, 0, 0, 1], "its copy is lost");
        assert!(laptop.rest().await.len() < long.len(), "what it never took is forgotten");
    });
}

#[test]
fn connections_are_counted_as_stragglers() {
    play(async {
        let mut stage = Stage::new(vec![]);
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        let mut app = stage.app().await;
        app.expect("GET / HTTP/1.1\r\n\r\n").await;
        stage.port.replace(unfiltered().0);
        assert_eq!((stage.port.connections(), stage.port.stragglers("a")), (1, 1));
        app.send("HTTP/1.1 204 No\r\n\r\n").await;
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        let mut laptop = stage.laptop().await;
        laptop.expect("GET /").await;
        assert_eq!((stage.port.connections(), stage.port.stragglers("a")), (1, 0));
        laptop.send("HTTP/1.1 204 No\r\n\r\n").await;
        drop(stage.client);
        sleep(Duration::from_millis(50)).await;
        assert_eq!(stage.port.connections(), 0);
    });
}

#[test]
fn silence_is_no_verdict() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        let mut app = stage.app().await;
        stage.client.send("GET / HT").await;
        app.expect_nothing().await;
        // Until it has lasted for too long for a first line.
        app.expect("GET / HT").await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The fuzz target for whole connections: whatever comes, the app gets it as it came.
    #[test]
    fn garbage_reaches_the_app_intact(
        garbage in prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..2000),
            "(GET|POST) /[ -~]{0,5} HTTP/1.1\r\n(Content-Length: [0-9x]{1,3}\r\n){2,3}[ -~]{0,20}\r\n\r\n.{0,50}"
                .prop_map(String::into_bytes),
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n([g-z]|1\r\nxy)[ -~]{0,50}"
                .prop_map(String::into_bytes),
        ],
        cuts in proptest::collection::vec(1usize..500, 1..10),
    ) {
        play(async move {
            let mut stage = Stage::new(filtered().0);
            let mut cuts = cuts.into_iter().cycle();
            let mut rest = &garbage[..];
            while !rest.is_empty() {
                let (part, more) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                stage.client.send(part).await;
                tokio::task::yield_now().await;
                rest = more;
            }
            stage.client.end().await;
            let mut app = stage.app().await;
            assert_eq!(app.rest().await, garbage);
            app.send("answer").await;
            app.end().await;
            assert_eq!(stage.client.rest().await, b"answer");
        });
    }
}
