//! The host in the beginning of an HTTP/1 request, and where the request ends.
//!
//! httparse takes the head apart. On top, everything is refused on which two
//! readers could disagree: the server must not see a request that we did not.

use super::{Progress, refusal};
use crate::net::refusal::{Code, Refusal};
use crate::spec::Domain;

/// Longest head.
pub(super) const LONGEST: usize = 16 * 1024;
/// Most header fields.
const FIELDS: usize = 100;

/// What is known from the head of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    /// The host it is for.
    pub(super) name: Domain,
    /// Bytes of the head.
    pub(super) length: usize,
    /// What follows it.
    pub(super) body: Body,
}

/// What follows a head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    /// So many bytes.
    Length(u64),
    /// Chunks.
    Chunked,
}

/// Whether so many first bytes can be those of a request: a method in capitals.
pub(super) fn may_be(first: u8) -> bool {
    first.is_ascii_uppercase()
}

/// Reads the head of a request.
pub(super) fn read(bytes: &[u8]) -> Progress<Head> {
    if bytes.first().is_some_and(|first| !may_be(*first)) {
        return Progress::Refused(no_http());
    }
    let window = &bytes[..bytes.len().min(LONGEST)];
    let Some(end) = window.windows(4).position(|four| four == b"\r\n\r\n") else {
        return match bytes.len() >= LONGEST {
            true => Progress::Refused(refusal(
                Code::HeadTooLarge,
                "the head of the HTTP request is larger than 16 KiB",
                "Send less in the header fields.",
            )),
            false => Progress::More(bytes.len() + 1),
        };
    };
    match head(&bytes[..end + 4]) {
        Ok(head) => Progress::Done(head),
        Err(refusal) => Progress::Refused(refusal),
    }
}

fn no_http() -> Refusal {
    refusal(
        Code::NotHttp,
        "the connection does not begin with an HTTP/1 request that can be read",
        "Use HTTP/1 or TLS at this port.",
    )
}

pub(super) fn ambiguous(why: &str) -> Refusal {
    refusal(
        Code::RequestAmbiguous,
        &format!("the HTTP request {why}"),
        "Use a usual HTTP client.",
    )
}

fn two_hosts(why: &str) -> Refusal {
    refusal(
        Code::HostAmbiguous,
        &format!("the HTTP request {why}"),
        "Name one host, in the Host field.",
    )
}

fn head(bytes: &[u8]) -> Result<Head, Refusal> {
    // httparse is lenient with ends of lines; servers are not all of one mind.
    let strict = bytes.iter().enumerate().all(|(at, byte)| match byte {
        b'\r' => bytes.get(at + 1) == Some(&b'\n'),
        b'\n' => at > 0 && bytes[at - 1] == b'\r',
        0 => false,
        _ => true,
    });
    if !strict {
        return Err(ambiguous("has ends of lines that are read differently"));
    }
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let complete = request
        .parse(bytes)
        .is_ok_and(|status| status.is_complete());
    let (true, Some(method), Some(target), Some(version)) =
        (complete, request.method, request.path, request.version)
    else {
        return Err(no_http());
    };
    let of = |wanted: &'static str| {
        let is = move |field: &&httparse::Header<'_>| field.name.eq_ignore_ascii_case(wanted);
        request.headers.iter().filter(is).map(|field| field.value)
    };
    // Some servers take `_` for `-`.
    let disguised = request.headers.iter().any(|field| {
        let plain = field.name.replace('_', "-").to_ascii_lowercase();
        field.name.contains('_')
            && matches!(
                plain.as_str(),
                "content-length" | "transfer-encoding" | "host"
            )
    });
    if disguised {
        return Err(ambiguous("has a header field in disguise"));
    }
    if method == "CONNECT" || of("upgrade").next().is_some() {
        return Err(refusal(
            Code::RequestKind,
            "the HTTP request asks for a tunnel or another protocol",
            "Connect to the host itself, and use HTTPS for WebSockets and HTTP/2.",
        ));
    }
    let mut hosts = of("host");
    let host = match (hosts.next(), hosts.next()) {
        (None, _) => {
            return Err(refusal(
                Code::HostMissing,
                "the HTTP request names no host",
                "Send a Host field.",
            ));
        }
        (Some(host), None) => authority(host)?,
        _ => return Err(two_hosts("names several hosts")),
    };
    check_target(method, target, &host)?;
    Ok(Head {
        length: bytes.len(),
        body: body(version, of("content-length"), of("transfer-encoding"))?,
        name: host.0,
    })
}

