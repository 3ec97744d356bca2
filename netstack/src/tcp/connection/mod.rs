//! A connection from its first SYN to its last acknowledgement.

mod input;
mod output;

use std::{io, net::SocketAddr, time::Duration};

use super::{
    budget::Budget,
    receiver::Receiver,
    segment::{ACK, Abilities, RST, SYN, Segment},
    sender::Sender,
};
use crate::packet::{self, IpHeader, header};

/// Segment size of a peer that doesn't say (RFC 9293, 3.7.1), and the least that is believed (Linux's
/// `TCP_MIN_SND_MSS`), bytes.
const DEFAULT_MSS: u16 = 536;
const LEAST_MSS: u16 = 48;

/// An idle peer is asked for a sign of life this often: below the shortest idle time-outs of NATs and load
/// balancers (60 s).
const KEEP_ALIVE: Duration = Duration::from_secs(50);

/// How often it is asked at least before it is given up: any one answer may be lost.
const KEEP_ALIVE_TRIES: u32 = 3;

/// How long a connection that both ends have closed waits for its last acknowledgement: one that is lost is
/// repeated a few times in this.
const LINGER: Duration = Duration::from_secs(60);

/// When a SYN is first repeated (RFC 6298, 2.1).
const SYN_TIMEOUT: Duration = Duration::from_secs(1);

/// What all connections of an engine have in common.
#[derive(Clone, Debug)]
pub struct Options {
    /// Largest packet on the overlay, bytes; 1,280 or more.
    pub mtu: u16,
    /// Most payload to send at once, bytes. Rounded down to whole segments.
    pub batch: usize,
    /// Whether the path loses packets, so that the sending rate must be measured.
    pub lossy: bool,
    /// The first sequence number; unpredictable (RFC 6528).
    pub sequence: u32,
    /// What buffers may grow at the cost of.
    pub budget: Budget,
    /// A peer that leaves data or keep-alives unanswered this long is gone.
    pub patience: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A SYN was sent, or is about to be.
    Calling,
    /// A SYN was received, its answer was sent or is about to be.
    Answering,
    Open,
    /// Over; a reset may still have to be sent.
    Closed,
}

/// One end of a TCP connection.
#[derive(Debug)]
pub struct Connection {
    local: SocketAddr,
    remote: SocketAddr,
    options: Options,
    phase: Phase,
    tx: Sender,
    rx: Receiver,
    /// Scale of the windows that the peer sends, if both ends scale.
    scale: Option<u8>,
    /// When the SYN is due (again), and how often it was sent.
    syn: (Duration, u32),
    /// When the peer was last heard of, and last asked for a sign of life.
    heard: Duration,
    asked: Duration,
    /// Whether what the peer sent last was answered promptly.
    conversing: bool,
    /// Whether both ends had closed, and since when.
    closing: Option<Duration>,
    /// Whether a reset is to be sent.
    resetting: bool,
    /// The number of an acknowledgement of another connection between the same ports, which a reset is to end.
    stale: Option<u32>,
    /// Whether the connection was torn down rather than closed.
    torn: bool,
}

impl Connection {
    /// An end that is about to answer the SYN in `packet`; `None` if it is none.
    #[must_use]
    pub fn accept(packet: &[u8], options: Options, now: Duration) -> Option<Self> {
        let header = IpHeader::parse(packet)?;
        let (remote, local) = header.sockets(packet)?;
        let segment = Segment::parse(&packet[header.payload..header.total])?;
        if segment.flags & (SYN | ACK | RST) != SYN {
            return None;
        }
        let mut connection = Self::new(local, remote, Phase::Answering, options, now);
        connection.meet(&segment);
        Some(connection)
    }

    /// An end that is about to connect.
    #[must_use]
    pub fn connect(local: SocketAddr, remote: SocketAddr, options: Options, now: Duration) -> Self {
        Self::new(local, remote, Phase::Calling, options, now)
    }

    fn new(local: SocketAddr, remote: SocketAddr, phase: Phase, options: Options, now: Duration) -> Self {
        let mss = own_mss(local, options.mtu);
        let batch = options.batch.min(packet::MAX - header::length(local.ip()) - 20);
        // So that a peer that only doesn't read is asked several times before it would be taken for gone.
        let pause = options.patience.min(LINGER) / KEEP_ALIVE_TRIES;
        let mut tx = Sender::new(options.sequence, usize::from(mss), batch, pause, &options.budget);
        tx.set_measured(options.lossy, now);
        Self {
            local,
            remote,
            phase,
            tx,
            rx: Receiver::new(0, true, &options.budget),
            options,
            scale: None,
            syn: (now, 0),
            heard: now,
            asked: now,
            conversing: false,
            closing: None,
            resetting: false,
            stale: None,
            torn: false,
        }
    }

