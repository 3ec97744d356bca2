//! Cutting datagrams into fragments and joining fragments to datagrams (RFC 791, RFC 8200, RFC 5722).

use std::{collections::VecDeque, net::IpAddr, time::Duration};

use super::{IpHeader, checksum, protocol};

/// How long the rest of a datagram is waited for: the least that RFC 791, 3.2 suggests. Fragments follow each
/// other at once through a tunnel.
const PATIENCE: Duration = Duration::from_secs(15);

/// Most incomplete datagrams, of all peers and of one. At 64 KiB each: 16 MiB and 2 MiB.
const MAX_DATAGRAMS: usize = 256;
const MAX_DATAGRAMS_OF_PEER: usize = 32;

/// Most fragments of one datagram: 65,535 bytes at the smallest MTU that every IPv4 host must take, 576, are 119.
const MAX_PIECES: usize = 128;

/// Longest payload of a datagram, bytes.
const MAX_PAYLOAD: usize = 65_535;

/// Length of the IPv6 fragment header, bytes.
const FRAGMENT_HEADER: usize = 8;

/// Hands `packet` to `emit` in pieces of at most `mtu` bytes that carry the identification `id`; whole, if it fits.
///
/// For packets without IPv4 options or IPv6 extension headers, which is how [`super::header`] makes them. `mtu`
/// must be 68 or more for IPv4 (RFC 791), 1,280 or more for IPv6.
pub fn fragment(packet: &mut [u8], mtu: usize, id: u32, mut emit: impl FnMut(&mut [u8])) {
    if packet.len() <= mtu {
        return emit(packet);
    }
    let Some(header) = IpHeader::parse(packet) else { return };
    let is_v4 = header.source.is_ipv4();
    let (start, extra) = if is_v4 { (20, 0) } else { (40, FRAGMENT_HEADER) };
    let room = (mtu - start - extra) & !7;

    let mut piece = vec![0; mtu];
    let payload = &packet[start..];
    for (index, chunk) in payload.chunks(room).enumerate() {
        let (offset, more) = (index * room, index * room + chunk.len() < payload.len());
        let piece = &mut piece[..start + extra + chunk.len()];
        piece[..start].copy_from_slice(&packet[..start]);
        piece[start + extra..].copy_from_slice(chunk);
        if is_v4 {
            place_v4(piece, id as u16, offset, more);
        } else {
            place_v6(piece, header.protocol, id, offset, more);
        }
        emit(piece);
    }
}

fn place_v4(piece: &mut [u8], id: u16, offset: usize, more: bool) {
    let total = piece.len() as u16;
    piece[2..4].copy_from_slice(&total.to_be_bytes());
    piece[4..6].copy_from_slice(&id.to_be_bytes());
    let place = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
    piece[6..8].copy_from_slice(&place.to_be_bytes());
    finish_v4(&mut piece[..20]);
}

fn place_v6(piece: &mut [u8], next: u8, id: u32, offset: usize, more: bool) {
    let payload = (piece.len() - 40) as u16;
    piece[4..6].copy_from_slice(&payload.to_be_bytes());
    piece[6] = protocol::IPV6_FRAGMENT;
    let place = offset as u16 | u16::from(more);
    piece[40] = next;
    piece[41] = 0;
    piece[42..44].copy_from_slice(&place.to_be_bytes());
    piece[44..48].copy_from_slice(&id.to_be_bytes());
}

fn finish_v4(header: &mut [u8]) {
    header[10..12].fill(0);
    let field = checksum::ipv4_header(header);
    header[10..12].copy_from_slice(&field.to_be_bytes());
}

/// What became of a fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Joined {
    /// It completed this packet.
    Whole(Vec<u8>),
    /// More are needed.
    Waiting,
    /// It was dropped, with all others of its datagram if it contradicts them.
    Dropped,
}

/// Joins fragments to packets. `P` names peers, none of which can use up what others need.
#[derive(Debug)]
pub struct Reassembler<P> {
    /// In the order of their first fragments' arrival.
    datagrams: VecDeque<(Name<P>, Datagram)>,
}

/// What fragments of one datagram have in common (RFC 791, 3.2; RFC 8200, 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Name<P> {
    peer: P,
    source: IpAddr,
    destination: IpAddr,
    id: u32,
    /// `None` for IPv6.
    protocol: Option<u8>,
}

#[derive(Debug)]
struct Datagram {
    /// When the first fragment arrived.
    since: Duration,
    /// The IP header as the whole packet will have it, but for the length.
    header: Vec<u8>,
    payload: Vec<u8>,
    /// What of the payload is there, as sorted ranges.
    pieces: Vec<(usize, usize)>,
    /// Length of the payload, once the last fragment is there.
    end: Option<usize>,
    /// Fragments that contradict each other condemn the whole datagram, and what of it is still to come (RFC 5722).
    condemned: bool,
}

