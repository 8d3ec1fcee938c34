//! Plans against snapshots.

use super::*;
use crate::image::{Agent, File, Kernel, Manifest};
use crate::spec::{Catalog, Request};

fn image() -> Image {
    let file = |name: &str| File {
        file: name.into(),
        size: 1,
        sha256: "0".repeat(64),
    };
    Image {
        id: "sha256-1".into(),
        dir: "/state/images/sha256-1".into(),
        manifest: Manifest {
            schema: 1,
            name: "default".into(),
            from: None,
            root: file("root.squashfs"),
            kernel: Kernel {
                image: file("kernel"),
                release: "6.1.0".into(),
                format: KernelFormat::Bzimage,
            },
            initramfs: file("initramfs"),
            agent: Agent {
                version: "0.1.0".into(),
                protocol: 1,
                sha256: "0".repeat(64),
            },
            packages: Vec::new(),
        },
    }
}

fn facts(vhost_vsock: bool) -> HostFacts {
    HostFacts {
        qemu: "/usr/bin/qemu".into(),
        tsc_khz: Some(2_400_000),
        vhost_vsock,
        closure: Ok(jail::Closure {
            files: [("/qemu".into(), "/usr/bin/qemu".into())].into(),
        }),
        unprivileged: false,
        lsm: None,
        open_kvm: false,
        raises_limits: true,
    }
}

fn plan(request: &str, vhost_vsock: bool) -> Result<Plan, PlanError> {
    plan_on(request, &facts(vhost_vsock))
}

fn plan_on(request: &str, facts: &HostFacts) -> Result<Plan, PlanError> {
    let network = match request.contains("network") {
        true => "",
        false => "network = \"isolated\"\n",
    };
    let text = format!("name = \"vm1\"\ncommand = [\"true\"]\n{network}{request}");
    let spec = toml::from_str::<Request>(&text)
        .unwrap()
        .resolve(&Catalog::default())
        .unwrap();
    let image = image();
    let kernel = KernelChoice {
        path: image.kernel(),
        format: KernelFormat::Bzimage,
    };
    Plan::new(&spec, &image, kernel, facts)
}

/// One argument with its value a line.
fn lines(plan: &Plan) -> String {
    plan.args.join(" ").replace(" -", "\n-")
}

#[test]
fn microvm_under_kvm() {
    insta::assert_snapshot!(lines(&plan("", true).unwrap()));
}

#[test]
fn microvm_under_tcg_without_vsock() {
    insta::assert_snapshot!(lines(
        &plan("accel = \"tcg\"\nprofile = \"light\"", false).unwrap()
    ));
}

#[test]
fn q35_with_a_read_only_share() {
    let request = "accel = \"tcg\"\nmachine = \"q35\"\nworkspace = \"/a,b\"\n\
                   workspace_mode = \"share\"\nread_only = true";
    insta::assert_snapshot!(lines(&plan(request, true).unwrap()));
}

#[test]
fn a_balloon_only_where_it_is_asked_for() {
    let devices = |request: &str| {
        let args = plan(request, true).unwrap().args;
        let balloons = args.into_iter().filter(|word| word.contains("balloon"));
        balloons.collect::<Vec<_>>()
    };
    assert_eq!(devices(""), [""; 0]);
    assert_eq!(
        devices("balloon = true"),
        [
            "virtio-balloon-device,id=balloon,deflate-on-oom=on,free-page-reporting=on,bus=virtio-mmio-bus.2"
        ]
    );
    let q35 = devices("balloon = true\nmachine = \"q35\"");
    assert!(q35[0].starts_with("virtio-balloon-pci,"), "{q35:?}");
}

#[test]
fn nested_virtualization_only_where_it_is_asked_for() {
    let cpu = |request: &str| {
        let args = plan(request, true).unwrap().args;
        let at = args.iter().position(|word| word == "-cpu").unwrap();
        args[at + 1].clone()
    };
    for accel in ["kvm", "tcg"] {
        let accel = format!("accel = \"{accel}\"\n");
        assert!(cpu(&accel).contains("-svm"), "{accel}");
        let nested = cpu(&format!("{accel}nested = true"));
        assert!(
            !nested.contains("-svm") && !nested.contains("-vmx"),
            "{nested}"
        );
    }
}

#[test]
fn a_network_is_a_device_a_descriptor_and_an_address() {
    let words = |request: &str| {
        let plan = plan(request, false).unwrap();
        let words = plan.args.iter().filter(|word| word.contains("net"));
        let words: Vec<_> = words
            .map(|word| word.split(" bulkhead.channel").next().unwrap().to_owned())
            .collect();
        (words, plan.fd(Descriptor::Tap), plan.cmdline)
    };
    assert_eq!(words("network = \"isolated\"").1, None);
    let (args, fd, cmdline) = words("network = \"nat-filtered\"");
    assert_eq!(
        args,
        [
            "-netdev",
            "tap,id=net,fd=10,vhost=off",
            "virtio-net-device,id=nic,netdev=net,mac=02:62:68:00:00:02,bus=virtio-mmio-bus.0"
        ]
    );
    assert_eq!(fd, Some(10));
    assert!(
        cmdline.ends_with(" bulkhead.ip=198.18.0.2/30@198.18.0.1"),
        "{cmdline}"
    );
    let (args, _, cmdline) = words("network = \"dev\"\nipv6 = true\nmachine = \"q35\"");
    assert!(
        args[2].ends_with("mac=02:62:68:00:00:02,romfile="),
        "{args:?}"
    );
    assert!(
        cmdline.ends_with(" bulkhead.ip6=fd62:756c:6b68::2/126@fd62:756c:6b68::1"),
        "{cmdline}"
    );
}

