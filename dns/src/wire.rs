//! DNS messages as octets (RFC 1035, 4): just enough reading to route, check, cache and patch them.
//!
//! Answers stay the octets that the cluster's server sent, so that record types nobody here knows go through unharmed.

use crate::name::Name;

/// Octets of the header.
pub(crate) const HEADER: usize = 12;
/// What a UDP answer may measure when the asker says nothing (RFC 1035, 2.3.4).
pub(crate) const PLAIN_LIMIT: u16 = 512;
/// What a UDP answer may measure at most. DNS Flag Day 2020: fits every path without fragments.
pub(crate) const EDNS_LIMIT: u16 = 1232;
/// Octets of an OPT record without options.
const OPT_LENGTH: usize = 11;
const OPT: u16 = 41;

pub(crate) const TYPE_PTR: u16 = 12;
pub(crate) const CLASS_IN: u16 = 1;

/// Response codes that are made or looked at here (RFC 1035, 4.1.1; RFC 6891, 9).
pub(crate) mod rcode {
    pub(crate) const NO_ERROR: u8 = 0;
    pub(crate) const FORMAT_ERROR: u8 = 1;
    pub(crate) const SERVER_FAILURE: u8 = 2;
    pub(crate) const NX_DOMAIN: u8 = 3;
    pub(crate) const NOT_IMPLEMENTED: u8 = 4;
    pub(crate) const REFUSED: u8 = 5;
    /// Needs EDNS: the upper bits travel in the OPT record.
    pub(crate) const BAD_VERSION: u8 = 16;
}

/// A packet that is no question. It is dropped: an answer would go to whoever's address is forged in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Garbage;

/// A question, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Query {
    pub(crate) id: u16,
    pub(crate) name: Name,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    /// The question section as the asker spelled it: answers repeat it to the letter.
    pub(crate) question: Box<[u8]>,
    pub(crate) recursion_desired: bool,
    pub(crate) checking_disabled: bool,
    pub(crate) edns: Option<Edns>,
    /// Neither a standard query nor one question: answered with this code.
    pub(crate) unsupported: Option<u8>,
    /// The whole packet, for who forwards it untouched.
    pub(crate) packet: Box<[u8]>,
}

/// What the asker's OPT record says (RFC 6891).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edns {
    pub(crate) limit: u16,
    pub(crate) version: u8,
    pub(crate) dnssec_ok: bool,
}

impl Query {
    pub(crate) fn read(packet: &[u8]) -> Result<Self, Garbage> {
        let header = packet.get(..HEADER).ok_or(Garbage)?;
        if header[2] & 0x80 != 0 {
            return Err(Garbage);
        }
        let opcode = header[2] >> 3 & 0xf;
        let (name, taken) = Name::read(&packet[HEADER..]).ok_or(Garbage)?;
        let end = HEADER + taken + 4;
        let question = packet.get(HEADER..end).ok_or(Garbage)?;
        let records = Records::after(packet, end);
        let unsupported = match (opcode, be16(packet, 4)) {
            (0, 1) => None,
            (0, _) => Some(rcode::FORMAT_ERROR),
            _ => Some(rcode::NOT_IMPLEMENTED),
        };
        let edns = match unsupported {
            None => records.collect::<Result<Vec<_>, _>>()?.into_iter().find_map(|record| record.edns()),
            Some(_) => None,
        };
        Ok(Self {
            id: be16(packet, 0),
            name,
            kind: be16(packet, end - 4),
            class: be16(packet, end - 2),
            question: question.into(),
            recursion_desired: header[2] & 0x01 != 0,
            checking_disabled: header[3] & 0x10 != 0,
            edns,
            unsupported,
            packet: packet.into(),
        })
    }

    /// What an answer over UDP may measure.
    pub(crate) fn limit(&self) -> usize {
        self.edns.map_or(PLAIN_LIMIT, |edns| edns.limit.clamp(PLAIN_LIMIT, EDNS_LIMIT)).into()
    }

    pub(crate) fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// An answer without records.
    pub(crate) fn empty_reply(&self, code: u8) -> Vec<u8> {
        let mut reply = Vec::with_capacity(HEADER + self.question.len() + OPT_LENGTH);
        let flags = [0x80 | u8::from(self.recursion_desired), 0x80 | code & 0xf];
        reply.extend(self.id.to_be_bytes());
        reply.extend(flags);
        reply.extend([0, 1, 0, 0, 0, 0, 0, 0]);
        reply.extend(&*self.question);
        self.push_edns(&mut reply, code);
        reply
    }

