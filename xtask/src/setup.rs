//! `cargo xtask setup`: what is missing on this host, installed and built.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use bulkhead::error::{Explain as _, Report};
use bulkhead::image::{AgentBinary, Builder, KernelSource, Recipe, Store};
use bulkhead::run::Dirs;
use xtask_boot as packages;
pub(crate) use xtask_boot::call;

/// The only target the agent is linked statically for without another toolchain.
const AGENT_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install missing packages without asking.
    #[arg(long, short)]
    yes: bool,
    /// Only say what is missing; fail if anything is.
    #[arg(long)]
    check: bool,
    /// Where images are kept.
    #[arg(
        long,
        env = "BULKHEAD_STATE_DIR",
        default_value_os_t = usual_state_dir(),
        value_name = "DIR"
    )]
    state_dir: PathBuf,
}

/// Where `bulkhead` keeps its state unless told otherwise.
pub(crate) fn usual_state_dir() -> PathBuf {
    let is_root = packages::is_root().unwrap_or_default();
    let dirs = Dirs::usual(is_root, None, None, |name| std::env::var_os(name));
    dirs.map_or_else(|| "/var/lib/bulkhead".into(), |dirs| dirs.state)
}

/// What [`ensure`] leaves behind.
pub(crate) struct Ready {
    /// The release binary; the guest agent is beside it.
    #[allow(dead_code, reason = "for the tasks that run it")]
    pub(crate) bulkhead: PathBuf,
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    if args.check {
        return check(&args.state_dir);
    }
    ensure(&args.state_dir, args.yes).map(|_| ())
}

/// Makes this host ready: packages, binaries, images. Does only what is
/// missing; `yes` installs packages without asking.
pub(crate) fn ensure(state_dir: &Path, yes: bool) -> Result<Ready> {
    let all = Instant::now();
    step("host packages", || install(yes))?;
    let bulkhead = step("bulkhead and the guest agent", binaries)?;
    let store = Store::new(state_dir.to_owned());
    let agent = AgentBinary::read(&bulkhead.with_file_name("bulkhead-agent")).map_err(explain)?;
    for name in Recipe::names() {
        step(&format!("image {name}"), || image(&store, name, &agent))?;
    }
    eprintln!("ready in {:.1} s", all.elapsed().as_secs_f32());
    Ok(Ready { bulkhead })
}

fn check(state_dir: &Path) -> Result<()> {
    let missing = packages::missing()?;
    packages::print(&missing);
    let store = Store::new(state_dir.to_owned());
    let mut lacking = missing.len();
    for name in Recipe::names() {
        if let Err(error) = store.get(name) {
            let report = Report::of(&error);
            eprintln!("{}: {}", report.what, report.remedy);
            lacking += 1;
        }
    }
    if lacking > 0 {
        bail!("{lacking} things are missing: run `cargo xtask setup`");
    }
    Ok(())
}

fn install(yes: bool) -> Result<()> {
    let missing = packages::missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    packages::print(&missing);
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    let by_hand = format!(
        "apt-get install --no-install-recommends {}",
        names.join(" ")
    );
    if !packages::is_root()? {
        bail!("installing them takes root: run `sudo {by_hand}`");
    }
    if !yes && !confirm("install them with apt?")? {
        bail!("not installed: run `{by_hand}`, or `cargo xtask setup --yes`");
    }
    packages::install(&names)
}

fn confirm(question: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Ok(false);
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// The workspace.
pub(crate) fn root() -> Result<&'static Path> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.context("xtask lies in the workspace")
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> Result<PathBuf> {
    let root = root()?;
    Ok(std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), |dir| root.join(dir)))
}

/// Cargo in the workspace.
pub(crate) fn cargo(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.current_dir(root()?).args(args).arg("--quiet");
    Ok(command)
}

/// Builds the release binary.
pub(crate) fn bulkhead() -> Result<PathBuf> {
    let words = ["build", "--release", "--package", "bulkhead-vm"];
    call(cargo(&words)?.args(["--bin", "bulkhead"]))?;
    Ok(target()?.join("release/bulkhead"))
}

/// Builds the release binary and, beside it, the static guest agent.
fn binaries() -> Result<PathBuf> {
    let (target, bulkhead) = (target()?, bulkhead()?);
    call(
        cargo(&[
            "build",
            "--profile",
            "agent",
            "--package",
            "bulkhead-agent",
            "--target",
            AGENT_TARGET,
        ])?
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static"),
    )?;
    let built = target.join(AGENT_TARGET).join("agent/bulkhead-agent");
    let beside = target.join("release/bulkhead-agent");
    // Replaced, not overwritten: a running build may have the old one open.
    let fresh = beside.with_extension("new");
    std::fs::copy(&built, &fresh)
        .and_then(|_| std::fs::rename(&fresh, &beside))
        .with_context(|| format!("cannot copy {} to {}", built.display(), beside.display()))?;
    Ok(bulkhead)
}

fn image(store: &Store, name: &str, agent: &AgentBinary) -> Result<()> {
    let recipe = Recipe::built_in(name).map_err(explain)?;
    let key = Builder::key(&recipe, agent, &KernelSource::Package).map_err(explain)?;
    // A corrupt image is built again.
    if store.inputs(name).as_deref() == Some(key.as_str()) && store.get(name).is_ok() {
        return Ok(());
    }
    let builder = Builder::new(store).with_progress(|step| eprintln!("    {step}"));
    let image = builder
        .from_recipe(&recipe, name, agent, &KernelSource::Package)
        .map_err(explain)?;
    store.set_inputs(&image, &key).map_err(explain)
}

fn explain(error: bulkhead::image::Error) -> anyhow::Error {
    let remedy = error.remedy();
    anyhow::Error::new(error).context(format!("image: {remedy}"))
}

fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("  {what} ...");
    let start = Instant::now();
    let done = work().with_context(|| what.to_owned())?;
    eprintln!("  {what}: {:.1} s", start.elapsed().as_secs_f32());
    Ok(done)
}
