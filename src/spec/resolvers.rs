//! Who resolves names for machines.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::units::{Malformed, as_text, malformed};

/// Where name resolution is.
const DNS: u16 = 53;
/// As many as resolv.conf(5) may have, and some.
const MOST: usize = 8;

/// Resolvers, asked in this order: addresses with commas between, each with a
/// port where it is not 53, such as `1.1.1.1,[2606:4700::1]:5353`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
#[serde(try_from = "String", into = "String")]
pub struct Resolvers(pub Vec<SocketAddr>);

impl FromStr for Resolvers {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let expected = "addresses of resolvers such as `1.1.1.1,[2606:4700::1]:5353`, at most 8";
        let one = |text: &str| {
            let text = text.trim();
            let alone = text
                .parse::<IpAddr>()
                .map(|address| SocketAddr::new(address, DNS));
            alone.ok().or_else(|| text.parse().ok())
        };
        let all: Option<Vec<_>> = text.split(',').map(one).collect();
        let fits =
            |all: &Vec<SocketAddr>| all.len() <= MOST && all.iter().all(|one| one.port() > 0);
        let all = all.filter(fits);
        all.map(Self).ok_or_else(|| malformed(text, expected))
    }
}

impl fmt::Display for Resolvers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.0.iter().map(SocketAddr::to_string).collect();
        f.write_str(&all.join(","))
    }
}

as_text!(Resolvers);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_addresses_with_commas_between() {
        for (text, shown) in [
            ("1.1.1.1", "1.1.1.1:53"),
            (
                "1.1.1.1:5353, ::1,[::2]:54",
                "1.1.1.1:5353,[::1]:53,[::2]:54",
            ),
        ] {
            let parsed: Resolvers = text.parse().unwrap();
            assert_eq!(parsed.to_string(), shown);
            assert_eq!(shown.parse(), Ok(parsed));
        }
        for bad in [
            "",
            ",",
            "1.1.1.1,",
            "dns.example",
            "1.1.1.1:0",
            "1.1.1.1:x",
            "::1:53x",
        ] {
            assert!(bad.parse::<Resolvers>().is_err(), "{bad}");
        }
        assert!(["1.1.1.1"; 9].join(",").parse::<Resolvers>().is_err());
    }
}
