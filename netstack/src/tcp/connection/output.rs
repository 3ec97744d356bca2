//! What goes out, and when.

use std::{num::NonZeroU16, time::Duration};

use super::{Connection, KEEP_ALIVE, KEEP_ALIVE_TRIES, LINGER, Phase, SYN_TIMEOUT, own_mss};
use crate::tcp::{
    receiver::SCALE,
    segment::{ACK, Abilities, Blocks, FIN, Head, PSH, RST, SYN},
    sender::Plan,
};

/// How often a SYN is repeated (Linux's `tcp_synack_retries`).
const SYN_TRIES: u32 = 5;

/// What is to be sent next.
enum Step {
    Reset,
    ResetStale(u32),
    Syn,
    Data(Plan),
    Acknowledgement,
    KeepAlive,
}

impl Connection {
    /// Sends one packet, if there is one to send: built in `buffer`, which is to hold 65,535 bytes, and handed
    /// to `send`, with the segment size to cut it at if it is longer than one segment. The TCP checksum is left
    /// zero.
    pub fn egress(
        &mut self,
        now: Duration,
        buffer: &mut [u8],
        send: &mut dyn FnMut(&mut [u8], Option<NonZeroU16>),
    ) -> bool {
        self.tick(now);
        let Some(step) = self.step(now) else { return false };
        match step {
            Step::Reset => {
                self.resetting = false;
                self.emit(self.tx.acceptable(), RST | ACK, &Plan::nothing(self.tx.next()), buffer, send);
            }
            Step::ResetStale(sequence) => {
                self.stale = None;
                let head = Head { flags: RST, sequence, acknowledgement: 0, window: 0, ..self.head() };
                let packet = &mut buffer[..head.length()];
                head.write(packet);
                send(packet, None);
            }
            Step::Syn => self.emit_syn(now, buffer, send),
            Step::Data(plan) => {
                let fin = if plan.fin { FIN } else { 0 };
                let push = if plan.last { PSH } else { 0 };
                self.conversing = true;
                self.emit(plan.range.start, ACK | push | fin, &plan, buffer, send);
                self.tx.sent(&plan, now);
            }
            Step::Acknowledgement => {
                self.conversing = false;
                self.emit(self.tx.acceptable(), ACK, &Plan::nothing(self.tx.next()), buffer, send);
            }
            Step::KeepAlive => {
                self.asked = now;
                self.release();
                // One before what is expected: whoever gets it must answer (RFC 1122, 4.2.3.6).
                self.emit(self.tx.next().wrapping_sub(1), ACK, &Plan::nothing(self.tx.next()), buffer, send);
            }
        }
        true
    }

    fn step(&self, now: Duration) -> Option<Step> {
        match self.phase {
            Phase::Closed => self.resetting.then_some(Step::Reset),
            Phase::Calling | Phase::Answering => match self.stale {
                Some(sequence) => Some(Step::ResetStale(sequence)),
                None => (self.syn.0 <= now).then_some(Step::Syn),
            },
            Phase::Open => {
                let owes = self.rx.due().is_some_and(|due| due <= now);
                // Data leaves no room to say what is missing.
                if owes && self.rx.has_gaps() {
                    return Some(Step::Acknowledgement);
                }
                if let Some(plan) = self.tx.plan(now) {
                    return Some(Step::Data(plan));
                }
                if owes {
                    return Some(Step::Acknowledgement);
                }
                (self.keep_alive_at() <= now).then_some(Step::KeepAlive)
            }
        }
    }

    /// Does what time alone brings about.
    fn tick(&mut self, now: Duration) {
        match self.phase {
            Phase::Closed => {}
            Phase::Calling | Phase::Answering => {
                if self.syn.1 > SYN_TRIES && self.syn.0 <= now {
                    self.tear_down();
                }
            }
            Phase::Open => {
                self.tx.tick(now);
                if self.is_quiet() && self.closing.is_none() {
                    self.closing = Some(now);
                }
                if self.give_up_at() <= now {
                    self.abort();
                    self.torn = true;
                }
            }
        }
    }

    fn give_up_at(&self) -> Duration {
        let limit = self.heard + self.options.patience;
        self.closing.map_or(limit, |since| limit.min(since.max(self.heard) + LINGER))
    }

    fn keep_alive_at(&self) -> Duration {
        if self.tx.is_busy() {
            return Duration::MAX;
        }
        self.heard.max(self.asked) + KEEP_ALIVE.min(self.options.patience / KEEP_ALIVE_TRIES)
    }

    /// How long until [`Self::egress`] has something to do by itself; zero if now.
    #[must_use]
    pub fn deadline(&mut self, now: Duration) -> Option<Duration> {
        self.tick(now);
        if self.step(now).is_some() {
            return Some(Duration::ZERO);
        }
        match self.phase {
            Phase::Closed => None,
            Phase::Calling | Phase::Answering => Some(self.syn.0.saturating_sub(now)),
            Phase::Open => {
                let at =
                    self.keep_alive_at().min(self.give_up_at()).min(self.rx.due().unwrap_or(Duration::MAX));
                let own = at.saturating_sub(now);
                Some(self.tx.deadline(now).map_or(own, |deadline| deadline.min(own)))
            }
        }
    }

    fn emit_syn(
        &mut self,
        now: Duration,
        buffer: &mut [u8],
        send: &mut dyn FnMut(&mut [u8], Option<NonZeroU16>),
    ) {
        let (_, tries) = self.syn;
        self.syn = (now + SYN_TIMEOUT * 2u32.pow(tries), tries + 1);
        let answering = self.phase == Phase::Answering;
        let scale = if answering { self.scale.map(|_| SCALE) } else { Some(SCALE) };
        // What wasn't offered isn't answered; the receiver's window is never scaled in a SYN.
        let sack = !answering || self.tx.is_selective();
        let mss = Some(own_mss(self.local, self.options.mtu));
        let head = Head {
            sequence: self.tx.sequence(0).wrapping_sub(1),
            acknowledgement: if answering { self.rx.acknowledgement() } else { 0 },
            flags: if answering { SYN | ACK } else { SYN },
            window: u16::MAX,
            abilities: Some(Abilities { mss, scale, sack }),
            ..self.head()
        };
        let packet = &mut buffer[..head.length()];
        head.write(packet);
        send(packet, None);
    }

    /// The headers of an acknowledgement of all that has arrived.
    fn head(&self) -> Head {
        Head {
            source: self.local,
            destination: self.remote,
            sequence: self.tx.sequence(self.tx.next()),
            acknowledgement: self.rx.acknowledgement(),
            flags: ACK,
            window: 0,
            abilities: None,
            blocks: Blocks::default(),
        }
    }

    fn emit(
        &mut self,
        offset: u64,
        flags: u8,
        plan: &Plan,
        buffer: &mut [u8],
        send: &mut dyn FnMut(&mut [u8], Option<NonZeroU16>),
    ) {
        let data = plan.data();
        let length = (data.end - data.start) as usize;
        // Blocks would make full segments longer than the MTU.
        let blocks = if length == 0 && self.tx.is_selective() { self.rx.blocks() } else { Blocks::default() };
        let sequence = self.tx.sequence(offset);
        let head = Head { sequence, flags, window: self.rx.announce(), blocks, ..self.head() };
        let start = head.length();
        let packet = &mut buffer[..start + length];
        head.write(packet);
        let (front, back) = self.tx.bytes(data);
        packet[start..start + front.len()].copy_from_slice(front);
        packet[start + front.len()..].copy_from_slice(back);
        let mss = self.tx.mss();
        send(packet, NonZeroU16::new(mss as u16).filter(|_| length > mss));
    }
}
