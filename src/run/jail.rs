//! Makes the jail of a machine ready: what it leases, and what it is made of.

use std::io;
use std::os::fd::AsFd;

use super::ends;
use super::error::MachineError;
use super::machine::io_error;
use super::options::StartOptions;
use super::record::{Record, RecordError};
use crate::host::cgroup::{Cgroup, CgroupError, Entrance};
use crate::host::fault;
use crate::host::lease::Lease;
use crate::host::uid::Uid;
use crate::plan::Plan;
use crate::spec::{Accel, JailLayer};
use crate::vmm::{Jail, Needs, User, detach, seccomp};

/// How often another user id is tried that somebody else took meanwhile.
const TRIES: u32 = 16;

/// Leases and makes what the jail of `plan` needs.
pub(super) fn make(
    plan: &Plan,
    record: &mut Record,
    options: &StartOptions,
) -> Result<Jail, MachineError> {
    let jail = &plan.jail;
    let dir = record.dir().join("jail");
    let failed = |what| move |source| MachineError::Jail { what, source };
    let mut leases = Vec::new();
    if jail.has(JailLayer::Files) {
        leases.push(Lease::Dir { path: dir.clone() });
    }
    let owner = take_user(plan, record, options, &mut leases)?;
    let mut user = owner.map(User::plain);
    if jail.has(JailLayer::Files) {
        fault::at("make jail")
            .and_then(|()| super::dirs::make_private(&dir))
            .map_err(io_error("make", &dir))?;
    }
    let mut share = None;
    if let Some(shared) = &plan.share
        && jail.has(JailLayer::Files)
    {
        let given = ends::share(plan, record.dir(), options)?;
        let detached = detach(given.as_fd(), owner, shared.read_only);
        let detached = detached.map_err(|source| MachineError::Share {
            path: shared.dir.clone(),
            source,
        })?;
        // Where it has no user of its own it is the owner: root without
        // capabilities could do no more.
        user = Some(detached.owner);
        share = Some(detached.mount);
    }
    let filters = match jail.has(JailLayer::Seccomp) {
        true => seccomp::filters(seccomp::Wanted {
            accel: plan.accel,
            share: plan.share.is_some(),
            adopt: plan.adoptable,
            ram: plan.ram.file().is_some(),
            host_files: !jail.has(JailLayer::Files),
            host_pids: !jail.has(JailLayer::Namespaces),
        }),
        false => Ok(Vec::new()),
    };
    let needs = Needs {
        dir: &dir,
        user,
        owner,
        share,
        filters: filters.map_err(failed("the list of system calls"))?,
        ram: plan.ram.file().is_some(),
        small: plan.ram.file().is_some() && plan.accel == Accel::Tcg,
        landlock: jail.has(JailLayer::Landlock),
    };
    Jail::new(jail, needs).map_err(failed("its root"))
}

/// Takes a user id, and writes the other leases down with it.
fn take_user(
    plan: &Plan,
    record: &mut Record,
    options: &StartOptions,
    leases: &mut Vec<Lease>,
) -> Result<Option<u32>, MachineError> {
    if !plan.jail.own_user() {
        record
            .lease_all(leases.drain(..))
            .map_err(RecordError::from)?;
        return Ok(None);
    }
    let mut tries = 0;
    loop {
        let uid = Uid::choose(&options.uid_dir, options.uids)
            .map_err(io_error("take a user id in", &options.uid_dir))?;
        leases.push(uid.lease());
        record
            .lease_all(leases.drain(..))
            .map_err(RecordError::from)?;
        match uid.take() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < TRIES => {
                tries += 1;
            }
            Err(error) => return Err(io_error("take a user id in", &options.uid_dir)(error)),
            Ok(()) => return Ok(Some(uid.uid())),
        }
    }
}

/// Whether a machine must have a control group.
pub(super) fn needs_cgroup(plan: &Plan) -> bool {
    plan.jail.has(JailLayer::Cgroup) && !plan.jail.unprivileged
}

/// Makes the machine's control group, with its limits. A user other than root
/// may have none.
pub(super) fn cgroup(
    plan: &Plan,
    record: &mut Record,
) -> Result<Result<Cgroup, CgroupError>, MachineError> {
    let jail = &plan.jail;
    let needed = needs_cgroup(plan);
    let group = match Cgroup::choose(&plan.id) {
        Ok(group) => group,
        Err(error) if needed => return Err(error.into()),
        Err(error) => return Ok(Err(error)),
    };
    record
        .lease_all(group.leases())
        .map_err(RecordError::from)?;
    let made = group
        .make()
        .and_then(|()| match jail.has(JailLayer::Cgroup) {
            true => group.limit(jail.memory, jail.threads),
            false => Ok(()),
        });
    match made {
        Err(error) if needed => Err(error.into()),
        made => Ok(made.map(|()| group)),
    }
}

/// The way into the control group; where it need not have one, a group that
/// cannot be entered is none.
pub(super) fn entrance(
    plan: &Plan,
    cgroup: &mut Result<Cgroup, CgroupError>,
) -> Result<Option<Entrance>, MachineError> {
    match cgroup.as_ref().ok().map(Cgroup::entrance).transpose() {
        Err(error) if !needs_cgroup(plan) => {
            *cgroup = Err(error);
            Ok(None)
        }
        entrance => Ok(entrance?),
    }
}

/// Looks whether the VMM is in its control group, where the start went on without.
pub(super) fn entered(plan: &Plan, cgroup: &mut Result<Cgroup, CgroupError>, pid: i32) {
    if !needs_cgroup(plan)
        && let Ok(group) = &*cgroup
        && !group.holds(pid)
    {
        let why = "its VMM may not enter it".to_owned();
        *cgroup = Err(CgroupError::Unavailable { why });
    }
}