/// A fragment, taken out of its packet.
struct Piece<'a> {
    header: Vec<u8>,
    offset: usize,
    more: bool,
    data: &'a [u8],
}

impl<P> Default for Reassembler<P> {
    fn default() -> Self {
        Self { datagrams: VecDeque::new() }
    }
}

impl<P: Copy + Eq> Reassembler<P> {
    /// Takes in a fragment in `packet` from `peer` at `now`; `header` is what [`IpHeader::parse`] made of it.
    pub fn add(&mut self, peer: P, header: &IpHeader, packet: &[u8], now: Duration) -> Joined {
        self.expire(now);
        let Some((fragment, piece)) = header.fragment.zip(Piece::parse(header, packet)) else {
            return Joined::Dropped;
        };
        let protocol = header.source.is_ipv4().then_some(header.protocol);
        let (source, destination) = (header.source, header.destination);
        let name = Name { peer, source, destination, id: fragment.id, protocol };

        let known = self.datagrams.iter().position(|(other, _)| *other == name);
        let index = known.unwrap_or_else(|| {
            self.make_room(peer);
            self.datagrams.push_back((name, Datagram::new(now)));
            self.datagrams.len() - 1
        });
        let datagram = &mut self.datagrams[index].1;
        if !datagram.condemned && !datagram.add(piece) {
            datagram.condemn();
        }
        if datagram.condemned {
            return Joined::Dropped;
        }
        if !datagram.is_whole() {
            return Joined::Waiting;
        }
        self.datagrams.remove(index).map_or(Joined::Dropped, |(_, datagram)| Joined::Whole(datagram.join()))
    }

    /// Forgets the fragments of `peer`.
    pub fn remove_peer(&mut self, peer: P) {
        self.datagrams.retain(|(name, _)| name.peer != peer);
    }

    fn expire(&mut self, now: Duration) {
        while self.datagrams.front().is_some_and(|(_, first)| now.saturating_sub(first.since) >= PATIENCE) {
            self.datagrams.pop_front();
        }
    }

    /// Gives up the oldest datagram of whoever has too many, so that there is room for one of `peer`.
    fn make_room(&mut self, peer: P) {
        if self.held_by(peer) >= MAX_DATAGRAMS_OF_PEER {
            self.give_up_oldest(peer);
        } else if self.datagrams.len() >= MAX_DATAGRAMS {
            let peers = self.datagrams.iter().map(|(name, _)| name.peer);
            if let Some(greediest) = peers.max_by_key(|peer| self.held_by(*peer)) {
                self.give_up_oldest(greediest);
            }
        }
    }

    fn held_by(&self, peer: P) -> usize {
        self.datagrams.iter().filter(|(name, _)| name.peer == peer).count()
    }

    fn give_up_oldest(&mut self, peer: P) {
        if let Some(index) = self.datagrams.iter().position(|(name, _)| name.peer == peer) {
            self.datagrams.remove(index);
        }
    }
}

impl Datagram {
    const fn new(since: Duration) -> Self {
        Self {
            since,
            header: Vec::new(),
            payload: Vec::new(),
            pieces: Vec::new(),
            end: None,
            condemned: false,
        }
    }

    fn condemn(&mut self) {
        *self = Self { condemned: true, ..Self::new(self.since) };
    }

    /// Takes a piece in; `false` if it contradicts the others.
    fn add(&mut self, piece: Piece<'_>) -> bool {
        let (start, end) = (piece.offset, piece.offset + piece.data.len());
        if self.pieces.contains(&(start, end)) {
            return true;
        }
        let ends_well = match self.end {
            Some(known) => end < known || (end == known && !piece.more),
            None => piece.more || self.pieces.last().is_none_or(|last| last.1 <= start),
        };
        let at = self.pieces.partition_point(|other| other.0 < start);
        let overlaps =
            at > 0 && self.pieces[at - 1].1 > start || self.pieces.get(at).is_some_and(|next| next.0 < end);
        if !ends_well || overlaps || self.pieces.len() >= MAX_PIECES {
            return false;
        }

        self.pieces.insert(at, (start, end));
        if self.payload.len() < end {
            self.payload.resize(end, 0);
        }
        self.payload[start..end].copy_from_slice(piece.data);
        if !piece.more {
            self.end = Some(end);
        }
        // The header of the first fragment is the packet's.
        if start == 0 {
            self.header = piece.header;
        }
        true
    }

    fn is_whole(&self) -> bool {
        let covered = self.pieces.iter().try_fold(0, |end, piece| (piece.0 == end).then_some(piece.1));
        self.end.is_some() && covered == self.end
    }

