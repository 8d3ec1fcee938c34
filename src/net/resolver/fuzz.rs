//! Doors for the fuzzer: what a guest and an upstream may say.

use hickory_proto::op::{Message, OpCode};
use hickory_proto::rr::{RData, RecordType};

use super::ResolverLimits;
use super::answer::sift;
use super::question::{Heard, Question, hear};
use crate::net::address;
use crate::net::policy::Policy;
use crate::spec::{Domain, NetworkPolicy};

/// Takes a guest's message, and reads again what it would be answered.
pub fn question(bytes: &[u8]) {
    let replies = match hear(bytes) {
        Heard::Noise => vec![],
        Heard::Wrong(bytes) => vec![bytes],
        Heard::Refused {
            reply,
            name,
            kind,
            refusal,
        } => {
            let texts = [&name, &kind, &refusal.cause, &refusal.remedy];
            assert!(texts.iter().all(|text| !text.contains(char::is_control)));
            vec![
                reply.udp().expect("it is small"),
                reply.tcp().expect("it is small")[2..].to_vec(),
            ]
        }
        Heard::Question(question) => {
            assert_eq!(
                Domain::parse(question.name.as_str()).as_ref(),
                Ok(&question.name)
            );
            let query = question.query().expect("a name of a host fits");
            assert_eq!(
                query.name.num_labels() as usize,
                question.name.labels().count()
            );
            let reply = question.failed(&"x".repeat(500));
            vec![reply.udp().expect("it is small")]
        }
    };
    for reply in replies {
        let reply = Message::from_vec(&reply).expect("we write what can be read");
        assert_eq!(reply.metadata.id.to_be_bytes(), bytes[..2]);
        assert!(reply.answers.is_empty() && !reply.metadata.truncation);
    }
}

/// Takes an upstream's answer to a question about `example.org`: nothing gets
/// through that is not asked for or may not be reached.
pub fn answer(bytes: &[u8], kind: u16, ipv6: bool) {
    let Ok(answer) = Message::from_vec(bytes) else {
        return;
    };
    // As where it is received: an update may have records without content.
    if answer.metadata.op_code != OpCode::Query {
        return;
    }
    let kind = RecordType::from(kind);
    let name = Domain::parse("example.org").expect("it is one");
    let question = Question::of(&name, kind).expect("it fits");
    let policy = Policy::new(&NetworkPolicy {
        ipv6,
        ..NetworkPolicy::default()
    });
    let limits = ResolverLimits::default();
    let Ok(sifted) = sift(&question, &answer, &policy, &limits) else {
        return;
    };
    let mut told = 0;
    for record in &sifted.records {
        let address = match &record.data {
            RData::A(a) => Some(a.0.into()),
            RData::AAAA(aaaa) => Some(aaaa.0.into()),
            _ => None,
        };
        if let Some(address) = address {
            assert!(address::special(address).is_none(), "{address} got through");
            assert!(sifted.addresses.iter().any(|(one, _)| *one == address));
            told += 1;
        }
        assert!(matches!(record.record_type(), RecordType::CNAME) || record.record_type() == kind);
    }
    assert_eq!(told, sifted.addresses.len());
    let mut reply = question.empty();
    reply.message.answers = sifted.records;
    reply.message.authorities.extend(sifted.nothing);
    if let Some(bytes) = reply.udp() {
        Message::from_vec(&bytes).expect("we write what can be read");
    }
}
