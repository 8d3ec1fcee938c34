//! Templates that a bench makes and removes.

use std::path::PathBuf;

use anyhow::Result;
use bulkhead::run::{Build, Io, build};

use super::config::{Bed, Config, explain};

/// A template; removed when the bench says so.
pub(super) struct Made {
    host: bulkhead::run::Host,
    pub(super) id: String,
    /// Its files.
    pub(super) dir: PathBuf,
}

impl Made {
    /// Makes the template that clones of this configuration need.
    pub(super) async fn new(bed: &Bed, config: &Config) -> Result<Self> {
        let (host, spec) = (bed.host(config), bed.spec(config)?);
        let wish = Build {
            rebuild: true,
            ..Build::default()
        };
        let io = Io::collecting(bed.temp().to_owned());
        let built = build(&host, &spec, &wish, io).await.map_err(explain)?;
        let id = built.template.id;
        let dir = bed.dirs().state.join("templates").join(&id);
        Ok(Self { host, id, dir })
    }

    /// Removes it.
    pub(super) fn remove(self) -> Result<()> {
        self.host.templates().rm(&self.id).map_err(explain)?;
        Ok(())
    }
}
