//! Heads and chunks of HTTP requests of a hostile guest.
#![no_main]

use bulkhead::net::fuzz::{chunks, http};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match data {
        [0, at, bytes @ ..] => chunks(bytes, usize::from(*at)),
        [_, at, bytes @ ..] => http(bytes, usize::from(*at)),
        _ => {}
    }
});
