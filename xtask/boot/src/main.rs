//! `cargo xtask`: installs what building needs, then becomes the real xtask,
//! which is linked with the library and could not be built without it.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use xtask_boot::{apt_install, is_root, missing_to_build, print};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let missing = missing_to_build()?;
    if !missing.is_empty() {
        print(&missing);
        let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
        let line = format!(
            "apt-get install --no-install-recommends {}",
            names.join(" ")
        );
        if !may_install(&words) {
            bail!("cargo xtask cannot be built without them: run `{line}`");
        }
        if !is_root()? {
            bail!("installing them takes root: run `sudo {line}`");
        }
        apt_install(&names)?;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let mut xtask = Command::new(cargo);
    xtask.args(["run", "--quiet", "--package", "xtask", "--"]);
    Err(xtask.args(words).exec()).context("cannot run cargo")
}

/// Whether the task is one that installs what is missing without asking.
fn may_install(words: &[String]) -> bool {
    let yes = |word: &String| word == "--yes" || word == "-y";
    match words.first().map(String::as_str) {
        Some("try" | "test" | "coverage") => true,
        Some("setup") => words.iter().any(yes),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tasks_that_say_so_install() {
        let may = |line: &str| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            may_install(&words)
        };
        assert!(may("try -- true") && may("test") && may("setup --yes"));
        assert!(!may("setup") && !may("setup --check") && !may("bench boot --yes"));
    }
}
