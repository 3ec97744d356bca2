//! Answers that are made here, and those of name servers made to fit what was asked.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, PTR};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use super::files::Hosts;

/// Lifetime of what comes from /etc/hosts, seconds: that of Kubernetes' own records.
const TTL: u32 = 5;

/// Largest answer over UDP, bytes (DNS Flag Day 2020).
const MAX_UDP: u16 = 1232;

/// Smallest that everybody takes (RFC 1035, 2.3.4).
const MIN_UDP: u16 = 512;

/// What came.
#[derive(Debug)]
pub(super) enum Asked {
    /// One question, which can be answered.
    Question(Box<Message>),
    /// Something else, and what is to be said to it.
    Other(Message),
}

/// Reads a packet; `None` if it is no question at all.
pub(super) fn read(packet: &[u8]) -> Option<Asked> {
    let message = Message::from_vec(packet).ok()?;
    let head = message.metadata;
    if head.message_type != MessageType::Query {
        return None;
    }
    let refused = match (head.op_code, message.queries.len()) {
        (OpCode::Query, 1) => return Some(Asked::Question(Box::new(message))),
        (OpCode::Query, _) => ResponseCode::FormErr,
        _ => ResponseCode::NotImp,
    };
    Some(Asked::Other(Message::error_msg(head.id, head.op_code, refused)))
}

/// What /etc/hosts says to a question, if anything.
pub(super) fn by_hosts(question: &Message, hosts: &Hosts) -> Option<Message> {
    let query = question.queries.first()?;
    let data: Vec<RData> = match query.query_type() {
        kind @ (RecordType::A | RecordType::AAAA) => {
            let addresses = hosts.addresses(query.name())?;
            addresses.into_iter().map(address).filter(|data| data.record_type() == kind).collect()
        }
        RecordType::PTR => {
            let address = query.name().parse_arpa_name().ok()?;
            let whole = address.prefix_len() == address.max_prefix_len();
            let name = hosts.name(address.addr()).filter(|_| whole)?;
            vec![RData::PTR(PTR(name.clone()))]
        }
        _ => return None,
    };
    let mut reply = reply(question, ResponseCode::NoError);
    reply.answers =
        data.into_iter().map(|data| Record::from_rdata(query.name().clone(), TTL, data)).collect();
    Some(reply)
}

fn address(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

/// An answer without records.
pub(super) fn reply(question: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(question.metadata.id, OpCode::Query);
    reply.metadata.recursion_desired = question.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.queries.clone_from(&question.queries);
    reply.edns = question.edns.as_ref().map(|_| edns());
    reply
}

fn edns() -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(MAX_UDP);
    edns
}

/// The same question about another name.
pub(super) fn about(question: &Message, name: &Name) -> Message {
    let mut other = question.clone();
    other.queries.iter_mut().for_each(|query| {
        query.set_name(name.clone());
    });
    other
}

/// Whether a server's message answers a question.
pub(super) fn belongs(answer: &Message, question: &Message) -> bool {
    answer.metadata.message_type == MessageType::Response
        && answer.metadata.id == question.metadata.id
        && answer.queries == question.queries
}

/// Whether a search ends with an answer: the name is there, and has what was asked for.
pub(super) fn is_final(answer: &Message) -> bool {
    answer.metadata.response_code == ResponseCode::NoError && !answer.answers.is_empty()
}

/// What was found by another name, as an answer to the question: the name that was asked for is an alias.
pub(super) fn aliased(question: &Message, found: Message) -> Message {
    let names = question.queries.first().zip(found.queries.first());
    let Some((asked, named)) = names.map(|(ours, theirs)| (ours.name().clone(), theirs.name().clone()))
    else {
        return found;
    };
    let mut answer = found;
    answer.metadata.id = question.metadata.id;
    if asked != named {
        answer.queries.clone_from(&question.queries);
        answer.answers.insert(0, Record::from_rdata(asked, TTL, RData::CNAME(CNAME(named))));
    }
    answer
}

