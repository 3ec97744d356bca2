use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::ext::Protocol;
use h2::server::{self, SendResponse};
use h2::{Ping, Reason, RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};
use tpd_api::agent::Mode;

use crate::agent::proxy::buffer::Share;
use crate::agent::proxy::rules::tests::{counts, rule};
use crate::agent::proxy::tests::{Far, Pipe, Stage, World, filtered, play, unfiltered};
use crate::agent::proxy::{Addresses, Refusal, Rule, Upstreams, held};

type Requests = mpsc::UnboundedReceiver<(Request<RecvStream>, SendResponse<Bytes>)>;

/// Begins to speak as the client of a stage.
async fn client(far: Far) -> SendRequest<Bytes> {
    let (sender, connection) = client::handshake(far.stream).await.unwrap();
    spawn_local(connection);
    sender
}

/// Serves a connection; the requests come out one by one.
async fn server(far: Far) -> Requests {
    serve(far, &server::Builder::new()).await
}

/// Serves a connection, and offers extended CONNECT.
async fn server_of_websockets(far: Far) -> Requests {
    serve(far, server::Builder::new().enable_connect_protocol()).await
}

async fn serve(far: Far, server: &server::Builder) -> Requests {
    let mut connection = server.handshake(far.stream).await.unwrap();
    let (requests, received) = mpsc::unbounded_channel();
    spawn_local(async move {
        let signs = far.signs;
        while let Some(Ok(request)) = connection.accept().await {
            let _ = requests.send(request);
        }
        drop(signs);
    });
    received
}

fn request(path: &str, dev: Option<&str>) -> Request<()> {
    let mut request = Request::post(format!("http://app{path}"));
    if let Some(dev) = dev {
        request = request.header("x-dev", dev);
    }
    request.body(()).unwrap()
}

async fn next(requests: &mut Requests) -> (Request<RecvStream>, SendResponse<Bytes>) {
    timeout(Duration::from_secs(10), requests.recv()).await.expect("a request").unwrap()
}

async fn read(body: &mut RecvStream) -> (Vec<u8>, Option<HeaderMap>) {
    let mut bytes = Vec::new();
    while let Some(part) = body.data().await {
        let part = part.unwrap();
        body.flow_control().release_capacity(part.len()).unwrap();
        bytes.extend_from_slice(&part);
    }
    (bytes, body.trailers().await.unwrap())
}

/// A stage whose client is taken, and speaks HTTP/2. Of the app it is known that it takes no extended CONNECT.
async fn open(rules: Vec<Rule>) -> (Stage, SendRequest<Bytes>) {
    let mut stage = Stage::new(rules);
    stage.port.offer().note(false);
    let far = stage.take_client();
    (stage, client(far).await)
}

/// The same with an app that offers it.
async fn open_for_websockets(rules: Vec<Rule>) -> (Stage, SendRequest<Bytes>) {
    let mut stage = Stage::new(rules);
    stage.port.offer().note(true);
    let far = stage.take_client();
    (stage, client(far).await)
}

/// A request for a WebSocket.
fn websocket(path: &str, dev: Option<&str>) -> Request<()> {
    let (mut head, ()) = request(path, dev).into_parts();
    head.method = Method::CONNECT;
    head.extensions.insert(Protocol::from_static("websocket"));
    Request::from_parts(head, ())
}

/// Whether a client is offered extended CONNECT in the first place.
async fn is_offered(far: Far) -> bool {
    let (sender, mut connection) = client::handshake(far.stream).await.unwrap();
    let mut pings = connection.ping_pong().unwrap();
    spawn_local(connection);
    timeout(Duration::from_secs(10), pings.ping(Ping::opaque())).await.expect("an answer").unwrap();
    sender.is_extended_connect_protocol_enabled()
}

/// Bytes from one end of a stream to the other.
async fn passes(from: &mut SendStream<Bytes>, to: &mut RecvStream, bytes: &'static str) {
    from.send_data(bytes.into(), false).unwrap();
    let got = timeout(Duration::from_secs(10), to.data()).await.expect(bytes).unwrap().unwrap();
    to.flow_control().release_capacity(got.len()).unwrap();
    assert_eq!(got, bytes);
}

