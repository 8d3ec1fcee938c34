//! The name in the beginning of a TLS connection (RFC 8446, 4.1.2; RFC 6066, 3).
//!
//! Read here and not by a TLS library: all that is wanted is one extension, and
//! that nothing about it is doubtful.

use super::{Progress, refusal};
use crate::net::refusal::{Code, Refusal};
use crate::spec::Domain;

/// Longest ClientHello: with post-quantum key shares they have about 2 KiB.
pub(super) const LONGEST: usize = 16 * 1024;
/// Most records that one may be cut into.
const RECORDS: usize = 32;
/// Bytes in front of a record.
const RECORD: usize = 5;
/// Bytes in front of a handshake message.
const MESSAGE: usize = 4;
/// Longest record.
const RECORD_LONGEST: usize = 1 << 14;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
/// Encrypted Client Hello, and what it was called before.
const ECH: [u16; 2] = [0xfe0d, 0xffce];

/// A fatal alert, access_denied, as the answer to a ClientHello (RFC 8446, 6).
pub(super) const DENIED: &[u8] = &[21, 3, 3, 0, 2, 2, 49];

/// Reads a name from the first bytes of a connection.
pub(super) fn read(bytes: &[u8]) -> Progress<Domain> {
    let mut message = Vec::new();
    let mut at = 0;
    for _ in 0..RECORDS {
        let Some(header) = bytes.get(at..at + RECORD) else {
            return match bytes.get(at) {
                Some(&kind) if kind != HANDSHAKE => no_tls(),
                _ => Progress::More(at + RECORD),
            };
        };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        let fits = (1..=RECORD_LONGEST).contains(&length);
        if header[0] != HANDSHAKE || header[1] != 3 || !fits {
            return no_tls();
        }
        at += RECORD;
        let Some(part) = bytes.get(at..at + length) else {
            return match at + length > LONGEST {
                true => too_large(),
                false => Progress::More(at + length),
            };
        };
        at += length;
        message.extend_from_slice(part);
        let Some(header) = message.first_chunk::<MESSAGE>() else {
            continue;
        };
        let [kind, a, b, c] = *header;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if kind != CLIENT_HELLO {
            return no_tls();
        }
        if length > LONGEST {
            return too_large();
        }
        let body = &message[MESSAGE..];
        match body.len().cmp(&length) {
            std::cmp::Ordering::Less => {}
            // Something behind it, before anybody has answered.
            std::cmp::Ordering::Greater => return no_tls(),
            std::cmp::Ordering::Equal => {
                return match hello(body) {
                    Ok(name) => Progress::Done(name),
                    Err(refusal) => Progress::Refused(refusal),
                };
            }
        }
    }
    too_large()
}

fn no_tls<T>() -> Progress<T> {
    Progress::Refused(broken())
}

fn broken() -> Refusal {
    refusal(
        Code::NotTls,
        "the connection does not begin with a TLS handshake that can be read",
        "Use TLS or HTTP at this port, or allow the address at its port without strict mode.",
    )
}

fn too_large<T>() -> Progress<T> {
    Progress::Refused(refusal(
        Code::HeadTooLarge,
        "the TLS handshake begins with more bytes than such a beginning needs",
        "Use a usual TLS client.",
    ))
}

/// What is left to read of a structure.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (part, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(part)
    }

    fn number(&mut self) -> Option<u16> {
        self.take(2)
            .map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// Bytes with their length in one byte in front.
    fn short(&mut self) -> Option<&'a [u8]> {
        let length = self.take(1)?[0];
        self.take(length.into())
    }

    /// Bytes with their length in two bytes in front.
    fn long(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(length.into())
    }

    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

fn hello(body: &[u8]) -> Result<Domain, Refusal> {
    let extensions = extensions(body).ok_or_else(broken)?;
    if extensions.iter().any(|(kind, _)| ECH.contains(kind)) {
        return Err(refusal(
            Code::Ech,
            "the TLS handshake hides the host's name (Encrypted Client Hello)",
            "Switch Encrypted Client Hello off in the client.",
        ));
    }
    let mut names = extensions.iter().filter(|(kind, _)| *kind == SERVER_NAME);
    match (names.next(), names.next()) {
        (None, _) => Err(refusal(
            Code::SniMissing,
            "the TLS handshake does not name the host (SNI)",
            "Connect by the host's name instead of its address.",
        )),
        (Some((_, data)), None) => server_name(data),
        _ => Err(doubtful("names the host twice")),
    }
}

fn doubtful(what: &str) -> Refusal {
    refusal(
        Code::SniInvalid,
        &format!("the TLS handshake {what} (SNI)"),
        "Connect by the host's name, with a usual TLS client.",
    )
}

/// The extensions of a ClientHello, when it is one to its last byte.
fn extensions(body: &[u8]) -> Option<Vec<(u16, &[u8])>> {
    let mut rest = Rest(body);
    let version = rest.take(2)?;
    let _random = rest.take(32)?;
    let session = rest.short()?;
    let ciphers = rest.long()?;
    let compressions = rest.short()?;
    let odd = version[0] != 3
        || session.len() > 32
        || ciphers.is_empty()
        || ciphers.len() % 2 != 0
        || compressions.is_empty();
    if odd {
        return None;
    }
    // Before TLS 1.2 there may be none.
    if rest.0.is_empty() {
        return Some(Vec::new());
    }
    let mut list = Rest(rest.long()?);
    rest.end()?;
    let mut extensions = Vec::new();
    while !list.0.is_empty() {
        extensions.push((list.number()?, list.long()?));
    }
    Some(extensions)
}

