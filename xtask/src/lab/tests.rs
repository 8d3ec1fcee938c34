//! `lab test`: the project's own tests, built here and run there, all in one boot.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as Waker, Poll};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tokio::io::AsyncWrite;

use super::machine::{self, Lab};
use super::{Options, with_lab};
use crate::{count, setup};

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,
    /// Run the tests whose name contains this, as `cargo test` does; those of
    /// one file with `FILE::`.
    filter: Option<String>,
}

/// The tests that need a KVM host, vhost or cgroup version 2: target, and what
/// their names begin with. CI runs these, every time.
const NEEDED: [(&str, &str); 12] = [
    ("kvm", ""),
    ("kvm_disk", ""),
    ("kvm_saved", ""),
    ("ordinary_user", "who_is_in_the_group_of_kvm"),
    ("out_of_memory", "a_run_whose_vmm_is_killed"),
    ("templates", "a_template_is_cloned_under_kvm"),
    ("whole_host", ""),
    ("jail", "no_file_of_a_machine"),
    ("bulkhead", "host::cgroup::"),
    ("bulkhead", "vmm::spawn::"),
    ("resources", "a_cpu_quota_holds"),
    ("resources", "the_group_of_a_dead_owner"),
];
/// A state directory of the lab's own: images and kernels of this machine, but
/// nothing it has running.
pub(super) const STATE: &str = "/run/lab/state";

/// A test program, and the tests to be run of it.
struct Program {
    target: String,
    path: PathBuf,
    tests: Vec<String>,
}

/// What a run of tests gave.
#[derive(Default)]
pub(crate) struct Tested {
    /// What the test programs wrote to stdout.
    pub(crate) text: String,
    /// Second tries: the tests that had failed, whether their program ended well
    /// then, and what it wrote.
    pub(crate) second: Vec<(BTreeSet<String>, bool, String)>,
    /// Programs that did not end well.
    pub(crate) failed: Vec<String>,
    /// Those of them that told no result.
    pub(crate) died: Vec<String>,
}

/// Runs the task.
pub(super) fn run(args: &Args) -> Result<()> {
    let tested = test(&args.options, args.filter.as_deref())?;
    ensure!(
        tested.failed.is_empty(),
        "tests failed: {}",
        tested.failed.join(", ")
    );
    Ok(())
}

/// The tests that need a lab, for `cargo xtask test`.
pub(crate) fn ci(state: &Path) -> Result<Tested> {
    let options = Options {
        state_dir: state.to_owned(),
        memory: bulkhead::spec::Bytes::gib(3),
        timeout: bulkhead::spec::Timeout::secs(30 * 60),
        verbose: true,
    };
    test(&options, None)
}

/// Makes a state directory in the lab; gives the environment of what uses it.
pub(super) async fn prepare(lab: &Lab, options: &Options) -> Result<Vec<(String, String)>> {
    let state = options.state_dir.canonicalize()?;
    let state = state.to_str().context("the state directory is not UTF-8")?;
    let links = format!("ln -s '{state}/images' '{state}/kernels' {STATE}");
    let script = format!("mkdir -p {STATE}/cache && {links}");
    let words = ["sh", "-c", &script].map(str::to_owned);
    let mut io = machine::plain_io(false);
    let code = lab.run(words.into(), &[], &mut io, None).await?;
    ensure!(code == 0, "cannot make {STATE}");
    let env = [
        ("BULKHEAD_TEST_STATE", STATE),
        ("BULKHEAD_TEST_ACCEL", "kvm"),
        // It boots several times faster than Debian's.
        ("BULKHEAD_KERNEL", "tuned"),
        // One proof that KVM works serves all.
        ("BULKHEAD_TEST_RUNTIME", "/run/lab/runtime"),
        // Machines in a machine under emulation.
        ("BULKHEAD_BOOT_TIMEOUT", "600s"),
    ];
    let text = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    Ok(env.map(text).into())
}

fn test(options: &Options, filter: Option<&str>) -> Result<Tested> {
    let programs = chosen(filter)?;
    with_lab(options, async |lab| {
        let work = async {
            let env = prepare(lab, options).await?;
            run_all(lab, &programs, &env, filter.is_none()).await
        };
        match tokio::time::timeout(options.timeout.0, work).await {
            Ok(tested) => tested,
            Err(_) => bail!("not over after {} s", options.timeout.0.as_secs()),
        }
    })
}

