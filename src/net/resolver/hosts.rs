//! The host's own resolvers.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// The name servers of a resolv.conf(5), with their ports; at most three, as
/// the C library takes them. Empty when the file is missing or names none.
pub fn host_upstreams(path: &Path) -> Vec<SocketAddr> {
    let text = std::fs::read(path).unwrap_or_default();
    parse(&String::from_utf8_lossy(&text))
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            return None;
        }
        // A scope (`fe80::1%eth0`) is none that a standard address has.
        let address: IpAddr = words.next()?.parse().ok()?;
        Some(SocketAddr::new(address, 53))
    };
    text.lines().filter_map(server).take(3).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_found() {
        let text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 127.0.0.53\n\tnameserver ::1 x\n\
                    nameserver bad\nnameserver fe80::1%eth0\nnameserver 1.1.1.1\nnameserver 1.0.0.1\n";
        let expected = ["127.0.0.53:53", "[::1]:53", "1.1.1.1:53"];
        assert_eq!(parse(text), expected.map(|one| one.parse().unwrap()));
        assert_eq!(host_upstreams(Path::new("/nowhere")), []);
    }
}