    /// Ends `reply` with an OPT record if the question had one (RFC 6891, 6.1.1).
    pub(crate) fn push_edns(&self, reply: &mut Vec<u8>, code: u8) {
        if let Some(edns) = self.edns {
            push_opt(reply, edns.dnssec_ok, code);
        }
    }
}

/// The question that the cluster is asked: (`name`, `kind`, `class`) with our own EDNS, as one that wants recursion.
pub(crate) fn cluster_question(
    name: &Name,
    kind: u16,
    class: u16,
    dnssec_ok: bool,
    checking_disabled: bool,
) -> Vec<u8> {
    let mut packet = vec![0, 0, 0x01, if checking_disabled { 0x10 } else { 0 }, 0, 1, 0, 0, 0, 0, 0, 0];
    packet.extend(name.wire());
    packet.extend(kind.to_be_bytes());
    packet.extend(class.to_be_bytes());
    push_opt(&mut packet, dnssec_ok, 0);
    packet
}

/// Is `reply` the answer to `question`, asked under `id`? Some servers leave the question out of an error.
pub(crate) fn is_reply_to(reply: &[u8], id: u16, question: &[u8]) -> bool {
    if reply.len() < HEADER || reply[2] & 0x80 == 0 || be16(reply, 0) != id {
        return false;
    }
    match be16(reply, 4) {
        0 => !matches!(code(reply), rcode::NO_ERROR | rcode::NX_DOMAIN),
        1 => reply.get(HEADER..HEADER + question.len()).is_some_and(|own| own.eq_ignore_ascii_case(question)),
        _ => false,
    }
}

pub(crate) fn code(message: &[u8]) -> u8 {
    message[3] & 0xf
}

pub(crate) fn is_truncated(message: &[u8]) -> bool {
    message[2] & 0x02 != 0
}

pub(crate) fn set_id(message: &mut [u8], id: u16) {
    message[..2].copy_from_slice(&id.to_be_bytes());
}

pub(crate) fn be16(message: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([message[at], message[at + 1]])
}

fn push_opt(message: &mut Vec<u8>, dnssec_ok: bool, code: u8) {
    message.push(0);
    message.extend(OPT.to_be_bytes());
    message.extend(EDNS_LIMIT.to_be_bytes());
    message.extend([code >> 4, 0, if dnssec_ok { 0x80 } else { 0 }, 0]);
    message.extend([0, 0]);
    let additional = be16(message, 10) + 1;
    message[10..12].copy_from_slice(&additional.to_be_bytes());
}

/// Sections that hold records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Section {
    Answer,
    Authority,
    Additional,
}

/// Where a record lies in its message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record<'a> {
    message: &'a [u8],
    pub(crate) section: Section,
    pub(crate) start: usize,
    /// Where its type field is; the TTL is 4 octets on, the data 10.
    fields: usize,
    pub(crate) end: usize,
}

impl<'a> Record<'a> {
    pub(crate) fn kind(&self) -> u16 {
        be16(self.message, self.fields)
    }

    pub(crate) fn is_opt(&self) -> bool {
        self.kind() == OPT
    }

    pub(crate) fn ttl_at(&self) -> usize {
        self.fields + 4
    }

    pub(crate) fn ttl(&self) -> u32 {
        let at = self.ttl_at();
        u32::from_be_bytes([
            self.message[at],
            self.message[at + 1],
            self.message[at + 2],
            self.message[at + 3],
        ])
    }

    pub(crate) fn data(&self) -> &'a [u8] {
        &self.message[self.fields + 10..self.end]
    }

    /// The owner's octets, up to a pointer or the root.
    pub(crate) fn owner(&self) -> std::ops::Range<usize> {
        self.start..self.fields
    }

    fn edns(&self) -> Option<Edns> {
        self.is_opt().then(|| Edns {
            limit: be16(self.message, self.fields + 2),
            version: self.message[self.fields + 5],
            dnssec_ok: self.message[self.fields + 6] & 0x80 != 0,
        })
    }
}

/// The records of a message in their order. Ends with [`Garbage`] where the message is broken.
pub(crate) struct Records<'a> {
    message: &'a [u8],
    at: usize,
    left: [u16; 3],
}

impl<'a> Records<'a> {
    /// Of a message that holds one question or none.
    pub(crate) fn of(message: &'a [u8]) -> Result<Self, Garbage> {
        let header = message.get(..HEADER).ok_or(Garbage)?;
        let at = match be16(header, 4) {
            0 => HEADER,
            1 => skip_name(message, HEADER).ok_or(Garbage)? + 4,
            _ => return Err(Garbage),
        };
        Ok(Self::after(message, at))
    }

