use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};
use tpd_api::agent::Mode;

use super::conversation::{BEAT, DOUBT, RETRY, TRIAL};
use super::entry::Call;
use super::{CLIENTS, Channels, IDLE, Table, serve};
use crate::agent::proxy::rules::tests::{counts, rule};
use crate::agent::proxy::{Port, Refusal, Rule};

fn client(number: u16) -> Call {
    Call { client: SocketAddr::from(([10, 0, 0, 1], number)), local: None }
}

#[test]
fn clients_keep_their_side_until_they_are_silent_or_the_rules_change() {
    let mut table = Table { clients: [].into() };
    let start = Instant::now();
    table.insert(client(1), 1, start, 'a');
    assert_eq!(table.find(client(1), 1, start + IDLE / 2), Some(&mut 'a'));
    assert_eq!(table.find(client(1), 2, start), None);
    assert_eq!(table.find(client(2), 1, start), None);
    table.expire(start + IDLE);
    assert_eq!(table.find(client(1), 1, start + IDLE / 2), Some(&mut 'a'));
    table.expire(start + 2 * IDLE);
    assert_eq!(table.find(client(1), 1, start + IDLE / 2), None);
}

#[test]
fn the_table_is_bounded_and_the_most_silent_one_leaves_it() {
    let mut table = Table { clients: [].into() };
    let start = Instant::now();
    for number in 0..CLIENTS as u16 {
        table.insert(client(number), 1, start + Duration::from_secs(number.into()), number);
    }
    table.find(client(0), 1, start + Duration::from_secs(5000));
    table.insert(client(5000), 1, start, 5000);
    assert_eq!(table.clients.len(), CLIENTS);
    assert!(table.find(client(0), 1, start).is_some());
    assert!(table.find(client(1), 1, start).is_none());
}

struct World {
    app: SocketAddr,
    laptop: SocketAddr,
    suspended: Cell<bool>,
    /// Whether the laptop is suspended once it is asked for a sign of life.
    gone: Cell<bool>,
    asked: Cell<usize>,
    app_is_down: Cell<bool>,
}

impl World {
    fn new(app: SocketAddr, laptop: SocketAddr) -> Rc<Self> {
        Rc::new(Self {
            app,
            laptop,
            suspended: Cell::default(),
            gone: Cell::default(),
            asked: Cell::default(),
            app_is_down: Cell::default(),
        })
    }
}

impl Channels for World {
    type App = UdpSocket;
    type Laptop = UdpSocket;

    async fn app(&self) -> io::Result<UdpSocket> {
        if self.app_is_down.get() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        connected(self.app).await
    }

    async fn laptop(&self, _: &Rule) -> Result<UdpSocket, Refusal> {
        if self.suspended.get() {
            return Err(Refusal::Suspended);
        }
        connected(self.laptop).await.map_err(|_| Refusal::Refused)
    }

    fn is_left_out(&self, _: &Rule, _: &UdpSocket) -> bool {
        self.suspended.get()
    }

    fn ask(&self, _: &Rule) {
        self.asked.update(|asked| asked + 1);
        self.suspended.set(self.gone.get());
    }
}

async fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    socket.connect(to).await?;
    Ok(socket)
}

/// A server that answers with its name and the question.
async fn server(name: &'static str) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    (socket.local_addr().unwrap(), answer(socket, name))
}

fn answer(socket: UdpSocket, name: &'static str) -> tokio::task::JoinHandle<()> {
    answer_after(Duration::ZERO, socket, name)
}

fn answer_after(pause: Duration, socket: UdpSocket, name: &'static str) -> tokio::task::JoinHandle<()> {
    spawn_local(async move {
        let mut buffer = [0; 100];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            sleep(pause).await;
            let answer = [name.as_bytes(), &buffer[..length]].concat();
            socket.send_to(&answer, from).await.unwrap();
        }
    })
}

