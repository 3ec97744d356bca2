//! One WireGuard tunnel, and telling tunnels apart on arrival. The only file that names boringtun.
//!
//! boringtun leaves to its caller: demultiplexing, the check of inner sources, the clock, the shared rate
//! limiter, and starting again after expiry. [`Tunnel`] and [`Responder`] are that, and nothing more.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use boringtun::{
    noise::{
        Packet, Tunn, TunnResult, errors::WireGuardError, handshake::parse_handshake_anon,
        rate_limiter::RateLimiter,
    },
    x25519,
};

use crate::key::{PrivateKey, PublicKey};

/// Bytes that sealing adds: header 16, tag 16 (WireGuard whitepaper, 5.4.6).
pub const OVERHEAD: usize = 32;

/// Smallest output buffer: a handshake initiation (whitepaper, 5.4.2).
pub const MIN_OUTPUT: usize = 148;

/// Handshake messages a second that are worked on before cookies are asked for. One costs about 0.1 ms of
/// curve arithmetic, so a flood takes a twentieth of a core. boringtun counts each message twice here:
/// once when the peer is looked up, once when its tunnel takes it.
const HANDSHAKES_PER_SECOND: u64 = 500;

/// How often [`Tunnel::tick`] must run: boringtun's clock advances only there, and its shortest timer is 5 s.
pub const TICK: Duration = Duration::from_millis(250);

/// Indices are 24 bits wide; the low 8 bits of an index on the wire number the session.
pub const MAX_TUNNELS: usize = 1 << 24;

/// The public half of `key`.
pub(crate) fn public_key(key: &PrivateKey) -> PublicKey {
    PublicKey(x25519::PublicKey::from(&x25519::StaticSecret::from(key.bytes())).to_bytes())
}

/// Our own identity, and the rate limit on what strangers can make us compute.
pub struct Responder {
    private: x25519::StaticSecret,
    public: x25519::PublicKey,
    limiter: Arc<RateLimiter>,
}

/// Whom a datagram is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressee {
    /// The tunnel with this index.
    Tunnel(u32),
    /// The peer with this key, whose handshake initiation it is.
    Initiator(PublicKey),
}

/// Why a datagram was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not WireGuard, or cut short.
    Garbage,
    /// A handshake that is not meant for our key, or forged.
    Forged,
    /// A counter or timestamp that was seen before.
    Replayed,
    /// A session that is not known (any more).
    NoSession,
    /// Too many handshakes at the moment; where it could be, a cookie was asked for.
    UnderLoad,
}

impl From<WireGuardError> for Refusal {
    fn from(error: WireGuardError) -> Self {
        match error {
            WireGuardError::InvalidMac | WireGuardError::InvalidAeadTag | WireGuardError::WrongKey => {
                Self::Forged
            }
            WireGuardError::DuplicateCounter
            | WireGuardError::InvalidCounter
            | WireGuardError::WrongTai64nTimestamp
            | WireGuardError::InvalidTai64nTimestamp => Self::Replayed,
            WireGuardError::NoCurrentSession
            | WireGuardError::WrongIndex
            | WireGuardError::ConnectionExpired => Self::NoSession,
            WireGuardError::UnderLoad => Self::UnderLoad,
            WireGuardError::DestinationBufferTooSmall
            | WireGuardError::IncorrectPacketLength
            | WireGuardError::UnexpectedPacket
            | WireGuardError::WrongPacketType
            | WireGuardError::InvalidPacket
            | WireGuardError::LockFailed => Self::Garbage,
        }
    }
}

impl Responder {
    /// An identity from its private key.
    #[must_use]
    pub fn new(key: &PrivateKey) -> Self {
        let private = x25519::StaticSecret::from(key.bytes());
        let public = x25519::PublicKey::from(&private);
        let limiter = Arc::new(RateLimiter::new(&public, 2 * HANDSHAKES_PER_SECOND));
        Self { private, public, limiter }
    }

    /// A tunnel to `peer` under `index`, which must be unique among ours and below [`MAX_TUNNELS`].
    #[must_use]
    pub fn tunnel(&self, peer: PublicKey, index: u32) -> Tunnel {
        let peer = x25519::PublicKey::from(peer.0);
        let limiter = Arc::clone(&self.limiter);
        Tunnel { inner: Tunn::new(self.private.clone(), peer, None, None, index, Some(limiter)) }
    }