/// The one name in the extension.
fn server_name(data: &[u8]) -> Result<Domain, Refusal> {
    let one = || {
        let mut rest = Rest(data);
        let mut list = Rest(rest.long()?);
        rest.end()?;
        let kind = list.take(1)?[0];
        let name = list.long()?;
        list.end()?;
        (kind == 0).then_some(name)
    };
    let name = one().ok_or_else(|| doubtful("does not name the host as it should"))?;
    let wrong = || doubtful("names what is no name of a host");
    // A dot at the end is not allowed here, and servers differ on it.
    if name.ends_with(b".") {
        return Err(wrong());
    }
    Domain::parse_ascii(name).map_err(|_| wrong())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(data.len()).unwrap();
        [&kind.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
    }

    pub(crate) fn sni(name: &[u8]) -> Vec<u8> {
        let length = u16::try_from(name.len()).unwrap();
        let entry = [&[0][..], &length.to_be_bytes(), name].concat();
        let list = u16::try_from(entry.len()).unwrap();
        extension(0, &[&list.to_be_bytes()[..], &entry].concat())
    }

    pub(crate) fn message(extensions: &[Vec<u8>]) -> Vec<u8> {
        let extensions = extensions.concat();
        let length = u16::try_from(extensions.len()).unwrap();
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(0);
        body.extend([0, 2, 0x13, 1, 1, 0]);
        body.extend(length.to_be_bytes());
        body.extend(extensions);
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&[1][..], &length[1..], &body].concat()
    }

    pub(crate) fn records(message: &[u8], each: usize) -> Vec<u8> {
        let record = |part: &[u8]| {
            let length = u16::try_from(part.len()).unwrap();
            [&[22, 3, 1][..], &length.to_be_bytes(), part].concat()
        };
        message.chunks(each).flat_map(record).collect()
    }

    fn code(bytes: &[u8]) -> Code {
        match read(bytes) {
            Progress::Refused(refusal) => refusal.code,
            other => panic!("{other:?}"),
        }
    }

    fn name(bytes: &[u8]) -> Option<String> {
        match read(bytes) {
            Progress::Done(name) => Some(name.to_string()),
            Progress::More(needed) => {
                assert!(needed > bytes.len());
                None
            }
            Progress::Refused(refusal) => panic!("{refusal}"),
        }
    }

    #[test]
    fn the_name_is_found_in_any_number_of_records() {
        let hello = message(&[extension(10, &[0, 2, 0, 29]), sni(b"Example.org")]);
        for each in [3, 7, 50, 5000] {
            let bytes = records(&hello, each);
            assert_eq!(name(&bytes).as_deref(), Some("example.org"), "{each}");
            for end in 0..bytes.len() {
                assert_eq!(name(&bytes[..end]), None, "{each}, {end}");
            }
        }
        assert_eq!(code(&records(&hello, 1)), Code::HeadTooLarge);
    }

    #[test]
    fn doubtful_handshakes_are_refused() {
        let whole = |extensions: &[Vec<u8>]| records(&message(extensions), 5000);
        assert_eq!(code(&whole(&[])), Code::SniMissing);
        assert_eq!(
            code(&whole(&[sni(b"a.org"), sni(b"a.org")])),
            Code::SniInvalid
        );
        for name in [
            &b""[..],
            b"10.0.0.1",
            b"::1",
            b"a.org.",
            b"a\0.org",
            b"*.org",
            b"a.org:443",
        ] {
            assert_eq!(code(&whole(&[sni(name)])), Code::SniInvalid, "{name:?}");
        }
        let two = [
            0, 14, 0, 0, 4, b'a', b'.', b'i', b'o', 0, 0, 4, b'b', b'.', b'i', b'o',
        ];
        assert_eq!(code(&whole(&[extension(0, &two)])), Code::SniInvalid);
        for ech in ECH {
            let hidden = whole(&[sni(b"a.org"), extension(ech, &[0; 40])]);
            assert_eq!(code(&hidden), Code::Ech);
        }
    }

    #[test]
    fn what_is_no_handshake_is_refused_early() {
        assert_eq!(code(b"SSH-2.0-x"), Code::NotTls);
        assert_eq!(code(&[22, 2, 0, 0, 1]), Code::NotTls);
        assert_eq!(code(&[22, 3, 1, 0, 0]), Code::NotTls);
        assert_eq!(code(&[22, 3, 1, 0xff, 0xff]), Code::NotTls);
        assert_eq!(code(&[22, 3, 1, 0, 4, 2, 0, 0, 0]), Code::NotTls);
        assert_eq!(code(&[22, 3, 1, 0, 4, 1, 0xff, 0, 0]), Code::HeadTooLarge);
        let mut long = message(&[sni(b"a.org")]);
        long.push(0);
        assert_eq!(code(&records(&long, 5000)), Code::NotTls);
        assert_eq!(code(&[21, 3, 3, 0, 2, 2, 40]), Code::NotTls);
    }

    proptest! {
        /// Whatever comes: an answer, and never more bytes asked for than fit.
        #[test]
        fn anything_has_an_answer(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..300), tls: bool,
        ) {
            if tls && bytes.len() > 10 {
                bytes[..6].copy_from_slice(&[22, 3, 1, 0, 200, 1]);
            }
            if let Progress::More(needed) = read(&bytes) {
                prop_assert!(needed > bytes.len() && needed <= LONGEST + RECORD);
            }
        }

        #[test]
        fn a_changed_byte_never_gives_another_name(at: prop::sample::Index, value: u8) {
            let mut bytes = records(&message(&[sni(b"allowed.example")]), 40);
            let at = at.index(bytes.len());
            bytes[at] = value;
            if let Progress::Done(name) = read(&bytes) {
                let text = name.as_str();
                prop_assert!(text.len() == 15 || text == "allowed.example", "{}", text);
            }
        }
    }
}