fn trailers() -> HeaderMap {
    [("grpc-status".parse().unwrap(), "0".parse().unwrap())].into_iter().collect()
}

#[test]
fn streams_of_one_connection_choose_their_sides() {
    play(async {
        let (rules, counters) = filtered();
        let (mut stage, mut client) = open(rules).await;
        let (first, mut upload) = client.send_request(request("/dev", Some("a")), false).unwrap();
        let (second, _) = client.send_request(request("/other", None), true).unwrap();
        let mut laptop = server(stage.laptop().await).await;
        let mut app = server(stage.app().await).await;

        // Both ways at once, as gRPC's streaming does.
        let (at_laptop, mut respond) = next(&mut laptop).await;
        assert_eq!(at_laptop.uri(), "http://app/dev");
        assert_eq!(at_laptop.headers()["x-forwarded-for"], "10.0.0.9");
        let mut answer = respond.send_response(Response::new(()), false).unwrap();
        answer.send_data("early".into(), false).unwrap();
        let mut first = first.await.unwrap().into_body();
        assert_eq!(first.data().await.unwrap().unwrap(), "early");
        upload.send_data("late".into(), false).unwrap();
        upload.send_trailers(trailers()).unwrap();
        assert_eq!(read(&mut at_laptop.into_body()).await, (b"late".to_vec(), Some(trailers())));
        answer.send_trailers(trailers()).unwrap();
        assert_eq!(read(&mut first).await, (vec![], Some(trailers())));

        assert_eq!(stage.port.activity().under_way, 1, "the other is not answered yet");
        let (at_app, mut respond) = next(&mut app).await;
        assert_eq!(at_app.uri(), "http://app/other");
        assert!(at_app.headers().is_empty() && at_app.body().is_end_stream());
        respond.send_response(Response::builder().status(404).body(()).unwrap(), true).unwrap();
        let second = second.await.unwrap();
        assert_eq!(second.status(), 404);
        assert!(second.body().is_end_stream());
        assert_eq!(counts(&counters), [1, 1, 0, 0]);
    });
}

#[test]
fn bodies_larger_than_every_window_go_through() {
    play(async {
        let (mut stage, mut client) = open(unfiltered().0).await;
        let (answer, mut upload) = client.send_request(request("/", None), false).unwrap();
        let mut laptop = server(stage.laptop().await).await;
        let (request, mut respond) = next(&mut laptop).await;
        let much = Bytes::from(vec![b'x'; 3 << 20]);
        upload.send_data(much.clone(), true).unwrap();
        let mut echo = respond.send_response(Response::new(()), false).unwrap();
        spawn_local(async move {
            let (bytes, _) = read(&mut request.into_body()).await;
            echo.send_data(bytes.into(), true).unwrap();
            let _ = poll_fn(|cx| echo.poll_reset(cx)).await;
        });
        let (bytes, trailers) = read(&mut answer.await.unwrap().into_body()).await;
        assert!(bytes == much && trailers.is_none());
    });
}

/// Until what is under way has come as far as it can.
async fn settled() {
    sleep(Duration::from_millis(100)).await;
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let met = async {
        while !is_so() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), met).await.expect(what);
}

