//! Names of hosts, in the one form in which they are compared.

use std::fmt;
use std::sync::Arc;

use idna::uts46::{AsciiDenyList, Hyphens, Uts46};
use serde::{Deserialize, Serialize};

/// Longest name, without the dot at its end (RFC 1035, 2.3.4).
const LONGEST: usize = 253;
/// Longest label.
const LONGEST_LABEL: usize = 63;

/// A host's name: lower case, ASCII (IDNA 2008 as UTS 46 has it), no dot at the
/// end. Underscores may be in it (`_acme-challenge`); it is never an address.
/// Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
#[serde(try_from = "String", into = "String")]
pub struct Domain(Arc<str>);

/// No host can have this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no name of a host: {why}", crate::text::printable(.text.as_bytes()))]
pub struct NotADomain {
    /// What was given, cut where it is too long for any name.
    pub text: String,
    /// The rule it breaks.
    pub why: &'static str,
}

impl Domain {
    /// Reads a name as a person writes it: any case, any script, perhaps with a
    /// dot at its end.
    ///
    /// # Errors
    /// No host can have this name; an address is none either.
    pub fn parse(text: &str) -> Result<Self, NotADomain> {
        if text.is_ascii() {
            return Self::parse_ascii(text.as_bytes());
        }
        let ascii = Uts46::new().to_ascii(
            text.as_bytes(),
            AsciiDenyList::EMPTY,
            Hyphens::Allow,
            idna::uts46::DnsLength::Ignore,
        );
        match ascii {
            Ok(ascii) => Self::parse_ascii(ascii.as_bytes()),
            Err(_) => Err(Self::wrong(text.as_bytes(), "it is not well-formed (IDNA)")),
        }
    }

    /// Reads a name as protocols carry it: ASCII only.
    ///
    /// # Errors
    /// As [`Domain::parse`].
    pub fn parse_ascii(bytes: &[u8]) -> Result<Self, NotADomain> {
        let name = bytes.strip_suffix(b".").unwrap_or(bytes);
        if name.is_empty() {
            return Err(Self::wrong(bytes, "it is empty"));
        }
        if name.len() > LONGEST {
            return Err(Self::wrong(bytes, "it is longer than 253 characters"));
        }
        for label in name.split(|&byte| byte == b'.') {
            if label.is_empty() {
                return Err(Self::wrong(bytes, "a part between dots is empty"));
            }
            if label.len() > LONGEST_LABEL {
                return Err(Self::wrong(bytes, "a part is longer than 63 characters"));
            }
            let fits = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            if !label.iter().all(fits) {
                return Err(Self::wrong(
                    bytes,
                    "letters, digits, - and _ are possible in it",
                ));
            }
        }
        let last = name.rsplit(|&byte| byte == b'.').next().unwrap_or(name);
        let is_hex = last.len() > 1 && last[0] == b'0' && matches!(last[1], b'x' | b'X');
        // As URLs have it: what ends in a number is an address (WHATWG URL, "ends in a number").
        if last.iter().all(u8::is_ascii_digit) || is_hex {
            return Err(Self::wrong(bytes, "it ends in a number, as addresses do"));
        }
        let lower = name.to_ascii_lowercase();
        match std::str::from_utf8(&lower) {
            Ok(text) => Ok(Self(text.into())),
            Err(_) => Err(Self::wrong(bytes, "it is not ASCII")),
        }
    }

    fn wrong(bytes: &[u8], why: &'static str) -> NotADomain {
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST + 3)]).into_owned();
        NotADomain { text, why }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its parts, from the left.
    pub fn labels(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('.')
    }

    /// Whether it is `parent` or below it.
    pub fn is_within(&self, parent: &str) -> bool {
        &*self.0 == parent || self.is_below(parent)
    }

    /// Whether it is below `parent`, and not `parent` itself.
    pub fn is_below(&self, parent: &str) -> bool {
        let rest = self.0.strip_suffix(parent);
        rest.is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Domain {
    type Error = NotADomain;
    fn try_from(text: String) -> Result<Self, NotADomain> {
        Self::parse(&text)
    }
}

impl std::str::FromStr for Domain {
    type Err = NotADomain;
    fn from_str(text: &str) -> Result<Self, NotADomain> {
        Self::parse(text)
    }
}

impl From<Domain> for String {
    fn from(domain: Domain) -> Self {
        domain.0.as_ref().into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn case_script_and_the_last_dot_make_no_difference() {
        for (text, expected) in [
            ("Example.ORG.", "example.org"),
            ("BÜCHER.example", "xn--bcher-kva.example"),
            ("bu\u{308}cher.example", "xn--bcher-kva.example"),
            ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
            ("ｅｘａｍｐｌｅ。org", "example.org"),
            ("_dmarc.example.org", "_dmarc.example.org"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(Domain::parse(text).unwrap().as_str(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = ["a".repeat(63).as_str(); 4].join(".");
        for text in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a b",
            "a\0b",
            "exa\u{0}mple.org",
            "a/b",
            "*.a",
            "a:80",
            "127.0.0.1",
            "1",
            "a.0x7f",
            "[::1]",
            "::1",
            "a@b",
            "%61.org",
            &long,
            &"a".repeat(64),
            "١٢٧.0.0.1",
            "\u{ad}",
        ] {
            assert!(Domain::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn below_is_by_whole_labels() {
        let name = Domain::parse("a.example.org").unwrap();
        assert!(name.is_below("example.org") && name.is_below("org"));
        assert!(!name.is_below("ample.org") && !name.is_below("a.example.org"));
        assert!(name.is_within("a.example.org") && !name.is_within("b.example.org"));
    }

    proptest! {
        #[test]
        fn reading_again_changes_nothing(text in "\\PC{0,80}|[a-zA-Z0-9_.-]{0,80}") {
            if let Ok(name) = Domain::parse(&text) {
                let again = Domain::parse(name.as_str());
                prop_assert_eq!(again.as_ref(), Ok(&name));
                let shouted = name.as_str().to_uppercase() + ".";
                prop_assert_eq!(Domain::parse(&shouted), Ok(name));
            }
        }
    }
}
