//! DNS messages of a hostile guest, and of a hostile upstream.
#![no_main]

use bulkhead::net::fuzz::{answer, question};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match data {
        [0, message @ ..] => question(message),
        [flags, a, b, message @ ..] => {
            answer(message, u16::from_be_bytes([*a, *b]), flags & 1 == 1);
        }
        _ => {}
    }
});
