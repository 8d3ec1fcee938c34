//! The privileged sequence: what a child does between fork and exec, as one
//! flat list. Nothing here allocates or locks.

use std::ffi::CStr;
use std::os::fd::AsRawFd;

use nix::libc::dev_t;
use seccompiler::sock_filter;

use super::jail::{Entry, Jail, Label, Landlock};

/// A step of the sequence, for naming the one that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SpawnStep {
    /// Tying its life to the owner's.
    Death = 1,
    /// The owner did not allow it to go on, or is gone.
    Permission,
    /// Leaving the owner's session and its keys.
    Session,
    /// Entering its control group.
    Group,
    /// A control group namespace of its own.
    CgroupNamespace,
    /// A host name of its own.
    HostName,
    /// Making its root.
    Root,
    /// Something in its root.
    Entry,
    /// Making its root read-only.
    ReadOnly,
    /// Changing to its root.
    PivotRoot,
    /// Putting the descriptors in place.
    Descriptors,
    /// Setting resource limits.
    Limits,
    /// Giving up capabilities.
    Capabilities,
    /// Becoming its user.
    User,
    /// Giving up to gain privileges.
    NoNewPrivs,
    /// Asking for the file of its memory.
    Ram,
    /// Landlock.
    Landlock,
    /// Filtering system calls.
    Seccomp,
    /// Executing the program.
    Exec,
    /// Giving it a label of the host's security module.
    Label,
}

impl SpawnStep {
    pub(super) const ALL: [Self; 20] = [
        Self::Death,
        Self::Permission,
        Self::Session,
        Self::Group,
        Self::CgroupNamespace,
        Self::HostName,
        Self::Root,
        Self::Entry,
        Self::ReadOnly,
        Self::PivotRoot,
        Self::Descriptors,
        Self::Limits,
        Self::Capabilities,
        Self::User,
        Self::NoNewPrivs,
        Self::Ram,
        Self::Landlock,
        Self::Seccomp,
        Self::Exec,
        Self::Label,
    ];

    /// Whether it makes a part of the jail.
    pub(super) fn is_jail(self) -> bool {
        !matches!(
            self,
            Self::Death | Self::Permission | Self::Session | Self::Descriptors | Self::Exec
        )
    }

    pub(super) fn from_byte(byte: u8) -> Self {
        let found = Self::ALL.into_iter().find(|step| *step as u8 == byte);
        found.unwrap_or(Self::Exec)
    }
}

