//! `cargo xtask soak`: many machines, many runs, for a while; nothing may fail,
//! grow, slow down or stay.

mod kills;
mod nets;
mod pool;
mod trend;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bulkhead::supervise::View;

use self::trend::worst;
use crate::bench::stats::quantile;
use crate::probe::place::{Kit, Place, entries};
use crate::probe::{Came, Row, Rows};
use crate::setup;

/// What each machine has.
const SIZE: [&str; 4] = ["--memory", "256M", "--cpus", "1"];
/// Every so many runs, one is a machine's whole life instead.
const CYCLE: usize = 5;
/// How often each machine is given a command.
const EXEC: Duration = Duration::from_secs(15);
/// A start may take so many times longer at the end than at the beginning:
/// half of them, and all but the slowest.
const DRIFT: [(f64, f64); 2] = [(0.5, 1.5), (0.99, 2.0)];

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Runs at least.
    #[arg(long, default_value_t = 1000)]
    runs: usize,
    /// Machines that run all the while.
    #[arg(long, default_value_t = 20)]
    machines: usize,
    /// Minutes at least.
    #[arg(long, default_value_t = 20)]
    minutes: u64,
    /// Runs at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Clones out of a pool in this very process instead, a command in each.
    #[arg(long, conflicts_with_all = ["machines", "minutes", "jobs"])]
    pool: bool,
    /// With --pool: callers at a time.
    #[arg(long, default_value_t = 20)]
    callers: usize,
    /// So many SIGKILLs instead, of a machine's owner, its QEMU, or the verb,
    /// while machines are saved, restored, forked, reset and made.
    #[arg(long, conflicts_with_all = ["machines", "minutes", "jobs", "pool", "runs"])]
    kills: Option<usize>,
    /// With --kills: what chance begins with [default: the time].
    #[arg(long, requires = "kills")]
    seed: Option<u64>,
    /// Machines without networks; only root's have any.
    #[arg(long)]
    isolated: bool,
    /// kvm or tcg.
    #[arg(long, default_value = "kvm")]
    accel: String,
    /// Kernel other than the image's.
    #[arg(long, default_value = "tuned")]
    kernel: String,
    /// Print the results as JSON; the closing line is on stderr then.
    #[arg(long)]
    json: bool,
    /// Where images are kept.
    #[arg(long, env = "BULKHEAD_STATE_DIR", default_value_os_t = setup::usual_state_dir())]
    state_dir: PathBuf,
}

/// Something that is measured again and again, and how much it may grow: by a
/// part of itself, and by so much besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Gauge {
    name: &'static str,
    percent: u32,
    more: u32,
}

const fn gauge(name: &'static str, percent: u32, more: u32) -> Gauge {
    Gauge {
        name,
        percent,
        more,
    }
}

const RSS: Gauge = gauge("supervisor memory, KiB", 3, 512);
const DESCRIPTORS: Gauge = gauge("supervisor descriptors", 0, 2);
const THREADS: Gauge = gauge("supervisor threads", 0, 2);
/// Without the logs of its commands, of which a hundred are kept.
const RECORD: Gauge = gauge("machine's record, KiB", 3, 1024);
const LOGS: Gauge = gauge("machine's logs, KiB", 0, 100 * 4);
const STATE: Gauge = gauge("state directory, KiB", 3, 4096);
const RUNTIME: Gauge = gauge("runtime directory, entries", 0, 4);
/// One more for each run that is under way.
const LINKS: Gauge = gauge("network links on the host", 0, 2);
const MEMBERS: Gauge = gauge("machines in the host's rules", 0, 2);

/// Samples of each gauge, of each thing it measures.
type Samples = BTreeMap<(Gauge, String), Vec<f64>>;

/// What goes on.
struct Soak {
    args: Args,
    place: Place,
    begin: Instant,
    started: AtomicUsize,
    over: AtomicBool,
    /// Seconds of each `run` and each `start`, in the order of their beginning.
    runs: Mutex<BTreeMap<usize, f64>>,
    starts: Mutex<BTreeMap<usize, f64>>,
    execs: AtomicUsize,
    failures: Mutex<Vec<String>>,
    samples: Mutex<Samples>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    // A copy: another build must not change what is run.
    let copy = tempfile::tempdir()?;
    let bulkhead = copy.path().join("bulkhead");
    // A pool is in this very process.
    if !args.pool {
        fs::copy(setup::bulkhead()?, &bulkhead)?;
    }
    let kit = Kit {
        bulkhead,
        state_dir: args.state_dir.clone(),
        accel: args.accel.clone(),
        kernel: Some(args.kernel.clone()),
        networks: nix::unistd::geteuid().is_root() && !args.isolated,
        within: Duration::from_secs(5),
    };
    let (rows, json) = (Rows::default(), args.json);
    if args.pool || args.kills.is_some() {
        let place = Place::new(&kit)?;
        match args.kills {
            Some(count) => kills::run(&args, count, &place, &rows)?,
            None => pool::run(&args, &place, &rows)?,
        }
        drop((place, copy));
        if !rows.close(json)? {
            std::process::exit(1);
        }
        return Ok(());
    }
    let soak = Soak {
        place: Place::new(&kit)?,
        begin: Instant::now(),
        started: AtomicUsize::new(0),
        over: AtomicBool::new(false),
        runs: Mutex::default(),
        starts: Mutex::default(),
        execs: AtomicUsize::new(0),
        failures: Mutex::default(),
        samples: Mutex::default(),
        args,
    };
    soak.whole(&rows)?;
    drop((soak, copy));
    if !rows.close(json)? {
        // Without a word: the closing line is the last.
        std::process::exit(1);
    }
    Ok(())
}