/// Runs them; tests that fail get a second try, alone, if that is wanted.
async fn run_all(
    lab: &Lab,
    programs: &[Program],
    env: &[(String, String)],
    twice: bool,
) -> Result<Tested> {
    let mut tested = Tested::default();
    for program in programs {
        println!("in the lab: {} of {}", program.tests.len(), program.target);
        let (code, text) = run_one(lab, program, &program.tests, "2", env).await?;
        tested.text.push_str(&text);
        if code == 0 {
            continue;
        }
        let name = format!("{} ({code})", program.target);
        // As libtest ends where a test failed.
        let told = code == 101 && !count::failed(&text).is_empty() && count::all_ended(&text);
        if !told {
            tested.died.push(name.clone());
        }
        tested.failed.push(name);
        let worth = count::worth_a_second_try(&text).filter(|_| twice && told);
        if let Some(failed) = worth {
            let names: Vec<String> = failed.iter().cloned().collect();
            let (code, text) = run_one(lab, program, &names, "1", env).await?;
            tested.second.push((failed, code == 0, text));
        }
    }
    Ok(tested)
}

/// Runs tests of one program: how it ended, and what it wrote.
async fn run_one(
    lab: &Lab,
    program: &Program,
    tests: &[String],
    threads: &str,
    env: &[(String, String)],
) -> Result<(i32, String)> {
    let path = program.path.to_str().context("a path is not UTF-8")?;
    let words = [path, "--include-ignored", "--show-output", "--exact"];
    let mut argv: Vec<String> = words.map(str::to_owned).into();
    argv.push(format!("--test-threads={threads}"));
    argv.extend(tests.iter().cloned());
    let copy = Copy::default();
    let mut io = machine::plain_io(false);
    io.stdout = Some(Box::new(copy.clone()));
    let code = lab.run(argv, env, &mut io, None).await?;
    Ok((code, String::from_utf8_lossy(&copy.bytes()).into_owned()))
}

/// Builds the tests, and chooses those to be run.
fn chosen(filter: Option<&str>) -> Result<Vec<Program>> {
    let mut programs = build()?;
    for program in &mut programs {
        let mut list = std::process::Command::new(&program.path);
        let output = list.args(["--list", "--format=terse"]).output()?;
        let text = String::from_utf8(output.stdout)?;
        let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
        let target = program.target.as_str();
        let wanted = |name: &&str| match filter {
            Some(filter) => format!("{target}::{name}").contains(filter),
            None => NEEDED
                .iter()
                .any(|(of, begin)| *of == target && name.starts_with(begin)),
        };
        program.tests = names.filter(wanted).map(str::to_owned).collect();
    }
    programs.retain(|program| !program.tests.is_empty());
    match filter {
        Some(filter) => ensure!(!programs.is_empty(), "no test's name contains {filter}"),
        None => {
            for (target, begin) in NEEDED {
                let found = programs.iter().any(|program| {
                    let tests = &program.tests;
                    program.target == target && tests.iter().any(|name| name.starts_with(begin))
                });
                ensure!(found, "there is no test {target}::{begin} any more");
            }
        }
    }
    Ok(programs)
}

/// The test programs of the library: the only ones that have to do with machines.
fn build() -> Result<Vec<Program>> {
    // As `cargo xtask test` builds them, or all would be compiled again.
    let mut command = setup::cargo(&["test", "--no-run", "--workspace"])?;
    command.arg("--message-format=json-render-diagnostics");
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the tests cannot be built");
    let root = setup::root()?;
    let dirs = [root.join("src"), root.join("tests")];
    let text = String::from_utf8(output.stdout)?;
    let programs = text.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let target = &message["target"];
        let source = Path::new(target["src_path"].as_str()?);
        let wanted = dirs.iter().any(|dir| source.starts_with(dir));
        if !wanted || message["profile"]["test"] != true {
            return None;
        }
        Some(Program {
            target: target["name"].as_str()?.to_owned(),
            path: message["executable"].as_str()?.into(),
            tests: Vec::new(),
        })
    });
    Ok(programs.collect())
}

/// Shows what is written to it, and keeps a copy.
#[derive(Clone, Default)]
struct Copy(Arc<Mutex<Vec<u8>>>);

impl Copy {
    fn bytes(&self) -> Vec<u8> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.clone()
    }
}

impl AsyncWrite for Copy {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Waker<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut copy = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        copy.extend(bytes);
        Poll::Ready(io::stdout().write_all(bytes).map(|()| bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Waker<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(io::stdout().flush())
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Waker<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