#[test]
fn uploads_that_stall_at_a_breakpoint_stop_no_other_stream() {
    play(async {
        let before = held();
        let (mut stage, mut client) = open(filtered().0).await;
        let mut uploads = Vec::new();
        for _ in 0..super::STREAMS - 1 {
            let (answer, mut upload) = client.send_request(request("/dev", Some("a")), false).unwrap();
            // All that its window takes, and more.
            upload.send_data(vec![b'x'; 1 << 20].into(), true).unwrap();
            uploads.push((answer, upload));
        }
        // Takes all requests and reads none.
        let mut laptop = server(stage.laptop().await).await;
        until("all wait that their windows let", || held() - before >= 12 << 20).await;
        let (answer, mut upload) = client.send_request(request("/other", None), false).unwrap();
        let mut app = server(stage.app().await).await;
        let (at_app, mut respond) = next(&mut app).await;
        upload.send_data(vec![b'y'; 200 << 10].into(), true).unwrap();
        let mut body = at_app.into_body();
        let got =
            timeout(Duration::from_secs(10), read(&mut body)).await.expect("a way past those that stall");
        assert_eq!(got.0.len(), 200 << 10);
        respond.send_response(Response::new(()), true).unwrap();
        answer.await.unwrap();

        // What waits is known, and is no more than the windows of all.
        let waiting = held() - before;
        assert!((12 << 20..17 << 20).contains(&waiting), "{waiting}");
        // None was given up.
        let mut stalled = 0;
        while let Ok((request, _respond)) = laptop.try_recv() {
            assert!(!request.body().is_end_stream());
            stalled += 1;
        }
        assert_eq!(stalled, super::STREAMS - 1);
        drop((uploads, client));
        until("and leaves with its streams", || held() < before + 4096).await;
    });
}

#[test]
fn clients_that_do_not_read_their_downloads_stop_no_other_stream() {
    play(async {
        let mut stage = Stage::new(unfiltered().0);
        stage.port.offer().note(false);
        // Its window for all is not what stops the others.
        let client = client::Builder::new().initial_connection_window_size(64 << 20).clone();
        let (mut client, connection) =
            client.handshake::<_, Bytes>(stage.take_client().stream).await.unwrap();
        spawn_local(connection);
        let mut stalled = Vec::new();
        for _ in 0..60 {
            stalled.push(client.send_request(request("/", None), true).unwrap().0);
        }
        let mut laptop = server(stage.laptop().await).await;
        for _ in 0..60 {
            let (_, mut respond) = next(&mut laptop).await;
            let mut body = respond.send_response(Response::new(()), false).unwrap();
            body.send_data(vec![b'x'; 200 << 10].into(), true).unwrap();
        }
        settled().await;
        let (answer, _) = client.send_request(request("/", None), true).unwrap();
        let (_, mut respond) = next(&mut laptop).await;
        let mut body = respond.send_response(Response::new(()), false).unwrap();
        body.send_data(vec![b'y'; 200 << 10].into(), true).unwrap();
        let mut body =
            timeout(Duration::from_secs(10), answer).await.expect("an answer").unwrap().into_body();
        let got =
            timeout(Duration::from_secs(10), read(&mut body)).await.expect("a way past those that stall");
        assert_eq!(got.0.len(), 200 << 10);
        // And once it reads, all of it comes.
        for answer in stalled {
            let mut body = answer.await.unwrap().into_body();
            let got = timeout(Duration::from_secs(10), read(&mut body)).await.expect("a download");
            assert_eq!(got.0.len(), 200 << 10);
        }
    });
}

#[test]
fn in_a_full_agent_streams_that_stall_are_ended_and_others_are_not() {
    play(async {
        let (mut stage, mut client) = open(filtered().0).await;
        let mut others = Share::default();
        others.set(super::FULL);
        let (stalled, mut upload) = client.send_request(request("/1", Some("a")), false).unwrap();
        upload.send_data(vec![b'x'; 1 << 20].into(), true).unwrap();
        let mut laptop = server(stage.laptop().await).await;
        let (_request, _respond) = next(&mut laptop).await;
        let ended = timeout(Duration::from_secs(10), stalled).await.expect("an end");
        assert!(ended.unwrap_err().is_reset());

        let (answer, mut upload) = client.send_request(request("/2", None), false).unwrap();
        let mut app = server(stage.app().await).await;
        let (at_app, mut respond) = next(&mut app).await;
        upload.send_data("body".into(), true).unwrap();
        assert_eq!(read(&mut at_app.into_body()).await.0, b"body");
        respond.send_response(Response::new(()), true).unwrap();
        answer.await.unwrap();
    });
}

