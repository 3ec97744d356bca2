//! The header that a TUN with offloads puts before each packet (virtio 1.2, 5.1.6; native byte order).

/// Length of the header, bytes.
pub const LENGTH: usize = 10;

/// The checksum field holds the pseudo-header's sum; whoever needs the whole one completes it.
const NEEDS_CHECKSUM: u8 = 1;
/// Set beside the type of a segmented packet whose headers carry an ECN echo.
const ECN: u8 = 0x80;

/// What kind of super-packet follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Segmentation {
    /// One packet as it is.
    #[default]
    None = 0,
    /// TCP over IPv4.
    TcpV4 = 1,
    /// TCP over IPv6.
    TcpV6 = 4,
    /// UDP datagrams of one size, over either.
    Udp = 5,
}

/// The fields that matter to a TUN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Whether the checksum at `checksum_start + checksum_offset` is still to be completed.
    pub needs_checksum: bool,
    /// What follows.
    pub segmentation: Segmentation,
    /// Bytes of headers that every segment repeats.
    pub headers: u16,
    /// Payload bytes of each segment but the last.
    pub size: u16,
    /// Where checksumming starts, bytes into the packet.
    pub checksum_start: u16,
    /// Where the field is, bytes from `checksum_start`.
    pub checksum_offset: u16,
}

impl Header {
    /// Reads a header; `None` if it is cut short or of a kind that was not asked for.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LENGTH] = bytes.first_chunk()?;
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Some(Self {
            needs_checksum: bytes[0] & NEEDS_CHECKSUM != 0,
            segmentation: match bytes[1] & !ECN {
                0 => Segmentation::None,
                1 => Segmentation::TcpV4,
                4 => Segmentation::TcpV6,
                5 => Segmentation::Udp,
                _ => return None,
            },
            headers: word(2),
            size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[0] = if self.needs_checksum { NEEDS_CHECKSUM } else { 0 };
        bytes[1] = self.segmentation as u8;
        let words = [self.headers, self.size, self.checksum_start, self.checksum_offset];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::{Header, Segmentation};

    #[test]
    fn a_header_survives_its_wire_form() {
        let header = Header {
            needs_checksum: true,
            segmentation: Segmentation::TcpV6,
            headers: 72,
            size: 1348,
            checksum_start: 40,
            checksum_offset: 16,
        };
        assert_eq!(Header::decode(&header.encode()), Some(header));
    }

    #[test]
    fn what_was_not_asked_for_is_refused() {
        assert_eq!(Header::decode(&[0; 9]), None);
        assert_eq!(Header::decode(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        let ecn = Header::decode(&[1, 0x81, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(ecn.map(|header| header.segmentation), Some(Segmentation::TcpV4));
    }
}
