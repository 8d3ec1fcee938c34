//! Every layer of the jail, broken on purpose: the kernel refuses one of the
//! calls that make it, or says that it did and did not. The command never
//! starts.
//!
//! The kernel is made to by a filter for system calls that the program, and
//! what it starts, runs under.
#![allow(unsafe_code)] // something has to be done between fork and exec

mod support;

use std::os::unix::process::CommandExt;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use support::{Bulkhead, Ran, accel, entries, ran};

const EPERM: u32 = libc::EPERM as u32;
/// No error, and nothing done.
const LIE: u32 = 0;

/// A system call, and what of its first arguments tells which of them is meant.
type Call = (libc::c_long, Arguments);
type Arguments = &'static [Argument];

/// An argument of a system call.
#[derive(Debug, Clone, Copy)]
enum Argument {
    /// It is this.
    Is(libc::c_int),
    /// It has these bits.
    Has(libc::c_int),
}
use Argument::{Has, Is};

/// Answers `call` with an error, and lets everything else be.
fn filter((call, arguments): Call, errno: u32) -> BpfProgram {
    let condition = |(index, argument): (u8, &Argument)| {
        let (op, value) = match *argument {
            Is(value) => (SeccompCmpOp::Eq, value as u64),
            Has(bits) => (SeccompCmpOp::MaskedEq(bits as u64), bits as u64),
        };
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value).unwrap()
    };
    let conditions: Vec<_> = (0..).zip(arguments).map(condition).collect();
    let rule = (!conditions.is_empty()).then(|| SeccompRule::new(conditions).unwrap());
    let rules = [(call, rule.into_iter().collect())];
    let filter = SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno),
        TargetArch::x86_64,
    );
    filter.unwrap().try_into().unwrap()
}

/// `bulkhead run -- echo ran` under that kernel.
fn run(bulkhead: &Bulkhead, call: Call, errno: u32, options: &[&str]) -> Ran {
    let small = [
        "--kernel", "tuned", "--memory", "256M", "--cpus", "1", "--image", "base",
    ];
    let accel = accel();
    let fixed = [&["run", "--accel", &accel], &small[..]].concat();
    let mut command = bulkhead.command(&[&fixed, options, &["--", "echo", "ran"]].concat());
    // Where the kernel can, it is `clone3` that makes the process (decision 0052).
    let newer = (call.0 == libc::SYS_clone)
        .then(|| filter((libc::SYS_clone3, &[]), libc::ENOSYS.unsigned_abs()));
    let filters: Vec<_> = newer.into_iter().chain([filter(call, errno)]).collect();
    // SAFETY: two system calls on memory made before the fork.
    unsafe {
        command.pre_exec(move || {
            for filter in &filters {
                seccompiler::apply_filter(filter).map_err(|_| std::io::ErrorKind::Other)?;
            }
            Ok(())
        });
    }
    ran(command.output().unwrap())
}

/// Nothing ran, and nothing is left.
fn assert_nothing(bulkhead: &Bulkhead, ran: &Ran, what: &str) {
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (125, ""),
        "{what}: {ran:?}"
    );
    let left = entries(&bulkhead.runtime().join("uids"));
    assert_eq!(left, [""; 0], "{what}");
    let left = entries(&bulkhead.state().join("runs"));
    assert_eq!(left, [""; 0], "{what}");
}