async fn ask(socket: &UdpSocket, question: &str) -> String {
    socket.send(question.as_bytes()).await.unwrap();
    let mut buffer = [0; 100];
    let length = timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await.unwrap().unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn conversations_go_where_the_rules_say_and_to_the_app_when_the_laptop_refuses() {
    LocalSet::new()
        .run_until(async {
            let (app, _app) = server("app ").await;
            let (laptop, at_laptop) = server("laptop ").await;
            let world = World::new(app, laptop);
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            let port = Rc::new(Port::default());
            spawn_local(serve(entry, port.clone(), world.clone()));
            assert_eq!(ask(&client, "1").await, "app 1");

            let (all, counters) = rule("a", None, Mode::Intercept);
            let (filtered, passed) = rule("b", Some("x"), Mode::Intercept);
            port.replace(vec![filtered, all]);
            assert_eq!(ask(&client, "2").await, "laptop 2");
            assert_eq!(ask(&client, "3").await, "laptop 3");
            assert_eq!(counts(&counters), [1, 0, 0, 0]);

            at_laptop.abort();
            let _ = at_laptop.await;
            assert_eq!(ask(&client, "4").await, "app 4");
            assert_eq!(counts(&counters), [1, 0, 1, 0]);
            world.suspended.set(true);
            let another = connected(client.peer_addr().unwrap()).await.unwrap();
            assert_eq!(ask(&another, "5").await, "app 5");
            assert_eq!(counts(&counters), [1, 0, 2, 0]);
            assert_eq!(counts(&passed), [0; 4], "it was never the filter that sent them to the app");
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_client_that_keeps_sending_reaches_the_app_once_there_is_a_way_to_it() {
    LocalSet::new()
        .run_until(async {
            let (app, _app) = server("app ").await;
            let world = World::new(app, app);
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            spawn_local(serve(entry, Rc::default(), world.clone()));
            world.app_is_down.set(true);
            client.send(b"1").await.unwrap();
            sleep(BEAT).await;
            world.app_is_down.set(false);
            assert_eq!(ask(&client, "2").await, "app 2");
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn conversations_leave_a_laptop_that_has_vanished_and_return_with_it() {
    LocalSet::new()
        .run_until(async {
            let (app, _app) = server("app ").await;
            // Takes what comes, and answers when it is told to.
            let laptop = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let world = World::new(app, laptop.local_addr().unwrap());
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            let port = Rc::new(Port::default());
            let (all, counters) = rule("a", None, Mode::Intercept);
            port.replace(vec![all]);
            spawn_local(serve(entry, port, world.clone()));

            // It is slow, and there: nothing is taken from it.
            client.send(b"1").await.unwrap();
            let mut buffer = [0; 10];
            let (_, from) = laptop.recv_from(&mut buffer).await.unwrap();
            sleep(2 * BEAT).await;
            assert!(world.asked.get() > 0);
            laptop.send_to(b"slow", from).await.unwrap();
            let length = client.recv(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], b"slow");
            let asked = world.asked.get();
            sleep(2 * BEAT).await;
            assert_eq!(world.asked.get(), asked, "it has answered");

            // It is not there any more: what it has not answered goes to the app, and all that follows.
            world.gone.set(true);
            let begun = Instant::now();
            assert_eq!(ask(&client, "2").await, "app 2");
            assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
            assert_eq!(ask(&client, "3").await, "app 3");
            assert_eq!(counts(&counters), [1, 0, 1, 0]);

            world.gone.set(false);
            world.suspended.set(false);
            let (back, mut answer) = (Instant::now(), [0; 10]);
            loop {
                client.send(b"4").await.unwrap();
                let Ok(heard) = timeout(2 * BEAT, client.recv(&mut answer)).await else { break };
                assert_eq!(
                    &answer[..heard.unwrap()],
                    b"app 4",
                    "the app answers what the laptop is tried with"
                );
                assert!(back.elapsed() < RETRY + 2 * TRIAL, "it is not tried");
                sleep(BEAT / 4).await;
            }
            assert!(back.elapsed() >= TRIAL, "it had no time to refuse");
            let mut from = from;
            while let Ok((_, newest)) = laptop.try_recv_from(&mut buffer) {
                from = newest;
            }
            laptop.send_to(b"back", from).await.unwrap();
            let length = client.recv(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], b"back");
            assert_eq!(counts(&counters), [2, 0, 1, 0]);
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn conversations_return_once_something_listens_again_and_nothing_is_lost_or_answered_twice() {
    LocalSet::new()
        .run_until(async {
            // The laptop is quicker: the app still answers what it was asked.
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let app = socket.local_addr().unwrap();
            let _app = answer_after(BEAT / 10, socket, "app ");
            let (laptop, at_laptop) = server("laptop ").await;
            at_laptop.abort();
            let _ = at_laptop.await;
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            let port = Rc::new(Port::default());
            let (all, counters) = rule("a", None, Mode::Intercept);
            port.replace(vec![all]);
            spawn_local(serve(entry, port, World::new(app, laptop)));
            let begun = Instant::now();
            let mut number = 0;
            while begun.elapsed() < 2 * RETRY + BEAT {
                number += 1;
                assert_eq!(ask(&client, &number.to_string()).await, format!("app {number}"));
                sleep(BEAT / 10).await;
            }
            assert_eq!(counts(&counters), [0, 0, 1, 0], "to be tried again is not to fail again");

            let _laptop = answer(UdpSocket::bind(laptop).await.unwrap(), "laptop ");
            let back = Instant::now();
            loop {
                number += 1;
                let (answer, question) = (ask(&client, &number.to_string()).await, format!(" {number}"));
                let who = answer.strip_suffix(&question).expect("each is answered once, and in turn");
                if who == "laptop" {
                    break;
                }
                assert!(back.elapsed() < RETRY + TRIAL, "{who} still answers");
                sleep(BEAT / 10).await;
            }
            assert_eq!(counts(&counters), [1, 0, 1, 0]);
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_laptop_that_answers_is_not_left_whatever_is_thought_of_it() {
    LocalSet::new()
        .run_until(async {
            let (app, _app) = server("app ").await;
            let (laptop, _laptop) = server("laptop ").await;
            let world = World::new(app, laptop);
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            let port = Rc::new(Port::default());
            port.replace(vec![rule("a", None, Mode::Intercept).0]);
            spawn_local(serve(entry, port, world.clone()));
            assert_eq!(ask(&client, "1").await, "laptop 1");
            world.suspended.set(true);
            for _ in 0..3 {
                sleep(2 * BEAT).await;
                assert_eq!(ask(&client, "2").await, "laptop 2");
            }
            assert_eq!(world.asked.get(), 0);
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn what_wants_no_answer_is_not_sent_twice() {
    LocalSet::new()
        .run_until(async {
            let app = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let laptop = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let world = World::new(app.local_addr().unwrap(), laptop.local_addr().unwrap());
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            let port = Rc::new(Port::default());
            port.replace(vec![rule("a", None, Mode::Intercept).0]);
            spawn_local(serve(entry, port, world.clone()));
            let mut buffer = [0; 10];
            client.send(b"1").await.unwrap();
            laptop.recv_from(&mut buffer).await.unwrap();
            sleep(DOUBT + BEAT).await;
            let asked = world.asked.get();
            world.gone.set(true);
            sleep(2 * BEAT).await;
            assert_eq!(world.asked.get(), asked, "it has arrived long since");
            client.send(b"2").await.unwrap();
            let (length, _) =
                timeout(Duration::from_secs(5), app.recv_from(&mut buffer)).await.unwrap().unwrap();
            assert_eq!(&buffer[..length], b"2");
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn of_what_a_client_begins_with_nothing_is_lost_at_a_laptop_that_refuses() {
    LocalSet::new()
        .run_until(async {
            let (app, _app) = server("app ").await;
            let (laptop, at_laptop) = server("laptop ").await;
            at_laptop.abort();
            let _ = at_laptop.await;
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            let port = Rc::new(Port::default());
            let (all, counters) = rule("a", None, Mode::Intercept);
            port.replace(vec![all]);
            spawn_local(serve(entry, port, World::new(app, laptop)));
            // All are under way before anyone can have heard that the first was refused.
            for question in 0..10 {
                client.send(question.to_string().as_bytes()).await.unwrap();
            }
            let mut buffer = [0; 10];
            for question in 0..10 {
                let heard = timeout(Duration::from_secs(5), client.recv(&mut buffer)).await;
                let length = heard.unwrap_or_else(|_| panic!("{question} is lost")).unwrap();
                assert_eq!(&buffer[..length], format!("app {question}").as_bytes());
            }
            assert_eq!(counts(&counters), [0, 0, 1, 0], "none of it was the laptop's");
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_tap_that_was_not_there_at_first_gets_copies_once_it_is() {
    LocalSet::new()
        .run_until(async {
            let (app, _app) = server("app ").await;
            let tap = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let world = World::new(app, tap.local_addr().unwrap());
            world.suspended.set(true);
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            let port = Rc::new(Port::default());
            let (rule, counters) = rule("a", None, Mode::Wiretap);
            port.replace(vec![rule]);
            spawn_local(serve(entry, port, world.clone()));
            assert_eq!(ask(&client, "1").await, "app 1");
            // The copy is carried beside the answer.
            sleep(Duration::from_millis(50)).await;
            assert_eq!(counts(&counters), [0, 0, 0, 1]);
            world.suspended.set(false);
            assert_eq!(ask(&client, "2").await, "app 2");
            let mut buffer = [0; 10];
            let heard = timeout(Duration::from_secs(5), tap.recv_from(&mut buffer)).await;
            let (length, _) = heard.expect("a copy").unwrap();
            assert_eq!(&buffer[..length], b"2");
            assert_eq!(counts(&counters), [1, 0, 0, 1]);
        })
        .await;
}

#[tokio::test(flavor = "current_thread")]
async fn taps_get_copies_and_nobody_gets_their_answers() {
    LocalSet::new()
        .run_until(async {
            let (app, _app) = server("app ").await;
            let tap = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let world = World::new(app, tap.local_addr().unwrap());
            let entry = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let client = connected(entry.local_addr().unwrap()).await.unwrap();
            let port = Rc::new(Port::default());
            let (rule, counters) = rule("a", None, Mode::Wiretap);
            port.replace(vec![rule]);
            spawn_local(serve(entry, port, world));
            assert_eq!(ask(&client, "1").await, "app 1");
            let mut buffer = [0; 10];
            let (length, from) = tap.recv_from(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], b"1");
            tap.send_to(b"not wanted", from).await.unwrap();
            assert_eq!(ask(&client, "2").await, "app 2");
            assert_eq!(counts(&counters), [1, 0, 0, 0]);
        })
        .await;
}
