//! Joining what arrived as TCP segments into super-packets for the TUN, as a network card's GRO does.
//!
//! A packet that leaves here has been authenticated by the tunnel, so its TCP checksum is handed to the kernel as
//! one that the sender left to hardware (`NEEDS_CSUM`, pseudo-header sum only): nobody computes it again.

use super::{
    IpHeader, MAX, checksum, protocol,
    virtio::{self, Segmentation},
};

const TCP_CHECKSUM: u16 = 16;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// Joins consecutive segments of one connection; anything else passes through in order.
#[derive(Debug)]
pub struct Coalescer {
    /// Room for a virtio header and one super-packet. Exactly that: an IP length past 65,535 would wrap.
    buffer: Vec<u8>,
    held: Option<Held>,
    joining: bool,
    mtu: usize,
}

/// The packet in the buffer that may still grow.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// Offset of the TCP header.
    tcp: usize,
    /// Offset of the TCP payload.
    payload: usize,
    /// Payload of the first segment; all but the last must match it.
    size: usize,
    next_sequence: u32,
}

impl Coalescer {
    /// A coalescer for a TUN of `mtu` bytes that takes super-packets if `joining`, or single packets if not.
    #[must_use]
    pub fn new(mtu: u16, joining: bool) -> Self {
        Self { buffer: Vec::with_capacity(virtio::LENGTH + MAX), held: None, joining, mtu: usize::from(mtu) }
    }

    /// Stops joining, for a kernel that refused a super-packet.
    pub fn stop_joining(&mut self) {
        self.joining = false;
    }

    /// Takes one IP packet. What is now complete goes to `emit`: a virtio header and an IP packet behind it.
    pub fn push(&mut self, packet: &[u8], emit: &mut impl FnMut(&[u8])) {
        let Some(header) = IpHeader::parse(packet) else { return };
        let packet = &packet[..header.total];
        let segment = Segment::of(&header, packet);

        if let (Some(held), Some(segment)) = (self.held, &segment)
            && self.joining
            && segment.continues(&held, &self.buffer[virtio::LENGTH..], packet)
        {
            return self.append(held, segment, packet, emit);
        }
        self.flush(emit);
        self.buffer.resize(virtio::LENGTH, 0);
        self.buffer.extend_from_slice(packet);
        match segment {
            // A super-packet that a stream carried unsplit is whole as it is, and so is one that ends a burst.
            Some(segment) => {
                let size = segment.length(packet);
                let held = Held {
                    tcp: header.payload,
                    payload: segment.payload,
                    size,
                    next_sequence: segment.sequence.wrapping_add(size as u32),
                };
                self.held = Some(held);
                let grows = self.joining
                    && segment.plain
                    && size > 0
                    && segment.flags & PSH == 0
                    && packet.len() <= self.mtu;
                if !grows {
                    self.flush(emit);
                }
            }
            None => {
                self.buffer[..virtio::LENGTH].fill(0);
                emit(&self.buffer);
                self.buffer.clear();
            }
        }
    }

    fn append(&mut self, held: Held, segment: &Segment, packet: &[u8], emit: &mut impl FnMut(&[u8])) {
        let length = segment.length(packet);
        self.buffer.extend_from_slice(&packet[segment.payload..]);
        self.held = Some(Held { next_sequence: held.next_sequence.wrapping_add(length as u32), ..held });
        if segment.flags & PSH != 0 {
            self.buffer[virtio::LENGTH + held.tcp + 13] |= PSH;
        }
        if length < held.size || segment.flags & PSH != 0 {
            self.flush(emit);
        }
    }

    /// Emits what is held, at the end of a batch.
    pub fn flush(&mut self, emit: &mut impl FnMut(&[u8])) {
        let Some(held) = self.held.take() else { return };
        let (virtio, packet) = self.buffer.split_at_mut(virtio::LENGTH);
        let payload = packet.len() - held.payload;
        // One segment more than the held size, or a super-packet of a stream: cut at what the MTU allows.
        let size = held.size.min(self.mtu.saturating_sub(held.payload)).max(1);
        let header = finish_headers(packet, held, (payload > size).then_some(size));
        virtio.copy_from_slice(&header.encode());
        emit(&self.buffer);
        self.buffer.clear();
    }
}

