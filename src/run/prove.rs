//! Whether KVM works here: proved by a guest kernel that reaches the agent.
//!
//! Opening /dev/kvm proves nothing, nor does a stub: there are hosts where
//! both work and no Linux boots. The verdict is kept for this boot of the
//! host, its kernel, this QEMU and the guest's kernel.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::dirs::make_private;
use super::host::Host;
use super::{RunError, machine::Machine};
use crate::error::Report;
use crate::host::lease::write_durably;
use crate::host::process;
use crate::image::Image;
use crate::plan::{KernelChoice, Plan};
use crate::spec::{Accel, Bytes, Catalog, NetworkMode, Request, Spec, VmId, Waived};

/// QEMU's words for what passes.
const BUSY: [&str; 2] = ["Device or resource busy", "Cannot allocate memory"];

/// Whether KVM works, and why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// A guest kernel reached the agent.
    pub usable: bool,
    /// What was seen.
    pub reason: String,
    /// How long the guest was given, in milliseconds: a bad verdict says nothing
    /// of a longer time.
    pub within_ms: u64,
    /// Taken from an earlier proof in this boot of the host.
    #[serde(skip)]
    pub cached: bool,
}

/// Whether an earlier verdict will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// Any of this boot of the host.
    Any,
    /// Only a good one: what did not work may work by now.
    Good,
}

/// Proves KVM with `image` and `kernel`, or finds the earlier verdict. The
/// machine for it does without the layers in `waived`.
///
/// # Errors
/// The proof itself could not be attempted (no space, no image ...).
pub async fn kvm(
    host: &Host,
    qemu: &Path,
    image: &Image,
    kernel: KernelChoice,
    waived: Waived,
    earlier: Earlier,
) -> Result<Verdict, RunError> {
    let within_ms = u64::try_from(host.proof_timeout.as_millis()).unwrap_or(u64::MAX);
    let refused = |reason: String| Verdict {
        usable: false,
        reason,
        within_ms,
        cached: false,
    };
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        // Cheap to find out and easy to cure: not worth remembering.
        return Ok(refused(match error.kind() {
            io::ErrorKind::NotFound => "/dev/kvm does not exist: no virtualization in this CPU or its firmware settings, or the kvm module is not loaded".into(),
            io::ErrorKind::PermissionDenied => "/dev/kvm may not be opened by this user: join its group (usually `kvm`)".into(),
            _ => format!("/dev/kvm cannot be opened: {error}"),
        }));
    }
    // The small image answers soonest; the asked one serves where it is missing.
    let small = host.images().get("base").unwrap_or_else(|_| image.clone());
    // An image's own kernel may need the modules it brings.
    let kernel = match kernel == KernelChoice::own(image) {
        true => KernelChoice::own(&small),
        false => kernel,
    };
    let path = verdict_file(host, qemu, &kernel.path);
    if let Some(verdict) = fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<Verdict>(&text).ok())
        .filter(|verdict| {
            verdict.usable || earlier == Earlier::Any && verdict.within_ms >= within_ms
        })
    {
        return Ok(Verdict {
            cached: true,
            ..verdict
        });
    }
    let verdict = match boot(host, qemu, &small, kernel, waived).await {
        Ok(machine) => {
            let ms = machine.phases().agent_us / 1000;
            let _ = machine.kill().await;
            Verdict {
                usable: true,
                reason: format!("a guest kernel reached its agent in {ms} ms"),
                within_ms,
                cached: false,
            }
        }
        Err(RunError::Machine(error)) => {
            let report = Report::of(&error);
            let busy = BUSY.iter().any(|words| report.what.contains(words));
            match report.code.as_str() {
                // It says nothing of the next attempt.
                _ if busy => return Ok(refused(report.what)),
                // These say something about KVM; others about the attempt.
                "agent-silent" | "qemu-died" | "guest-panic" | "guest-ended" => refused(format!(
                    "/dev/kvm opens, but no Linux guest boots on it: {}",
                    report.what
                )),
                _ => return Err(error.into()),
            }
        }
        Err(error) => return Err(error),
    };
    make_private(&host.dirs.runtime)
        .and_then(|()| write_durably(&path, &serde_json::to_vec(&verdict)?))
        .unwrap_or_else(|error| tracing::warn!("cannot keep the verdict on KVM: {error}"));
    Ok(verdict)
}

async fn boot(
    host: &Host,
    qemu: &Path,
    image: &Image,
    kernel: KernelChoice,
    waived: Waived,
) -> Result<Machine, RunError> {
    let spec = proof_spec(&image.id, waived)?;
    let facts = crate::host::probe::facts(qemu.to_owned(), &host.dirs.cache());
    let plan = Plan::new(&spec, image, kernel, &facts)?;
    host.start_unproved(&spec, plan, host.proof_timeout).await
}

fn proof_spec(image: &str, waived: Waived) -> Result<Spec, RunError> {
    let request = Request {
        name: format!("proof-{}", VmId::random()).parse().ok(),
        image: Some(image.to_owned()),
        cpus: Some(1),
        memory: Some(Bytes::mib(256)),
        disk: Some(Bytes::mib(64)),
        // Nothing is proved by it, and it is root's to have.
        network: Some(NetworkMode::Isolated.into()),
        accel: Some(Accel::Kvm),
        command: vec!["true".into()],
        waive: Some(waived),
        ..Request::default()
    };
    Ok(request.resolve(&Catalog::default())?)
}

/// One file for each boot of the host, its kernel, QEMU build and guest kernel.
fn verdict_file(host: &Host, qemu: &Path, guest: &Path) -> PathBuf {
    let kernel = nix::sys::utsname::uname()
        .map(|name| format!("{:?} {:?}", name.release(), name.version()))
        .unwrap_or_default();
    let build = |path: &Path| {
        // By whatever name it is found.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let build = fs::metadata(&path)
            .map(|meta| format!("{} {} {}", meta.size(), meta.mtime(), meta.ino()))
            .unwrap_or_default();
        format!("{}\n{build}", path.display())
    };
    let key = format!(
        "{}\n{kernel}\n{}\n{}",
        process::boot_id(),
        build(qemu),
        build(guest)
    );
    let digest: String = Sha256::digest(key.as_bytes())
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    host.dirs.runtime.join(format!("kvm-{digest}.json"))
}
