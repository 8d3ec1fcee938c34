//! What tests/fuzz reaches of this module, and nobody else.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::error::Result;
use super::merge::{Limits, Merge};
use super::oci;

/// The files of the layers that an OCI layout names.
///
/// # Errors
/// It is no layout, or not one of ours.
pub fn oci_layers(layout: &Path) -> Result<Vec<PathBuf>> {
    let layers = oci::layers(layout)?;
    Ok(layers.iter().map(|layer| layer.path().to_owned()).collect())
}

/// One archive out of several, the uppermost first.
///
/// # Errors
/// An archive that is not acceptable.
pub fn merge(layers: &[Vec<u8>]) -> Result<Vec<u8>> {
    let limits = Limits {
        entries: 256,
        bytes: 1 << 20,
        kept: 1 << 16,
    };
    let mut out = Vec::new();
    let mut merge = Merge::new(&mut out, "fuzz".to_owned(), limits, false);
    for layer in layers {
        let promotions = match layers {
            [_] => HashMap::new(),
            _ => merge.promotions(&layer[..])?,
        };
        merge.layer(&layer[..], &promotions)?;
    }
    merge.finish()?;
    Ok(out)
}