#[test]
fn resets_keep_their_reasons_both_ways() {
    play(async {
        let (mut stage, mut client) = open(unfiltered().0).await;
        let (answer, _upload) = client.send_request(request("/1", None), false).unwrap();
        let mut laptop = server(stage.laptop().await).await;
        let (_request, mut respond) = next(&mut laptop).await;
        respond.send_reset(Reason::ENHANCE_YOUR_CALM);
        assert_eq!(answer.await.unwrap_err().reason(), Some(Reason::ENHANCE_YOUR_CALM));

        let (_answer, mut upload) = client.send_request(request("/2", None), false).unwrap();
        let (request, _respond) = next(&mut laptop).await;
        upload.send_reset(Reason::CANCEL);
        assert_eq!(request.into_body().data().await.unwrap().unwrap_err().reason(), Some(Reason::CANCEL));
    });
}

/// Ways where connections to the app come about only once they are let.
struct Held {
    world: Rc<World>,
    let_through: Semaphore,
}

impl Upstreams for Held {
    type App = Pipe;
    type Laptop = Pipe;

    async fn app(&self) -> io::Result<Pipe> {
        let _one_at_a_time = self.let_through.acquire().await.map_err(io::Error::other)?;
        self.world.app().await
    }

    async fn laptop(&self, rule: &Rule) -> Result<Pipe, Refusal> {
        self.world.laptop(rule).await
    }

    fn is_left_out(&self, rule: &Rule) -> bool {
        self.world.is_left_out(rule)
    }

    fn lost(&self, rule: &Rule) {
        self.world.lost(rule);
    }
}

/// Has another client come to a stage's port by these ways.
async fn client_by<U: Upstreams>(stage: &mut Stage, ways: Rc<U>) -> Far {
    let near = stage.world.app().await.unwrap();
    let addresses =
        Addresses { client: "10.0.0.9:5001".parse().unwrap(), server: "10.0.0.2:80".parse().unwrap() };
    spawn_local(crate::agent::proxy::serve(near, addresses, stage.port.clone(), ways));
    stage.app().await
}

#[test]
fn requests_that_are_reset_while_a_connection_is_made_leave_nothing_and_go_nowhere() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        stage.port.offer().note(false);
        // The stage's own says nothing, and leaves behind no more than a connection to the app.
        drop(stage.take_client());
        let ways = Rc::new(Held { world: stage.world.clone(), let_through: Semaphore::new(0) });
        let mut client = client(client_by(&mut stage, ways.clone()).await).await;
        // More than a connection may have streams, and never many at once.
        for _ in 0..60 {
            let mut sent = Vec::new();
            for _ in 0..10 {
                sent.push(client.send_request(request("/dead", None), false).unwrap());
            }
            sleep(Duration::from_millis(2)).await;
            for (_, stream) in &mut sent {
                stream.send_reset(Reason::CANCEL);
            }
            sleep(Duration::from_millis(2)).await;
            let under_way = stage.port.activity().under_way;
            assert!(under_way <= 20, "{under_way} tasks are left");
        }
        settled().await;
        assert_eq!(stage.port.activity().under_way, 0);

        let (answer, _) = client.send_request(request("/live", None), true).unwrap();
        while stage.server_now().is_some() {}
        ways.let_through.add_permits(1);
        let far = stage.app().await;
        let mut app = timeout(Duration::from_secs(10), server(far)).await.expect("a connection to speak on");
        let (at_app, mut respond) = next(&mut app).await;
        assert_eq!(at_app.uri().path(), "/live", "the app gets none of the others");
        respond.send_response(Response::new(()), true).unwrap();
        timeout(Duration::from_secs(10), answer).await.expect("an answer").unwrap();
    });
}

