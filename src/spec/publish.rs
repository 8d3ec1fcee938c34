//! Ports of the host that lead to services in a guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A port of the host that leads to one of the guest: `8080`, `8080:80`,
/// `127.0.0.1:8080:80`. Without an address it is loopback, which only this host
/// can reach; port 0 of the host is any that is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
#[serde(try_from = "String", into = "String")]
pub struct Publish {
    /// Where the host listens.
    pub listen: SocketAddr,
    /// The guest's port, on its loopback.
    pub port: u16,
}

/// No such port can be published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not [ADDRESS:]PORT[:GUEST-PORT], such as 127.0.0.1:8080:80", crate::text::printable(.0.as_bytes()))]
pub struct NotAPublish(pub String);

impl FromStr for Publish {
    type Err = NotAPublish;
    fn from_str(text: &str) -> Result<Self, NotAPublish> {
        let wrong = || NotAPublish(text.chars().take(64).collect());
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u16>()
                .ok()
                .filter(|_| digits)
                .ok_or_else(wrong)
        };
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let (address, rest) = match text.strip_prefix('[') {
            Some(six) => {
                let (address, rest) = six.split_once("]:").ok_or_else(wrong)?;
                let address: std::net::Ipv6Addr = address.parse().map_err(|_| wrong())?;
                (Some(address.into()), rest)
            }
            None => match text.split_once(':') {
                Some((address, rest)) if address.contains('.') => {
                    let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
                    (Some(address.into()), rest)
                }
                _ => (None, text),
            },
        };
        let (host, guest) = match rest.split_once(':') {
            Some((host, guest)) => (number(host)?, number(guest)?),
            None => (number(rest)?, number(rest)?),
        };
        if guest == 0 {
            return Err(wrong());
        }
        let listen = SocketAddr::new(address.unwrap_or(loopback), host);
        Ok(Self {
            listen,
            port: guest,
        })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.listen, self.port)
    }
}

impl TryFrom<String> for Publish {
    type Error = NotAPublish;
    fn try_from(text: String) -> Result<Self, NotAPublish> {
        text.parse()
    }
}

impl From<Publish> for String {
    fn from(publish: Publish) -> Self {
        publish.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_they_are_written() {
        for (text, listen, port) in [
            ("8080", "127.0.0.1:8080", 8080),
            ("8080:80", "127.0.0.1:8080", 80),
            ("0:80", "127.0.0.1:0", 80),
            ("127.0.0.1:8080:80", "127.0.0.1:8080", 80),
            ("0.0.0.0:8080", "0.0.0.0:8080", 8080),
            ("[::1]:8080:80", "[::1]:8080", 80),
        ] {
            let publish: Publish = text.parse().unwrap();
            assert_eq!(
                (publish.listen, publish.port),
                (listen.parse().unwrap(), port),
                "{text}"
            );
            assert_eq!(publish.to_string().parse(), Ok(publish));
        }
        for text in [
            "",
            ":",
            "a",
            "80:",
            ":80",
            "80:0",
            "0",
            "65536",
            "+80",
            "1.2.3:80",
            "1.2.3.4:80:90:100",
            "::1:80:80",
            "[::1]80",
            "localhost:80",
            "80/tcp",
        ] {
            assert!(text.parse::<Publish>().is_err(), "{text}");
        }
    }
}
