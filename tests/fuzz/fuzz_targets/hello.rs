//! The beginning of a TLS connection of a hostile guest.
#![no_main]

use bulkhead::net::fuzz::tls;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let [a, b, bytes @ ..] = data {
        tls(bytes, usize::from(u16::from_be_bytes([*a, *b])));
    }
});