    fn join(self) -> Vec<u8> {
        let mut packet = self.header;
        let start = packet.len();
        packet.extend_from_slice(&self.payload);
        if packet[0] >> 4 == 4 {
            let total = packet.len() as u16;
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            packet[6..8].fill(0);
            finish_v4(&mut packet[..start]);
        } else {
            let payload = (packet.len() - 40) as u16;
            packet[4..6].copy_from_slice(&payload.to_be_bytes());
        }
        packet
    }
}

impl<'a> Piece<'a> {
    /// `None` for what no sender of fragments produces, or what would make too long a packet.
    fn parse(header: &IpHeader, packet: &'a [u8]) -> Option<Self> {
        let fragment = header.fragment?;
        let (start, own) = match header.source {
            IpAddr::V4(_) => (header.payload, packet.get(..header.payload)?.to_vec()),
            IpAddr::V6(_) => unfragmentable(packet)?,
        };
        let data = packet.get(start..header.total)?;
        let whole_units = data.len().is_multiple_of(8) || !fragment.more;
        let longest = match header.source {
            IpAddr::V4(_) => MAX_PAYLOAD - own.len(),
            IpAddr::V6(_) => MAX_PAYLOAD + 40 - own.len(),
        };
        let fits = fragment.offset + data.len() <= longest;
        let piece = Self { header: own, offset: fragment.offset, more: fragment.more, data };
        (!data.is_empty() && whole_units && fits).then_some(piece)
    }
}

