//! What the guest asks: taken apart, and answered where nobody else has to be asked.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{DNSClass, Name, RecordType};

use crate::net::address;
use crate::net::refusal::{Code, Refusal};
use crate::spec::Domain;

/// The option that tells why (RFC 8914, Extended DNS Errors), and its codes.
const EDE: u16 = 15;
/// "Blocked", by the operator of the resolver.
const EDE_BLOCKED: u16 = 15;
/// "Network Error".
const EDE_NETWORK: u16 = 23;
/// Longest text of an extended error.
const EDE_TEXT: usize = 200;
/// Largest answer over UDP.
const UDP_MOST: u16 = 1232;
/// Smallest that everybody takes.
const UDP_LEAST: u16 = 512;
/// Bytes of a header.
const HEADER: usize = 12;

/// Types of records that are answered. Anything else is for zone transfers,
/// for signatures of messages, withdrawn, or good for tunnels only.
const KINDS: &[RecordType] = &[
    RecordType::A,
    RecordType::AAAA,
    RecordType::CAA,
    RecordType::CNAME,
    RecordType::HTTPS,
    RecordType::MX,
    RecordType::NAPTR,
    RecordType::NS,
    RecordType::PTR,
    RecordType::SOA,
    RecordType::SRV,
    RecordType::SSHFP,
    RecordType::SVCB,
    RecordType::TLSA,
    RecordType::TXT,
];

/// A question that makes sense.
#[derive(Debug, Clone)]
pub(super) struct Question {
    /// Its message, for the answer's header.
    request: Message,
    /// What is asked for.
    pub(super) name: Domain,
    /// Type of records.
    pub(super) kind: RecordType,
}

/// A message from the guest.
#[derive(Debug)]
pub(super) enum Heard {
    /// Nothing that is answered.
    Noise,
    /// Answered at once: not a question, or not one we understand.
    Wrong(Vec<u8>),
    /// A question that is refused whatever its name.
    Refused {
        /// The answer.
        reply: Reply,
        /// The name, printable.
        name: String,
        /// The type.
        kind: String,
        /// Why.
        refusal: Refusal,
    },
    /// A question.
    Question(Question),
}

/// An answer on its way.
#[derive(Debug)]
pub(super) struct Reply {
    /// The answer.
    pub(super) message: Message,
    /// Largest packet the guest takes over UDP.
    udp: u16,
}

impl Reply {
    /// As bytes for UDP: cut, and marked so, where it does not fit.
    pub(super) fn udp(&self) -> Option<Vec<u8>> {
        let bytes = self.message.to_vec().ok()?;
        if bytes.len() <= usize::from(self.udp) {
            return Some(bytes);
        }
        let mut cut = self.message.clone();
        cut.answers.clear();
        cut.authorities.clear();
        cut.additionals.clear();
        cut.metadata.truncation = true;
        cut.to_vec().ok()
    }

    /// As bytes for TCP, with their length in front.
    pub(super) fn tcp(&self) -> Option<Vec<u8>> {
        let bytes = self.message.to_vec().ok()?;
        let length = u16::try_from(bytes.len()).ok()?;
        Some([&length.to_be_bytes(), &bytes[..]].concat())
    }
}

/// Takes a message apart.
pub(super) fn hear(bytes: &[u8]) -> Heard {
    // The bit that marks an answer: never answer one, or two of us never stop.
    if bytes.len() < HEADER || bytes[2] & 0x80 != 0 {
        return Heard::Noise;
    }
    let id = u16::from_be_bytes([bytes[0], bytes[1]]);
    let Ok(request) = Message::from_vec(bytes) else {
        return wrong(id, ResponseCode::FormErr);
    };
    if request.metadata.message_type != MessageType::Query {
        return Heard::Noise;
    }
    if request.metadata.op_code != OpCode::Query {
        return wrong(id, ResponseCode::NotImp);
    }
    let [query] = &request.queries[..] else {
        return wrong(id, ResponseCode::FormErr);
    };
    let (name, kind) = (query.name.clone(), query.query_type);
    let refuse = |refusal: Refusal| Heard::Refused {
        reply: refused(&request, &refusal),
        name: shown(&name),
        kind: kind.to_string(),
        refusal,
    };
    if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        let mut reply = empty(&request);
        reply.message.metadata.response_code = ResponseCode::BADVERS;
        return reply.message.to_vec().map_or(Heard::Noise, Heard::Wrong);
    }
    if query.query_class != DNSClass::IN || !KINDS.contains(&kind) {
        let cause = format!("questions for {kind} are not answered");
        let remedy = "Ask for the addresses of a host (A or AAAA).";
        return refuse(Refusal::built_in(Code::QueryKind, cause, remedy));
    }
    let domain = match domain(&name) {
        Ok(domain) => domain,
        Err(refusal) => return refuse(refusal),
    };
    Heard::Question(Question {
        request,
        name: domain,
        kind,
    })
}

