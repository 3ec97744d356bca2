//! Datagrams, which nobody acknowledges: who gets them when the laptop does not, and that
//! conversations follow that have never paused.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use tpd_api::intercept::InterceptStatus;
use tpd_tests::{Agent, Laptop, Local, Workload, inside, is_laptop, is_pod, until};

use super::SOON;
use crate::store::{LOCAL, connected, intercepted, pod_address, web};

/// The datagrams of the port `http-udp`.
const DATAGRAMS: &str = "--port 9090:http-udp/udp";

/// A laptop that has come back is used again within this.
const BACK: Duration = Duration::from_secs(3);

/// The redirect outlives the last heartbeat by 2 s, and a question that is lost then has 0.3 s.
const LAPSED: Duration = Duration::from_millis(2_500);

/// A client that asks by datagrams, always from the same port.
struct Talker {
    socket: UdpSocket,
    asked: u32,
}

impl Talker {
    fn new(laptop: &Laptop, server: SocketAddr) -> Self {
        let socket = inside(&laptop.cluster.netns("node"), || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(server)?;
            // Far more than a round trip, and little to wait for one that is lost.
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            io::Result::Ok(socket)
        });
        Self { socket: socket.expect("a UDP socket"), asked: 0 }
    }

    /// Asks so many questions at once, none of which anybody has asked before.
    fn send(&mut self, count: u32) {
        let own = self.socket.local_addr().expect("an address").port();
        for _ in 0..count {
            self.asked += 1;
            self.socket.send(format!("{own}/{}", self.asked).as_bytes()).expect("it leaves");
        }
    }

    /// Who answered of the newest questions, so many of them, those that were answered.
    fn heard(&self, count: u32) -> Vec<String> {
        let own = self.socket.local_addr().expect("an address").port();
        let mut awaited: Vec<_> =
            (self.asked - count..self.asked).map(|number| format!("{own}/{}", number + 1)).collect();
        let (mut answers, mut buffer) = (Vec::new(), [0; 200]);
        while !awaited.is_empty() {
            let Ok(length) = self.socket.recv(&mut buffer) else { break };
            let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let (who, question) = answer.split_once(' ').expect("a name and the question");
            assert!(question.starts_with(&format!("{own}/")), "a client hears what another asked: {answer}");
            // Others are late answers to what nobody waits for any more.
            if let Some(place) = awaited.iter().position(|one| one == question) {
                awaited.swap_remove(place);
                answers.push(who.to_owned());
            }
        }
        answers
    }

    /// Whether those answer one question; who else does, if anybody.
    fn answer(&mut self, who: impl Fn(&str) -> bool) -> Result<(), String> {
        self.send(1);
        match self.heard(1).pop() {
            Some(name) if who(&name) => Ok(()),
            Some(name) => Err(format!("{name} answers")),
            None => Err("nobody answers".to_owned()),
        }
    }

    /// Asks until those answer.
    #[track_caller]
    fn until(&mut self, limit: Duration, what: &str, who: impl Fn(&str) -> bool) {
        until(limit, what, || self.answer(&who));
    }
}

/// Has each ask so many questions at once: those answer every one.
#[track_caller]
fn all_answered(talkers: &mut [Talker], count: u32, who: impl Fn(&str) -> bool) {
    for talker in talkers {
        talker.send(count);
        let answers = talker.heard(count);
        let all = answers.len() == count as usize && answers.iter().all(|name| who(name));
        assert!(all, "{count} questions are answered by {answers:?}");
    }
}

/// Where the only pod of the sample takes requests and datagrams.
#[track_caller]
fn only_pod(web: &Workload) -> SocketAddr {
    SocketAddr::new(pod_address(web, &web.ready().pop().expect("one pod")), 8080)
}