#[test]
fn a_laptop_that_is_not_there_costs_nothing() {
    play(async {
        let (rules, counters) = unfiltered();
        let (mut stage, mut client) = open(rules).await;
        stage.world.refusal.set(Some(Refusal::Suspended));
        let (answer, mut upload) = client.send_request(request("/1", None), false).unwrap();
        upload.send_data("body".into(), true).unwrap();
        let mut app = server(stage.app().await).await;
        let (at_app, mut respond) = next(&mut app).await;
        assert_eq!(read(&mut at_app.into_body()).await.0, b"body");
        respond.send_response(Response::new(()), true).unwrap();
        answer.await.unwrap();

        // It took the connection, and acknowledges nothing.
        stage.world.refusal.set(None);
        stage.world.unheard.set(true);
        let (answer, mut upload) = client.send_request(request("/2", None), false).unwrap();
        upload.send_data("body".into(), true).unwrap();
        let _laptop = stage.laptop().await;
        let (at_app, mut respond) = next(&mut app).await;
        assert_eq!(read(&mut at_app.into_body()).await.0, b"body");
        respond.send_response(Response::new(()), true).unwrap();
        answer.await.unwrap();
        assert_eq!(counts(&counters), [0, 0, 2, 0]);
        assert_eq!(stage.world.lost.get(), 1);
    });
}

#[test]
fn a_laptop_that_falls_silent_is_asked_again_on_another_connection_once_it_is_heard() {
    play(async {
        let (rules, counters) = unfiltered();
        let (mut stage, mut client) = open(rules).await;
        let (_first, _) = client.send_request(request("/1", None), true).unwrap();
        let far = stage.laptop().await;
        let signs = far.signs.clone();
        let mut laptop = server(far).await;
        let (_, _open) = next(&mut laptop).await;
        // As if it were left out since another's request.
        stage.world.refusal.set(Some(Refusal::Suspended));
        let (_second, _) = client.send_request(request("/2", None), true).unwrap();
        let mut app = server(stage.app().await).await;
        assert_eq!(next(&mut app).await.0.uri().path(), "/2");
        // Heard again, and silent on the old connection.
        stage.world.refusal.set(None);
        signs.unheard.set(true);
        let (_third, _) = client.send_request(request("/3", None), true).unwrap();
        assert_eq!(next(&mut app).await.0.uri().path(), "/3");
        assert_eq!(stage.world.lost.get(), 1);
        let (_fourth, _) = client.send_request(request("/4", None), true).unwrap();
        let mut laptop = server(stage.laptop().await).await;
        assert_eq!(next(&mut laptop).await.0.uri().path(), "/4");
        assert_eq!(counts(&counters)[2], 2);
    });
}

#[test]
fn a_laptop_that_dies_resets_its_streams_and_no_others() {
    play(async {
        let (mut stage, mut client) = open(filtered().0).await;
        let (first, _) = client.send_request(request("/1", Some("a")), true).unwrap();
        let (second, _) = client.send_request(request("/2", None), true).unwrap();
        let far = stage.laptop().await;
        let mut app = server(stage.app().await).await;
        let mut laptop = server::handshake(far.stream).await.unwrap();
        let (_, mut respond) = laptop.accept().await.unwrap().unwrap();
        let mut body = respond.send_response(Response::new(()), false).unwrap();
        body.send_data("half".into(), false).unwrap();
        let _ = timeout(Duration::from_millis(100), laptop.accept()).await;
        let mut first = first.await.unwrap().into_body();
        assert_eq!(first.data().await.unwrap().unwrap(), "half");
        drop((laptop, respond, body));
        assert!(first.data().await.unwrap().is_err());
        let (_, mut respond) = next(&mut app).await;
        respond.send_response(Response::new(()), true).unwrap();
        assert_eq!(second.await.unwrap().status(), 200);
    });
}

#[test]
fn a_server_that_speaks_first_is_not_taken_for_another_protocol() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        stage.port.offer().note(false);
        // Sends its SETTINGS without having heard the client.
        let mut app = server_at_once(stage.app().await);
        sleep(Duration::from_millis(20)).await;
        let mut client = client(stage.take_client()).await;
        let (answer, _) = client.send_request(request("/1", None), true).unwrap();
        let (_, mut respond) = next(&mut app).await;
        respond.send_response(Response::new(()), true).unwrap();
        answer.await.unwrap();
        let (_answer, _) = client.send_request(request("/2", Some("a")), true).unwrap();
        let mut laptop = server(stage.laptop().await).await;
        next(&mut laptop).await;
        assert!(stage.nothing_was_dialled());
    });
}