/// The octets of an answer over UDP, cut to nothing where the asker could not take them: it asks again by TCP.
pub(super) fn over_udp(question: &[u8], answer: Vec<u8>) -> Option<Vec<u8>> {
    let limit = Message::from_vec(question).map_or(MIN_UDP, |message| message.max_payload());
    if answer.len() <= limit.clamp(MIN_UDP, MAX_UDP).into() {
        return Some(answer);
    }
    Message::from_vec(&answer).ok()?.truncate().to_vec().ok()
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, Query, ResponseCode};
    use hickory_proto::rr::rdata::TXT;
    use hickory_proto::rr::{Name, RData, Record, RecordType};

    use super::{Asked, Hosts, about, aliased, by_hosts, is_final, over_udp, read, reply};

    fn question(name: &str, kind: RecordType) -> Message {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    #[test]
    fn hosts_answer_both_ways() {
        let hosts = Hosts::parse("10.1.2.3 legacy.corp\nfd00::3 legacy.corp\n");
        let ask = |name: &str, kind| by_hosts(&question(name, kind), &hosts);
        let answer = ask("Legacy.Corp.", RecordType::A).unwrap();
        assert_eq!(answer.answers.len(), 1);
        assert!(is_final(&answer));
        assert_eq!(ask("legacy.corp.", RecordType::AAAA).unwrap().answers.len(), 1);
        assert!(ask("legacy.corp.", RecordType::TXT).is_none());
        assert!(ask("other.corp.", RecordType::A).is_none());
        let back = ask("3.2.1.10.in-addr.arpa.", RecordType::PTR).unwrap();
        assert_eq!(back.answers[0].data.to_string(), "legacy.corp.");
        assert!(ask("1.10.in-addr.arpa.", RecordType::PTR).is_none());
    }

    #[test]
    fn a_name_that_only_one_family_has_is_not_asked_for_elsewhere() {
        let hosts = Hosts::parse("10.1.2.3 legacy.corp\n");
        let answer = by_hosts(&question("legacy.corp.", RecordType::AAAA), &hosts).unwrap();
        assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
    }

    #[test]
    fn what_a_search_finds_is_an_alias_of_what_was_asked() {
        let asked = question("db.", RecordType::A);
        let expanded = about(&asked, &Name::from_ascii("db.shop.svc.").unwrap());
        let hosts = Hosts::parse("10.0.0.1 db.shop.svc");
        let found = by_hosts(&expanded, &hosts).unwrap();
        let answer = aliased(&asked, found);
        assert_eq!(answer.queries, asked.queries);
        let lines: Vec<_> =
            answer.answers.iter().map(|record| format!("{} {}", record.name, record.data)).collect();
        assert_eq!(lines, ["db. db.shop.svc.", "db.shop.svc. 10.0.0.1"]);
        let plain = by_hosts(&expanded, &hosts).unwrap();
        assert_eq!(aliased(&expanded, plain.clone()).answers, plain.answers);
    }

    #[test]
    fn what_is_no_question_is_told_so_or_ignored() {
        assert!(read(b"garbage").is_none());
        let query = question("a.", RecordType::A);
        assert!(matches!(read(&query.to_vec().unwrap()), Some(Asked::Question(_))));
        assert!(read(&reply(&query, ResponseCode::NoError).to_vec().unwrap()).is_none());
        let mut two = query.clone();
        two.add_query(query.queries[0].clone());
        let Some(Asked::Other(answer)) = read(&two.to_vec().unwrap()) else { panic!() };
        assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
    }

    #[test]
    fn answers_that_are_too_long_for_udp_are_cut() {
        let query = question("a.", RecordType::TXT);
        let mut long = reply(&query, ResponseCode::NoError);
        for _ in 0..4 {
            let data = RData::TXT(TXT::new(vec!["x".repeat(200)]));
            long.add_answer(Record::from_rdata(query.queries[0].name().clone(), 1, data));
        }
        let long = long.to_vec().unwrap();
        let cut = over_udp(&query.to_vec().unwrap(), long.clone()).unwrap();
        let cut = Message::from_vec(&cut).unwrap();
        assert!(cut.metadata.truncation && cut.answers.is_empty());
        let mut edns = query;
        edns.set_edns(super::edns());
        assert_eq!(over_udp(&edns.to_vec().unwrap(), long.clone()).unwrap(), long);
    }
}