/// Writes lengths and sums of a joined packet, and describes it to the kernel.
fn finish_headers(packet: &mut [u8], held: Held, cut: Option<usize>) -> virtio::Header {
    let total = packet.len();
    let v4 = packet[0] >> 4 == 4;
    if v4 {
        packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
        packet[10..12].fill(0);
        let sum = checksum::ipv4_header(&packet[..held.tcp]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        packet[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
    }
    if let Some(header) = IpHeader::parse(packet) {
        let pseudo =
            checksum::pseudo_header(header.source, header.destination, protocol::TCP, total - held.tcp);
        let field = held.tcp + usize::from(TCP_CHECKSUM);
        packet[field..field + 2].copy_from_slice(&checksum::fold(pseudo).to_be_bytes());
    }
    virtio::Header {
        needs_checksum: true,
        segmentation: match (cut, v4) {
            (None, _) => Segmentation::None,
            (Some(_), true) => Segmentation::TcpV4,
            (Some(_), false) => Segmentation::TcpV6,
        },
        headers: held.payload as u16,
        size: cut.unwrap_or(0) as u16,
        checksum_start: held.tcp as u16,
        checksum_offset: TCP_CHECKSUM,
    }
}

/// What joining looks at in a TCP segment.
#[derive(Debug)]
struct Segment {
    tcp: usize,
    payload: usize,
    sequence: u32,
    flags: u8,
    /// Nothing but ACK and PSH is set, and the IP header has no options or extensions.
    plain: bool,
}

impl Segment {
    fn of(header: &IpHeader, packet: &[u8]) -> Option<Self> {
        if header.protocol != protocol::TCP || header.fragment.is_some() {
            return None;
        }
        let tcp = packet.get(header.payload..header.payload + 20)?;
        let payload = header.payload + usize::from(tcp[12] >> 4) * 4;
        if payload < header.payload + 20 || payload > header.total {
            return None;
        }
        let flags = tcp[13];
        Some(Self {
            tcp: header.payload,
            payload,
            sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
            flags,
            plain: flags & !PSH == ACK && header.payload == if packet[0] >> 4 == 4 { 20 } else { 40 },
        })
    }

    fn length(&self, packet: &[u8]) -> usize {
        packet.len() - self.payload
    }

    /// Whether this segment is the next one of `held`, with headers that say the same.
    fn continues(&self, held: &Held, first: &[u8], packet: &[u8]) -> bool {
        let length = self.length(packet);
        let same = |range: std::ops::Range<usize>| first.get(range.clone()) == packet.get(range);
        let addresses = if packet[0] >> 4 == 4 {
            same(0..2) && same(6..10) && same(12..20)
        } else {
            same(0..4) && same(6..40)
        };
        self.plain
            && self.tcp == held.tcp
            && self.payload == held.payload
            && (1..=held.size).contains(&length)
            && first.len() + length <= MAX
            && self.sequence == held.next_sequence
            && addresses
            // Ports, acknowledgement, window and options; the sequence number between them differs.
            && same(held.tcp..held.tcp + 4)
            && same(held.tcp + 8..held.tcp + 13)
            && same(held.tcp + 14..held.tcp + 16)
            && same(held.tcp + 18..held.payload)
    }
}

#[cfg(test)]
mod tests {
    use super::super::segment::{split, tests::tcp};
    use super::*;

    fn run(coalescer: &mut Coalescer, packets: &[Vec<u8>]) -> Vec<(virtio::Header, Vec<u8>)> {
        let mut out = Vec::new();
        let mut emit = |bytes: &[u8]| {
            out.push((virtio::Header::decode(bytes).unwrap(), bytes[virtio::LENGTH..].to_vec()));
        };
        for packet in packets {
            coalescer.push(packet, &mut emit);
        }
        coalescer.flush(&mut emit);
        out
    }

    #[test]
    fn what_was_cut_is_joined_again() {
        for v6 in [false, true] {
            let payload: Vec<u8> = (0..20_000u32).map(|byte| (byte * 7) as u8).collect();
            let mut whole = tcp(v6, 77, PSH, &payload);
            let mut pieces = Vec::new();
            split(&mut whole, 1360, &mut Vec::new(), |piece| pieces.push(piece.to_vec()));
            let out = run(&mut Coalescer::new(1420, true), &pieces);
            assert_eq!(out.len(), 1, "v6={v6}");
            let (header, packet) = &out[0];
            assert_eq!(header.size, 1360);
            let start = usize::from(header.headers);
            assert_eq!(&packet[start..], payload);
            let parsed = IpHeader::parse(packet).unwrap();
            assert_eq!(parsed.total, packet.len());
            // The kernel completes the pseudo-header sum over the segment; then it must hold.
            let mut finished = packet.clone();
            super::super::segment::finish(&mut finished);
            assert_eq!(&finished[start..], &whole[start..]);
        }
    }

    #[test]
    fn a_gap_an_other_connection_or_a_flag_ends_a_run() {
        let mut other = tcp(false, 1100, 0, &[1; 100]);
        other[21] = 0x91;
        let packets = vec![
            tcp(false, 1000, 0, &[1; 100]),
            tcp(false, 1100, 0, &[2; 100]),
            tcp(false, 1300, 0, &[3; 100]),
            other,
            tcp(false, 1400, 1, &[4; 100]),
            tcp(false, 1500, 0, &[]),
        ];
        let lengths: Vec<_> = run(&mut Coalescer::new(1420, true), &packets)
            .iter()
            .map(|(_, packet)| packet.len() - 40)
            .collect();
        assert_eq!(lengths, [200, 100, 100, 100, 0]);
    }

    #[test]
    fn a_super_packet_of_a_stream_is_cut_by_the_kernel_at_the_mtu() {
        let out = run(&mut Coalescer::new(1420, true), &[tcp(false, 1, 0, &[5; 40_000])]);
        assert_eq!((out[0].0.segmentation, out[0].0.size), (Segmentation::TcpV4, 1380));
        assert_eq!(out[0].1.len(), 40_040);
    }

    #[test]
    fn a_super_packet_never_passes_the_length_field() {
        let packets: Vec<_> = (0..120).map(|number| tcp(true, number * 1360, 0, &[6; 1360])).collect();
        for (_, packet) in run(&mut Coalescer::new(1420, true), &packets) {
            assert!(packet.len() <= MAX);
            assert_eq!(IpHeader::parse(&packet).unwrap().total, packet.len());
        }
    }

    #[test]
    fn without_offload_packets_pass_one_by_one() {
        let packets = vec![tcp(false, 1000, 0, &[1; 100]), tcp(false, 1100, 0, &[2; 100])];
        assert_eq!(run(&mut Coalescer::new(1420, false), &packets).len(), 2);
    }
}