/// Serves a connection, and does not wait for the client with it.
fn server_at_once(far: Far) -> Requests {
    let (requests, received) = mpsc::unbounded_channel();
    let signs = Rc::clone(&far.signs);
    spawn_local(async move {
        let mut connection = server::handshake(far.stream).await.unwrap();
        while let Some(Ok(request)) = connection.accept().await {
            let _ = requests.send(request);
        }
        drop(signs);
    });
    received
}

#[test]
fn a_client_is_sent_away_when_no_rule_is_left() {
    play(async {
        let (mut stage, mut client) = open(unfiltered().0).await;
        let (answer, _) = client.send_request(request("/", None), true).unwrap();
        let mut laptop = server(stage.laptop().await).await;
        let (_, mut respond) = next(&mut laptop).await;
        stage.port.replace(vec![]);
        // What is under way is finished.
        sleep(Duration::from_millis(50)).await;
        respond.send_response(Response::new(()), true).unwrap();
        assert_eq!(answer.await.unwrap().status(), 200);
        let ready = timeout(Duration::from_secs(10), async {
            while poll_fn(|cx| client.poll_ready(cx)).await.is_ok() {
                sleep(Duration::from_millis(10)).await;
            }
        });
        ready.await.expect("a GOAWAY");
    });
}

#[test]
fn taps_get_copies_of_streams() {
    play(async {
        let (tap, counters) = rule("tap", Some("a"), Mode::Wiretap);
        let (mut stage, mut client) = open(vec![tap]).await;
        let (answer, mut upload) = client.send_request(request("/1", Some("a")), false).unwrap();
        upload.send_data("body".into(), false).unwrap();
        upload.send_trailers(trailers()).unwrap();
        let mut app = server(stage.app().await).await;
        let (at_app, mut respond) = next(&mut app).await;
        assert_eq!(read(&mut at_app.into_body()).await, (b"body".to_vec(), Some(trailers())));
        respond.send_response(Response::new(()), true).unwrap();
        answer.await.unwrap();
        let mut laptop = server(stage.laptop().await).await;
        let (copy, mut respond) = next(&mut laptop).await;
        assert_eq!(copy.uri(), "http://app/1");
        assert_eq!(read(&mut copy.into_body()).await, (b"body".to_vec(), Some(trailers())));
        respond.send_response(Response::builder().status(500).body(()).unwrap(), true).unwrap();
        assert_eq!(counts(&counters), [1, 0, 0, 0]);

        stage.world.refusal.set(Some(Refusal::Refused));
        drop(laptop);
        let (answer, _) = client.send_request(request("/2", Some("b")), true).unwrap();
        let (_, mut respond) = next(&mut app).await;
        respond.send_response(Response::new(()), true).unwrap();
        answer.await.unwrap();
        assert_eq!(counts(&counters), [1, 1, 0, 0]);
    });
}

#[test]
fn extended_connect_is_offered_if_and_only_if_the_app_offers_it() {
    for offers in [true, false] {
        play(async {
            // The laptop takes everything, and the app is asked all the same.
            let mut stage = Stage::new(unfiltered().0);
            let client = stage.take_client();
            let (offered, mut app) = tokio::join!(is_offered(client), async {
                let app = stage.app().await;
                if offers { server_of_websockets(app).await } else { server(app).await }
            });
            assert_eq!(offered, offers);
            let asked = timeout(Duration::from_secs(10), app.recv()).await.expect("the end of the question");
            assert!(asked.is_none(), "nothing was asked but this");
            assert_eq!(is_offered(stage.another_client()).await, offers);
            assert!(stage.nothing_was_dialled(), "it is known by now");
        });
    }
}

