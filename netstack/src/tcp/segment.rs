//! TCP segments on the wire (RFC 9293, 3.1; RFC 7323; RFC 2018).

use std::net::SocketAddr;

use crate::packet::{header, protocol};

pub(super) const FIN: u8 = 0x01;
pub(super) const SYN: u8 = 0x02;
pub(super) const RST: u8 = 0x04;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;

/// Option kinds (IANA).
const END: u8 = 0;
const NOP: u8 = 1;
const MSS: u8 = 2;
const SCALE: u8 = 3;
const SACK_PERMITTED: u8 = 4;
const SACK: u8 = 5;

/// Length of the header without options, bytes.
const HEADER: usize = 20;

/// Most SACK blocks in one segment (RFC 2018, 3).
pub(super) const MAX_BLOCKS: usize = 4;

/// What a SYN says about its sender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Abilities {
    /// Largest segment payload it takes, bytes.
    pub(super) mss: Option<u16>,
    /// Its window's scale, if it takes scaled windows.
    pub(super) scale: Option<u8>,
    /// Whether it understands selective acknowledgements.
    pub(super) sack: bool,
}

/// Selectively acknowledged sequence numbers, the most recent first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    blocks: [(u32, u32); MAX_BLOCKS],
    count: usize,
}

impl Blocks {
    pub(super) fn push(&mut self, start: u32, end: u32) {
        if self.count < MAX_BLOCKS {
            self.blocks[self.count] = (start, end);
            self.count += 1;
        }
    }

    pub(super) fn as_slice(&self) -> &[(u32, u32)] {
        &self.blocks[..self.count]
    }
}

/// A segment, as far as it matters to a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'a> {
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) abilities: Abilities,
    pub(super) blocks: Blocks,
    pub(super) payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Reads what follows an IP header.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let head: &[u8; HEADER] = bytes.first_chunk()?;
        let start = usize::from(head[12] >> 4) * 4;
        let mut segment = Self {
            sequence: u32::from_be_bytes([head[4], head[5], head[6], head[7]]),
            acknowledgement: u32::from_be_bytes([head[8], head[9], head[10], head[11]]),
            flags: head[13],
            window: u16::from_be_bytes([head[14], head[15]]),
            abilities: Abilities::default(),
            blocks: Blocks::default(),
            payload: bytes.get(start..)?,
        };
        segment.parse_options(bytes.get(HEADER..start)?);
        Some(segment)
    }

    fn parse_options(&mut self, mut options: &[u8]) {
        while let Some((kind, rest)) = options.split_first() {
            if *kind == END {
                return;
            }
            if *kind == NOP {
                options = rest;
                continue;
            }
            let Some(value) = rest.first().and_then(|length| options.get(2..usize::from(*length))) else {
                return;
            };
            match (*kind, value) {
                (MSS, [high, low]) => self.abilities.mss = Some(u16::from_be_bytes([*high, *low])),
                // RFC 7323, 2.3: more than 14 means 14.
                (SCALE, [scale]) => self.abilities.scale = Some((*scale).min(14)),
                (SACK_PERMITTED, []) => self.abilities.sack = true,
                (SACK, blocks) => {
                    for block in blocks.as_chunks::<8>().0 {
                        let start = u32::from_be_bytes([block[0], block[1], block[2], block[3]]);
                        let end = u32::from_be_bytes([block[4], block[5], block[6], block[7]]);
                        self.blocks.push(start, end);
                    }
                }
                _ => {}
            }
            options = &options[2 + value.len()..];
        }
    }

    pub(super) fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

/// The headers of a segment that is sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// Said only in a SYN.
    pub(super) abilities: Option<Abilities>,
    pub(super) blocks: Blocks,
}

impl Head {
    /// Length of IP and TCP header together, bytes.
    pub(super) fn length(&self) -> usize {
        header::length(self.source.ip()) + HEADER + self.options()
    }

    fn options(&self) -> usize {
        let abilities = self.abilities.map_or(0, |abilities| {
            4 + if abilities.scale.is_some() { 4 } else { 0 } + if abilities.sack { 4 } else { 0 }
        });
        let blocks = match self.blocks.count {
            0 => 0,
            count => 4 + 8 * count,
        };
        abilities + blocks
    }

