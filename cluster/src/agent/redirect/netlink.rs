//! Netlink messages as octets (netlink(7)): headers, attributes, nesting, and the transactions of nf_tables.

/// Subsystem of nf_tables within nfnetlink; the upper octet of a message's type.
const NF_TABLES: u16 = 10;

/// Types that begin and end a transaction. They name the subsystem in the resource field instead.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;

/// Marks an attribute that holds others.
const NESTED: u16 = 0x8000;

/// Octets of a message's header.
const HEADER: usize = 16;

/// Messages and attributes begin at multiples of so many octets.
const ALIGNMENT: usize = 4;

/// Family of the begin and end of a transaction.
const UNSPECIFIED: u8 = 0;

/// A transaction: the kernel carries out all of it, or nothing.
#[derive(Debug)]
pub(crate) struct Transaction {
    octets: Vec<u8>,
    sequence: u32,
}

impl Transaction {
    pub(crate) fn begin() -> Self {
        let mut transaction = Self { octets: Vec::new(), sequence: 0 };
        transaction.push(BATCH_BEGIN, 0, UNSPECIFIED, NF_TABLES, |_| {});
        transaction
    }

    /// Adds a message of nf_tables that the kernel shall acknowledge; returns the number that it does so by.
    pub(crate) fn add(
        &mut self,
        kind: u8,
        flags: u16,
        family: u8,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) -> u32 {
        self.push(NF_TABLES << 8 | u16::from(kind), flags | ACKNOWLEDGE, family, 0, fill)
    }

    /// The whole transaction, ready to be sent at once.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.push(BATCH_END, 0, UNSPECIFIED, NF_TABLES, |_| {});
        self.octets
    }

    fn push(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) -> u32 {
        let sequence = self.sequence;
        self.sequence += 1;
        let start = self.octets.len();
        self.octets.extend(0u32.to_ne_bytes());
        self.octets.extend(kind.to_ne_bytes());
        self.octets.extend((flags | REQUEST).to_ne_bytes());
        self.octets.extend(sequence.to_ne_bytes());
        // The kernel knows the socket's own number.
        self.octets.extend(0u32.to_ne_bytes());
        self.octets.extend([family, 0]);
        self.octets.extend(resource.to_be_bytes());
        fill(&mut Attributes(&mut self.octets));
        let length = (self.octets.len() - start) as u32;
        self.octets[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        sequence
    }
}

/// Where attributes of a message, or of an attribute, are written.
#[derive(Debug)]
pub(crate) struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    /// Octets as they are.
    pub(crate) fn octets(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |octets| octets.extend(value));
    }

    /// A name, ended by a zero.
    pub(crate) fn name(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |octets| {
            octets.extend(value.as_bytes());
            octets.push(0);
        });
    }

    /// A number. Those of nf_tables are big-endian.
    pub(crate) fn number(&mut self, kind: u16, value: u32) {
        self.octets(kind, &value.to_be_bytes());
    }

    /// A long number.
    pub(crate) fn long(&mut self, kind: u16, value: u64) {
        self.octets(kind, &value.to_be_bytes());
    }

    /// Attributes within one.
    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.attribute(kind | NESTED, |octets| fill(&mut Attributes(octets)));
    }

    fn attribute(&mut self, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.0.len();
        self.0.extend(0u16.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        write(self.0);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
    }
}

/// What the kernel answered to one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Number of the message.
    pub(crate) sequence: u32,
    /// 0, or the error's number as in errno(3).
    pub(crate) error: i32,
}

/// Type of a message that acknowledges or refuses another.
const ERROR: u16 = 2;

/// The answers that a datagram from the kernel holds. What is broken or is no answer is left out.
pub(crate) fn answers(mut datagram: &[u8]) -> Vec<Answer> {
    let mut answers = Vec::new();
    while let Some((message, rest)) = split(datagram) {
        let error = message.get(HEADER..HEADER + 4).and_then(|octets| octets.try_into().ok());
        if let (ERROR, Some(error)) = (u16::from_ne_bytes([message[4], message[5]]), error) {
            let sequence = u32::from_ne_bytes([message[8], message[9], message[10], message[11]]);
            answers.push(Answer { sequence, error: i32::from_ne_bytes(error).saturating_neg() });
        }
        datagram = rest;
    }
    answers
}

/// The first message, and what follows it.
fn split(datagram: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?) as usize;
    if length < HEADER || length > datagram.len() {
        return None;
    }
    let next = length.next_multiple_of(ALIGNMENT).min(datagram.len());
    Some((&datagram[..length], &datagram[next..]))
}

#[cfg(test)]
mod tests {
    use super::{Answer, HEADER, Transaction, answers};

    /// What a message has before its attributes.
    const PREAMBLE: usize = HEADER + 4;

    fn hex(octets: &[u8]) -> String {
        octets.iter().map(|octet| format!("{octet:02x}")).collect()
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_transaction_is_laid_out_as_the_kernel_reads_it() {
        let mut transaction = Transaction::begin();
        let sequence = transaction.add(0, 0x400, 1, |attributes| attributes.name(1, "tpd"));
        assert_eq!(sequence, 1);
        let octets = transaction.end();
        // As `nft --debug=mnl` shows them: begin, table, end.
        assert_eq!(hex(&octets[..20]), "1400000010000100000000000000000000 00000a".replace(' ', ""));
        assert_eq!(
            hex(&octets[20..48]),
            "1c000000000a050401000000000000000100000008000100747064 00".replace(' ', "")
        );
        assert_eq!(hex(&octets[48..]), "1400000011000100020000000000000000 00000a".replace(' ', ""));
    }

    #[test]
    fn attributes_are_padded_but_not_counted_so() {
        let mut transaction = Transaction::begin();
        let before = transaction.octets.len() + PREAMBLE;
        transaction.add(0, 0, 1, |attributes| {
            attributes.nested(2, |inner| inner.octets(1, &[7]));
            attributes.number(3, 1);
        });
        let octets = &transaction.octets[before..];
        assert_eq!(octets.len(), 12 + 8);
        assert_eq!(u16::from_ne_bytes([octets[0], octets[1]]), 12);
        assert_eq!(u16::from_ne_bytes([octets[2], octets[3]]), 0x8002);
        assert_eq!(u16::from_ne_bytes([octets[4], octets[5]]), 5);
        assert_eq!(octets[8..12], [7, 0, 0, 0]);
        assert_eq!(octets[16..], [0, 0, 0, 1]);
    }

    fn answer(sequence: u32, error: i32) -> Vec<u8> {
        let head = [&36u32.to_ne_bytes()[..], &2u16.to_ne_bytes(), &[0, 0], &sequence.to_ne_bytes(), &[0; 4]];
        [&head.concat()[..], &(-error).to_ne_bytes(), &[0; 16]].concat()
    }

    #[test]
    fn answers_are_found_and_garbage_is_not() {
        let datagram = [answer(1, 0), answer(2, 1)].concat();
        let expected = [Answer { sequence: 1, error: 0 }, Answer { sequence: 2, error: 1 }];
        assert_eq!(answers(&datagram), expected);
        for cut in 0..datagram.len() {
            assert!(answers(&datagram[..cut]).len() < 2);
        }
        assert_eq!(answers(&[0; 64]), []);
        assert_eq!(answers(&[0xff; 64]), []);
    }
}
