//! A service that keeps machines ready and runs the same command in each, for
//! as many callers as are asked for: `cargo run --no-default-features
//! --features service --example pool -- STATE_DIR RUNTIME_DIR tcg 8 echo hello`.

use std::process::ExitCode;
use std::time::Duration;

use bulkhead::error::Report;
use bulkhead::run::{Build, Dirs, Host, Io, RunError, build, command};
use bulkhead::service::pool::{Pool, PoolError, Settings};
use bulkhead::spec::{Accel, Catalog, NetworkMode, Request, Spec};
use bulkhead_agent::{Exec, Request as Ask};

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [state, runtime, accel, callers, argv @ ..] = &words[..] else {
        eprintln!("usage: pool STATE_DIR RUNTIME_DIR kvm|tcg CALLERS CMD [ARG ...]");
        return ExitCode::from(125);
    };
    let dirs = Dirs {
        state: state.into(),
        runtime: runtime.into(),
    };
    let accel = match accel.as_str() {
        "tcg" => Accel::Tcg,
        _ => Accel::Kvm,
    };
    let callers = callers.parse().unwrap_or(1);
    match serve(Host::new(dirs), accel, callers, argv).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(report) => {
            eprintln!("{} ({}): {}", report.what, report.code, report.remedy);
            ExitCode::from(125)
        }
    }
}

async fn serve(host: Host, accel: Accel, callers: usize, argv: &[String]) -> Result<(), Report> {
    let request = Request {
        image: Some("base".into()),
        accel: Some(accel),
        network: Some(NetworkMode::Isolated.into()),
        ..Request::default()
    };
    let spec = request.resolve_machine(&Catalog::default());
    let spec = spec.map_err(|error| Report::of(&error))?;
    template(&host, &spec)
        .await
        .map_err(|error| Report::of(&error))?;
    let output = host.dirs.state.join("output");
    let work = async {
        let pool = Pool::open(host, spec, Settings::new(2, 4)).await?;
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..callers {
            all.spawn(one(pool.clone(), argv.to_owned(), output.clone()));
        }
        while let Some(done) = all.join_next().await {
            match done {
                Ok(Ok(text)) => print!("{text}"),
                Ok(Err(error)) => eprintln!("{}", Report::of(&*error).what),
                Err(error) => eprintln!("{error}"),
            }
        }
        pool.drain(PATIENCE).await
    };
    let done: Result<_, PoolError> = work.await;
    done.map(drop).map_err(|error| Report::of(&error))
}

/// Makes the template where there is none.
async fn template(host: &Host, spec: &Spec) -> Result<(), RunError> {
    let io = Io::collecting(host.dirs.state.join("output"));
    build(host, spec, &Build::default(), io).await.map(drop)
}

/// One caller: a clone, a command in it, its output.
async fn one(
    pool: Pool,
    argv: Vec<String>,
    spill: std::path::PathBuf,
) -> Result<String, Box<dyn bulkhead::error::Explain + Send + Sync>> {
    let clone = pool.acquire(PATIENCE).await.map_err(boxed)?;
    let exec = Exec {
        argv,
        ..Exec::default()
    };
    let stream = clone
        .channel()
        .open(&Ask::Exec(exec))
        .await
        .map_err(boxed)?;
    let (what, mut io) = ("run a command".to_owned(), Io::collecting(spill));
    let done = command(
        stream,
        what,
        &mut io,
        clone.plan().id.as_str(),
        Some(PATIENCE),
    )
    .await;
    let text = done.map_err(boxed)?.stdout.map(|captured| captured.text);
    Ok(text.unwrap_or_default())
}

fn boxed<E>(error: E) -> Box<dyn bulkhead::error::Explain + Send + Sync>
where
    E: bulkhead::error::Explain + Send + Sync + 'static,
{
    Box::new(error)
}
