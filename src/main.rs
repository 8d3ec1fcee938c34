//! The `bulkhead` command.

fn main() -> std::process::ExitCode {
    bulkhead::cli::main()
}
