//! Signs of life, asked for through a real manager's lane over sockets of this machine.

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};
use tpd_api::overlay::CONTROL_PORT;
use tpd_netstack::control::Hello;
use tpd_netstack::flow::{Limits, Policy, Protocol, Route};
use tpd_netstack::key::PrivateKey;
use tpd_netstack::server::{self, Hub, Lane, Pair};
use tpd_netstack::uplink::{self, Uplink};

use super::{Laptops, PATIENCE, RETRY, is_answer};
use crate::agent::environment::Environments;
use crate::agent::merge::Managers;
use crate::agent::merge::tests::{config, intercept};
use crate::agent::parting::Loss;
use crate::agent::policy::Grants;
use crate::agent::proxy::Refusal;
use crate::agent::uplinks::Uplinks;

const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 1);
const LAPTOP: Ipv6Addr = Ipv6Addr::new(0xfd74, 0, 0, 0, 0, 0, 0, 2);
/// Where the laptop takes datagrams, and no connections.
const PORT: u16 = 20_000;

/// No connection may be made anywhere, as to a port of a laptop that is meant for datagrams.
struct Nothing;

impl Policy for Nothing {
    fn route(&self, _: Protocol, _: IpAddr, _: SocketAddr) -> Route {
        Route::Prohibited
    }
}

fn hello() -> Hello {
    Hello { name: "test".into(), version: "0".into(), instance: 1, features: Vec::new() }
}

/// A manager's lane with an agent's ways to a laptop, whose network can be cut.
struct Scene {
    laptops: Rc<Laptops>,
    managers: Managers,
    is_cut: Rc<Cell<bool>>,
    _manager: Lane,
    laptop: Uplink,
}

impl Scene {
    async fn new() -> Self {
        let (manager_key, agent_key, laptop_key) = (key(), key(), key());
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let at = socket.local_addr().unwrap();
        let manager = Lane::spawn(server::Config {
            private_key: manager_key.clone(),
            udp: socket,
            gateway: vec![GATEWAY.into()],
            control_port: CONTROL_PORT,
            policy: Arc::new(Nothing),
            limits: Limits::default(),
            hello: hello(),
        });
        let manager = manager.unwrap();

        let mut config = config(1, &at.to_string(), &[]);
        config.manager.key = manager_key.public().to_string();
        config.intercepts.push(intercept("i", &LAPTOP.to_string()));
        manager.upsert_peer(agent_key.public(), vec![config.address.into()]);
        manager.upsert_peer(laptop_key.public(), vec![LAPTOP.into()]);
        let pair = Pair { agent: config.address, laptop: LAPTOP, ports: vec![PORT], services: vec![] };
        manager.set_hub(Hub { pairs: vec![pair] });

        let is_cut = Rc::new(Cell::new(false));
        let laptop = Uplink::start(uplink::Config {
            private_key: laptop_key,
            manager_key: manager_key.public(),
            address: LAPTOP,
            gateway: GATEWAY,
            control_port: CONTROL_PORT,
            udp: network(at, is_cut.clone()).await,
            stream: at,
            upgrade: ("/", "none"),
            policy: Arc::new(Nothing),
            hello: hello(),
            limits: Limits::default(),
        });
        let laptop = laptop.unwrap();

        let environments = Environments::gather(&[], std::iter::empty());
        let uplinks =
            Uplinks::new(agent_key, Arc::new(Grants::default()), environments.into(), Rc::default());
        let uplinks = Rc::new(uplinks);
        let mut managers = Managers::new(at);
        managers.configured(at, config);
        managers.carried(at, vec![LAPTOP]);
        uplinks.follow(&managers, Loss::Closed, Instant::now());
        let laptops = Rc::new(Laptops::new(uplinks, Rc::default()));
        laptops.follow(&managers);
        let mut scene = Self { laptops, managers, is_cut, _manager: manager, laptop };
        scene.until(Duration::from_secs(10), |laptops| laptops.is_reachable(LAPTOP)).await;
        let mut ready = scene.laptop.ready();
        timeout(Duration::from_secs(10), ready.wait_for(Option::is_some)).await.unwrap().unwrap();
        scene
    }

