//! What the kernel's command line tells the agent: `bulkhead.*`.

use super::network::Network;

/// Options of a boot.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// `bulkhead.root=none`: stay in the initramfs.
    pub(crate) stay: bool,
    /// `bulkhead.scratch=tmpfs`: keep what is written in memory.
    pub(crate) scratch_in_memory: bool,
    /// `bulkhead.init=PATH`: run this as PID 1, and the agent beside it.
    pub(crate) init: Option<String>,
    /// `bulkhead.channel=vsock`: listen on vsock although there may be a port.
    pub(crate) vsock: bool,
    /// `bulkhead.hostname=NAME`: instead of the one in /etc/hostname.
    pub(crate) hostname: Option<String>,
    /// `bulkhead.ip=ADDRESS/PREFIX@GATEWAY`, and `bulkhead.ip6=` likewise.
    pub(crate) network: Network,
    /// `bulkhead.trace=1`: log how long each step of the boot took.
    pub(crate) trace: bool,
}

impl Options {
    /// Reads a command line; also returns the `bulkhead.*` words it does not know.
    pub(crate) fn parse(line: &str) -> (Self, Vec<String>) {
        let mut options = Self::default();
        let mut unknown = Vec::new();
        for word in line.split_whitespace() {
            let Some(word) = word.strip_prefix("bulkhead.") else {
                continue;
            };
            match word.split_once('=') {
                Some(("root", "none")) => options.stay = true,
                Some(("scratch", "tmpfs")) => options.scratch_in_memory = true,
                Some(("init", path)) if path.starts_with('/') => options.init = Some(path.into()),
                Some(("channel", "vsock")) => options.vsock = true,
                Some(("channel", "serial")) => options.vsock = false,
                Some(("hostname", name)) if !name.is_empty() => {
                    options.hostname = Some(name.into())
                }
                Some(("ip", text))
                    if text
                        .parse::<super::network::Address<std::net::Ipv4Addr>>()
                        .is_ok() =>
                {
                    options.network.ip = text.parse().ok();
                }
                Some(("ip6", text))
                    if text
                        .parse::<super::network::Address<std::net::Ipv6Addr>>()
                        .is_ok() =>
                {
                    options.network.ip6 = text.parse().ok();
                }
                Some(("trace", "1")) => options.trace = true,
                _ => unknown.push(format!("bulkhead.{word}")),
            }
        }
        (options, unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_unknown_ones_named() {
        let (options, unknown) = Options::parse(
            "console=ttyS0 bulkhead.root=none bulkhead.init=/sbin/init quiet bulkhead.rot=1\n",
        );
        let expected = Options {
            stay: true,
            init: Some("/sbin/init".into()),
            ..Options::default()
        };
        assert_eq!(options, expected);
        assert_eq!(unknown, ["bulkhead.rot=1"]);
    }
}
