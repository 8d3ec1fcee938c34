//! `bulkhead completions`.

use clap_complete::Shell;

use super::message::{Failure, print_text};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell they are for.
    shell: Known,
}

/// The shells whose completions are looked after.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Known {
    Bash,
    Zsh,
    Fish,
}

/// Prints completions.
pub(super) fn run(args: &Args) -> Result<i32, Failure> {
    let shell = match args.shell {
        Known::Bash => Shell::Bash,
        Known::Zsh => Shell::Zsh,
        Known::Fish => Shell::Fish,
    };
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "bulkhead", &mut text);
    print_text(&String::from_utf8_lossy(&text));
    Ok(0)
}
