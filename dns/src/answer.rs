//! An answer of the cluster, kept as its octets, and the replies that are made of it.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query as Question},
    rr::{
        DNSClass, Name as ProtoName, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME},
    },
    serialize::binary::{BinDecodable, BinDecoder},
};

use crate::{
    name::Name,
    wire::{self, Garbage, Query, Records, Section, rcode},
};

/// How long an answer is believed, whether it says that a name exists or that it doesn't. Pods come and go; this is the TTL that
/// Kubernetes' own records have, so a laptop sees a change when a pod would.
const MAX_TTL: Duration = Duration::from_secs(5);
/// Lifetime of what the proxy answers by itself. It never changes.
const LOCAL_TTL: u32 = 3600;
/// Longest message (its length travels in two octets over TCP).
pub(crate) const MAX_MESSAGE: usize = 65_535;

/// What a server of the cluster said to a question.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// As it was sent, without its OPT record.
    message: Box<[u8]>,
    /// Where its TTLs are.
    ttls: Box<[usize]>,
    received: Instant,
    lifetime: Duration,
}

impl Answer {
    /// Reads a reply that has been checked to belong to its question.
    pub(crate) fn read(reply: &[u8], now: Instant) -> Result<Self, Garbage> {
        let records: Vec<_> = Records::of(reply)?.collect::<Result<_, _>>()?;
        let opt = records.iter().position(|record| record.is_opt());
        let kept = &records[..opt.unwrap_or(records.len())];
        let end = opt.map_or(reply.len(), |index| records[index].start);
        let additional = kept.iter().filter(|record| record.section == Section::Additional).count() as u16;

        let mut message: Box<[u8]> = reply[..end].into();
        message[10..12].copy_from_slice(&additional.to_be_bytes());
        Ok(Self {
            message,
            ttls: kept.iter().map(wire::Record::ttl_at).collect(),
            received: now,
            lifetime: lifetime(reply, kept),
        })
    }

    pub(crate) fn code(&self) -> u8 {
        wire::code(&self.message)
    }

    /// Does the name exist, if not with this type?
    pub(crate) fn exists(&self) -> bool {
        self.code() == rcode::NO_ERROR
    }

    /// May be given out until then; `None` for what isn't kept at all.
    pub(crate) fn expires(&self) -> Option<Instant> {
        (!self.lifetime.is_zero()).then(|| self.received + self.lifetime)
    }

    /// The reply to `query`, which asked for the very name that the answer is about.
    pub(crate) fn reply(&self, query: &Query, now: Instant, limit: usize) -> Vec<u8> {
        if wire::be16(&self.message, 4) == 0 {
            return query.empty_reply(self.code());
        }
        let mut reply = self.aged(now);
        let question = wire::HEADER..wire::HEADER + query.question.len();
        let owner = &query.question[..query.name.wire().len()];
        for range in self.spelled_owners() {
            reply[range].copy_from_slice(owner);
        }
        reply[question].copy_from_slice(&query.question);
        wire::set_id(&mut reply, query.id);
        reply[2] = reply[2] & 0xfe | u8::from(query.recursion_desired);
        // The cluster's server says that it offers no recursion; this proxy, which asks for who can't, does.
        reply[3] |= 0x80;
        finish(reply, query, limit)
    }

    /// The reply to `query`, whose name is short for `full`: an alias (CNAME) of the name that the answer is about, as a pod's resolver
    /// would report it after going through its search list.
    pub(crate) fn aliased_reply(&self, query: &Query, full: &Name, now: Instant, limit: usize) -> Vec<u8> {
        if !self.exists() {
            return query.empty_reply(self.code());
        }
        match self.alias(query, full, now) {
            Some(reply) => finish(reply, query, limit),
            None => query.empty_reply(rcode::SERVER_FAILURE),
        }
    }

