//! Pings through every path: what lives, how fast, and which one carries the session.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval};

use super::Client;
use crate::{
    control::{self, Hello, Message},
    path::{PathKind, Via},
    selector::HEARTBEAT,
};

/// Pings whose answer may still come: a minute's worth on two paths.
const MOST_PINGS: usize = 256;

/// While a stream works and UDP does not answer, it is asked every other second only: each question is a full packet.
const UDP_PROBE: Duration = Duration::from_secs(2);

/// Quick first questions, so that UDP is in use soon after `up`.
const UDP_FIRST_PROBES: Duration = Duration::from_secs(3);

/// Pings that were sent.
#[derive(Debug, Default)]
pub(super) struct Pings {
    next: u64,
    sent: VecDeque<(u64, Instant)>,
}

impl Pings {
    fn send(&mut self, now: Instant) -> u64 {
        self.next += 1;
        self.sent.push_back((self.next, now));
        if self.sent.len() > MOST_PINGS {
            self.sent.pop_front();
        }
        self.next
    }

    /// The round trip of the ping with this number, once.
    fn answer(&mut self, sequence: u64, now: Instant) -> Option<Duration> {
        let at = self.sent.iter().position(|(sent, _)| *sent == sequence)?;
        self.sent.remove(at).map(|(_, sent)| now.duration_since(sent))
    }
}

impl Client {
    /// Pings every open path, probes UDP, gives up what is silent, and reports.
    pub(super) async fn beat(self: Rc<Self>) {
        let started = Instant::now();
        let mut last_probe = None;
        let mut beats = interval(HEARTBEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            beats.tick().await;
            let now = Instant::now();
            let silent = self.selector.borrow_mut().tick(now);
            if silent.is_some()
                && let Some((id, _)) = self.stream.get()
            {
                self.exit.overlay.borrow_mut().close_stream(id);
            }
            self.choose();
            if let Some((id, kind)) = self.stream.get() {
                self.ping(kind, Via::Stream(id));
            }
            if self.policy.allows(PathKind::Udp) {
                let eager = now.duration_since(started) < UDP_FIRST_PROBES;
                let due = last_probe.is_none_or(|last: Instant| now.duration_since(last) >= UDP_PROBE);
                if self.selector.borrow().rtt(PathKind::Udp).is_some() {
                    self.udp_target
                        .get()
                        .into_iter()
                        .for_each(|target| self.ping(PathKind::Udp, Via::Udp(target)));
                } else if eager || due || self.selector.borrow().stream_stalled() {
                    last_probe = Some(now);
                    self.probe_udp();
                }
            }
            self.publish();
        }
    }

    /// Asks every UDP address. Without any other path there is no session yet, so a handshake goes ahead.
    pub(super) fn probe_udp(&self) {
        let addresses: Vec<SocketAddr> =
            self.udp.borrow().iter().map(|address| self.exit.overlay.borrow().native(*address)).collect();
        let alone = self.selector.borrow().choice().is_none();
        for address in addresses {
            self.selector.borrow_mut().trying_udp();
            if alone {
                self.exit.overlay.borrow_mut().initiate(Via::Udp(address), self.manager);
            }
            self.ping(PathKind::Udp, Via::Udp(address));
        }
    }

    /// Sends a ping through one path: by UDP as large as packets get, on a stream as small as it is.
    pub(super) fn ping(&self, kind: PathKind, via: Via) {
        let (Some(source), Some(gateway)) = (self.address.first(), self.gateway.first()) else { return };
        let select = self.selector.borrow().choice() == Some(kind);
        let sequence = self.pings.borrow_mut().send(Instant::now());
        let message = Message::Ping { sequence, select, hello: self.hello.clone() };
        let port = self.control_port;
        let size = if kind == PathKind::Udp { usize::from(self.mtu) } else { 0 };
        let mut packet =
            control::encode(SocketAddr::new(*source, port), SocketAddr::new(*gateway, port), &message, size);
        self.exit.overlay.borrow_mut().transmit_by(via, self.manager, &mut packet, None);
    }

    pub(super) fn pong(&self, sequence: u64, hello: Hello, via: Via) {
        let Some(rtt) = self.pings.borrow_mut().answer(sequence, Instant::now()) else { return };
        let restarted = {
            let mut peer = self.peer.borrow_mut();
            let restarted = peer.as_ref().is_some_and(|known| known.instance != hello.instance);
            *peer = Some(hello);
            restarted
        };
        if restarted {
            tracing::info!("another manager carries the session");
            if matches!(via, Via::Stream(_)) {
                self.selector.borrow_mut().manager_restarted();
            }
        }
        if let Via::Udp(address) = via
            && self.selector.borrow().rtt(PathKind::Udp).is_none()
        {
            self.udp_target.set(Some(address));
        }
        self.heard(via, Some(rtt));
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{MOST_PINGS, Pings};

    #[test]
    fn a_ping_is_answered_once_and_old_ones_are_forgotten() {
        let mut pings = Pings::default();
        let start = Instant::now();
        let first = pings.send(start);
        let later = start + Duration::from_millis(3);
        assert_eq!(pings.answer(first, later), Some(Duration::from_millis(3)));
        assert_eq!(pings.answer(first, later), None);
        let old = pings.send(start);
        for _ in 0..MOST_PINGS {
            pings.send(start);
        }
        assert_eq!(pings.answer(old, later), None);
    }
}
