//! `cargo xtask soak --pool`: clones out of a pool, each with a network, one
//! command in each, over and over; what this very process, its directories and
//! the networks take may not grow, and is gone in the end.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bulkhead::error::{Explain, Report};
use bulkhead::guest::Output;
use bulkhead::run::{Build, Host, Io, build};
use bulkhead::service::pool::{Pool, Settings};
use bulkhead::spec::{Accel, Bytes, Catalog, NetworkMode, Request as Wish, Spec};
use bulkhead_agent::{Exec, Request};

use super::nets::Nets;
use super::trend::worst;
use super::{Args, Gauge, Samples, gauge, kib, lock};
use crate::bench::stats::quantile;
use crate::probe::place::{Place, entries};
use crate::probe::{Came, Row, Rows};

/// How long a caller waits, and a command takes, at most.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often what may grow is measured.
const LOOK: Duration = Duration::from_millis(250);
/// Longer than the kernel takes to remove a link.
const SETTLED: Duration = Duration::from_secs(60);

const RSS: Gauge = gauge("own memory, KiB", 10, 4096);
/// Those of the clones that are there at the moment, too.
const DESCRIPTORS: Gauge = gauge("own descriptors", 10, 32);
const THREADS: Gauge = gauge("own threads", 10, 8);
const STATE: Gauge = gauge("state directory, KiB", 10, 4096);
const RUNS: Gauge = gauge("machines on record", 0, 8);

/// What the callers have in common.
struct Work {
    pool: Pool,
    /// What is run in each clone.
    argv: Vec<String>,
    begun: AtomicUsize,
    runs: usize,
    /// Milliseconds that callers waited.
    waits: Mutex<Vec<f64>>,
    failures: Mutex<Vec<String>>,
}

/// Runs the cycles.
pub(super) fn run(args: &Args, place: &Place, rows: &Rows) -> Result<()> {
    let nets = Nets::new(place)?;
    let (host, spec) = machines(args, place, nets.as_ref())?;
    let begin = Instant::now();
    let mut samples = Samples::new();
    let add = |case: String, why: Vec<String>| {
        let came = match why.is_empty() {
            true => Came::Passed,
            false => Came::Failed,
        };
        if !args.json {
            println!("{:6} {case}", format!("{came:?}").to_lowercase());
        }
        rows.add(Row {
            case,
            came,
            why,
            again: "cargo xtask soak --pool".into(),
            ms: begin.elapsed().as_millis(),
            tried: None,
        });
    };
    // What this process makes once and keeps is there after it.
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(template(place, &host, &spec))?;
    drop(runtime);
    let count = || count(nets.as_ref());
    let before = steady(count)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let measure = |samples: &mut Samples| measure(place, &count()?, samples);
    let argv = match nets {
        Some(_) => vec!["bash".into(), "-c".into(), Nets::script()],
        None => vec!["true".into()],
    };
    let work = runtime.block_on(cycles(args, host, spec, argv, || measure(&mut samples)))?;
    let seconds = begin.elapsed().as_secs_f64();
    let waits = lock(&work.waits);
    let [half, most] = [0.5, 0.99].map(|part| quantile(&waits, part));
    let what = format!(
        "{} cycles {} by {} callers in {seconds:.0} s; they waited {half:.0} ms (p50), {most:.0} \
         ms (p99)",
        waits.len(),
        if nets.is_some() {
            "with networks"
        } else {
            "without networks"
        },
        args.callers
    );
    let mut failures = std::mem::take(&mut *lock(&work.failures));
    if waits.len() + failures.len() != args.runs {
        failures.push(format!("{} were to be run", args.runs));
    }
    add(what, failures);
    let status = work.pool.status();
    let left = (status.alive() + status.left_behind > 0).then(|| format!("{status:?}"));
    add("the pool is empty".into(), left.into_iter().collect());
    for (gauge, worst) in worst(&samples) {
        let grown = (!worst.flat).then(|| format!("it grew: {}", worst.of));
        let what = format!("{:31} {}", gauge.name, worst.shown());
        add(what, grown.into_iter().collect());
    }
    drop(runtime);
    let names: Vec<&str> = before.iter().map(|(gauge, _)| gauge.name).collect();
    let what = format!("as before the first cycle: {}", names.join("; "));
    add(what, differs(&before, count)?);
    add("nothing is left".into(), place.left());
    Ok(())
}

/// The clones, and where they run.
fn machines(args: &Args, place: &Place, nets: Option<&Nets>) -> Result<(Host, Spec)> {
    let network = match nets {
        Some(_) => NetworkMode::NatFiltered,
        None => NetworkMode::Isolated,
    };
    let wish = Wish {
        image: Some("base".into()),
        kernel: Some(args.kernel.clone()),
        accel: Some(match args.accel.as_str() {
            "tcg" => Accel::Tcg,
            "kvm" => Accel::Kvm,
            other => bail!("--accel cannot be {other}: kvm and tcg are possible"),
        }),
        cpus: Some(1),
        memory: Some(Bytes::mib(256)),
        disk: Some(Bytes::mib(64)),
        network: Some(network.into()),
        ..Wish::default()
    };
    let spec = wish.resolve_machine(&Catalog::default());
    let host = Host {
        die_with_thread: true,
        site: nets.map(Nets::site).unwrap_or_default(),
        ..Host::new(place.dirs())
    };
    Ok((host, spec.map_err(|error| told(&error))?))
}

