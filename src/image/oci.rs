//! Reads OCI layout directories (opencontainers/image-spec, image-layout.md).

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::digest;
use super::error::{Error, Result};

/// Largest index or manifest read, in bytes (the distribution spec's limit).
const MAX_JSON: u64 = 4 << 20;
/// Indexes may name indexes; this many times.
const MAX_DEPTH: usize = 4;
/// Most layers of an image.
const MAX_LAYERS: usize = 512;

/// A layer's blob.
#[derive(Debug)]
pub(super) struct Layer {
    path: PathBuf,
    digest: String,
    size: u64,
    layout: PathBuf,
}

impl Layer {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Checks size and digest.
    pub(super) fn verify(&self) -> Result<()> {
        let (found, size) = digest::of_file(&self.path)?;
        if (found.as_str(), size) != (self.digest.as_str(), self.size) {
            return Err(Error::Oci {
                path: self.layout.clone(),
                reason: format!(
                    "blob {} has digest {found} and {size} bytes, expected {} bytes",
                    self.digest, self.size
                ),
            });
        }
        Ok(())
    }
}

// The specification lets writers add fields, so unknown ones are no error.
#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct ImageManifest {
    layers: Vec<Descriptor>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

#[derive(Deserialize, Clone)]
struct Platform {
    architecture: String,
    os: String,
}

/// Layers of the linux/amd64 image in a layout, lowermost first.
pub(super) fn layers(layout: &Path) -> Result<Vec<Layer>> {
    let reader = Reader { layout };
    let index: Index = reader.parse(&layout.join("index.json"))?;
    let manifest = reader.choose(index, 0)?;
    if manifest.layers.len() > MAX_LAYERS {
        return Err(reader.bad("it has too many layers"));
    }
    manifest
        .layers
        .iter()
        .map(|descriptor| {
            if !descriptor.media_type.contains(".layer.")
                && !descriptor.media_type.contains(".rootfs.")
            {
                let kind = &descriptor.media_type;
                return Err(reader.bad(&format!("a layer has the unknown type \"{kind}\"")));
            }
            let (path, digest) = reader.blob(descriptor)?;
            Ok(Layer {
                path,
                digest,
                size: descriptor.size,
                layout: layout.to_owned(),
            })
        })
        .collect()
}

struct Reader<'a> {
    layout: &'a Path,
}

impl Reader<'_> {
    fn choose(&self, index: Index, depth: usize) -> Result<ImageManifest> {
        if depth == MAX_DEPTH {
            return Err(self.bad("its indexes name each other too deeply"));
        }
        let ours = |descriptor: &&Descriptor| match &descriptor.platform {
            Some(platform) => platform.os == "linux" && platform.architecture == "amd64",
            // A layout with a single image need not name its platform.
            None => index.manifests.len() == 1,
        };
        let found: Vec<&Descriptor> = index.manifests.iter().filter(ours).collect();
        let descriptor = match found[..] {
            [one] => one,
            [] => return Err(self.bad("it has no image for linux/amd64")),
            _ => return Err(self.bad("it has several images for linux/amd64")),
        };
        let (path, expected) = self.blob(descriptor)?;
        let bytes = self.read(&path)?;
        let digest = digest::of_bytes(&bytes);
        if digest != expected {
            return Err(self.bad(&format!("blob {expected} has digest {digest}")));
        }
        if descriptor.media_type.contains(".index.") || descriptor.media_type.contains(".list.") {
            return self.choose(self.decode(&path, &bytes)?, depth + 1);
        }
        self.decode(&path, &bytes)
    }

    /// Path of a blob. Only a plain SHA-256 can become a part of a path.
    fn blob(&self, descriptor: &Descriptor) -> Result<(PathBuf, String)> {
        let hex = descriptor
            .digest
            .strip_prefix("sha256:")
            .filter(|hex| {
                hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            })
            .ok_or_else(|| self.bad(&format!("\"{}\" is no SHA-256 digest", descriptor.digest)))?;
        let path = self.layout.join("blobs/sha256").join(hex);
        // A link or a pipe in a hostile layout could stand for any host file.
        match fs::symlink_metadata(&path) {
            Ok(data) if data.is_file() => Ok((path, hex.to_owned())),
            Ok(_) => Err(self.bad(&format!("blob {hex} is no regular file"))),
            Err(_) => Err(self.bad(&format!("blob {hex} is missing"))),
        }
    }

    fn parse<T: DeserializeOwned>(&self, path: &Path) -> Result<T> {
        let bytes = self.read(path)?;
        self.decode(path, &bytes)
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        let fail = |source| Error::io("read", path, source);
        let mut bytes = Vec::new();
        let file = fs::File::open(path).map_err(fail)?;
        file.take(MAX_JSON + 1)
            .read_to_end(&mut bytes)
            .map_err(fail)?;
        if bytes.len() as u64 > MAX_JSON {
            return Err(self.bad(&format!("{} is too large", path.display())));
        }
        Ok(bytes)
    }

    fn decode<T: DeserializeOwned>(&self, path: &Path, bytes: &[u8]) -> Result<T> {
        serde_json::from_slice(bytes)
            .map_err(|error| self.bad(&format!("{}: {error}", path.display())))
    }

    fn bad(&self, reason: &str) -> Error {
        Error::Oci {
            path: self.layout.to_owned(),
            reason: reason.to_owned(),
        }
    }
}