#[test]
fn a_step_the_kernel_refuses_stops_the_run() {
    let bulkhead = Bulkhead::new().with_own_state();
    let steps: [(libc::c_long, Arguments, &str, &str); 18] = [
        (
            libc::SYS_clone,
            &[Has(libc::CLONE_NEWPID)],
            "spawn-failed",
            "make a process",
        ),
        (
            libc::SYS_clone,
            &[Has(libc::CLONE_NEWNET)],
            "spawn-failed",
            "make a process",
        ),
        (libc::SYS_setsid, &[], "spawn-failed", "Session"),
        (libc::SYS_unshare, &[], "jail-failed", "CgroupNamespace"),
        (libc::SYS_sethostname, &[], "jail-failed", "HostName"),
        (libc::SYS_mount, &[], "jail-failed", "Root"),
        (libc::SYS_mount_setattr, &[], "jail-failed", "ReadOnly"),
        (libc::SYS_pivot_root, &[], "jail-failed", "PivotRoot"),
        (libc::SYS_umount2, &[], "jail-failed", "PivotRoot"),
        (libc::SYS_close_range, &[], "spawn-failed", "Descriptors"),
        (
            libc::SYS_prctl,
            &[Is(libc::PR_CAPBSET_DROP)],
            "jail-failed",
            "Capabilities",
        ),
        (libc::SYS_setgroups, &[], "jail-failed", "User"),
        (libc::SYS_setresgid, &[], "jail-failed", "User"),
        (libc::SYS_setresuid, &[], "jail-failed", "User"),
        (libc::SYS_capset, &[], "jail-failed", "Capabilities"),
        (libc::SYS_landlock_add_rule, &[], "jail-failed", "Landlock"),
        (
            libc::SYS_landlock_restrict_self,
            &[],
            "jail-failed",
            "Landlock",
        ),
        (libc::SYS_seccomp, &[], "jail-failed", "Seccomp"),
    ];
    for (call, arguments, code, step) in steps {
        let what = format!(
            "{} {arguments:?}",
            bulkhead::vmm::seccomp::name(call).unwrap()
        );
        let refused = run(&bulkhead, (call, arguments), EPERM, &[]);
        assert_nothing(&bulkhead, &refused, &what);
        let told = |word: &str| refused.stderr.contains(word);
        assert!(
            told(&format!("[{code}]")) && told(step),
            "{what}: {refused:?}"
        );
    }
}

#[test]
fn a_kernel_that_does_not_tell_of_landlock_is_not_one_without_it() {
    let bulkhead = Bulkhead::new().with_own_state();
    let create: Call = (libc::SYS_landlock_create_ruleset, &[]);
    let refused = run(&bulkhead, create, EPERM, &[]);
    assert_nothing(&bulkhead, &refused, "refused");
    assert!(refused.stderr.contains("[jail-failed]"), "{refused:?}");
    // One without it is told apart: that is no failure, and `verify` says it.
    let without = run(&bulkhead, create, libc::ENOSYS as u32, &[]);
    assert_eq!(
        (without.code, without.stdout.as_str()),
        (0, "ran\n"),
        "{without:?}"
    );
}

#[test]
fn what_cannot_be_made_can_be_waived() {
    let bulkhead = Bulkhead::new().with_own_state();
    for (layer, call) in [
        ("namespaces", libc::SYS_unshare),
        ("files", libc::SYS_pivot_root),
        ("user", libc::SYS_setresuid),
        ("landlock", libc::SYS_landlock_restrict_self),
    ] {
        let waived = run(&bulkhead, (call, &[]), EPERM, &["--waive", layer]);
        assert_eq!(
            (waived.code, waived.stdout.as_str()),
            (0, "ran\n"),
            "{layer}: {waived:?}"
        );
    }
}

#[test]
fn a_layer_that_only_seems_to_be_made_is_seen() {
    let bulkhead = Bulkhead::new().with_own_state();
    // SECCOMP_SET_MODE_FILTER without flags is ours, not QEMU's.
    let lies: [(libc::c_long, Arguments, &str); 5] = [
        (libc::SYS_setresuid, &[], "Uid (user)"),
        (
            libc::SYS_prctl,
            &[Is(libc::PR_CAPBSET_DROP)],
            "CapBnd (user)",
        ),
        (libc::SYS_mount_setattr, &[], "writable mounts (files)"),
        (libc::SYS_unshare, &[], "cgroup namespace (namespaces)"),
        (
            libc::SYS_seccomp,
            &[Is(1), Is(0)],
            "Seccomp_filters (seccomp)",
        ),
    ];
    for (call, arguments, missed) in lies {
        let what = format!(
            "{} {arguments:?}",
            bulkhead::vmm::seccomp::name(call).unwrap()
        );
        let seen = run(&bulkhead, (call, arguments), LIE, &[]);
        assert_nothing(&bulkhead, &seen, &what);
        let told = |word: &str| seen.stderr.contains(word);
        assert!(told("[not-confined]") && told(missed), "{what}: {seen:?}");
    }
}
