//! `bulkhead man`.

use std::path::PathBuf;

use super::message::{Failure, print_text};
use crate::run::RunError;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Write the pages of all verbs into this directory.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Prints or writes manual pages.
pub(super) fn run(args: &Args) -> Result<i32, Failure> {
    let failed = |source| RunError::Output {
        place: match &args.dir {
            Some(dir) => dir.display().to_string(),
            None => "stdout".into(),
        },
        source,
    };
    if let Some(dir) = &args.dir {
        std::fs::create_dir_all(dir).map_err(failed)?;
        clap_mangen::generate_to(super::command(), dir).map_err(failed)?;
        return Ok(0);
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(super::command())
        .render(&mut page)
        .map_err(failed)?;
    print_text(&String::from_utf8_lossy(&page));
    Ok(0)
}