    /// Lets the rate limiter start a new second.
    pub fn tick(&self) {
        self.limiter.reset_count();
    }

    /// Whom `datagram` from `source` is for. A cookie reply that a flood calls for is written to `reply`.
    ///
    /// # Errors
    /// Anything that cannot be for one of our tunnels; with [`Refusal::UnderLoad`] the length of the reply, if any.
    pub fn addressee(
        &self,
        source: IpAddr,
        datagram: &[u8],
        reply: &mut [u8],
    ) -> Result<Addressee, (Refusal, usize)> {
        let data = |refusal| (refusal, 0);
        match Tunn::parse_incoming_packet(datagram).map_err(|error| data(error.into()))? {
            Packet::PacketData(packet) => Ok(Addressee::Tunnel(packet.receiver_idx >> 8)),
            Packet::HandshakeResponse(packet) => Ok(Addressee::Tunnel(packet.receiver_idx >> 8)),
            Packet::PacketCookieReply(packet) => Ok(Addressee::Tunnel(packet.receiver_idx >> 8)),
            Packet::HandshakeInit(packet) => {
                match self.limiter.verify_packet(Some(source), datagram, reply) {
                    Ok(_) => {}
                    Err(TunnResult::WriteToNetwork(cookie)) => {
                        return Err((Refusal::UnderLoad, cookie.len()));
                    }
                    Err(TunnResult::Err(error)) => return Err(data(error.into())),
                    Err(_) => return Err(data(Refusal::Garbage)),
                }
                let half = parse_handshake_anon(&self.private, &self.public, &packet)
                    .map_err(|error| data(error.into()))?;
                Ok(Addressee::Initiator(PublicKey(half.peer_static_public)))
            }
        }
    }
}

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Responder")
            .field("public", &PublicKey(self.public.to_bytes()))
            .finish_non_exhaustive()
    }
}

/// What opening a datagram gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// An IP packet, in the first bytes of the output; its inner source is *not* checked yet.
    Packet(usize),
    /// A datagram to send back the way this one came, in the first bytes of the output.
    Reply(usize),
    /// Nothing to do: a keepalive, or a cookie.
    Nothing,
}

/// One WireGuard tunnel.
pub struct Tunnel {
    inner: Tunn,
}

