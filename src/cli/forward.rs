//! `bulkhead forward`.

use std::net::TcpListener;

use super::Global;
use super::message::{Failure, print_json, say, visible};
use super::output::Forwarded;
use crate::error::Report;
use crate::net::Serving;
use crate::run::MachineError;
use crate::spec::{Publish, VmId};
use crate::supervise::{Client, Machines, SuperviseError};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the machine.
    vm: VmId,
    /// Ports of this host that lead to ports on the guest's loopback:
    /// [ADDRESS:]PORT[:GUEST-PORT]. Without an address only this host can reach
    /// them; port 0 is any that is free.
    #[arg(required = true, value_name = "PORT")]
    ports: Vec<Publish>,
}

/// Leads ports to a machine until it ends, or this does.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    let client = machines.running(&args.vm).await?;
    let mut all: Vec<Serving> = Vec::new();
    let mut told = Vec::new();
    let lost = client.forward_channel().await?;
    for publish in args.ports {
        let unusable = |source| MachineError::Publish { publish, source };
        let listener = TcpListener::bind(publish.listen).map_err(unusable)?;
        let listen = listener.local_addr().map_err(unusable)?;
        let serving = Client::forward(&lost, listener, publish.port, |error| {
            let Report { what, cause, .. } = Report::of(&error);
            let cause = if cause.is_empty() {
                cause
            } else {
                format!(": {cause}")
            };
            say(&format!(
                "bulkhead: warning: {}",
                visible(&format!("{what}{cause}"))
            ));
        });
        all.push(serving.map_err(unusable)?);
        told.push(Publish { listen, ..publish });
    }
    match global.json {
        true => print_json(&Forwarded { forwarded: told }),
        false => told.iter().for_each(|one| {
            say(&format!(
                "bulkhead: {} leads to port {} of {}",
                one.listen, one.port, args.vm
            ))
        }),
    }
    tokio::select! {
        error = lost.closed() => Err(SuperviseError::from(error).into()),
        result = tokio::signal::ctrl_c() => {
            drop(result);
            Ok(0)
        }
    }
}