impl Soak {
    fn whole(&self, rows: &Rows) -> Result<()> {
        let kept: Vec<String> = (0..self.args.machines)
            .map(|at| format!("kept{at}"))
            .collect();
        self.in_turn(&kept, |vm| {
            self.must(&[&["create", "--name", vm], &SIZE[..]].concat());
            self.must(&["start", vm])
        });
        eprintln!(
            "{} machines after {} s",
            kept.len(),
            self.begin.elapsed().as_secs()
        );
        let (begin, minutes) = (Instant::now(), Duration::from_secs(60 * self.args.minutes));
        let wanted = || {
            let at = self.started.load(Ordering::Relaxed);
            at < self.args.runs || begin.elapsed() < minutes
        };
        std::thread::scope(|scope| {
            scope.spawn(|| self.watch(&kept));
            scope.spawn(|| self.work(&kept));
            let jobs: Vec<_> = (0..self.args.jobs.max(1))
                .map(|_| {
                    scope.spawn(|| {
                        while wanted() {
                            self.once(self.started.fetch_add(1, Ordering::Relaxed));
                        }
                    })
                })
                .collect();
            for job in jobs {
                // It only ends otherwise by a panic, which is shown.
                let _ = job.join();
            }
            self.over.store(true, Ordering::Relaxed);
        });
        self.in_turn(&kept, |vm| self.must(&["exec", vm, "true"]));
        let views: Vec<View> = serde_json::from_slice(&self.place.must(&["ls", "--json"])?)?;
        let alive = views
            .iter()
            .filter(|view| view.live.as_ref().is_some_and(|live| live.agent));
        let (alive, all) = (alive.count(), views.len());
        self.in_turn(&kept, |vm| self.must(&["rm", "--force", vm]));
        let failures = std::mem::take(&mut *lock(&self.failures));
        let (runs, starts) = (lock(&self.runs), lock(&self.starts));
        let execs = self.execs.load(Ordering::Relaxed);
        let what = format!(
            "{} runs, {} lives, {execs} commands",
            runs.len(),
            starts.len()
        );
        self.add(rows, what, failures);
        let dead = (alive != kept.len() || all != kept.len())
            .then(|| format!("{alive} of {all} machines answer"));
        self.add(
            rows,
            format!("{} machines answer at the end", kept.len()),
            dead,
        );
        for (name, times) in [("run", &runs), ("start", &starts)] {
            let times: Vec<f64> = times.values().copied().collect();
            for (part, factor) in DRIFT {
                self.drift(rows, name, &times, part, factor);
            }
        }
        for (gauge, worst) in worst(&lock(&self.samples)) {
            let what = format!("{:28} {}", gauge.name, worst.shown());
            let grown = (!worst.flat).then(|| format!("it grew: {}", worst.of));
            self.add(rows, what, grown);
        }
        self.add(rows, "nothing is left".into(), self.place.left());
        Ok(())
    }

    fn add(&self, rows: &Rows, case: String, why: impl IntoIterator<Item = String>) {
        let why: Vec<String> = why.into_iter().collect();
        let came = if why.is_empty() {
            Came::Passed
        } else {
            Came::Failed
        };
        if !self.args.json {
            println!("{:6} {case}", format!("{came:?}").to_lowercase());
        }
        rows.add(Row {
            case,
            came,
            why,
            again: "cargo xtask soak".into(),
            ms: self.begin.elapsed().as_millis(),
            tried: None,
        });
    }

    fn drift(&self, rows: &Rows, name: &str, times: &[f64], part: f64, factor: f64) {
        let quarter = times.len() / 4;
        let of = |times: &[f64]| quantile(times, part);
        let (first, last) = (of(&times[..quarter]), of(&times[times.len() - quarter..]));
        let percent = part * 100.0;
        let ratio = last / first;
        let what = format!(
            "{name} p{percent:<4} {first:.2} s in the first quarter, {last:.2} s in the last: \
             {ratio:.2} (up to {factor})"
        );
        // Not a number where too few were measured to tell.
        let slow = (ratio.is_nan() || ratio > factor).then(|| "it became slower".to_owned());
        self.add(rows, what, slow);
    }