#[test]
fn an_app_that_does_not_say_delays_no_client_twice() {
    play(async {
        tokio::time::pause();
        let mut stage = Stage::new(unfiltered().0);
        stage.world.app_is_down.set(true);
        let client = stage.take_client();
        assert!(!is_offered(client).await, "nobody is there");
        // Nobody accepts what is sent to this one.
        stage.world.app_is_down.set(false);
        let begun = tokio::time::Instant::now();
        assert!(!is_offered(stage.another_client()).await);
        let _silent = stage.app().await;
        let taken = begun.elapsed();
        assert!((500..600).contains(&taken.as_millis()), "{taken:?}");
        assert!(!is_offered(stage.another_client()).await);
        assert_eq!(begun.elapsed(), taken);
        // After a while it is asked again, once, and nobody waits for that.
        sleep(Duration::from_secs(60)).await;
        let begun = tokio::time::Instant::now();
        assert!(!is_offered(stage.another_client()).await);
        assert!(!is_offered(stage.another_client()).await);
        assert_eq!(begun.elapsed(), Duration::ZERO);
        let _app = server_of_websockets(stage.app().await).await;
        sleep(Duration::from_millis(100)).await;
        assert!(is_offered(stage.another_client()).await);
    });
}

#[test]
fn websockets_over_http2_go_both_ways_with_the_side_that_they_match() {
    play(async {
        let (rules, counters) = filtered();
        let (mut stage, mut client) = open_for_websockets(rules).await;
        for (dev, at_laptop) in [(Some("a"), true), (None, false)] {
            let (answer, mut up) = client.send_request(websocket("/chat?room=1", dev), false).unwrap();
            let far = if at_laptop { stage.laptop().await } else { stage.app().await };
            let mut requests = server_of_websockets(far).await;
            let (request, mut respond) = next(&mut requests).await;
            assert_eq!(request.method(), Method::CONNECT);
            assert_eq!(request.uri(), "http://app/chat?room=1");
            assert_eq!(request.extensions().get(), Some(&Protocol::from_static("websocket")));
            assert_eq!(request.headers().contains_key("x-forwarded-for"), at_laptop);
            let mut there = request.into_body();
            let mut down = respond.send_response(Response::new(()), false).unwrap();
            let answer = answer.await.unwrap();
            assert_eq!(answer.status(), 200);
            let mut back = answer.into_body();
            for _ in 0..3 {
                passes(&mut up, &mut there, "ping").await;
                passes(&mut down, &mut back, "pong").await;
            }
            // Each way ends by itself.
            up.send_data(Bytes::new(), true).unwrap();
            assert_eq!(read(&mut there).await, (vec![], None));
            passes(&mut down, &mut back, "last").await;
            down.send_reset(Reason::CANCEL);
            assert_eq!(back.data().await.unwrap().unwrap_err().reason(), Some(Reason::CANCEL));
        }
        assert_eq!(counts(&counters), [1, 1, 0, 0]);
    });
}

#[test]
fn a_websocket_that_the_laptop_does_not_take_goes_to_the_app() {
    play(async {
        let (rules, counters) = unfiltered();
        let (mut stage, mut client) = open_for_websockets(rules).await;
        let (answer, mut up) = client.send_request(websocket("/1", None), false).unwrap();
        let mut laptop = server(stage.laptop().await).await;
        let mut app = server_of_websockets(stage.app().await).await;
        let (at_app, mut respond) = next(&mut app).await;
        assert_eq!(at_app.uri().path(), "/1");
        respond.send_response(Response::new(()), false).unwrap();
        answer.await.unwrap();
        passes(&mut up, &mut at_app.into_body(), "ping").await;
        assert_eq!(counts(&counters), [0, 0, 1, 0]);

        // What else there is goes on to the laptop, by the same connection.
        let (_second, _) = client.send_request(request("/2", None), true).unwrap();
        assert_eq!(next(&mut laptop).await.0.uri().path(), "/2");
        assert_eq!(stage.world.lost.get(), 0, "it is there");
    });
}

#[test]
fn a_laptop_that_does_not_say_what_it_takes_is_not_waited_for() {
    play(async {
        let (rules, counters) = unfiltered();
        let (mut stage, mut client) = open_for_websockets(rules).await;
        let (_answer, _up) = client.send_request(websocket("/1", None), false).unwrap();
        let _silent = stage.laptop().await;
        let mut app = server_of_websockets(stage.app().await).await;
        assert_eq!(next(&mut app).await.0.uri().path(), "/1");
        assert_eq!((counts(&counters), stage.world.lost.get()), ([0, 0, 1, 0], 1));
    });
}

