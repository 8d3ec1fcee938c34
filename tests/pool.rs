//! Pools of clones against real QEMU, real kernels and the real agent.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead::error::{Explain, Report};
use bulkhead::run::{Build, Dirs, Host, Io, build, recover};
use bulkhead::service::pool::{Pool, PoolError, Settings, Status};
use bulkhead::spec::{Accel, Bytes, Catalog, NetworkMode, Request as Wish, Spec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::entries;
use support::live::{Live, sh};
use support::vmms::{cpu, is_alive, vmms};

/// More than anything here takes.
const LONG: Duration = Duration::from_secs(120);

/// The smallest machine that boots soonest.
fn spec() -> Spec {
    let wish = Wish {
        image: Some("base".into()),
        kernel: Some("tuned".into()),
        accel: Some(match support::accel().as_str() {
            "kvm" => Accel::Kvm,
            _ => Accel::Tcg,
        }),
        cpus: Some(1),
        memory: Some(Bytes::mib(256)),
        disk: Some(Bytes::mib(64)),
        network: Some(NetworkMode::Isolated.into()),
        ..Wish::default()
    };
    wish.resolve_machine(&Catalog::default()).unwrap()
}

/// A host with a template for such machines.
struct Bed {
    live: Live,
}

impl Bed {
    async fn new() -> Self {
        Self::with_qemu(None).await
    }

    async fn with_qemu(qemu: Option<PathBuf>) -> Self {
        let mut live = Live::new();
        live.host.qemu = qemu;
        let templates = made(&live.host).await;
        std::os::unix::fs::symlink(templates, live.host.dirs.state.join("templates")).unwrap();
        Self { live }
    }

    async fn open(&self, settings: Settings) -> Pool {
        Pool::open(self.live.host.clone(), spec(), settings)
            .await
            .unwrap()
    }

    /// One that has as many ready as it is to have.
    async fn filled(&self, settings: Settings) -> Pool {
        let idle = settings.idle;
        let pool = self.open(settings).await;
        assert_eq!(pool.filled(LONG).await.idle, idle, "{:?}", pool.status());
        pool
    }

    /// Machines on record.
    fn runs(&self) -> Vec<String> {
        entries(&self.live.host.dirs.runs())
    }

    /// Process ids of their VMMs.
    fn vmms(&self) -> Vec<i32> {
        vmms(&self.live.host.dirs.runs())
    }

    async fn drained(&self, pool: Pool) {
        let status = pool.drain(LONG).await.unwrap();
        assert_eq!((status.alive(), status.left_behind), (0, 0));
        assert_eq!(self.runs(), [""; 0]);
        assert_eq!(entries(&self.live.host.dirs.runtime), [""; 0]);
        assert_eq!(self.vmms(), [0; 0]);
    }
}

/// A directory with the template for these machines: one for all tests, and
/// there when they are run again.
async fn made(host: &Host) -> PathBuf {
    static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _one = ONE.lock().await;
    let state = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pool");
    fs::create_dir_all(&state).unwrap();
    for name in ["images", "kernels"] {
        let prepared = host.dirs.state.join(name).canonicalize().unwrap();
        std::os::unix::fs::symlink(prepared, state.join("new")).unwrap();
        fs::rename(state.join("new"), state.join(name)).unwrap();
    }
    let builder = Host {
        dirs: Dirs {
            state: state.clone(),
            ..host.dirs.clone()
        },
        ..host.clone()
    };
    let io = Io::collecting(state.join("output"));
    let built = build(&builder, &spec(), &Build::default(), io).await;
    built.unwrap();
    state.join("templates")
}

/// Also while other tests keep the processors busy.
fn settings(idle: usize, max: usize) -> Settings {
    let mut settings = Settings::new(idle, max);
    settings.admission.cpu_wait = 100;
    settings
}

/// Waits until it is like that.
async fn becomes(pool: &Pool, what: &str, like: impl Fn(&Status) -> bool) {
    let begin = Instant::now();
    loop {
        let status = pool.status();
        if like(&status) {
            return;
        }
        assert!(begin.elapsed() < LONG, "not {what}: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_are_ready_and_each_is_another() {
    let bed = Bed::new().await;
    let pool = bed.filled(settings(3, 4)).await;
    let vmms = bed.vmms();
    assert_eq!(vmms.len(), 3);
    // Nobody asks: no processor time, but the clocks fall behind.
    // Threads that end after the filling may take their last turns first, which
    // takes a slow host long.
    let (mut used, mut quiet) = (Vec::new(), 0);
    for _ in 0..30 {
        let before: Vec<u64> = vmms.iter().map(|pid| cpu(*pid)).collect();
        tokio::time::sleep(Duration::from_secs(3)).await;
        let now = vmms
            .iter()
            .zip(before)
            .map(|(pid, before)| cpu(*pid) - before);
        used = now.collect();
        let idle = used.iter().all(|used| *used < 10_000_000);
        quiet = if idle { quiet + 1 } else { 0 };
        if quiet == 2 {
            break;
        }
    }
    assert_eq!(quiet, 2, "{used:?} ns in 3 s");
    let script = "cat /etc/machine-id; hostname; head -c 16 /dev/urandom | od -An -tx1; \
                  date +%s.%N";
    let mut told: [BTreeSet<String>; 3] = Default::default();
    let mut loans = Vec::new();
    // One more than there are.
    for _ in 0..4 {
        let loan = pool.acquire(LONG).await.unwrap();
        let begin = now();
        let said = sh(&loan, script).await;
        let lines: Vec<&str> = said.lines().collect();
        for (seen, line) in told.iter_mut().zip(&lines) {
            assert!(seen.insert((*line).to_owned()), "{line} again");
        }
        let clock: f64 = lines[3].parse().unwrap();
        assert!((begin - 0.1..now() + 0.1).contains(&clock), "{said}");
        loans.push(loan);
    }
    assert_eq!(pool.status().lent, 4);
    drop(loans);
    bed.drained(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_released_is_never_lent_again() {
    let bed = Bed::new().await;
    let pool = bed.filled(settings(1, 1)).await;
    let mut seen = BTreeSet::new();
    for _ in 0..3 {
        let loan = pool.acquire(LONG).await.unwrap();
        sh(&loan, "[ ! -e /var/mark ]; touch /var/mark").await;
        assert!(seen.insert(loan.process().pid()));
        loan.release();
    }
    bed.drained(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_wait_in_turn_and_are_told_why_in_vain() {
    let bed = Bed::new().await;
    let pool = bed
        .filled(Settings {
            queue: 2,
            ..settings(1, 1)
        })
        .await;
    let first = pool.acquire(LONG).await.unwrap();
    let begin = Instant::now();
    let error = pool.acquire(Duration::from_millis(300)).await.unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(5));
    let report = Report::of(&error);
    assert_eq!(report.code, "pool-exhausted");
    assert!(report.what.contains("all of 1 are lent out"), "{report:?}");
    assert!(report.remedy.contains("max"), "{report:?}");
    // One behind the other, and one that does not wait to be served.
    let order = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let waits = |name: &'static str| {
        let (pool, order) = (pool.clone(), std::sync::Arc::clone(&order));
        tokio::spawn(async move {
            let loan = pool.acquire(LONG).await.unwrap();
            order.lock().unwrap().push(name);
            loan.release();
        })
    };
    let gone = waits("gone");
    becomes(&pool, "waited for", |status| status.waiting == 1).await;
    let second = waits("second");
    becomes(&pool, "waited for", |status| status.waiting == 2).await;
    let error = pool.acquire(LONG).await.unwrap_err();
    assert_eq!(error.code(), "pool-crowded");
    gone.abort();
    becomes(&pool, "given up", |status| status.waiting == 1).await;
    let third = waits("third");
    becomes(&pool, "waited for", |status| status.waiting == 2).await;
    first.release();
    second.await.unwrap();
    third.await.unwrap();
    assert_eq!(*order.lock().unwrap(), ["second", "third"]);
    bed.drained(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_and_broken_clones_are_replaced() {
    let bed = Bed::new().await;
    let old = Settings {
        ttl: Duration::from_secs(4),
        ..settings(1, 2)
    };
    let pool = bed.filled(old).await;
    let first = bed.vmms();
    let begin = Instant::now();
    while bed.vmms().iter().any(|pid| first.contains(pid)) {
        assert!(begin.elapsed() < LONG, "it is never replaced");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(begin.elapsed() > Duration::from_secs(1));
    bed.drained(pool).await;

    let pool = bed.filled(settings(2, 3)).await;
    let broken = bed.vmms()[0];
    kill(Pid::from_raw(broken), Signal::SIGKILL).unwrap();
    becomes(&pool, "noticed", |status| status.idle < 2).await;
    assert_eq!(pool.filled(LONG).await.idle, 2);
    // Also where it breaks in the moment in which it is taken.
    let vmms = bed.vmms();
    assert!(!vmms.contains(&broken));
    kill(Pid::from_raw(vmms[0]), Signal::SIGKILL).unwrap();
    for _ in 0..2 {
        let loan = pool.acquire(LONG).await.unwrap();
        assert_eq!(sh(&loan, "echo fine").await, "fine");
    }
    bed.drained(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_runs_though_it_should_rest_is_replaced() {
    let bed = Bed::new().await;
    let quick = Settings {
        check: Duration::from_millis(200),
        ..settings(1, 2)
    };
    let pool = bed.filled(quick).await;
    let first = bed.vmms()[0];
    // Stopped by a signal, QEMU gives no answer; it is not noticed otherwise.
    kill(Pid::from_raw(first), Signal::SIGSTOP).unwrap();
    becomes(&pool, "noticed", |status| status.idle == 0).await;
    pool.filled(LONG).await;
    assert!(!bed.vmms().contains(&first));
    bed.drained(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_short_is_not_asked_for_more() {
    let bed = Bed::new().await;
    let proc = tempfile::tempdir().unwrap();
    let available = |mib: u64| {
        let text = format!("MemTotal: 1 kB\nMemAvailable:    {} kB\n", mib * 1024);
        fs::write(proc.path().join("new"), text).unwrap();
        fs::rename(proc.path().join("new"), proc.path().join("meminfo")).unwrap();
    };
    // The reserve, and not quite a clone.
    available(1024 + 63);
    let short = Settings {
        proc: proc.path().to_owned(),
        ..settings(1, 2)
    };
    let pool = bed.open(short.clone()).await;
    let error = pool.acquire(Duration::from_secs(1)).await.unwrap_err();
    let report = Report::of(&error);
    assert_eq!(report.code, "host-memory-short");
    assert!(report.what.contains("63M"), "{report:?}");
    assert_eq!(pool.status().alive(), 0, "nothing was started");
    // Room to start one, and none to let it run.
    available(1024 + 255);
    pool.filled(LONG).await;
    let error = pool.acquire(Duration::from_millis(500)).await.unwrap_err();
    assert_eq!(error.code(), "host-memory-short");
    assert_eq!(pool.status().idle, 1);
    available(1024 + 256);
    let loan = pool.acquire(LONG).await.unwrap();
    // What it may still take is promised to it.
    let error = pool.acquire(Duration::from_secs(1)).await.unwrap_err();
    assert_eq!(error.code(), "host-memory-short");
    drop(loan);
    // Programs wait for memory: nothing is started.
    fs::create_dir(proc.path().join("pressure")).unwrap();
    let stalled = "some avg10=21.00 avg60=0.00 avg300=0.00 total=1\n";
    fs::write(proc.path().join("pressure/memory"), stalled).unwrap();
    available(16 << 10);
    bed.drained(pool).await;
    let pool = bed.open(short).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(pool.status().alive(), 0);
    fs::remove_file(proc.path().join("pressure/memory")).unwrap();
    pool.filled(LONG).await;
    bed.drained(pool).await;
    let nothing = Settings {
        proc: "/nothing".into(),
        ..settings(1, 1)
    };
    let refused = Pool::open(bed.live.host.clone(), spec(), nothing).await;
    assert_eq!(refused.unwrap_err().code(), "host-refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_leaves_what_is_lent_to_its_holder() {
    let bed = Bed::new().await;
    let pool = bed.filled(settings(1, 3)).await;
    let loan = pool.acquire(LONG).await.unwrap();
    let others = tokio::join!(pool.acquire(LONG), pool.acquire(LONG));
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.acquire(LONG).await.map(drop) }
    });
    becomes(&pool, "waited for", |status| status.waiting == 1).await;
    let error = pool.drain(Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(error, PoolError::Lent { lent: 3, .. }), "{error}");
    drop(others);
    assert_eq!(waiting.await.unwrap().unwrap_err().code(), "pool-closed");
    assert_eq!(pool.acquire(LONG).await.unwrap_err().code(), "pool-closed");
    assert_eq!(sh(&loan, "echo still there").await, "still there");
    loan.release();
    bed.drained(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_dropped_ends_its_clones() {
    let bed = Bed::new().await;
    let pool = bed.filled(settings(2, 3)).await;
    let loan = pool.acquire(LONG).await.unwrap();
    drop(pool);
    let begin = Instant::now();
    while bed.runs().len() > 1 {
        assert!(begin.elapsed() < LONG, "{:?}", bed.runs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(sh(&loan, "echo still there").await, "still there");
    drop(loan);
    while !bed.runs().is_empty() {
        assert!(begin.elapsed() < LONG, "{:?}", bed.runs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn a_runtime_that_ends_takes_the_clones_along() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bed = runtime.block_on(Bed::new());
    let pool = runtime.block_on(bed.filled(settings(2, 2)));
    let loan = runtime.block_on(pool.acquire(LONG)).unwrap();
    let vmms = bed.vmms();
    assert!(vmms.len() >= 2);
    drop(runtime);
    drop((pool, loan));
    let begin = Instant::now();
    while vmms.iter().any(|pid| is_alive(*pid)) {
        assert!(begin.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(50));
    }
    // Their leases are recovery's.
    recover(&bed.live.host.dirs, false).unwrap();
    assert_eq!(bed.runs(), [""; 0]);
}

#[test]
fn an_owner_that_is_killed_leaves_nothing_after_recovery() {
    const HELPER: &str = "BH_POOL_OWNER";
    let name = "an_owner_that_is_killed_leaves_nothing_after_recovery";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(dirs) = std::env::var_os(HELPER) {
        let mut dirs = std::env::split_paths(&dirs);
        let [state, runtime_dir] = [(); 2].map(|()| dirs.next().unwrap());
        let host = Host::new(Dirs {
            state,
            runtime: runtime_dir,
        });
        runtime.block_on(async {
            let pool = Pool::open(host, spec(), settings(2, 3)).await.unwrap();
            let _loan = pool.acquire(LONG).await.unwrap();
            assert_eq!(pool.filled(LONG).await.idle, 2);
            println!("ready");
            tokio::time::sleep(LONG).await;
        });
        return;
    }
    let bed = runtime.block_on(Bed::new());
    let dirs = &bed.live.host.dirs;
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(
            HELPER,
            std::env::join_paths([&dirs.state, &dirs.runtime]).unwrap(),
        )
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("ready")));
    owner.kill().unwrap();
    owner.wait().unwrap();
    let vmms = bed.vmms();
    assert_eq!((vmms.len(), bed.runs().len()), (3, 3));
    recover(dirs, false).unwrap();
    assert_eq!(bed.runs(), [""; 0]);
    assert_eq!(entries(&dirs.runtime), [""; 0]);
    assert!(vmms.iter().all(|pid| !is_alive(*pid)));
}

#[tokio::test]
async fn every_qemu_fills_a_pool_also_in_a_runtime_of_one_thread() {
    let own = std::env::var_os("BULKHEAD_QEMU10");
    assert!(
        own.is_some(),
        "BULKHEAD_QEMU10 names no QEMU 10: see `cargo xtask qemu10`"
    );
    let bed = Bed::with_qemu(own.map(PathBuf::from)).await;
    let pool = bed.filled(settings(2, 3)).await;
    let loans = tokio::join!(pool.acquire(LONG), pool.acquire(LONG), pool.acquire(LONG));
    let mut names = BTreeSet::new();
    for loan in [loans.0, loans.1, loans.2] {
        names.insert(sh(&loan.unwrap(), "hostname").await);
    }
    assert_eq!(names.len(), 3);
    bed.drained(pool).await;
}

#[tokio::test]
async fn what_cannot_be_a_pool_is_refused() {
    let live = Live::new();
    let code = async |spec: Spec, settings: Settings| {
        let opened = Pool::open(live.host.clone(), spec, settings).await;
        opened.unwrap_err().code()
    };
    assert_eq!(code(spec(), settings(2, 1)).await, "pool-settings");
    assert_eq!(code(spec(), settings(0, 0)).await, "pool-settings");
    assert_eq!(code(spec(), settings(1, 1)).await, "template-not-found");
    let mut with = spec();
    with.workspace.dir = Some("/tmp".into());
    assert_eq!(code(with, settings(1, 1)).await, "pool-spec");
}