/// Where the data of the IPv6 fragment in `packet` starts, and the headers before its fragment header as they
/// were before it was put in.
fn unfragmentable(packet: &[u8]) -> Option<(usize, Vec<u8>)> {
    let (mut field, mut at) = (6, 40);
    while *packet.get(field)? != protocol::IPV6_FRAGMENT {
        if !matches!(packet[field], 0 | 43 | 60) {
            return None;
        }
        (field, at) = (at, at + 8 + usize::from(*packet.get(at + 1)?) * 8);
    }
    let mut headers = packet.get(..at)?.to_vec();
    headers[field] = *packet.get(at)?;
    Some((at + FRAGMENT_HEADER, headers))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::packet::header;

    const NOW: Duration = Duration::from_secs(100);

    fn datagram(is_v4: bool, length: usize) -> Vec<u8> {
        let (source, destination) = if is_v4 {
            (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)))
        } else {
            (
                IpAddr::V6(Ipv6Addr::new(1, 0, 0, 0, 0, 0, 0, 1)),
                IpAddr::V6(Ipv6Addr::new(1, 0, 0, 0, 0, 0, 0, 2)),
            )
        };
        let start = header::length(source);
        let mut packet = vec![0; start];
        packet.extend((0..length).map(|index| (index ^ index >> 8) as u8));
        header::write(&mut packet, source, destination, protocol::UDP, length);
        packet
    }

    fn pieces(packet: &[u8], mtu: usize, id: u32) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        fragment(&mut packet.to_vec(), mtu, id, |piece| pieces.push(piece.to_vec()));
        pieces
    }

    fn add(reassembler: &mut Reassembler<u32>, peer: u32, packet: &[u8], now: Duration) -> Joined {
        let header = IpHeader::parse(packet).unwrap();
        reassembler.add(peer, &header, packet, now)
    }

    /// What was sent, as it is when joined: IPv4's "don't fragment" and identification are the fragments' own.
    fn comparable(mut packet: Vec<u8>) -> Vec<u8> {
        if packet[0] >> 4 == 4 {
            packet[4..8].fill(0);
            packet[10..12].fill(0);
        }
        packet
    }

    proptest! {
        #[test]
        fn what_was_cut_is_joined_in_any_order(
            is_v4: bool,
            length in 1481usize..65_500,
            mtu in 1280usize..1500,
            order in any::<u64>(),
        ) {
            let packet = datagram(is_v4, length);
            let mut pieces = pieces(&packet, mtu, 7);
            pieces.iter().for_each(|piece| assert!(piece.len() <= mtu));
            let mut random = order | 1;
            for index in (1..pieces.len()).rev() {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                pieces.swap(index, (random >> 33) as usize % (index + 1));
            }
            let mut reassembler = Reassembler::default();
            let (last, others) = pieces.split_last().unwrap();
            for piece in others {
                prop_assert_eq!(add(&mut reassembler, 1, piece, NOW), Joined::Waiting);
                // A duplicate changes nothing.
                prop_assert_eq!(add(&mut reassembler, 1, piece, NOW), Joined::Waiting);
            }
            let Joined::Whole(whole) = add(&mut reassembler, 1, last, NOW) else { panic!("not whole") };
            if is_v4 {
                prop_assert_eq!(checksum::ipv4_header(&whole[..20]), 0);
            }
            prop_assert!(comparable(whole) == comparable(packet));
            prop_assert!(reassembler.datagrams.is_empty());
        }

        #[test]
        fn garbage_is_bounded_and_harmless(
            packets in proptest::collection::vec((0u32..4, proptest::collection::vec(any::<u8>(), 20..120)), 0..400),
        ) {
            let mut reassembler = Reassembler::default();
            for (peer, mut packet) in packets {
                packet[0] = if packet[1] & 1 == 0 { 0x45 } else { 0x60 };
                packet[2] = 0;
                packet[3] %= 120;
                packet[4] = 0;
                packet[5] %= 80;
                packet[6] = if packet[0] == 0x45 { packet[6] & 0x3f } else { protocol::IPV6_FRAGMENT };
                if let Some(header) = IpHeader::parse(&packet)
                    && header.fragment.is_some()
                    && let Joined::Whole(whole) = reassembler.add(peer, &header, &packet, NOW)
                {
                    prop_assert!(IpHeader::parse(&whole).is_none_or(|header| header.fragment.is_none()));
                }
                prop_assert!(reassembler.held_by(peer) <= MAX_DATAGRAMS_OF_PEER);
            }
        }
    }

    #[test]
    fn what_fits_is_not_cut() {
        let packet = datagram(true, 1400);
        assert_eq!(pieces(&packet, 1420, 7), [packet]);
    }

    #[test]
    fn overlapping_fragments_condemn_their_datagram() {
        for is_v4 in [true, false] {
            let packet = datagram(is_v4, 4000);
            let sent = pieces(&packet, 1420, 7);
            // The same datagram cut elsewhere: its second piece overlaps two of the first.
            let other = pieces(&packet, 1300, 7);
            let mut reassembler = Reassembler::default();
            assert_eq!(add(&mut reassembler, 1, &sent[0], NOW), Joined::Waiting);
            assert_eq!(add(&mut reassembler, 1, &other[1], NOW), Joined::Dropped);
            for piece in &sent {
                assert_eq!(add(&mut reassembler, 1, piece, NOW), Joined::Dropped);
            }
            // Once that is forgotten, the identification may be used again.
            let later = NOW + PATIENCE;
            let results: Vec<_> = sent.iter().map(|piece| add(&mut reassembler, 1, piece, later)).collect();
            assert!(matches!(results.last(), Some(Joined::Whole(_))));
        }
    }

    #[test]
    fn a_datagram_has_one_end() {
        let (short, long) = (pieces(&datagram(true, 1500), 1420, 7), pieces(&datagram(true, 6000), 1420, 7));
        let mut reassembler = Reassembler::default();
        assert_eq!(add(&mut reassembler, 1, &short[1], NOW), Joined::Waiting);
        assert_eq!(add(&mut reassembler, 1, &long[3], NOW), Joined::Dropped);
        let mut reassembler = Reassembler::default();
        assert_eq!(add(&mut reassembler, 1, &long[3], NOW), Joined::Waiting);
        assert_eq!(add(&mut reassembler, 1, &short[1], NOW), Joined::Dropped);
    }

    #[test]
    fn a_packet_longer_than_ip_allows_is_never_made() {
        let mut last = pieces(&datagram(true, 1500), 1420, 7).remove(1);
        last[6..8].copy_from_slice(&0x1fffu16.to_be_bytes());
        assert_eq!(add(&mut Reassembler::default(), 1, &last, NOW), Joined::Dropped);
    }

    #[test]
    fn one_peer_cannot_use_up_what_others_need() {
        let mut reassembler = Reassembler::default();
        let quiet = pieces(&datagram(true, 3000), 1420, 7);
        assert_eq!(add(&mut reassembler, 9, &quiet[0], NOW), Joined::Waiting);
        for peer in 0..12 {
            for id in 0..100 {
                add(&mut reassembler, 100 + peer, &pieces(&datagram(true, 3000), 1420, id)[0], NOW);
            }
        }
        (100..112).for_each(|peer| assert!(reassembler.held_by(peer) <= MAX_DATAGRAMS_OF_PEER));
        assert!(reassembler.datagrams.len() <= MAX_DATAGRAMS);
        assert_eq!(add(&mut reassembler, 9, &quiet[1], NOW), Joined::Waiting);
        assert!(matches!(add(&mut reassembler, 9, &quiet[2], NOW), Joined::Whole(_)));
    }

    #[test]
    fn the_rest_is_not_waited_for_forever() {
        let sent = pieces(&datagram(false, 2000), 1420, 7);
        let mut reassembler = Reassembler::default();
        assert_eq!(add(&mut reassembler, 1, &sent[0], NOW), Joined::Waiting);
        assert_eq!(add(&mut reassembler, 1, &sent[1], NOW + PATIENCE), Joined::Waiting);
    }
}
