//! `cargo xtask soak --pool`: clones out of a pool, one command in each, over
//! and over; what this very process and its directories take may not grow.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bulkhead::error::{Explain, Report};
use bulkhead::guest::Output;
use bulkhead::run::{Build, Host, Io, build};
use bulkhead::service::pool::{Pool, Settings};
use bulkhead::spec::{Accel, Bytes, Catalog, NetworkMode, Request as Wish};
use bulkhead_agent::{Exec, Request};

use super::{Args, Gauge, Samples, gauge, kib, lock, worst};
use crate::bench::stats::quantile;
use crate::probe::place::{Place, entries};
use crate::probe::{Came, Row, Rows};

/// How long a caller waits, and a command takes, at most.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often what may grow is measured.
const LOOK: Duration = Duration::from_millis(500);

const RSS: Gauge = gauge("own memory, KiB", 10, 4096);
/// Those of the clones that are there at the moment, too.
const DESCRIPTORS: Gauge = gauge("own descriptors", 10, 32);
const THREADS: Gauge = gauge("own threads", 10, 8);
const STATE: Gauge = gauge("state directory, KiB", 10, 4096);
const RUNS: Gauge = gauge("machines on record", 0, 8);

/// What the callers have in common.
struct Work {
    pool: Pool,
    begun: AtomicUsize,
    runs: usize,
    /// Milliseconds that callers waited.
    waits: Mutex<Vec<f64>>,
    failures: Mutex<Vec<String>>,
}

/// Runs the cycles.
pub(super) fn run(args: &Args, place: &Place, rows: &Rows) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
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
    let work = runtime.block_on(cycles(args, place, &mut samples))?;
    let seconds = begin.elapsed().as_secs_f64();
    let waits = lock(&work.waits);
    let [half, most] = [0.5, 0.99].map(|part| quantile(&waits, part));
    let what = format!(
        "{} cycles by {} callers in {seconds:.0} s; they waited {half:.0} ms (p50), {most:.0} ms \
         (p99)",
        waits.len(),
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
        let what = format!("{:28} {}", gauge.name, worst.shown());
        add(what, grown.into_iter().collect());
    }
    drop(runtime);
    add("nothing is left".into(), place.left());
    Ok(())
}

async fn cycles(args: &Args, place: &Place, samples: &mut Samples) -> Result<Arc<Work>> {
    let told = |error: &dyn Explain| anyhow::anyhow!("{}", Report::of(error).what);
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
        network: Some(NetworkMode::Isolated.into()),
        ..Wish::default()
    };
    let spec = wish.resolve_machine(&Catalog::default());
    let spec = spec.map_err(|error| told(&error))?;
    let host = Host {
        die_with_thread: true,
        ..Host::new(place.dirs())
    };
    let io = Io::collecting(place.dirs().state.join("output"));
    let built = build(&host, &spec, &Build::default(), io).await;
    built.map_err(|error| told(&error))?;
    let settings = Settings::new(args.callers.min(4), args.callers + 4);
    let pool = Pool::open(host, spec, settings).await;
    let work = Arc::new(Work {
        pool: pool.map_err(|error| told(&error))?,
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
            _ = look.tick() => measure(place, samples)?,
        }
    }
    let drained = work.pool.drain(PATIENCE).await;
    drained.map_err(|error| told(&error))?;
    Ok(work)
}

/// One caller: as long as there is something to do.
async fn calls(work: Arc<Work>) {
    while work.begun.fetch_add(1, Ordering::Relaxed) < work.runs {
        match once(&work.pool).await {
            Ok(wait) => lock(&work.waits).push(wait.as_secs_f64() * 1000.0),
            Err(report) => {
                eprintln!("{}: {}", report.what, report.cause);
                lock(&work.failures).push(report.what);
            }
        }
    }
}

/// Acquires, runs `true`, releases; gives how long the caller waited.
async fn once(pool: &Pool) -> Result<Duration, Report> {
    let begin = Instant::now();
    let clone = pool.acquire(PATIENCE).await;
    let clone = clone.map_err(|error| Report::of(&error))?;
    let wait = begin.elapsed();
    let run = async {
        let exec = Exec {
            argv: vec!["true".into()],
            ..Exec::default()
        };
        let mut stream = clone.channel().open(&Request::Exec(exec)).await?;
        stream.started("run a command").await?;
        loop {
            if let Output::Exit(exit) = stream.next().await? {
                return Ok(exit);
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
            what: format!("`true` ended with {exit:?}"),
            cause: String::new(),
            remedy: String::new(),
            system_call: None,
        }),
    }
}

fn measure(place: &Place, samples: &mut Samples) -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let figure = |name: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let text = line.context("/proc/self/status is odd")?.trim();
        Ok(text.trim_end_matches(" kB").parse()?)
    };
    let dirs = place.dirs();
    let state: f64 = entries(&dirs.state).iter().map(|path| kib(path)).sum();
    for (gauge, value) in [
        (RSS, figure("VmRSS:")?),
        (THREADS, figure("Threads:")?),
        (
            DESCRIPTORS,
            entries(Path::new("/proc/self/fd")).len() as f64,
        ),
        (STATE, state),
        (RUNS, entries(&dirs.runs()).len() as f64),
    ] {
        let all = samples.entry((gauge, "all".to_owned())).or_default();
        all.push(value);
    }
    Ok(())
}
