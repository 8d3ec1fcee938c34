//! Tasks of the developers and the README: `cargo xtask TASK`.

mod bench;
mod count;
mod coverage;
mod docs;
mod fuzz;
mod kernel;
mod lab;
mod probe;
mod qemu10;
mod qmp_schema;
mod seccomp;
mod setup;
mod soak;
mod test;
mod try_run;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Set up what is missing and run a command in a microVM.
    Try(try_run::Args),
    /// Set up what is missing and pass all tests.
    Test(test::Args),
    /// Install what is missing and build the default image.
    Setup(setup::Args),
    /// Measure, against bare QEMU in the same run.
    Bench(Box<bench::Args>),
    /// Run commands and tests in a real KVM host, made by emulation.
    Lab(lab::Args),
    /// Let things go wrong on purpose, and look at what is left.
    Probe(probe::Args),
    /// Keep many machines and many runs going, and look for what grows or stays.
    Soak(soak::Args),
    /// Measure which lines of the library the tests reach.
    Coverage(coverage::Args),
    /// Write the reference below docs/ from the code.
    Docs(docs::Args),
    /// Feed hostile bytes to whatever reads them.
    Fuzz(fuzz::Args),
    /// Build the tuned kernel.
    Kernel(kernel::Args),
    /// What QEMU calls, against the list of allowed system calls.
    Seccomp(seccomp::Args),
    /// Dumps of what each QEMU version offers.
    QmpSchema(qmp_schema::Args),
    /// Unpack QEMU 10.0 beside the host's own and print its path.
    Qemu10(qemu10::Args),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().task {
        Task::Try(args) => try_run::run(args),
        Task::Test(args) => test::run(args),
        Task::Setup(args) => setup::run(args),
        Task::Bench(args) => bench::run(*args),
        Task::Lab(args) => lab::run(args),
        Task::Probe(args) => probe::run(args),
        Task::Soak(args) => soak::run(args),
        Task::Coverage(args) => coverage::run(args),
        Task::Docs(args) => docs::run(&args),
        Task::Fuzz(args) => fuzz::run(args),
        Task::Kernel(args) => kernel::run(args),
        Task::Seccomp(args) => seccomp::run(args),
        Task::QmpSchema(args) => qmp_schema::run(args),
        Task::Qemu10(args) => qemu10::run(args),
    }
}