fn told(error: &dyn Explain) -> anyhow::Error {
    anyhow::anyhow!("{}", Report::of(error).what)
}

async fn template(place: &Place, host: &Host, spec: &Spec) -> Result<()> {
    let io = Io::collecting(place.dirs().state.join("output"));
    let built = build(host, spec, &Build::default(), io).await;
    built.map_err(|error| told(&error))?;
    Ok(())
}

async fn cycles(
    args: &Args,
    host: Host,
    spec: Spec,
    argv: Vec<String>,
    mut measure: impl FnMut() -> Result<()>,
) -> Result<Arc<Work>> {
    let settings = Settings::new(args.callers.min(4), args.callers + 4);
    let pool = Pool::open(host, spec, settings).await;
    let work = Arc::new(Work {
        pool: pool.map_err(|error| told(&error))?,
        argv,
        begun: AtomicUsize::new(0),
        runs: args.runs,
        waits: Mutex::default(),
        failures: Mutex::default(),
    });
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..args.callers {
        callers.spawn(calls(Arc::clone(&work)));
    }
    let mut look = tokio::time::interval(LOOK);
    while !callers.is_empty() {
        tokio::select! {
            done = callers.join_next() => done.transpose().map(drop)?,
            _ = look.tick() => measure()?,
        }
    }
    let drained = work.pool.drain(PATIENCE).await;
    drained.map_err(|error| told(&error))?;
    Ok(work)
}

/// One caller: as long as there is something to do.
async fn calls(work: Arc<Work>) {
    while work.begun.fetch_add(1, Ordering::Relaxed) < work.runs {
        match once(&work).await {
            Ok(wait) => lock(&work.waits).push(wait.as_secs_f64() * 1000.0),
            Err(report) => {
                let failure = format!("{}: {}", report.what, report.cause);
                eprintln!("{failure}");
                lock(&work.failures).push(failure);
            }
        }
    }
}

/// Acquires, runs the command, releases; gives how long the caller waited.
async fn once(work: &Work) -> Result<Duration, Report> {
    let begin = Instant::now();
    let clone = work.pool.acquire(PATIENCE).await;
    let clone = clone.map_err(|error| Report::of(&error))?;
    let wait = begin.elapsed();
    let mut said = Vec::new();
    let run = async {
        let exec = Exec {
            argv: work.argv.clone(),
            ..Exec::default()
        };
        let mut stream = clone.channel().open(&Request::Exec(exec)).await?;
        stream.started("run a command").await?;
        loop {
            match stream.next().await? {
                Output::Out(bytes) | Output::Err(bytes) => said.extend(bytes),
                Output::Exit(exit) => return Ok(exit),
            }
        }
    };
    let run: Result<_, bulkhead::guest::GuestError> = run.await;
    let exit = run.map_err(|error| Report::of(&error))?;
    clone.release();
    match exit.code {
        Some(0) => Ok(wait),
        _ => Err(Report {
            code: "command-failed".into(),
            what: format!("the command ended with {exit:?}"),
            cause: String::from_utf8_lossy(&said).trim().to_owned(),
            remedy: String::new(),
            system_call: None,
        }),
    }
}

/// Whatever is to be as it was when all is over.
fn count(nets: Option<&Nets>) -> Result<Vec<(Gauge, usize)>> {
    let mut all = vec![
        (DESCRIPTORS, entries(Path::new("/proc/self/fd")).len()),
        (THREADS, entries(Path::new("/proc/self/task")).len()),
    ];
    if let Some(nets) = nets {
        all.extend(nets.count()?);
    }
    Ok(all)
}

/// What there is when it does not change any more: some sockets are closed a
/// little later, by threads of their own.
fn steady(count: impl Fn() -> Result<Vec<(Gauge, usize)>>) -> Result<Vec<(Gauge, usize)>> {
    let begin = Instant::now();
    let mut before = count()?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = count()?;
        if now == before || begin.elapsed() > SETTLED {
            return Ok(now);
        }
        before = now;
    }
}

/// Waits until all of it is as it was before; gives what is not.
fn differs(
    before: &[(Gauge, usize)],
    count: impl Fn() -> Result<Vec<(Gauge, usize)>>,
) -> Result<Vec<String>> {
    let begin = Instant::now();
    loop {
        let now = count()?;
        let both = before
            .iter()
            .zip(&now)
            .filter(|(before, now)| before != now);
        let differs = both.map(|((gauge, before), (_, now))| {
            format!("{}: {before} before, {now} now", gauge.name)
        });
        let differs: Vec<String> = differs.collect();
        if differs.is_empty() || begin.elapsed() > SETTLED {
            return Ok(differs);
        }
        std::thread::sleep(LOOK);
    }
}

fn measure(place: &Place, counts: &[(Gauge, usize)], samples: &mut Samples) -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let text = line.context("/proc/self/status is odd")?.trim();
    let rss: f64 = text.trim_end_matches(" kB").parse()?;
    let dirs = place.dirs();
    let state: f64 = entries(&dirs.state).iter().map(|path| kib(path)).sum();
    let runs = entries(&dirs.runs()).len() as f64;
    let counts = counts.iter().map(|(gauge, count)| (*gauge, *count as f64));
    for (gauge, value) in counts.chain([(RSS, rss), (STATE, state), (RUNS, runs)]) {
        let all = samples.entry((gauge, "all".to_owned())).or_default();
        all.push(value);
    }
    Ok(())
}
