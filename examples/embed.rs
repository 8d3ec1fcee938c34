//! An appliance that runs one command through the library, without the
//! command line's dependencies: `cargo run --no-default-features --example
//! embed -- STATE_DIR RUNTIME_DIR tcg echo hello`.

use std::process::ExitCode;

use bulkhead::error::Report;
use bulkhead::run::{Dirs, Host, Io, RunError, run};
use bulkhead::spec::{Accel, Catalog, NetworkMode, Request};

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let (Some(state), Some(runtime), Some(accel)) = (words.next(), words.next(), words.next())
    else {
        eprintln!("usage: embed STATE_DIR RUNTIME_DIR kvm|tcg CMD [ARG ...]");
        return ExitCode::from(125);
    };
    let accel = if accel == "tcg" {
        Accel::Tcg
    } else {
        Accel::Kvm
    };
    let dirs = Dirs {
        state: state.into(),
        runtime: runtime.into(),
    };
    let request = Request {
        image: Some("base".into()),
        accel: Some(accel),
        command: words.collect(),
        network: Some(NetworkMode::Isolated.into()),
        ..Request::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = runtime
        .expect("a runtime")
        .block_on(one(Host::new(dirs), request));
    match result {
        Ok((output, code)) => {
            print!("{output}");
            ExitCode::from(u8::try_from(code).unwrap_or(125))
        }
        Err(error) => {
            let report = Report::of(&error);
            eprintln!("{} ({}): {}", report.what, report.code, report.remedy);
            ExitCode::from(125)
        }
    }
}

async fn one(host: Host, request: Request) -> Result<(String, i32), RunError> {
    let spec = request.resolve(&Catalog::default())?;
    let io = Io::collecting(host.dirs.state.join("output"));
    let outcome = run(&host, &spec, io).await?;
    let output = outcome.stdout.map(|captured| captured.text);
    Ok((output.unwrap_or_default(), outcome.exit_code))
}