    /// Writes both headers at the start of `packet`, before a payload that fills the rest of it. The checksum
    /// field is zero.
    pub(super) fn write(&self, packet: &mut [u8]) {
        let start = header::length(self.source.ip());
        let length = packet.len() - start;
        header::write(packet, self.source.ip(), self.destination.ip(), protocol::TCP, length);
        let (head, rest) = packet[start..].split_at_mut(HEADER);
        head[..2].copy_from_slice(&self.source.port().to_be_bytes());
        head[2..4].copy_from_slice(&self.destination.port().to_be_bytes());
        head[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        head[8..12].copy_from_slice(&self.acknowledgement.to_be_bytes());
        head[12] = ((HEADER + self.options()) as u8 / 4) << 4;
        head[13] = self.flags;
        head[14..16].copy_from_slice(&self.window.to_be_bytes());
        head[16..20].fill(0);
        self.write_options(&mut rest[..self.options()]);
    }

    fn write_options(&self, mut options: &mut [u8]) {
        let mut put = |bytes: &[u8]| {
            let (here, rest) = std::mem::take(&mut options).split_at_mut(bytes.len());
            here.copy_from_slice(bytes);
            options = rest;
        };
        if let Some(Abilities { mss, scale, sack }) = self.abilities {
            let [high, low] = mss.unwrap_or_default().to_be_bytes();
            put(&[MSS, 4, high, low]);
            if let Some(scale) = scale {
                put(&[NOP, SCALE, 3, scale]);
            }
            if sack {
                put(&[NOP, NOP, SACK_PERMITTED, 2]);
            }
        }
        if self.blocks.count > 0 {
            put(&[NOP, NOP, SACK, 2 + 8 * self.blocks.count as u8]);
            for (start, end) in self.blocks.as_slice() {
                put(&start.to_be_bytes());
                put(&end.to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::IpHeader;

    fn arbitrary_head() -> impl Strategy<Value = Head> {
        let abilities = (1u16.., proptest::option::of(0u8..15), any::<bool>())
            .prop_map(|(mss, scale, sack)| Abilities { mss: Some(mss), scale, sack });
        let blocks = proptest::collection::vec(any::<(u32, u32)>(), 0..4);
        let numbers = any::<(u32, u32, u8, u16, bool)>();
        (proptest::option::of(abilities), blocks, numbers).prop_map(|(abilities, list, numbers)| {
            let (sequence, acknowledgement, flags, window, is_v4) = numbers;
            let (source, destination) = if is_v4 {
                ("10.0.0.1:80".parse().unwrap(), "10.0.0.2:4000".parse().unwrap())
            } else {
                ("[fd74::1]:80".parse().unwrap(), "[fd74::2]:4000".parse().unwrap())
            };
            let mut blocks = Blocks::default();
            // Both together would be longer than the options may be.
            if abilities.is_none() {
                list.into_iter().for_each(|(start, end)| blocks.push(start, end));
            }
            Head { source, destination, sequence, acknowledgement, flags, window, abilities, blocks }
        })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(
            head in arbitrary_head(),
            payload in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut packet = vec![0; head.length()];
            packet.extend_from_slice(&payload);
            head.write(&mut packet);
            let ip = IpHeader::parse(&packet).unwrap();
            prop_assert_eq!(ip.sockets(&packet), Some((head.source, head.destination)));
            let segment = Segment::parse(&packet[ip.payload..ip.total]).unwrap();
            prop_assert_eq!(segment.sequence, head.sequence);
            prop_assert_eq!(segment.acknowledgement, head.acknowledgement);
            prop_assert_eq!(segment.flags, head.flags);
            prop_assert_eq!(segment.window, head.window);
            prop_assert_eq!(segment.abilities, head.abilities.unwrap_or_default());
            prop_assert_eq!(segment.blocks, head.blocks);
            prop_assert_eq!(segment.payload, &payload[..]);
        }

        #[test]
        fn garbage_is_harmless(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Segment::parse(&bytes);
        }
    }
}