#[test]
fn vsock_is_not_quietly_replaced() {
    assert!(matches!(
        plan("channel = \"vsock\"", false),
        Err(PlanError::NoVsock)
    ));
    assert_eq!(
        plan("channel = \"serial\"", true).unwrap().channel,
        Channel::Serial
    );
}

#[test]
fn descriptors_are_numbered_without_gaps() {
    let plan = plan("", false).unwrap();
    assert_eq!(plan.fd(Descriptor::Qmp), Some(FIRST_FD));
    assert_eq!(plan.fd(Descriptor::Vsock), None);
    assert_eq!(plan.fd(Descriptor::Agent), Some(FIRST_FD + 6));
}

#[test]
fn without_its_files_a_machine_has_the_hosts_kvm() {
    let refused = plan("waive = \"files\"", false).unwrap_err();
    assert_eq!(refused.code(), "kvm-closed");
    for possible in [
        "waive = \"files,user\"",
        "waive = \"files\"\naccel = \"tcg\"",
    ] {
        assert!(plan(possible, false).is_ok(), "{possible}");
    }
    let open = HostFacts {
        open_kvm: true,
        ..facts(false)
    };
    assert!(plan_on("waive = \"files\"", &open).is_ok());
}

#[test]
fn the_longest_file_is_about_the_disk() {
    let size = |request: &str, raises_limits| {
        let facts = HostFacts {
            raises_limits,
            ..facts(false)
        };
        plan_on(request, &facts).unwrap().jail.file_size
    };
    let small = "disk = \"1G\"\nmemory = \"512M\"\n";
    let longest = Some(Bytes(Bytes::gib(1).0 + (Bytes::mib(64 + 64)).0));
    assert_eq!(size(small, true), longest);
    // The disk of a run does not grow.
    assert_eq!(size(small, false), longest);
    let share = format!("{small}workspace = \"/w\"\nworkspace_mode = \"share\"\n");
    assert_eq!(size(&share, true), None);
    assert_eq!(size(&format!("{share}read_only = true"), true), longest);
}

#[test]
fn a_label_is_the_one_asked_for_or_our_profile() {
    let on = |request: &str, lsm: Option<(LsmKind, bool)>| {
        let facts = HostFacts {
            lsm: lsm.map(|(kind, profile)| LsmFacts { kind, profile }),
            ..facts(false)
        };
        let label = plan_on(request, &facts)?.jail.label;
        Ok(label.map(|label| (label.kind, label.name)))
    };
    let apparmor = |profile| Some((LsmKind::Apparmor, profile));
    let ours = (LsmKind::Apparmor, jail::PROFILE.to_owned());
    let none = |found: Result<Option<_>, PlanError>| assert_eq!(found.unwrap(), None);
    none(on("", None));
    none(on("", apparmor(false)));
    none(on("", Some((LsmKind::Selinux, false))));
    assert_eq!(on("", apparmor(true)).unwrap(), Some(ours));
    none(on("waive = \"lsm\"", apparmor(true)));
    // It knows the jail's paths only.
    none(on("accel = \"tcg\"\nwaive = \"files\"", apparmor(true)));
    let asked = "lsm_label = \"a_t:s0\"";
    for kind in [LsmKind::Apparmor, LsmKind::Selinux] {
        let expected = (kind, "a_t:s0".to_owned());
        assert_eq!(on(asked, Some((kind, true))).unwrap(), Some(expected));
    }
    assert_eq!(on(asked, None).unwrap_err().code(), "lsm-missing");
}

#[test]
fn memory_in_a_file_is_a_templates_or_a_clones() {
    let text = "command = [\"true\"]\nnetwork = \"isolated\"\nballoon = true";
    let request = toml::from_str::<Request>(text).unwrap();
    let spec = request.resolve(&Catalog::default()).unwrap();
    let facts = facts(false);
    let image = image();
    let words = |ram: Ram| {
        let kernel = KernelChoice::own(&image);
        let plan = Plan::with_ram(&spec, &image, kernel, &facts, ram).unwrap();
        assert!(!plan.args.iter().any(|word| word.contains("balloon")));
        let words = plan.args.windows(2).filter(|pair| {
            ["-object", "-incoming"].contains(&pair[0].as_str()) || pair[0] == "-machine"
        });
        words.map(|pair| pair.join(" ")).collect::<Vec<_>>()
    };
    let machine = "-machine microvm,acpi=on,rtc=on,usb=off,memory-backend=ram";
    let object = "-object memory-backend-file,id=ram,size=2048M,mem-path=/ram,share=";
    let file = || "/state/templates/x/ram".into();
    let saved = words(Ram::Saved { file: file() });
    assert_eq!(saved, [machine, &format!("{object}on")]);
    let cloned = words(Ram::Cloned {
        template: "x".into(),
        file: file(),
        inode: (1, 2),
    });
    assert_eq!(
        cloned,
        [machine, &format!("{object}off"), "-incoming defer"]
    );
}