    fn alias(&self, query: &Query, full: &Name, now: Instant) -> Option<Vec<u8>> {
        let mut message = Message::from_vec(&self.aged(now)).ok()?;
        let question = read_question(query)?;
        let target = ProtoName::from_bytes(full.wire()).ok()?;
        let ttl = self.left(now).as_secs() as u32;
        let alias = Record::from_rdata(question.name().clone(), ttl, RData::CNAME(CNAME(target)));
        message.metadata.id = query.id;
        message.metadata.recursion_desired = query.recursion_desired;
        message.metadata.recursion_available = true;
        message.queries = vec![question];
        message.answers.insert(0, alias);
        message.to_vec().ok()
    }

    /// The message as it is now, with what is left of its TTLs.
    fn aged(&self, now: Instant) -> Vec<u8> {
        let age = now.saturating_duration_since(self.received).as_secs() as u32;
        let mut message = self.message.to_vec();
        for at in &self.ttls {
            let field: &mut [u8; 4] = (&mut message[*at..*at + 4]).try_into().expect("a slice of 4 octets");
            let ttl = u32::from_be_bytes(*field).min(MAX_TTL.as_secs() as u32).saturating_sub(age);
            *field = ttl.to_be_bytes();
        }
        message
    }

    fn left(&self, now: Instant) -> Duration {
        self.lifetime.saturating_sub(now.saturating_duration_since(self.received))
    }

    /// Where records repeat the name of the question in full, instead of pointing to it.
    fn spelled_owners(&self) -> Vec<std::ops::Range<usize>> {
        let Some((asked, _)) = Name::read(&self.message[wire::HEADER..]) else { return Vec::new() };
        let records = Records::of(&self.message).into_iter().flatten().flatten();
        records
            .map(|record| record.owner())
            .filter(|owner| self.message[owner.clone()].eq_ignore_ascii_case(asked.wire()))
            .collect()
    }
}