/// One thing to ask of the kernel.
#[derive(Debug)]
pub(super) enum Op<'a> {
    EndWithOwner,
    AwaitPermission,
    EnterGroup,
    LeaveSession,
    LeaveKeyring,
    ResetSignals,
    UnshareCgroup,
    SetHostName,
    SetLabel(&'a Label),
    PrivateMounts,
    MountRoot(&'a CStr),
    MakeDir(&'a CStr),
    BindFile {
        from: &'a CStr,
        to: &'a CStr,
    },
    MountDevices(&'a CStr),
    MakeDevice {
        to: &'a CStr,
        number: dev_t,
        owner: u32,
    },
    MountProc(&'a CStr),
    MakeReadOnly,
    AllowDevices(&'a CStr),
    PlaceTree {
        mount: i32,
        to: &'a CStr,
    },
    PivotRoot,
    PlaceDescriptors,
    SetLimit {
        resource: u32,
        value: u64,
    },
    DropBoundingSet,
    LockSecureBits,
    DropGroups,
    EnterUserNamespace(i32),
    BecomeUser {
        uid: u32,
        gid: u32,
    },
    DropCapabilities,
    CheckOwner,
    SetUmask,
    NoNewPrivs,
    SmallPages,
    AskForRam,
    Landlock(&'a Landlock),
    Seccomp(&'a [sock_filter]),
    Exec,
}

/// A failed step: which, in which entry of the root, and errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) step: SpawnStep,
    pub(super) entry: u32,
    pub(super) errno: i32,
}

/// Who carries it out: the kernel, or a test that writes it down.
pub(super) trait Kernel {
    /// # Errors
    /// The errno.
    fn call(&mut self, op: Op<'_>) -> Result<(), i32>;
}

/// The sequence. It ends in exec, or comes back with what failed.
pub(super) fn confine(
    kernel: &mut impl Kernel,
    jail: &Jail,
    end_with_owner: bool,
) -> Result<(), Failed> {
    use SpawnStep as Step;
    let mut entry = 0;
    let mut ask = |step, op: Op<'_>, entry| {
        kernel
            .call(op)
            .map_err(|errno| Failed { step, entry, errno })
    };
    // 1. End with the owner, and wait until it has written us down: it closes
    //    its end of the pipe when it dies, so nobody goes on unwatched.
    if end_with_owner {
        ask(Step::Death, Op::EndWithOwner, 0)?;
    }
    ask(Step::Permission, Op::AwaitPermission, 0)?;
    // 2. Out of the terminal's reach: Ctrl-C is for the command. The keys of the
    //    owner's session would go to whoever comes from it, whatever its user.
    ask(Step::Session, Op::LeaveSession, 0)?;
    ask(Step::Session, Op::LeaveKeyring, 0)?;
    ask(Step::Session, Op::ResetSignals, 0)?;
    // 3. Into our control group: from here on everything counts there. It becomes
    //    the root of what is seen of them; the other namespaces came with the fork.
    ask(Step::Group, Op::EnterGroup, 0)?;
    if jail.namespaces {
        ask(Step::CgroupNamespace, Op::UnshareCgroup, 0)?;
        ask(Step::HostName, Op::SetHostName, 0)?;
    }
    // 4. The label that comes with exec: its file is the host's, and must be
    //    written by who opened it.
    if let Some(label) = &jail.label {
        ask(Step::Label, Op::SetLabel(label), 0)?;
    }
    // 5. A root with nothing but what is listed, read-only but for the share.
    if let Some(root) = &jail.root {
        ask(Step::Root, Op::PrivateMounts, 0)?;
        ask(Step::Root, Op::MountRoot(&root.dir), 0)?;
        for made in &root.entries {
            match made {
                Entry::Dir(to) => ask(Step::Entry, Op::MakeDir(to), entry)?,
                Entry::File { from, to } | Entry::HostDevice { from, to } => {
                    ask(Step::Entry, Op::BindFile { from, to }, entry)?;
                }
                Entry::Device {
                    dir,
                    to,
                    number,
                    owner,
                } => {
                    ask(Step::Entry, Op::MountDevices(dir), entry)?;
                    let (number, owner) = (*number, *owner);
                    ask(Step::Entry, Op::MakeDevice { to, number, owner }, entry)?;
                }
                Entry::Proc(to) => ask(Step::Entry, Op::MountProc(to), entry)?,
                Entry::Tree { .. } => {}
            }
            entry += 1;
        }
        ask(Step::ReadOnly, Op::MakeReadOnly, 0)?;
        entry = 0;
        for made in &root.entries {
            match made {
                Entry::Device { dir, .. } => {
                    ask(Step::Entry, Op::AllowDevices(dir), entry)?;
                }
                Entry::HostDevice { to, .. } => {
                    ask(Step::Entry, Op::AllowDevices(to), entry)?;
                }
                Entry::Tree { to, .. } => {
                    let mount = made.mount_fd();
                    ask(Step::Entry, Op::PlaceTree { mount, to }, entry)?;
                }
                Entry::Dir(_) | Entry::File { .. } | Entry::Proc(_) => {}
            }
            entry += 1;
        }
        ask(Step::PivotRoot, Op::PivotRoot, 0)?;
    }
    // 6. Only what the plan lists stays open.
    ask(Step::Descriptors, Op::PlaceDescriptors, 0)?;
    // 7. Limits, while we may still raise them.
    // What the owner has open counts until we execute, and the memory and
    // Landlock take one more each: that limit comes after them.
    let late = |resource| resource == nix::libc::RLIMIT_NOFILE;
    for (resource, value) in &jail.limits {
        let (resource, value) = (*resource, *value);
        if !late(resource) {
            ask(Step::Limits, Op::SetLimit { resource, value }, 0)?;
        }
    }
    // 8. Privileges: first what nobody can give back, then who we are.
    if let Some(namespace) = jail.user.as_ref().and_then(|user| user.namespace.as_ref()) {
        ask(Step::User, Op::EnterUserNamespace(namespace.as_raw_fd()), 0)?;
    }
    if jail.privileged || jail.user_namespace {
        ask(Step::Capabilities, Op::DropBoundingSet, 0)?;
        ask(Step::Capabilities, Op::LockSecureBits, 0)?;
    }
    if let Some(user) = &jail.user {
        let (uid, gid) = (user.uid, user.gid);
        ask(Step::User, Op::DropGroups, 0)?;
        ask(Step::User, Op::BecomeUser { uid, gid }, 0)?;
    }
    ask(Step::Capabilities, Op::DropCapabilities, 0)?;
    // 9. Another user has no tie to its owner any more: again.
    if end_with_owner {
        ask(Step::Death, Op::EndWithOwner, 0)?;
    }
    ask(Step::Permission, Op::CheckOwner, 0)?;
    // 10. Files it makes are nobody else's.
    ask(Step::Session, Op::SetUmask, 0)?;
    // 11. Nothing it executes gains privileges; only now may we filter.
    ask(Step::NoNewPrivs, Op::NoNewPrivs, 0)?;
    // 12. Many like it fit into the host's memory: what an emulator translates for
    //     one does not begin huge pages.
    if jail.small {
        ask(Step::Ram, Op::SmallPages, 0)?;
    }
    // 13. Who has its memory in a file gets that from us, whatever it may open.
    if jail.ram {
        ask(Step::Ram, Op::AskForRam, 0)?;
    }
    if let Some(landlock) = &jail.landlock {
        ask(Step::Landlock, Op::Landlock(landlock), 0)?;
    }
    for (resource, value) in &jail.limits {
        let (resource, value) = (*resource, *value);
        if late(resource) {
            ask(Step::Limits, Op::SetLimit { resource, value }, 0)?;
        }
    }
    for filter in &jail.filters {
        ask(Step::Seccomp, Op::Seccomp(filter), 0)?;
    }
    ask(Step::Exec, Op::Exec, 0)
}

#[cfg(test)]
mod tests {
    use super::super::jail::Root;
    use super::super::share::User;
    use super::*;

    /// Writes down what it is asked for, and refuses one thing.
    #[derive(Default)]
    struct Recorder {
        asked: Vec<String>,
        refuse: Option<&'static str>,
    }

    impl Kernel for Recorder {
        fn call(&mut self, op: Op<'_>) -> Result<(), i32> {
            let text = match op {
                Op::Landlock(_) => "Landlock".into(),
                Op::SetLabel(label) => format!("SetLabel({:?})", label.text),
                Op::Seccomp(filter) => format!("Seccomp({})", filter.len()),
                op => format!("{op:?}"),
            };
            let refused = self.refuse.is_some_and(|word| text.starts_with(word));
            self.asked.push(text);
            if refused { Err(13) } else { Ok(()) }
        }
    }

    fn jail() -> Jail {
        let null = std::fs::File::open("/dev/null").unwrap();
        Jail {
            root: Some(Root {
                dir: c"/run/jail".to_owned(),
                entries: vec![
                    Entry::Dir(c"dev".to_owned()),
                    Entry::File {
                        from: c"/usr/bin/qemu".to_owned(),
                        to: c"qemu".to_owned(),
                    },
                    Entry::Device {
                        dir: c"dev".to_owned(),
                        to: c"dev/kvm".to_owned(),
                        number: 0xae8,
                        owner: 7000,
                    },
                    Entry::Tree {
                        mount: null.into(),
                        to: c"share".to_owned(),
                    },
                ],
            }),
            user: Some(User::plain(7000)),
            namespaces: true,
            user_namespace: false,
            privileged: true,
            label: Some(Label {
                files: [c"/proc/thread-self/attr/exec"; 2],
                text: c"exec profile".to_owned(),
            }),
            landlock: Some(Landlock {
                handled: [0; 3],
                size: 8,
                rules: Vec::new(),
            }),
            filters: vec![Vec::new(), Vec::new()],
            limits: vec![(7, 256)],
            ram: true,
            small: true,
            environment: None,
        }
    }

    #[test]
    fn the_order_is_this() {
        let mut recorder = Recorder::default();
        confine(&mut recorder, &jail(), true).unwrap();
        // The number of a descriptor differs from run to run.
        let asked = recorder
            .asked
            .iter()
            .map(|op| match op.split_once("mount: ") {
                Some((before, after)) => format!("{before}{}", after.split_once(", ").unwrap().1),
                None => op.clone(),
            });
        insta::assert_snapshot!(asked.collect::<Vec<_>>().join("\n"));
    }

    #[test]
    fn nothing_follows_a_step_that_failed() {
        for refuse in [
            "AwaitPermission",
            "EnterGroup",
            "UnshareCgroup",
            "SetLabel",
            "BindFile",
            "PivotRoot",
            "BecomeUser",
            "DropCapabilities",
            "CheckOwner",
            "NoNewPrivs",
            "Landlock",
            "Seccomp",
        ] {
            let mut recorder = Recorder {
                refuse: Some(refuse),
                ..Recorder::default()
            };
            let failed = confine(&mut recorder, &jail(), true).unwrap_err();
            assert_eq!(failed.errno, 13, "{refuse}");
            assert!(
                recorder.asked.last().unwrap().starts_with(refuse),
                "{refuse}"
            );
            let entry = u32::from(refuse == "BindFile");
            assert_eq!(failed.entry, entry, "{refuse}");
        }
    }

    #[test]
    fn a_waived_layer_is_left_out_and_nothing_else() {
        let mut all = Recorder::default();
        confine(&mut all, &jail(), false).unwrap();
        let mut less = Recorder::default();
        confine(
            &mut less,
            &Jail {
                root: None,
                ..jail()
            },
            false,
        )
        .unwrap();
        let gone: Vec<_> = all
            .asked
            .iter()
            .filter(|op| !less.asked.contains(op))
            .collect();
        assert_eq!(gone.len(), all.asked.len() - less.asked.len());
        assert!(gone.iter().any(|op| *op == "PivotRoot") && !gone.iter().any(|op| *op == "Exec"));
    }

    #[test]
    fn steps_survive_the_pipe() {
        for step in SpawnStep::ALL {
            assert_eq!(SpawnStep::from_byte(step as u8), step);
        }
    }
}