    fn after(message: &'a [u8], at: usize) -> Self {
        Self { message, at, left: [be16(message, 6), be16(message, 8), be16(message, 10)] }
    }

    fn read(&self, section: Section) -> Option<Record<'a>> {
        let fields = skip_name(self.message, self.at)?;
        let length = self.message.get(fields + 8..fields + 10)?;
        let end = fields + 10 + usize::from(be16(length, 0));
        (end <= self.message.len()).then_some(Record {
            message: self.message,
            section,
            start: self.at,
            fields,
            end,
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, Garbage>;

    fn next(&mut self) -> Option<Self::Item> {
        let index = self.left.iter().position(|left| *left > 0)?;
        let section = [Section::Answer, Section::Authority, Section::Additional][index];
        match self.read(section) {
            Some(record) => {
                self.at = record.end;
                self.left[index] -= 1;
                Some(Ok(record))
            }
            None => {
                self.left = [0; 3];
                Some(Err(Garbage))
            }
        }
    }
}

/// Where the name that starts at `at` ends. Pointers are not followed: a name ends behind its first one.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let length = *message.get(at)?;
        match length >> 6 {
            0 if length == 0 => return Some(at + 1),
            0 => at += 1 + usize::from(length),
            3 if at + 1 < message.len() => return Some(at + 2),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TYPE_A: u16 = 1;

    fn question(name: &str) -> Vec<u8> {
        cluster_question(&Name::parse(name).unwrap(), TYPE_A, CLASS_IN, true, false)
    }

    #[test]
    fn reads_its_own_question() {
        let query = Query::read(&question("web.shop")).unwrap();
        assert_eq!(query.name, Name::parse("web.shop").unwrap());
        assert_eq!((query.kind, query.class, query.unsupported), (TYPE_A, CLASS_IN, None));
        assert!(query.recursion_desired && query.dnssec_ok());
        assert_eq!(query.limit(), 1232);
    }

    #[test]
    fn an_empty_reply_answers_the_question_to_the_letter() {
        let mut packet = question("web.shop");
        packet[HEADER + 1] = b'W';
        let query = Query::read(&packet).unwrap();
        let reply = query.empty_reply(rcode::NX_DOMAIN);
        assert!(is_reply_to(&reply, 0, &query.question) && !is_reply_to(&reply, 1, &query.question));
        assert_eq!(&reply[HEADER..HEADER + 5], b"\x03Web\x04");
        assert_eq!(code(&reply), rcode::NX_DOMAIN);
        assert!(Records::of(&reply).unwrap().all(|record| record.unwrap().is_opt()));
    }

    #[test]
    fn tells_questions_from_other_packets() {
        let good = question("web");
        let with = |at: usize, value: u8| {
            let mut packet = good.clone();
            packet[at] = value;
            packet
        };
        assert_eq!(Query::read(&[]), Err(Garbage));
        assert_eq!(Query::read(&good[..good.len() - 1]), Err(Garbage), "a cut OPT record");
        assert_eq!(Query::read(&with(2, 0x80)), Err(Garbage), "an answer");
        assert_eq!(Query::read(&with(HEADER, 0xc0)), Err(Garbage), "a compressed question");
        assert_eq!(Query::read(&with(2, 4 << 3)).unwrap().unsupported, Some(rcode::NOT_IMPLEMENTED));
        assert_eq!(Query::read(&with(5, 2)).unwrap().unsupported, Some(rcode::FORMAT_ERROR));
    }

    #[test]
    fn an_error_may_lack_the_question() {
        let query = question("web");
        let question = &query[HEADER..query.len() - OPT_LENGTH];
        let reply = |code: u8| [0, 7, 0x80, code, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(is_reply_to(&reply(rcode::SERVER_FAILURE), 7, question));
        assert!(!is_reply_to(&reply(rcode::NX_DOMAIN), 7, question));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(packet in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(query) = Query::read(&packet) {
                prop_assert!(Query::read(&query.packet).is_ok());
                query.empty_reply(rcode::SERVER_FAILURE);
            }
            if let Ok(records) = Records::of(&packet) {
                for record in records.flatten() {
                    let _ = (record.ttl(), record.data(), record.edns(), record.owner());
                }
            }
            is_reply_to(&packet, 1, b"\x00\x00\x01\x00\x01");
        }

        #[test]
        fn a_broken_question_never_panics(at in 0_usize..40, value in any::<u8>(), cut in 0_usize..60) {
            let mut packet = question("web.shop.svc.cluster.local");
            let index = at % packet.len();
            packet[index] = value;
            packet.truncate(packet.len() - cut % packet.len());
            let _ = Query::read(&packet);
        }
    }
}