/// How long to keep an answer: its shortest TTL, or for a negative one what its SOA says (RFC 2308, 5).
fn lifetime(reply: &[u8], records: &[wire::Record<'_>]) -> Duration {
    const SOA: u16 = 6;
    let of = |section| records.iter().filter(move |record| record.section == section);
    let negative = || {
        let soa = of(Section::Authority).find(|record| record.kind() == SOA)?;
        let minimum = soa.data().last_chunk::<4>()?;
        Some(soa.ttl().min(u32::from_be_bytes(*minimum)))
    };
    let ttl = match wire::code(reply) {
        _ if wire::is_truncated(reply) => None,
        rcode::NO_ERROR => of(Section::Answer).map(wire::Record::ttl).min().or_else(negative),
        rcode::NX_DOMAIN => negative(),
        _ => None,
    };
    Duration::from_secs(ttl.unwrap_or(0).into()).min(MAX_TTL)
}

/// Makes room for the OPT record if one is due, and cuts whole records off the end until the reply fits.
fn finish(mut reply: Vec<u8>, query: &Query, limit: usize) -> Vec<u8> {
    const OPT_ROOM: usize = 11;
    let code = wire::code(&reply);
    let room = limit - if query.edns.is_some() { OPT_ROOM } else { 0 };
    if reply.len() > room {
        cut(&mut reply, room);
    }
    query.push_edns(&mut reply, code);
    reply
}

fn cut(reply: &mut Vec<u8>, room: usize) {
    let records: Vec<_> = Records::of(reply).into_iter().flatten().flatten().collect();
    let start = records.first().map_or(reply.len(), |record| record.start);
    let kept: Vec<_> = records.iter().take_while(|record| record.end <= room).collect();
    let end = kept.last().map_or(start, |record| record.end);
    let counts = [Section::Answer, Section::Authority, Section::Additional]
        .map(|section| kept.iter().filter(|record| record.section == section).count() as u16);
    // Additional records are a courtesy; without any other, the answer is incomplete and TCP has the rest.
    let missing = records.get(kept.len()).is_some_and(|first| first.section < Section::Additional);
    for (index, count) in counts.into_iter().enumerate() {
        reply[6 + 2 * index..8 + 2 * index].copy_from_slice(&count.to_be_bytes());
    }
    if missing {
        reply[2] |= 0x02;
    }
    reply.truncate(end);
}

/// The reply to a question about this machine or this proxy: those of `addresses` that are of the type asked for.
pub(crate) fn local_reply(query: &Query, addresses: &[IpAddr], ttl: Option<u32>) -> Vec<u8> {
    let Some(question) = read_question(query) else { return query.empty_reply(rcode::FORMAT_ERROR) };
    let mut message = Message::new(query.id, MessageType::Response, OpCode::Query);
    message.metadata.authoritative = true;
    message.metadata.recursion_desired = query.recursion_desired;
    message.metadata.recursion_available = true;
    let data = addresses.iter().map(|address| match address {
        IpAddr::V4(address) => RData::A(A(*address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(*address)),
    });
    let wanted = data.filter(|data| {
        data.record_type() == question.query_type() || question.query_type() == RecordType::ANY
    });
    let ttl = ttl.unwrap_or(LOCAL_TTL);
    let class = question.query_class() == DNSClass::IN;
    let records = wanted.filter(|_| class).map(|data| Record::from_rdata(question.name().clone(), ttl, data));
    message.add_answers(records);
    message.add_query(question);
    match message.to_vec() {
        Ok(reply) => finish(reply, query, query.limit()),
        Err(_) => query.empty_reply(rcode::SERVER_FAILURE),
    }
}

fn read_question(query: &Query) -> Option<Question> {
    Question::read(&mut BinDecoder::new(&query.question)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::rdata::{SOA, TXT};
    use proptest::prelude::*;

    const MINUTE: u32 = 60;
    const TYPE_A: u16 = 1;

    fn query(name: &str, limit: Option<u16>) -> Query {
        let mut packet =
            wire::cluster_question(&Name::parse(name).unwrap(), TYPE_A, wire::CLASS_IN, false, false);
        match limit {
            Some(limit) => {
                let at = packet.len() - 8;
                packet[at..at + 2].copy_from_slice(&limit.to_be_bytes());
            }
            None => {
                packet.truncate(packet.len() - 11);
                packet[11] = 0;
            }
        }
        let mut query = Query::read(&packet).unwrap();
        query.id = 4711;
        query
    }

    fn proto(name: &str) -> ProtoName {
        ProtoName::from_ascii(name).unwrap()
    }

    fn answer(name: &str, addresses: u8, ttl: u32) -> Answer {
        let mut message = Message::new(0, MessageType::Response, OpCode::Query);
        message.add_query(Question::query(proto(name), RecordType::A));
        for last in 0..addresses {
            message.add_answer(Record::from_rdata(proto(name), ttl, RData::A(A::new(10, 96, 0, last))));
        }
        if addresses == 0 {
            let soa = SOA::new(proto("ns.cluster.local."), proto("admin.cluster.local."), 1, 2, 3, 4, 30);
            message.add_authority(Record::from_rdata(proto("cluster.local."), ttl, RData::SOA(soa)));
        }
        message.set_edns(hickory_proto::op::Edns::new());
        Answer::read(&message.to_vec().unwrap(), Instant::now()).unwrap()
    }

    #[test]
    fn patches_identifier_spelling_and_time() {
        let answer = answer("web.shop.svc.cluster.local.", 2, MINUTE);
        let mut asked = query("web.shop.svc.cluster.local", Some(1232));
        asked.question[1] = b'W';
        let later = answer.received + Duration::from_secs(2);
        let reply = Message::from_vec(&answer.reply(&asked, later, 1232)).unwrap();
        assert_eq!(reply.metadata.id, 4711);
        assert_eq!(reply.queries[0].name().to_ascii(), "Web.shop.svc.cluster.local.");
        assert_eq!(reply.answers.len(), 2);
        for record in &reply.answers {
            assert_eq!(record.name.to_ascii(), "Web.shop.svc.cluster.local.");
            assert_eq!(record.ttl, 3, "clamped to 5, two seconds old");
        }
        assert!(reply.edns.is_some());
        assert_eq!(answer.expires(), Some(answer.received + MAX_TTL));
    }

    #[test]
    fn who_asks_without_edns_gets_none() {
        let answer = answer("web.", 1, MINUTE);
        let reply = Message::from_vec(&answer.reply(&query("web", None), answer.received, 512)).unwrap();
        assert!(reply.edns.is_none() && reply.additionals.is_empty());
    }

    #[test]
    fn an_alias_leads_from_the_short_name_to_the_full_one() {
        let answer = answer("web.shop.svc.cluster.local.", 1, MINUTE);
        let full = Name::parse("web.shop.svc.cluster.local").unwrap();
        let reply = answer.aliased_reply(&query("web.shop", Some(1232)), &full, answer.received, 1232);
        let reply = Message::from_vec(&reply).unwrap();
        assert_eq!(reply.queries[0].name().to_ascii(), "web.shop.");
        assert_eq!(reply.answers[0].name.to_ascii(), "web.shop.");
        assert_eq!(reply.answers[0].data, RData::CNAME(CNAME(proto("web.shop.svc.cluster.local."))));
        assert_eq!(reply.answers[1].data, RData::A(A::new(10, 96, 0, 0)));
    }

    #[test]
    fn negative_answers_live_as_long_as_the_soa_says() {
        assert_eq!(answer("web.", 0, 3).lifetime, Duration::from_secs(3));
        assert_eq!(answer("web.", 0, MINUTE).lifetime, MAX_TTL);
        assert_eq!(answer("web.", 1, 0).expires(), None);
    }

    #[test]
    fn what_does_not_fit_is_cut_between_records() {
        let answer = answer("web.shop.svc.cluster.local.", 100, MINUTE);
        for (limit, edns) in [(512, None), (600, Some(600)), (1232, Some(4096))] {
            let query = query("web.shop.svc.cluster.local", edns);
            let reply = answer.reply(&query, answer.received, query.limit());
            assert!(reply.len() <= limit && reply.len() > limit - 30, "{} of {limit}", reply.len());
            let reply = Message::from_vec(&reply).unwrap();
            assert!(reply.metadata.truncation && reply.answers.len() > 20);
        }
        let query = query("web.shop.svc.cluster.local", Some(1232));
        let reply = Message::from_vec(&answer.reply(&query, answer.received, MAX_MESSAGE)).unwrap();
        assert!(!reply.metadata.truncation && reply.answers.len() == 100);
    }

    #[test]
    fn local_answers_are_of_the_type_asked_for() {
        let both: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
        let reply = Message::from_vec(&local_reply(&query("localhost", None), &both, None)).unwrap();
        assert_eq!(reply.answers.len(), 1);
        assert_eq!(reply.answers[0].data, RData::A(A::new(127, 0, 0, 1)));
    }

    #[test]
    fn unknown_record_types_go_through() {
        let mut message = Message::new(0, MessageType::Response, OpCode::Query);
        message.add_query(Question::query(proto("web.shop.svc.cluster.local."), RecordType::Unknown(65_400)));
        let data = RData::Unknown {
            code: RecordType::Unknown(65_400),
            rdata: hickory_proto::rr::rdata::NULL::with(vec![1, 2, 3]),
        };
        message.add_answer(Record::from_rdata(proto("web.shop.svc.cluster.local."), 5, data.clone()));
        message.add_answer(Record::from_rdata(proto("x."), 5, RData::TXT(TXT::new(vec!["t".into()]))));
        let answer = Answer::read(&message.to_vec().unwrap(), Instant::now()).unwrap();
        let full = Name::parse("web.shop.svc.cluster.local").unwrap();
        let reply = answer.aliased_reply(&query("web.shop", None), &full, answer.received, 512);
        assert_eq!(Message::from_vec(&reply).unwrap().answers[1].data, data);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut packet in proptest::collection::vec(any::<u8>(), 12..600), counts in any::<[bool; 4]>()) {
            for (index, one) in counts.into_iter().enumerate() {
                packet[4 + 2 * index] = 0;
                packet[5 + 2 * index] = one.into();
            }
            let query = query("web.shop", Some(512));
            let full = Name::parse("web.shop.svc.cluster.local").unwrap();
            if let Ok(answer) = Answer::read(&packet, Instant::now()) {
                answer.aliased_reply(&query, &full, answer.received, 512);
                if wire::is_reply_to(&packet, wire::be16(&packet, 0), &query.question) {
                    answer.reply(&query, answer.received, 512);
                }
            }
        }
    }
}