impl Tunnel {
    /// Seals one IP packet, or an empty one as a keepalive, into `output` (at least [`OVERHEAD`] more than the
    /// packet, and at least [`MIN_OUTPUT`]). `None` if there is no session: the packet is not queued, since
    /// whoever sends through a dead tunnel learns it best from silence.
    pub fn seal(&mut self, packet: &[u8], output: &mut [u8]) -> Option<usize> {
        self.handshake_age()?;
        match self.inner.encapsulate(packet, output) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.len()),
            _ => None,
        }
    }

    /// Opens a datagram from `source` into `output`, which must be at least as long.
    ///
    /// # Errors
    /// What is not authentic, not new, or of no session.
    pub fn open(&mut self, source: IpAddr, datagram: &[u8], output: &mut [u8]) -> Result<Opened, Refusal> {
        // To boringtun an empty datagram asks for its queue.
        if datagram.is_empty() {
            return Err(Refusal::Garbage);
        }
        match self.inner.decapsulate(Some(source), datagram, output) {
            TunnResult::Done => Ok(Opened::Nothing),
            TunnResult::WriteToNetwork(reply) => Ok(Opened::Reply(reply.len())),
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Ok(Opened::Packet(packet.len()))
            }
            TunnResult::Err(error) => Err(error.into()),
        }
    }

    /// Writes a new handshake initiation to `output`, whether or not one is under way. Answers its length.
    pub fn initiate(&mut self, output: &mut [u8]) -> Option<usize> {
        match self.inner.format_handshake_initiation(output, true) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.len()),
            _ => None,
        }
    }

    /// Advances the tunnel's clock; answers the length of a datagram that is due (a keepalive, a handshake).
    pub fn tick(&mut self, output: &mut [u8]) -> Option<usize> {
        match self.inner.update_timers(output) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.len()),
            _ => None,
        }
    }

    /// Time since the current session's handshake; `None` without a session.
    #[must_use]
    pub fn handshake_age(&self) -> Option<Duration> {
        self.inner.time_since_last_handshake()
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("handshake_age", &self.handshake_age()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::{Addressee, MIN_OUTPUT, OVERHEAD, Opened, Refusal, Responder, Tunnel};
    use crate::key::PrivateKey;

    const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    struct Pair {
        laptop: Tunnel,
        manager: Tunnel,
        responder: Responder,
        laptop_key: PrivateKey,
    }

    fn pair() -> Pair {
        let (laptop_key, manager_key) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let responder = Responder::new(&manager_key);
        Pair {
            laptop: Responder::new(&laptop_key).tunnel(manager_key.public(), 1),
            manager: responder.tunnel(laptop_key.public(), 7),
            responder,
            laptop_key,
        }
    }

    fn packet(length: u16) -> Vec<u8> {
        let mut packet = vec![0; usize::from(length)];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet
    }

    impl Pair {
        fn handshake(&mut self) {
            let (mut init, mut response, mut keepalive) = ([0; 200], [0; 200], [0; 200]);
            let length = self.laptop.initiate(&mut init).unwrap();
            let Ok(Opened::Reply(length)) = self.manager.open(SOURCE, &init[..length], &mut response) else {
                panic!("no response")
            };
            let Ok(Opened::Reply(length)) = self.laptop.open(SOURCE, &response[..length], &mut keepalive)
            else {
                panic!("no keepalive")
            };
            assert_eq!(self.manager.open(SOURCE, &keepalive[..length], &mut response), Ok(Opened::Nothing));
        }
    }

    #[test]
    fn a_super_packet_crosses_whole() {
        let mut pair = pair();
        pair.handshake();
        let plain = packet(u16::MAX);
        let (mut sealed, mut opened) = (vec![0; plain.len() + OVERHEAD], vec![0; plain.len() + OVERHEAD]);
        let length = pair.laptop.seal(&plain, &mut sealed).unwrap();
        assert_eq!(length, plain.len() + OVERHEAD);
        assert_eq!(pair.responder.addressee(SOURCE, &sealed, &mut []), Ok(Addressee::Tunnel(7)));
        assert_eq!(pair.manager.open(SOURCE, &sealed, &mut opened), Ok(Opened::Packet(plain.len())));
        assert_eq!(opened[..plain.len()], plain);
    }

    #[test]
    fn a_replay_a_forgery_and_garbage_are_told_apart() {
        let mut pair = pair();
        pair.handshake();
        let (mut sealed, mut opened) = ([0; 200], [0; 200]);
        let length = pair.laptop.seal(&packet(40), &mut sealed).unwrap();
        let sealed = &mut sealed[..length];
        pair.manager.open(SOURCE, sealed, &mut opened).unwrap();
        assert_eq!(pair.manager.open(SOURCE, sealed, &mut opened), Err(Refusal::Replayed));
        sealed[8] ^= 0x40;
        assert_eq!(pair.manager.open(SOURCE, sealed, &mut opened), Err(Refusal::Forged));
        assert_eq!(pair.manager.open(SOURCE, &[1, 2, 3], &mut opened), Err(Refusal::Garbage));
        assert_eq!(pair.manager.open(SOURCE, &[], &mut opened), Err(Refusal::Garbage));
    }

    #[test]
    fn an_initiator_is_known_by_its_key() {
        let mut pair = pair();
        let mut init = [0; MIN_OUTPUT];
        let length = pair.laptop.initiate(&mut init).unwrap();
        let mut reply = [0; MIN_OUTPUT];
        let addressee = pair.responder.addressee(SOURCE, &init[..length], &mut reply);
        assert_eq!(addressee, Ok(Addressee::Initiator(pair.laptop_key.public())));
        init[20] ^= 1;
        let forged = pair.responder.addressee(SOURCE, &init[..length], &mut reply);
        assert_eq!(forged, Err((Refusal::Forged, 0)));
    }

    #[test]
    fn a_flood_of_handshakes_is_answered_with_cookies() {
        let mut pair = pair();
        let mut init = [0; MIN_OUTPUT];
        let length = pair.laptop.initiate(&mut init).unwrap();
        let mut reply = [0; MIN_OUTPUT];
        let last = (0..2_000).map(|_| pair.responder.addressee(SOURCE, &init[..length], &mut reply)).last();
        assert!(matches!(last, Some(Err((Refusal::UnderLoad, 64)))), "{last:?}");
    }

    #[test]
    fn nothing_is_sealed_before_a_handshake() {
        assert_eq!(pair().laptop.seal(&packet(40), &mut [0; 200]), None);
    }
}