    /// Waits for something that must come within this time.
    async fn until(&mut self, limit: Duration, holds: impl Fn(&Laptops) -> bool) {
        let come = async {
            while !holds(&self.laptops) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(limit, come).await.expect("in time");
    }
}

fn key() -> PrivateKey {
    PrivateKey::generate().unwrap()
}

/// Passes datagrams on to a manager, and its answers back, while it is not cut.
async fn network(manager: SocketAddr, is_cut: Rc<Cell<bool>>) -> SocketAddr {
    let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    far.connect(manager).await.unwrap();
    let address = near.local_addr().unwrap();
    spawn_local(async move {
        let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
        let mut laptop = None;
        loop {
            tokio::select! {
                Ok((length, from)) = near.recv_from(&mut up) => {
                    laptop = Some(from);
                    if !is_cut.get() {
                        let _ = far.send(&up[..length]).await;
                    }
                }
                Ok(length) = far.recv(&mut down) => if let Some(laptop) = laptop && !is_cut.get() {
                    let _ = near.send_to(&down[..length], laptop).await;
                },
            }
        }
    });
    address
}

fn play(scene: impl AsyncFnOnce(Scene)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async { scene(Scene::new().await).await });
}

#[test]
fn a_laptop_that_gives_no_sign_of_life_is_left_out_until_it_does() {
    play(async |mut scene| {
        let target = SocketAddr::from((LAPTOP, PORT));
        let is_asked = |laptops: &Laptops| laptops.asked.borrow().contains(&LAPTOP);
        // It refuses connections to this port, and is there.
        scene.laptops.ask(target);
        assert!(is_asked(&scene.laptops));
        scene.until(PATIENCE, |laptops| !is_asked(laptops)).await;
        assert!(!scene.laptops.is_left_out(target));

        // The manager has not noticed yet.
        scene.is_cut.set(true);
        scene.laptops.ask(target);
        scene.laptops.ask(target);
        scene.until(PATIENCE + PATIENCE / 2, |laptops| laptops.is_left_out(target)).await;
        scene.is_cut.set(false);
        scene.until(2 * RETRY + PATIENCE, |laptops| !laptops.is_left_out(target)).await;
        scene.until(PATIENCE, |laptops| !is_asked(laptops)).await;

        // One that nobody carries is left to the manager that hears it next.
        scene.is_cut.set(true);
        scene.laptops.ask(target);
        scene.until(2 * PATIENCE, |laptops| laptops.is_left_out(target)).await;
        let manager = *scene.managers.connected().next().unwrap().0;
        scene.managers.carried(manager, vec![]);
        scene.laptops.follow(&scene.managers);
        scene.until(2 * RETRY + PATIENCE, |laptops| !is_asked(laptops)).await;
        assert!(scene.laptops.is_left_out(target));
        assert!(!scene.laptops.is_led_to_by(LAPTOP, manager));
    });
}

#[test]
fn a_laptop_that_knows_nothing_of_a_port_is_left_out_at_that_port_alone() {
    play(async |scene| {
        let (target, other) = ((LAPTOP, PORT).into(), (LAPTOP, PORT + 1).into());
        assert!(matches!(scene.laptops.connect(target).await, Err(Refusal::Refused)));
        assert!(scene.laptops.is_left_out(target) && !scene.laptops.is_left_out(other));
    });
}

#[test]
fn only_a_laptop_itself_gives_signs_of_life() {
    use tpd_netstack::flow::DialCause::{Refused, Removed, TimedOut, Unreachable};
    use tpd_netstack::packet::icmp::Unreachable::{Host, Network, Port, Prohibited};
    for (cause, expected) in [
        (None, true),
        (Some(Refused), true),
        (Some(Unreachable(Port)), true),
        (Some(Unreachable(Prohibited)), true),
        (Some(Unreachable(Host)), false),
        (Some(Unreachable(Network)), false),
        (Some(TimedOut), false),
        (Some(Removed), false),
    ] {
        assert_eq!(is_answer(cause), expected, "{cause:?}");
    }
}