/// `NAME` or `NAME:PORT`.
fn authority(bytes: &[u8]) -> Result<(Domain, Option<u16>), Refusal> {
    let (name, port) = match bytes.iter().position(|&byte| byte == b':') {
        Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
        None => (bytes, None),
    };
    let port = port.map(|port| {
        let digits = port.iter().all(u8::is_ascii_digit);
        let text = std::str::from_utf8(port).ok().filter(|_| digits);
        text.and_then(|text| text.parse::<u16>().ok())
    });
    let wrong = || {
        let shown = crate::text::printable(&bytes[..bytes.len().min(100)]);
        refusal(
            Code::HostMissing,
            &format!("the HTTP request is for `{shown}`, which is no name of a host"),
            "Connect by the host's name instead of its address.",
        )
    };
    match (Domain::parse_ascii(name), port) {
        (Ok(name), None) => Ok((name, None)),
        (Ok(name), Some(Some(port))) => Ok((name, Some(port))),
        _ => Err(wrong()),
    }
}

/// What the first line asks for must be on the host of the Host field: where a
/// whole URL stands there, it counts for the server.
fn check_target(method: &str, target: &str, host: &(Domain, Option<u16>)) -> Result<(), Refusal> {
    if target.starts_with('/') || target == "*" && method == "OPTIONS" {
        return Ok(());
    }
    let scheme = target.split_at_checked("http://".len());
    let rest = match scheme {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http://") => rest,
        _ => return Err(no_http()),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let theirs = authority(&rest.as_bytes()[..end])?;
    match (
        theirs.0 == host.0,
        theirs.1.unwrap_or(80) == host.1.unwrap_or(80),
    ) {
        (true, true) => Ok(()),
        _ => Err(two_hosts(
            "has one host in its first line and another in its Host field",
        )),
    }
}

fn body<'a>(
    version: u8,
    mut lengths: impl Iterator<Item = &'a [u8]>,
    mut codings: impl Iterator<Item = &'a [u8]>,
) -> Result<Body, Refusal> {
    let (length, coding) = (lengths.next(), codings.next());
    if lengths.next().is_some() || codings.next().is_some() {
        return Err(ambiguous("says twice how long it is"));
    }
    match (length, coding) {
        (None, None) => Ok(Body::Length(0)),
        (Some(length), None) => {
            let digits = !length.is_empty() && length.iter().all(u8::is_ascii_digit);
            let text = std::str::from_utf8(length).ok().filter(|_| digits);
            let number = text.and_then(|text| text.parse().ok());
            number
                .map(Body::Length)
                .ok_or_else(|| ambiguous("has a length that is no number"))
        }
        (None, Some(coding)) if version == 1 && coding.eq_ignore_ascii_case(b"chunked") => {
            Ok(Body::Chunked)
        }
        (None, Some(_)) => Err(ambiguous("has a transfer coding other than chunked")),
        (Some(_), Some(_)) => Err(ambiguous("has a length and a transfer coding")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn done(text: &str) -> Head {
        match read(text.as_bytes()) {
            Progress::Done(head) => head,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    fn code(text: &str) -> Code {
        match read(text.as_bytes()) {
            Progress::Refused(refusal) => refusal.code,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn the_host_is_found() {
        let head = done("GET / HTTP/1.1\r\nHost: Example.org:80\r\n\r\nmore");
        assert_eq!((head.name.as_str(), head.length), ("example.org", 40));
        assert_eq!(head.body, Body::Length(0));
        let head = done("POST /x HTTP/1.1\r\nhost:a.org\r\ncontent-length: 12\r\n\r\n");
        assert_eq!(head.body, Body::Length(12));
        let head = done("POST /x HTTP/1.1\r\nhost:a.org\r\nTransfer-Encoding: Chunked\r\n\r\n");
        assert_eq!(head.body, Body::Chunked);
        done("GET HTTP://A.org/x HTTP/1.1\r\nHost: a.org\r\n\r\n");
        done("OPTIONS * HTTP/1.1\r\nHost: a.org\r\n\r\n");
        assert!(matches!(
            read(b"GET / HTTP/1.1\r\nHost: a.org\r\n"),
            Progress::More(_)
        ));
        assert!(matches!(read(b""), Progress::More(1)));
    }

    #[test]
    fn doubtful_requests_are_refused() {
        for (head, expected) in [
            ("GET / HTTP/1.1\r\n\r\n", Code::HostMissing),
            ("GET / HTTP/1.0\r\n\r\n", Code::HostMissing),
            (
                "GET / HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n",
                Code::HostMissing,
            ),
            ("GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n", Code::HostMissing),
            (
                "GET / HTTP/1.1\r\nHost: a.org b.org\r\n\r\n",
                Code::HostMissing,
            ),
            ("GET / HTTP/1.1\r\nHost: a.org:x\r\n\r\n", Code::HostMissing),
            (
                "GET / HTTP/1.1\r\nHost: user@a.org\r\n\r\n",
                Code::HostMissing,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a.org\r\nhost: a.org\r\n\r\n",
                Code::HostAmbiguous,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a.org\r\nHost : b.org\r\n\r\n",
                Code::NotHttp,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a.org\r\n Host: b.org\r\n\r\n",
                Code::NotHttp,
            ),
            (
                "GET http://b.org/ HTTP/1.1\r\nHost: a.org\r\n\r\n",
                Code::HostAmbiguous,
            ),
            (
                "GET http://a.org@b.org/ HTTP/1.1\r\nHost: a.org\r\n\r\n",
                Code::HostMissing,
            ),
            (
                "GET http://a.org:81/ HTTP/1.1\r\nHost: a.org\r\n\r\n",
                Code::HostAmbiguous,
            ),
            (
                "GET https://a.org/ HTTP/1.1\r\nHost: a.org\r\n\r\n",
                Code::NotHttp,
            ),
            ("GET a.org HTTP/1.1\r\nHost: a.org\r\n\r\n", Code::NotHttp),
            (
                "GET / HTTP/1.1\nHost: b.org\r\nHost: a.org\r\n\r\n",
                Code::RequestAmbiguous,
            ),
            (
                "GET / HTTP/1.1\r\nX: a\rHost: b.org\r\nHost: a.org\r\n\r\n",
                Code::RequestAmbiguous,
            ),
            (
                "CONNECT a.org:443 HTTP/1.1\r\nHost: a.org\r\n\r\n",
                Code::RequestKind,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a.org\r\nUpgrade: h2c\r\n\r\n",
                Code::RequestKind,
            ),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Code::NotHttp),
            ("SSH-2.0-x\r\n\r\n", Code::NotHttp),
            ("get / HTTP/1.1\r\nHost: a.org\r\n\r\n", Code::NotHttp),
        ] {
            assert_eq!(code(head), expected, "{head:?}");
        }
        for fields in [
            "Content-Length: 1\r\nContent-Length: 1",
            "Content-Length: 1, 1",
            "Content-Length: +1",
            "Content-Length: 0x1",
            "Content-Length:",
            "Content-Length: 99999999999999999999",
            "Content-Length: 1\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: identity",
            "Transfer_Encoding: chunked",
            "Content_Length: 5",
        ] {
            let head = format!("POST / HTTP/1.1\r\nHost: a.org\r\n{fields}\r\n\r\n");
            assert_eq!(code(&head), Code::RequestAmbiguous, "{fields:?}");
        }
        let old = "POST / HTTP/1.0\r\nHost: a.org\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(code(old), Code::RequestAmbiguous);
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(LONGEST));
        assert_eq!(code(&long), Code::HeadTooLarge);
    }

    proptest! {
        /// Whatever comes has an answer; what is taken names one host only.
        #[test]
        fn anything_has_an_answer(
            fields in proptest::collection::vec(
                "(Host|host|HOST|X|Content-Length|Transfer-Encoding|Upgrade)(:| :|: )[a-z0-9.:, ]{0,8}", 0..5),
            ending in "(\r\n\r\n|\n\n|\r\n)",
        ) {
            let text = format!("GET / HTTP/1.1\r\n{}{ending}", fields.join("\r\n"));
            if let Progress::Done(head) = read(text.as_bytes()) {
                let hosts = text.to_ascii_lowercase().matches("\nhost:").count();
                prop_assert_eq!(hosts, 1);
                prop_assert!(text.to_ascii_lowercase().contains(head.name.as_str()));
            }
        }
    }
}
