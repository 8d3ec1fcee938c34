//! The one shape in which a refusal is told: to the user, in the record, and to
//! the guest.

use serde::{Deserialize, Serialize};

/// Why something was not let through, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[error("{cause} ({rule})")]
pub struct Refusal {
    /// Stable, for scripts.
    pub code: Code,
    /// What was refused and why, one sentence.
    pub cause: String,
    /// What the user can do, one imperative sentence.
    pub remedy: String,
    /// The rule that decided: `deny-host:*.example.org`, `default:packages`.
    pub rule: String,
}

/// Kinds of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// A rule of the user forbids the host.
    HostDenied,
    /// No rule allows the host.
    HostNotAllowed,
    /// The host is allowed, but not at this port.
    PortNotAllowed,
    /// A name that is meaningful only inside somebody's own network.
    NameSpecial,
    /// No name that a host can have.
    NameInvalid,
    /// A question of a kind that is not answered.
    QueryKind,
    /// Too many questions in a short time.
    QueryRate,
    /// Names that carry more data than names do.
    QueryTunnel,
    /// The answer is an address that no machine may reach.
    AnswerPrivate,
    /// The answer is larger than answers are.
    AnswerSize,
    /// The first bytes are no TLS handshake.
    NotTls,
    /// The TLS handshake does not say which host it is for.
    SniMissing,
    /// It says so twice, or not with a name.
    SniInvalid,
    /// It says so in secret (Encrypted Client Hello).
    Ech,
    /// The first bytes are no HTTP/1 request.
    NotHttp,
    /// The request names no host.
    HostMissing,
    /// The request names several hosts.
    HostAmbiguous,
    /// A later request on the connection is for another host.
    HostChanged,
    /// Two readers of the request could disagree on where it ends.
    RequestAmbiguous,
    /// CONNECT, or a change of protocol.
    RequestKind,
    /// The first bytes are more than such a beginning needs.
    HeadTooLarge,
    /// They did not come in time.
    HeadTooSlow,
    /// Too many connections at a time.
    TooManyConnections,
    /// The host has no address that may be reached.
    NoAddress,
    /// A packet that a firewall rule refuses.
    Packet,
}

impl Code {
    /// As it is written in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::HostDenied => "host-denied",
            Self::HostNotAllowed => "host-not-allowed",
            Self::PortNotAllowed => "port-not-allowed",
            Self::NameSpecial => "name-special",
            Self::NameInvalid => "name-invalid",
            Self::QueryKind => "query-kind",
            Self::QueryRate => "query-rate",
            Self::QueryTunnel => "query-tunnel",
            Self::AnswerPrivate => "answer-private",
            Self::AnswerSize => "answer-size",
            Self::NotTls => "not-tls",
            Self::SniMissing => "sni-missing",
            Self::SniInvalid => "sni-invalid",
            Self::Ech => "ech",
            Self::NotHttp => "not-http",
            Self::HostMissing => "host-missing",
            Self::HostAmbiguous => "host-ambiguous",
            Self::HostChanged => "host-changed",
            Self::RequestAmbiguous => "request-ambiguous",
            Self::RequestKind => "request-kind",
            Self::HeadTooLarge => "head-too-large",
            Self::HeadTooSlow => "head-too-slow",
            Self::TooManyConnections => "too-many-connections",
            Self::NoAddress => "no-address",
            Self::Packet => "packet",
        }
    }
}

impl Refusal {
    /// A refusal by a rule that is built in and has the code's name.
    pub(crate) fn built_in(code: Code, cause: impl Into<String>, remedy: &str) -> Self {
        Self {
            code,
            cause: cause.into(),
            remedy: remedy.into(),
            rule: format!("built-in:{}", code.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_written_as_it_is_told() {
        for code in [Code::HostDenied, Code::Ech, Code::TooManyConnections] {
            let json = serde_json::to_value(code).unwrap();
            assert_eq!(json, code.as_str());
        }
    }
}