    /// One run, or one machine's whole life.
    fn once(&self, at: usize) {
        let (vm, begin) = (format!("once{at}"), Instant::now());
        if at % CYCLE != CYCLE - 1 {
            let words = [&["run", "--name", &vm], &SIZE[..], &["--", "true"]].concat();
            if self.must(&words) {
                lock(&self.runs).insert(at, begin.elapsed().as_secs_f64());
            }
            return;
        }
        self.must(&[&["create", "--name", &vm], &SIZE[..]].concat());
        let begin = Instant::now();
        if self.must(&["start", &vm]) {
            lock(&self.starts).insert(at, begin.elapsed().as_secs_f64());
        }
        self.must(&["exec", &vm, "true"]);
        self.must(&["stop", &vm]);
        self.must(&["rm", &vm]);
    }

    /// A verb that must succeed; a failure is remembered.
    fn must(&self, words: &[&str]) -> bool {
        if words.first() == Some(&"exec") {
            self.execs.fetch_add(1, Ordering::Relaxed);
        }
        match self.place.must(words) {
            Ok(_) => true,
            Err(error) => {
                let at = self.begin.elapsed().as_secs();
                let failure = format!("after {at} s: {error:#}");
                eprintln!("{failure}");
                lock(&self.failures).push(failure);
                false
            }
        }
    }

    /// For each of `vms`, as many at a time as there are jobs.
    fn in_turn(&self, vms: &[String], work: impl Fn(&str) -> bool + Sync) {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..self.args.jobs.max(1) {
                scope.spawn(|| {
                    while let Some(vm) = vms.get(next.fetch_add(1, Ordering::Relaxed)) {
                        work(vm);
                    }
                });
            }
        });
    }

    /// Gives each machine a command now and then.
    fn work(&self, kept: &[String]) {
        let pause = EXEC / u32::try_from(kept.len().max(1)).unwrap_or(1);
        for vm in kept.iter().cycle() {
            std::thread::sleep(pause);
            if self.over.load(Ordering::Relaxed) {
                return;
            }
            self.must(&["exec", vm, "true"]);
        }
    }

    /// Measures now and then.
    fn watch(&self, kept: &[String]) {
        let pause = Duration::from_secs((self.args.minutes * 60 / 200).clamp(2, 10));
        while !self.over.load(Ordering::Relaxed) {
            for vm in kept {
                if let Err(error) = self.measure(vm) {
                    lock(&self.failures).push(format!("cannot measure {vm}: {error:#}"));
                }
            }
            let dirs = self.place.dirs();
            let own = entries(&dirs.state).iter().map(|path| kib(path)).sum();
            self.sample(STATE, "all", own);
            self.sample(RUNTIME, "all", entries(&dirs.runtime).len() as f64);
            match self.place.networks() {
                Ok((links, members)) => {
                    self.sample(LINKS, "all", links as f64);
                    self.sample(MEMBERS, "all", members as f64);
                }
                Err(error) => {
                    lock(&self.failures).push(format!("cannot look at the network: {error:#}"));
                }
            }
            std::thread::sleep(pause);
        }
    }

    fn measure(&self, vm: &str) -> Result<()> {
        let dir = self.place.dirs().runs().join(vm);
        let state: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("state.json"))?)?;
        let pid = state["supervisor"]["pid"]
            .as_i64()
            .context("no supervisor")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let figure = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let text = line.context("/proc/PID/status is odd")?.trim();
            Ok(text.trim_end_matches(" kB").parse()?)
        };
        self.sample(RSS, vm, figure("VmRSS:")?);
        self.sample(THREADS, vm, figure("Threads:")?);
        let open = entries(Path::new(&format!("/proc/{pid}/fd"))).len();
        self.sample(DESCRIPTORS, vm, open as f64);
        let logs = kib(&dir.join("logs"));
        self.sample(LOGS, vm, logs);
        self.sample(RECORD, vm, kib(&dir) - logs);
        Ok(())
    }

    fn sample(&self, gauge: Gauge, of: &str, value: f64) {
        let mut samples = lock(&self.samples);
        samples
            .entry((gauge, of.to_owned()))
            .or_default()
            .push(value);
    }
}

/// What a file or a directory takes, links not followed; what goes meanwhile is
/// not counted.
fn kib(path: &Path) -> f64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(meta) = fs::symlink_metadata(path) else {
        return 0.0;
    };
    let below = match meta.is_dir() {
        true => entries(path).iter().map(|entry| kib(entry)).sum(),
        false => 0.0,
    };
    meta.blocks() as f64 / 2.0 + below
}
