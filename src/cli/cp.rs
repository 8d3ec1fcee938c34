//! `bulkhead cp`.

use std::path::PathBuf;
use std::str::FromStr;

use super::Global;
use super::message::{Failure, print_json, say, visible};
use super::output::Copied;
use crate::spec::{Malformed, SpecError, VmId};
use crate::supervise::Machines;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What to copy: a path of this host, or VM:PATH.
    from: Place,
    /// Where to: a path of this host, or VM:PATH.
    to: Place,
    /// Who it belongs to in the guest: a name, a number, or root [default: agent].
    #[arg(long, short)]
    user: Option<String>,
}

/// A path, here or in a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Host(PathBuf),
    Guest(VmId, String),
}

impl FromStr for Place {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        // As in scp and podman: with a slash before the colon it is a path of ours.
        let split = text
            .split_once(':')
            .filter(|(before, _)| !before.is_empty() && !before.contains(['/', '.']));
        let Some((vm, path)) = split else {
            return Ok(Self::Host(text.into()));
        };
        if !path.starts_with('/') {
            return Err(Malformed {
                value: text.to_owned(),
                expected: "VM:PATH with an absolute path (`./a:b` is a file of this host)",
            });
        }
        Ok(Self::Guest(vm.parse()?, path.to_owned()))
    }
}

/// Copies a file or a directory into a machine or out of it.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    let notes = match (args.from, args.to) {
        (Place::Host(from), Place::Guest(vm, to)) => {
            let client = machines.running(&vm).await?;
            client.copy_in(&from, &to, args.user).await?
        }
        (Place::Guest(vm, from), Place::Host(to)) => {
            let client = machines.running(&vm).await?;
            client.copy_out(&from, &to).await?
        }
        _ => {
            return Err(SpecError::Clash {
                first: "a copy between two paths of this host, or of machines",
                second: "bulkhead cp",
            }
            .into());
        }
    };
    match global.json {
        true => print_json(&Copied { warnings: notes }),
        false => notes
            .iter()
            .for_each(|note| say(&format!("bulkhead: warning: {}", visible(note)))),
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let guest = |vm: &str, path: &str| Place::Guest(vm.parse().unwrap(), path.into());
        assert_eq!("vm:/a/b".parse(), Ok(guest("vm", "/a/b")));
        for host in ["a", "./a:b", "/x:y", "a.b:/c"] {
            assert_eq!(host.parse(), Ok(Place::Host(host.into())), "{host}");
        }
        assert!("vm:a".parse::<Place>().is_err());
        assert!("VM:/a".parse::<Place>().is_err());
    }
}