#[test]
fn a_websocket_that_the_app_takes_no_more_is_answered() {
    play(async {
        let (mut stage, mut client) = open_for_websockets(filtered().0).await;
        let (answer, _up) = client.send_request(websocket("/1", None), false).unwrap();
        let mut app = server(stage.app().await).await;
        assert_eq!(answer.await.unwrap().status(), 501);
        // The connection is as good as before.
        let (_second, _) = client.send_request(request("/2", None), true).unwrap();
        assert_eq!(next(&mut app).await.0.uri().path(), "/2");
        assert!(stage.nothing_was_dialled());
    });
}

#[test]
fn plain_connect_goes_both_ways() {
    play(async {
        let (mut stage, mut client) = open(filtered().0).await;
        let connect = Request::connect("db:5432").body(()).unwrap();
        let (answer, mut up) = client.send_request(connect, false).unwrap();
        let mut app = server(stage.app().await).await;
        let (request, mut respond) = next(&mut app).await;
        assert_eq!((request.method(), request.uri().to_string()), (&Method::CONNECT, "db:5432".into()));
        let mut there = request.into_body();
        let mut down = respond.send_response(Response::new(()), false).unwrap();
        let mut back = answer.await.unwrap().into_body();
        passes(&mut up, &mut there, "ping").await;
        passes(&mut down, &mut back, "pong").await;
        up.send_data("last".into(), true).unwrap();
        assert_eq!(read(&mut there).await.0, b"last");
        passes(&mut down, &mut back, "more").await;
    });
}

#[test]
fn taps_get_copies_of_what_clients_say_on_websockets() {
    play(async {
        let (tap, counters) = rule("tap", None, Mode::Wiretap);
        let (mut stage, mut client) = open_for_websockets(vec![tap]).await;
        let (answer, mut up) = client.send_request(websocket("/1", None), false).unwrap();
        let mut app = server_of_websockets(stage.app().await).await;
        let mut laptop = server_of_websockets(stage.laptop().await).await;
        let (request, mut respond) = next(&mut app).await;
        let mut down = respond.send_response(Response::new(()), false).unwrap();
        let (copy, mut respond) = next(&mut laptop).await;
        assert_eq!(copy.extensions().get(), Some(&Protocol::from_static("websocket")));
        let mut copy = copy.into_body();
        // What it answers goes nowhere, and fills no window meanwhile.
        let mut unwanted = respond.send_response(Response::new(()), false).unwrap();
        unwanted.send_data(vec![b'x'; 6 << 20].into(), false).unwrap();
        let mut back = answer.await.unwrap().into_body();
        let mut there = request.into_body();
        for _ in 0..3 {
            passes(&mut up, &mut there, "ping").await;
            assert_eq!(copy.data().await.unwrap().unwrap(), "ping");
            passes(&mut down, &mut back, "pong").await;
        }
        unwanted.reserve_capacity(1);
        let room = poll_fn(|cx| unwanted.poll_capacity(cx));
        timeout(Duration::from_secs(10), room).await.expect("room for more").unwrap().unwrap();
        up.send_data(Bytes::new(), true).unwrap();
        assert_eq!(read(&mut copy).await, (vec![], None));
        assert_eq!(counts(&counters), [1, 0, 0, 0]);

        // One that takes no such requests gets none.
        let (tap, counters) = rule("tap", None, Mode::Wiretap);
        let (mut stage, mut client) = open_for_websockets(vec![tap]).await;
        let (_answer, _up) = client.send_request(websocket("/1", None), false).unwrap();
        let mut app = server_of_websockets(stage.app().await).await;
        let _laptop = server(stage.laptop().await).await;
        next(&mut app).await;
        sleep(Duration::from_millis(50)).await;
        assert_eq!(counts(&counters), [0, 0, 0, 1]);
    });
}
