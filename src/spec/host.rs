//! Patterns that hosts are allowed or denied by.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::domain::{Domain, NotADomain};

/// Which hosts are meant: `example.org` that one, `*.example.org` all below it,
/// `*` all; with `:PORT` at that port only.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
#[serde(try_from = "String", into = "String")]
pub struct HostPattern {
    pub(crate) hosts: Hosts,
    port: Option<u16>,
}

/// The part before the port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Hosts {
    Exact(Domain),
    Below(Domain),
    Any,
}

/// No such pattern can be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPattern {
    /// What should be a name is none.
    #[error(transparent)]
    Name(#[from] NotADomain),
    /// What should be a port is none.
    #[error("`{}` is no port (1 to 65535)", crate::text::printable(.0.as_bytes()))]
    Port(String),
    /// A star elsewhere than at the start.
    #[error("`{}` has a * elsewhere than at its start (`*.example.org`)", crate::text::printable(.0.as_bytes()))]
    Star(String),
}

impl HostPattern {
    /// Whether the name is meant, at some port.
    pub fn matches(&self, name: &Domain) -> bool {
        match &self.hosts {
            Hosts::Exact(exact) => exact == name,
            Hosts::Below(parent) => name.is_below(parent.as_str()),
            Hosts::Any => true,
        }
    }

    /// The port it is limited to.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// How closely it describes a name: the closest one names the rule.
    pub(crate) fn closeness(&self) -> (u8, usize) {
        match &self.hosts {
            Hosts::Exact(name) => (2, name.as_str().len()),
            Hosts::Below(name) => (1, name.as_str().len()),
            Hosts::Any => (0, 0),
        }
    }
}

impl std::str::FromStr for HostPattern {
    type Err = BadPattern;
    fn from_str(text: &str) -> Result<Self, BadPattern> {
        let (hosts, port) = match text.rsplit_once(':') {
            // An address in brackets, or several colons, are refused as names are.
            Some((hosts, port)) if !hosts.contains(':') => {
                let wrong = || BadPattern::Port(port.chars().take(16).collect());
                let digits = port.bytes().all(|byte| byte.is_ascii_digit());
                let number = port.parse().ok().filter(|&port| digits && port > 0);
                (hosts, Some(number.ok_or_else(wrong)?))
            }
            _ => (text, None),
        };
        let hosts = if hosts == "*" {
            Hosts::Any
        } else if let Some(parent) = hosts.strip_prefix("*.") {
            if parent.contains('*') {
                return Err(BadPattern::Star(text.chars().take(256).collect()));
            }
            Hosts::Below(Domain::parse(parent)?)
        } else if hosts.contains('*') {
            return Err(BadPattern::Star(text.chars().take(256).collect()));
        } else {
            Hosts::Exact(Domain::parse(hosts)?)
        };
        Ok(Self { hosts, port })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hosts {
            Hosts::Exact(name) => write!(f, "{name}")?,
            Hosts::Below(name) => write!(f, "*.{name}")?,
            Hosts::Any => f.write_str("*")?,
        }
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

impl TryFrom<String> for HostPattern {
    type Error = BadPattern;
    fn try_from(text: String) -> Result<Self, BadPattern> {
        text.parse()
    }
}

impl From<HostPattern> for String {
    fn from(pattern: HostPattern) -> Self {
        pattern.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> HostPattern {
        text.parse().unwrap()
    }

    fn name(text: &str) -> Domain {
        Domain::parse(text).unwrap()
    }

    #[test]
    fn a_pattern_means_whole_names() {
        assert!(pattern("Example.ORG.").matches(&name("example.org")));
        assert!(!pattern("example.org").matches(&name("a.example.org")));
        let below = pattern("*.example.org");
        assert!(below.matches(&name("a.example.org")) && below.matches(&name("a.b.example.org")));
        assert!(!below.matches(&name("example.org")) && !below.matches(&name("badexample.org")));
        assert!(!below.matches(&name("example.org.evil.com")));
        assert!(pattern("*.bücher.example").matches(&name("a.xn--bcher-kva.example")));
        assert!(pattern("*").matches(&name("a")));
    }

    #[test]
    fn a_pattern_is_written_as_it_is_read() {
        for text in [
            "*",
            "*:53",
            "example.org",
            "*.example.org",
            "example.org:8443",
        ] {
            assert_eq!(pattern(text).to_string(), text);
        }
        for text in [
            "",
            "*.",
            "**",
            "a.*.b",
            "*a.org",
            "*.*.org",
            "example.org:",
            "example.org:0",
            "example.org:65536",
            "example.org:+5",
            "example.org:http",
            "10.0.0.1",
            "::1",
            "[::1]:80",
            "https://example.org",
            "example.org/x",
        ] {
            assert!(text.parse::<HostPattern>().is_err(), "{text}");
        }
    }
}
