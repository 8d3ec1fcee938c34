//! What tests and tests/fuzz reach of this module, and nobody else.

use std::io::Write as _;

use super::seal::Sealing;

/// An export with this in it, whatever it is.
///
/// # Panics
/// Never: memory takes it.
pub fn seal(content: &[u8]) -> Vec<u8> {
    seal_frame(&zstd::encode_all(content, 1).expect("memory takes it"))
}

/// A chain around these bytes, which should be one zstd frame.
///
/// # Panics
/// Never: memory takes it.
pub fn seal_frame(frame: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut sealing = Sealing::new(&mut out).expect("memory takes it");
    sealing.write_all(frame).expect("memory takes it");
    sealing.finish().expect("memory takes it");
    out
}
