//! What lets connections through, and the marks by which the record knows it.

use std::fmt;

use crate::spec::Exception;

/// Set in the marks of exceptions and in no other.
const EXCEPTION: u32 = 1 << 31;

/// What lets a connection through. The rule that does puts its mark on the packet,
/// where the log sees it, and on the connection, where it stays until the kernel
/// tells that it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Through {
    /// It goes to the machine's resolver.
    Resolver,
    /// It asks whether the gateway is there.
    Ping,
    /// It goes to the proxy of strict mode.
    Proxy,
    /// Its port is allowed, to any public host.
    Port,
    /// Its address was given out for an allowed host.
    Host,
    /// An exception is made for where it goes.
    Exception(Exception),
}

impl Through {
    /// Its mark, never zero. That of an exception follows from its text: so it is
    /// the same whatever else changes, and for whoever takes the machine over.
    pub fn mark(&self) -> u32 {
        match self {
            Self::Resolver => 1,
            Self::Ping => 2,
            Self::Proxy => 3,
            Self::Port => 4,
            Self::Host => 5,
            Self::Exception(exception) => EXCEPTION | fnv1a(&exception.to_string()),
        }
    }

    /// What a mark says that is no exception's, where it says something.
    pub fn of_mark(mark: u32) -> Option<Self> {
        let all = [
            Self::Resolver,
            Self::Ping,
            Self::Proxy,
            Self::Port,
            Self::Host,
        ];
        all.into_iter().find(|one| one.mark() == mark)
    }

    /// Whether a mark is that of an exception, perhaps of one that is no more.
    pub fn is_exception(mark: u32) -> bool {
        mark & EXCEPTION != 0
    }
}

impl fmt::Display for Through {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resolver => f.write_str("built-in:resolver"),
            Self::Ping => f.write_str("built-in:ping"),
            Self::Proxy => f.write_str("built-in:proxy"),
            Self::Port => f.write_str("allow-port"),
            Self::Host => f.write_str("allow-host"),
            Self::Exception(exception) => write!(f, "{}{exception}", super::ALLOW_CIDR),
        }
    }
}

/// 32-bit FNV-1a: short, and the same in every version of ours.
fn fnv1a(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_apart_and_stay_the_same() {
        let exception = |text: &str| Through::Exception(text.parse().unwrap());
        let (one, other) = (exception("10.1.2.3/32:5432"), exception("10.1.2.3/32:5433"));
        // Whoever takes a machine over may be of a later version.
        assert_eq!(one.mark(), 0xed28_6b74);
        assert_ne!(one.mark(), other.mark());
        assert_eq!(one.to_string(), "allow-cidr:10.1.2.3/32:5432");
        for mark in [one.mark(), other.mark()] {
            assert!(Through::is_exception(mark) && Through::of_mark(mark).is_none());
        }
        for through in [
            Through::Resolver,
            Through::Ping,
            Through::Proxy,
            Through::Port,
            Through::Host,
        ] {
            assert_eq!(Through::of_mark(through.mark()), Some(through));
            assert!(!Through::is_exception(through.mark()));
        }
        // Of what no rule of ours has marked, nothing is said.
        assert!(Through::of_mark(0).is_none() && !Through::is_exception(0));
    }
}