    /// Takes in what the peer's SYN says.
    fn meet(&mut self, segment: &Segment<'_>) {
        let Abilities { mss, scale, sack } = segment.abilities;
        let mss = mss.filter(|mss| *mss > 0).unwrap_or(DEFAULT_MSS).max(LEAST_MSS);
        let mss = mss.min(own_mss(self.local, self.options.mtu));
        self.scale = scale;
        self.rx = Receiver::new(segment.sequence, scale.is_some(), &self.options.budget);
        self.tx.meet(usize::from(mss), sack, usize::from(segment.window));
    }

    fn tear_down(&mut self) {
        self.phase = Phase::Closed;
        self.torn = true;
    }

    /// Whether both ends have said that they send no more.
    fn is_quiet(&self) -> bool {
        self.tx.is_fin_queued() && self.rx.is_complete()
    }

    /// Has the sending rate measured from now on, or no longer.
    pub fn set_lossy(&mut self, lossy: bool, now: Duration) {
        self.tx.set_measured(lossy, now);
    }
}

impl Connection {
    /// Whether bytes wait to be taken with [`Self::receive`].
    #[must_use]
    pub fn can_receive(&self) -> bool {
        self.rx.has_data()
    }

    /// Whether the peer has said that it will send no more, and all it sent has been received.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.rx.is_complete() && !self.rx.has_data()
    }

    /// Hands the next received bytes to `take`, which says how many it took.
    ///
    /// # Errors
    ///
    /// Those of `take`.
    pub fn receive(&mut self, take: impl FnOnce(&[u8]) -> io::Result<usize>) -> io::Result<usize> {
        let count = take(self.rx.readable())?;
        self.rx.consume(count);
        Ok(count)
    }

    /// Whether the connection is open for sending, and has `enough` room (bytes).
    #[must_use]
    pub fn wants_filling(&self, enough: usize) -> bool {
        self.phase == Phase::Open && !self.tx.is_fin_queued() && self.tx.room() >= enough
    }

    /// Lets `fill` put bytes to send into free room, of which there must be some ([`Self::wants_filling`]).
    ///
    /// # Errors
    ///
    /// Those of `fill`.
    pub fn transmit(&mut self, fill: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        let count = fill(self.tx.vacant())?;
        self.tx.append(count);
        Ok(count)
    }

    /// Sends FIN after what is waiting.
    pub fn close(&mut self) {
        self.tx.finish();
    }

    /// Gives the connection up; a reset is sent by the next [`Self::egress`].
    pub fn abort(&mut self) {
        // A peer that wasn't called yet has nothing to reset.
        let known = match self.phase {
            Phase::Calling => self.syn.1 > 0,
            Phase::Answering | Phase::Open => true,
            Phase::Closed => false,
        };
        self.resetting |= known;
        self.phase = Phase::Closed;
    }

    /// Whether [`Self::close`] was called.
    #[must_use]
    pub fn is_finishing(&self) -> bool {
        self.tx.is_fin_queued()
    }

    /// Bytes that were given to be sent and that the peer has not acknowledged.
    #[must_use]
    pub fn unacknowledged(&self) -> usize {
        self.tx.kept()
    }

    /// Whether the connection is over, in whatever way: nothing is sent or received any more but for a last reset.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Gives memory back that isn't used now.
    fn release(&mut self) {
        self.tx.release();
        self.rx.release();
    }

    /// Whether the handshake is done.
    #[must_use]
    pub fn is_established(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether the peer tore the connection down, or let it time out.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// Whether nothing of this connection is left to be sent or awaited.
    ///
    /// TIME-WAIT counts as closed: should the last acknowledgement be lost, the peer's FIN is answered with a
    /// reset, in a state where the peer's process is done with the connection.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match self.phase {
            Phase::Closed => !self.resetting,
            Phase::Open => self.is_quiet() && self.tx.is_finished() && self.rx.due().is_none(),
            Phase::Calling | Phase::Answering => false,
        }
    }
}

/// The largest segment payload that fits into the MTU, bytes.
fn own_mss(local: SocketAddr, mtu: u16) -> u16 {
    mtu - header::length(local.ip()) as u16 - 20
}
