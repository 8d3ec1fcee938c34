//! Doors for the fuzzer: what a guest may begin a connection with.

use super::chunks::Chunks;
use super::{Progress, hello, request};

/// Takes the beginning of a TLS connection, whole and cut at `at`: what has
/// been decided is not decided otherwise when more comes.
pub fn tls(bytes: &[u8], at: usize) {
    check(bytes, at, hello::LONGEST + 5, hello::read);
}

/// The same for HTTP; and a head that is taken has one host in it.
pub fn http(bytes: &[u8], at: usize) {
    check(bytes, at, request::LONGEST, request::read);
    if let Progress::Done(head) = request::read(bytes) {
        let text = String::from_utf8_lossy(&bytes[..head.length]).to_ascii_lowercase();
        assert_eq!(text.matches("\nhost:").count(), 1, "{text:?}");
        assert!(text.contains(head.name.as_str()) && text.ends_with("\r\n\r\n"));
        assert!(!text.contains("\nupgrade:") && !text.starts_with("connect "));
    }
}

/// Takes chunks, whole and cut at `at`: they end at the same byte.
pub fn chunks(bytes: &[u8], at: usize) {
    let mut whole = Chunks::new();
    let all = whole.follow(bytes);
    let (first, second) = bytes.split_at(at.min(bytes.len()));
    let mut cut = Chunks::new();
    let parts = match cut.follow(first) {
        Ok(taken) if taken == first.len() => cut.follow(second).map(|more| taken + more),
        other => other,
    };
    assert_eq!(all, parts);
    assert!(all.is_err() || whole == cut);
}

fn check<T: PartialEq + std::fmt::Debug>(
    bytes: &[u8],
    at: usize,
    most: usize,
    read: impl Fn(&[u8]) -> Progress<T>,
) {
    let whole = read(bytes);
    if let Progress::More(needed) = whole {
        assert!(needed > bytes.len() && needed <= most.max(bytes.len() + 1));
    }
    match read(&bytes[..at.min(bytes.len())]) {
        Progress::More(_) => {}
        decided => assert_eq!(decided, whole),
    }
}