#[test]
fn datagrams_reach_the_app_while_the_local_process_or_the_daemon_is_gone_and_the_laptop_afterwards() {
    let laptop = Laptop::take();
    let connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (local, intercept) = intercepted(&laptop, &web, DATAGRAMS);
    let pod = only_pod(&web);
    let mut talkers: Vec<_> = (0..4).map(|_| Talker::new(&laptop, pod)).collect();
    talkers.iter_mut().for_each(|talker| talker.send(20));
    for talker in &talkers {
        assert_eq!(talker.heard(20), ["laptop"; 20], "of twenty questions beside those of others");
    }

    drop(local);
    for talker in &mut talkers {
        talker.until(Duration::from_secs(1), "the app answers conversations that go on", is_pod);
    }
    // Nothing is lost of one that begins now, with more than one datagram before anybody can have refused the first.
    all_answered(&mut [Talker::new(&laptop, pod)], 10, is_pod);
    let _local = Local::start(&laptop, LOCAL);
    until(BACK, "new clients are the laptop's once something listens there", || {
        Talker::new(&laptop, pod).answer(is_laptop)
    });
    for talker in &mut talkers {
        talker.until(BACK, "so are conversations that have gone on with the app", is_laptop);
    }
    all_answered(&mut talkers, 10, is_laptop);

    let pid = laptop.status().pid;
    laptop.cluster.machine(&format!("kill -KILL {pid}")).run().ok();
    // Nobody acknowledges datagrams. At the latest, a manager knows that a laptop is gone when it has heard nothing for 1.2 s.
    let (_, took) = until(Duration::from_secs(2), "new clients are answered without the daemon", || {
        Talker::new(&laptop, pod).answer(is_pod)
    });
    println!("the app answers new clients {took:?} after the daemon was killed");
    for talker in &mut talkers {
        talker.until(Duration::from_secs(1), "so is a client that has gone on asking", is_pod);
    }
    laptop.until_as(connection.before(), Duration::from_secs(2));
    laptop.run("tpd up --namespace store").ok();
    until(BACK, "new clients are the laptop's again with the daemon", || {
        Talker::new(&laptop, pod).answer(is_laptop)
    });
    for talker in &mut talkers {
        talker.until(BACK, "and those that have gone on with the app", is_laptop);
    }
    let counted = |status: &InterceptStatus| status.traffic.failed_open > 0;
    intercept.until(BACK, "what went to the app instead is counted", counted);
}

#[test]
fn clients_that_never_pause_change_side_when_an_intercept_begins_and_ends_and_when_its_agent_is_stopped() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    // Now there is an agent, which nobody needs.
    drop(intercepted(&laptop, &web, DATAGRAMS));
    let pod = only_pod(&web);
    let mut talkers: Vec<_> = (0..4).map(|_| Talker::new(&laptop, pod)).collect();
    for _ in 0..2 {
        for talker in &mut talkers {
            talker.until(LAPSED, "the app answers while nobody intercepts it", is_pod);
        }
        all_answered(&mut talkers, 20, is_pod);
        let _intercepted = intercepted(&laptop, &web, DATAGRAMS);
        for talker in &mut talkers {
            talker.until(Duration::from_secs(1), "the laptop answers a client of before", is_laptop);
        }
        all_answered(&mut talkers, 20, is_laptop);
    }

    let (_local, intercept) = intercepted(&laptop, &web, DATAGRAMS);
    all_answered(&mut talkers, 1, is_laptop);
    let agent = Agent::of(laptop.cluster, "store", &web.ready()[0]).expect("a supervisor and a worker");
    agent.signal(laptop.cluster, "STOP");
    let stopped = Instant::now();
    for talker in &mut talkers {
        talker.until(LAPSED, "the app answers past a stopped agent", is_pod);
    }
    println!("the app answers conversations that go on {:?} after the agent was stopped", stopped.elapsed());
    all_answered(&mut talkers, 20, is_pod);
    agent.signal(laptop.cluster, "CONT");
    for talker in &mut talkers {
        talker.until(BACK, "the laptop answers again", is_laptop);
    }
    intercept.until_covered(1);
    all_answered(&mut talkers, 20, is_laptop);
}

#[test]
fn a_wiretap_gets_a_copy_of_each_datagram_and_the_app_answers() {
    let laptop = Laptop::take();
    let _connection = connected(&laptop);
    let web = web(&laptop, 1);
    let (tap, tapped) = intercepted(&laptop, &web, &format!("{DATAGRAMS} --wiretap"));
    let pod = only_pod(&web);
    let mut talkers = vec![Talker::new(&laptop, pod), Talker::new(&laptop, pod)];
    all_answered(&mut talkers, 25, is_pod);
    until(SOON, "each datagram was copied once", || match tap.counts().datagrams {
        50 => Ok(()),
        count => Err(format!("{count} of 50: {:?}", tapped.status().traffic)),
    });
    assert_eq!(tapped.status().traffic.copies_lost, 0);
    drop(tap);
    all_answered(&mut talkers, 25, is_pod);
    let tap = Local::start(&laptop, LOCAL);
    until(BACK, "a tap that is back gets copies of conversations that have gone on", || {
        all_answered(&mut talkers, 1, is_pod);
        if tap.counts().datagrams > 0 { Ok(()) } else { Err("none") }
    });
    tapped.until(BACK, "copies that nobody took are counted", |status| status.traffic.copies_lost > 0);
}
