//! What an upstream answers: only what belongs to the question gets through.

use std::net::IpAddr;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::svcb::{Mandatory, SvcParamKey, SvcParamValue};
use hickory_proto::rr::rdata::{HTTPS, SVCB};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::BinEncodable;

use super::ResolverLimits;
use super::question::{Question, domain};
use crate::net::policy::Policy;
use crate::net::refusal::{Code, Refusal};

/// Longest chain of aliases.
const ALIASES: usize = 12;
/// Most addresses taken from one answer.
const ADDRESSES: usize = 32;
/// How long the guest may remember that there is nothing, in seconds.
const NOTHING_TTL: u32 = 300;

/// What of an answer may be told.
#[derive(Debug, Default)]
pub(super) struct Sifted {
    /// Records, in the order of the chain.
    pub(super) records: Vec<Record>,
    /// How long the guest may remember that there are none.
    pub(super) nothing: Option<Record>,
    /// Addresses among the records, with their time to live in seconds.
    pub(super) addresses: Vec<(IpAddr, u32)>,
    /// Whether the name does not exist.
    pub(super) no_name: bool,
    /// Why a part was left out.
    pub(super) left_out: Option<Refusal>,
    /// Bytes of what is not an address.
    pub(super) data: usize,
}

/// Follows the chain from the question, and keeps what is on it.
pub(super) fn sift(
    question: &Question,
    answer: &Message,
    policy: &Policy,
    limits: &ResolverLimits,
) -> Result<Sifted, Refusal> {
    let mut sifted = Sifted {
        no_name: answer.metadata.response_code == ResponseCode::NXDomain,
        ..Sifted::default()
    };
    let mut owner = question.query().map(|query| query.name).unwrap_or_default();
    for _ in 0..=ALIASES {
        let of = |kind| {
            let owner = owner.clone();
            move |record: &&Record| {
                record.name == owner
                    && record.dns_class == DNSClass::IN
                    && record.record_type() == kind
            }
        };
        for record in answer.answers.iter().filter(of(question.kind)) {
            sifted.take(question, record, policy)?;
        }
        let alias = answer.answers.iter().find(of(RecordType::CNAME));
        let Some(RData::CNAME(target)) = alias.map(|record| &record.data) else {
            break;
        };
        if question.kind == RecordType::CNAME {
            break;
        }
        policy.alias(&domain(&target.0)?)?;
        let ttl = alias.map_or(0, |record| record.ttl);
        sifted.add(question, &owner, ttl, RData::CNAME(target.clone()));
        owner = target.0.to_lowercase();
    }
    let size: usize = sifted.records.iter().map(size).sum();
    if size > limits.answer_bytes {
        let cause = format!("the answer for {} has {size} bytes", question.name);
        let remedy = "Ask for the addresses of a host (A or AAAA).";
        return Err(Refusal::built_in(Code::AnswerSize, cause, remedy));
    }
    if sifted.records.is_empty() {
        sifted.nothing = answer
            .authorities
            .iter()
            .find_map(|record| nothing(record, &owner));
    }
    // Aliases to nowhere tell about names only.
    let only_aliases = sifted.addresses.is_empty() && sifted.left_out.is_some();
    if only_aliases && let Some(refusal) = sifted.left_out.take() {
        return Err(refusal);
    }
    Ok(sifted)
}

impl Sifted {
    fn take(
        &mut self,
        question: &Question,
        record: &Record,
        policy: &Policy,
    ) -> Result<(), Refusal> {
        let address = match &record.data {
            RData::A(a) => Some(IpAddr::V4(a.0)),
            RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
            _ => None,
        };
        if let Some(address) = address {
            if let Some(kind) = policy.forbids(address) {
                let cause = format!(
                    "{} has the address {address}, which is {kind}",
                    question.name
                );
                let remedy =
                    format!("Allow it with `--allow-cidr {address}`, if it should be reached.");
                self.left_out = Some(Refusal::built_in(Code::AnswerPrivate, cause, &remedy));
                return Ok(());
            }
            if self.addresses.len() >= ADDRESSES {
                return Ok(());
            }
            self.addresses.push((address, record.ttl));
            self.add(question, &record.name, record.ttl, record.data.clone());
            return Ok(());
        }
        let data = match &record.data {
            RData::HTTPS(https) => without_hints(&https.0).map(|svcb| RData::HTTPS(HTTPS(svcb))),
            RData::SVCB(svcb) => without_hints(svcb).map(RData::SVCB),
            // Other data of this type would be something that we do not understand.
            RData::Unknown { .. } | RData::NULL(_) => None,
            other => Some(other.clone()),
        };
        if let Some(data) = data {
            self.add(question, &record.name, record.ttl, data);
            self.data += self.records.last().map_or(0, size);
        }
        Ok(())
    }

    /// Under the name that the guest wrote, where it is that one.
    fn add(&mut self, question: &Question, owner: &Name, ttl: u32, data: RData) {
        let name = match owner == question.written() {
            true => question.written().clone(),
            false => owner.clone(),
        };
        self.records.push(Record::from_rdata(name, ttl, data));
    }
}

/// Service parameters without addresses, which would be past the sieve, and
/// without keys for Encrypted Client Hello, which would hide names. `None` when
/// the record is of no use without them.
fn without_hints(svcb: &SVCB) -> Option<SVCB> {
    let hides = |key: &SvcParamKey| {
        matches!(
            key,
            SvcParamKey::Ipv4Hint | SvcParamKey::Ipv6Hint | SvcParamKey::EchConfigList
        )
    };
    let mut kept = svcb.svc_params.clone();
    kept.retain(|(key, _)| !hides(key));
    let needs_them = kept.iter().any(|(_, value)| match value {
        SvcParamValue::Mandatory(Mandatory(keys)) => keys.iter().any(hides),
        _ => false,
    });
    (!needs_them).then(|| SVCB::new(svcb.svc_priority, svcb.target_name.clone(), kept))
}

/// How long there is nothing (RFC 2308), where the record says that about `name`.
fn nothing(record: &Record, name: &Name) -> Option<Record> {
    let RData::SOA(soa) = &record.data else {
        return None;
    };
    let fits = record.dns_class == DNSClass::IN && record.name.zone_of(name);
    let ttl = record.ttl.min(soa.minimum).min(NOTHING_TTL);
    fits.then(|| Record::from_rdata(record.name.clone(), ttl, record.data.clone()))
}

/// Bytes of a record, names not compressed.
fn size(record: &Record) -> usize {
    record
        .to_bytes()
        .map_or(usize::MAX / 64, |bytes| bytes.len())
}