impl Question {
    /// A question that nobody of the guest's has asked.
    pub(super) fn of(name: &Domain, kind: RecordType) -> Option<Self> {
        let written = wire_name(name)?;
        let mut request = Message::query();
        request.add_query(Query::query(written, kind));
        Some(Self {
            request,
            name: name.clone(),
            kind,
        })
    }

    /// The question for an upstream: nothing of the guest's but name and type.
    pub(super) fn query(&self) -> Option<Query> {
        let name = wire_name(&self.name)?;
        Some(Query::query(name, self.kind))
    }

    /// An answer without records.
    pub(super) fn empty(&self) -> Reply {
        empty(&self.request)
    }

    /// A refusal, told in words too where the guest understands that.
    pub(super) fn refused(&self, refusal: &Refusal) -> Reply {
        refused(&self.request, refusal)
    }

    /// A failure, with its reason.
    pub(super) fn failed(&self, why: &str) -> Reply {
        let mut reply = empty(&self.request);
        reply.message.metadata.response_code = ResponseCode::ServFail;
        tell(&mut reply.message, EDE_NETWORK, why);
        reply
    }

    /// The name as the guest wrote it: case counts for those who play with it.
    pub(super) fn written(&self) -> &Name {
        &self.request.queries[0].name
    }
}

/// A host's name as messages have it. Label by label: what is read from text
/// may not begin with a hyphen, and some hosts' names do.
fn wire_name(name: &Domain) -> Option<Name> {
    Name::from_labels(name.labels().map(str::as_bytes)).ok()
}

/// A name from a message, as a host's.
pub(super) fn domain(name: &Name) -> Result<Domain, Refusal> {
    let labels: Vec<&[u8]> = name.iter().collect();
    // A dot inside of a label would look like one between labels.
    let bytes = match labels.iter().any(|label| label.contains(&b'.')) {
        true => b" ".to_vec(),
        false => labels.join(&b'.'),
    };
    Domain::parse_ascii(&bytes).map_err(|error| {
        let cause = format!("`{}` is no name of a host: {}", shown(name), error.why);
        Refusal::built_in(Code::NameInvalid, cause, "Check the name.")
    })
}

/// Whether a name asks whose address a private one is.
pub(super) fn private_reverse(name: &Domain) -> Option<Refusal> {
    if !name.is_within("arpa") {
        return None;
    }
    let parsed = wire_name(name)?.parse_arpa_name();
    // What is no whole address is of no use either.
    let kind = match parsed {
        Ok(net) if net.prefix_len() == net.max_prefix_len() => address::special(net.addr())?,
        _ => "incomplete",
    };
    let cause = format!("{name} asks for the name of an address that is {kind}");
    let remedy = "Ask for the names of public addresses only.";
    Some(Refusal::built_in(Code::NameSpecial, cause, remedy))
}

fn shown(name: &Name) -> String {
    crate::text::printable(name.to_ascii().as_bytes())
}

fn wrong(id: u16, code: ResponseCode) -> Heard {
    let message = Message::error_msg(id, OpCode::Query, code);
    message.to_vec().map_or(Heard::Noise, Heard::Wrong)
}

fn empty(request: &Message) -> Reply {
    let mut message = Message::response(request.metadata.id, OpCode::Query);
    message.metadata.recursion_desired = request.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.queries.clone_from(&request.queries);
    let mut udp = UDP_LEAST;
    if let Some(theirs) = &request.edns {
        udp = theirs.max_payload().clamp(UDP_LEAST, UDP_MOST);
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_MOST);
        message.set_edns(edns);
    }
    Reply { message, udp }
}

fn refused(request: &Message, refusal: &Refusal) -> Reply {
    let mut reply = empty(request);
    reply.message.metadata.response_code = ResponseCode::Refused;
    let text = format!(
        "{}: {} [{}]",
        refusal.code.as_str(),
        refusal.cause,
        refusal.rule
    );
    tell(&mut reply.message, EDE_BLOCKED, &text);
    reply
}

fn tell(message: &mut Message, code: u16, text: &str) {
    if let Some(edns) = &mut message.edns {
        let text = crate::text::printable(text.as_bytes());
        let end = text.char_indices().map(|(at, c)| at + c.len_utf8());
        let end = end.take_while(|end| *end <= EDE_TEXT).last().unwrap_or(0);
        let data = [&code.to_be_bytes(), &text.as_bytes()[..end]].concat();
        edns.options_mut().insert(EdnsOption::Unknown(EDE, data));
    }
}
