//! QEMU's arguments, one struct for each kind.

use super::{Channel, Descriptor, Plan, Ram, SHARE_TAG, jail, network, ram};
use crate::image::{Image, KernelFormat};
use crate::spec::{Accel, JailLayer, MachineType, Spec};
use bulkhead_agent::{AGENT_PORT, QGA_PORT, ROOT_SERIAL, SCRATCH_SERIAL};

/// `key=value` pairs after a first word, with commas in values doubled as
/// QEMU's option parser wants them (qemu(1), "-drive").
struct Options(String);

impl Options {
    fn new(first: &str) -> Self {
        Self(first.replace(',', ",,"))
    }

    fn set(mut self, key: &str, value: impl ToString) -> Self {
        self.0
            .push_str(&format!(",{key}={}", value.to_string().replace(',', ",,")));
        self
    }
}

/// One QEMU argument.
trait Argument {
    fn flag(&self) -> &'static str;
    fn value(&self) -> Option<String>;
}

/// A flag without a value.
struct Flag(&'static str);

impl Argument for Flag {
    fn flag(&self) -> &'static str {
        self.0
    }
    fn value(&self) -> Option<String> {
        None
    }
}

/// A flag with a value made from options or a plain text.
struct Valued(&'static str, String);

impl Argument for Valued {
    fn flag(&self) -> &'static str {
        self.0
    }
    fn value(&self) -> Option<String> {
        Some(self.1.clone())
    }
}

/// `-chardev socket` on an inherited descriptor: connected, or listening.
struct SocketChardev {
    id: &'static str,
    fd: i32,
    listens: bool,
}

impl Argument for SocketChardev {
    fn flag(&self) -> &'static str {
        "-chardev"
    }
    fn value(&self) -> Option<String> {
        let socket = Options::new("socket").set("id", self.id).set("fd", self.fd);
        Some(match self.listens {
            true => socket.set("server", "on").set("wait", "off").0,
            false => socket.0,
        })
    }
}

/// A device on the machine's bus: `virtio-blk-device` on microvm's mmio bus,
/// `virtio-blk-pci` on q35.
struct VirtioDevice {
    kind: &'static str,
    machine: MachineType,
    options: Vec<(&'static str, String)>,
}

impl Argument for VirtioDevice {
    fn flag(&self) -> &'static str {
        "-device"
    }
    fn value(&self) -> Option<String> {
        let bus = match self.machine {
            MachineType::Microvm => "device",
            MachineType::Q35 => "pci",
        };
        let first = format!("{}-{bus}", self.kind);
        let options = Options::new(&first);
        Some(
            self.options
                .iter()
                .fold(options, |all, (key, value)| all.set(key, value))
                .0,
        )
    }
}

/// A port of the virtio-serial device.
struct SerialPort {
    kind: &'static str,
    chardev: &'static str,
    nr: u32,
    name: Option<&'static str>,
}

impl Argument for SerialPort {
    fn flag(&self) -> &'static str {
        "-device"
    }
    fn value(&self) -> Option<String> {
        let options = Options::new(self.kind)
            .set("chardev", self.chardev)
            .set("nr", self.nr);
        Some(match self.name {
            Some(name) => options.set("name", name).0,
            None => options.0,
        })
    }
}

/// A raw disk whose file is passed as a descriptor.
struct Disk {
    node: &'static str,
    fd: i32,
    set: u32,
    read_only: bool,
    keep: bool,
}

impl Disk {
    fn arguments(&self) -> [Valued; 2] {
        let on_off = |on| if on { "on" } else { "off" };
        let add_fd = Options(format!("fd={}", self.fd))
            .set("set", self.set)
            .set("opaque", self.node);
        let mut file = Options(format!("driver=raw,node-name={}", self.node))
            .set("read-only", on_off(self.read_only))
            .set("file.driver", "file")
            .set("file.filename", format!("/dev/fdset/{}", self.set))
            // The lease is what keeps two machines off one disk.
            .set("file.locking", "off");
        if !self.read_only {
            // What the guest deletes shrinks the file.
            file = file.set("discard", "unmap");
            if !self.keep {
                // Nothing on this disk outlives the machine: flushing it would
                // only cost time.
                file = file.set("cache.no-flush", "on");
            }
        }
        [Valued("-add-fd", add_fd.0), Valued("-blockdev", file.0)]
    }
}

/// All arguments, in order.
pub(super) fn build(spec: &Spec, image: &Image, plan: &Plan) -> Vec<String> {
    let mut list: Vec<Box<dyn Argument>> = Vec::new();
    machine(&mut list, spec, plan);
    boot(&mut list, image, plan);
    monitor_and_ports(&mut list, plan);
    disks(&mut list, plan);
    balloon(&mut list, plan);
    share(&mut list, plan);
    nic(&mut list, plan);
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    list.push(Box::new(Valued("-sandbox", sandbox.into())));
    list.iter()
        .flat_map(|argument| std::iter::once(argument.flag().to_owned()).chain(argument.value()))
        .collect()
}

fn machine(list: &mut Vec<Box<dyn Argument>>, spec: &Spec, plan: &Plan) {
    let name = Options::new(spec.id.as_str()).set("debug-threads", "on");
    list.push(Box::new(Valued("-name", name.0)));
    // Distributions' kernels take virtio-mmio devices from ACPI only; ours
    // takes them from the command line, and boots faster without ACPI.
    let acpi = match plan.kernel.format {
        KernelFormat::Bzimage => "on",
        KernelFormat::Vmlinux => "off",
    };
    let machine = match spec.machine {
        // The option ROMs stay on: QEMU 10 of Debian's backports hangs with its
        // own qboot, and SeaBIOS costs nothing measurable. Without the RTC the
        // kernel polls for a second.
        MachineType::Microvm => Options::new("microvm")
            .set("acpi", acpi)
            .set("rtc", "on")
            .set("usb", "off"),
        MachineType::Q35 => Options::new("q35")
            .set("usb", "off")
            .set("vmport", "off")
            .set("sata", "off")
            .set("smbus", "off")
            .set("graphics", "off")
            .set("hpet", "off"),
    };
    let machine = match plan.ram.is_backed() {
        false => machine,
        true => machine.set("memory-backend", "ram"),
    };
    list.push(Box::new(Valued("-machine", machine.0)));
    let (accel, cpu) = match (spec.accel, spec.nested) {
        // Nested virtualization is a way out: only for who asks for it.
        (Accel::Kvm, false) => ("kvm", "host,-vmx,-svm"),
        (Accel::Kvm, true) => ("kvm", "host"),
        // Without SVM, QEMU 7.2 ends the extended CPUID leaves before the one
        // with the address sizes, and a kernel with five-level page tables then
        // takes its own addresses for wild ones: paths in /proc read "xxxx".
        // Four levels are also less to walk. Without ERMS and FSRM the guest
        // does not copy with `rep movsb`, which is emulated byte by byte.
        (Accel::Tcg, false) => (
            "tcg,thread=multi",
            "max,-svm,-la57,-erms,-fsrm,xlevel=0x80000008",
        ),
        // QEMU emulates AMD's SVM, not Intel's VMX.
        (Accel::Tcg, true) => ("tcg,thread=multi", "max,-la57,-erms,-fsrm"),
    };
    list.push(Box::new(Valued("-accel", accel.into())));
    list.push(Box::new(Valued("-cpu", cpu.into())));
    list.push(Box::new(Valued("-smp", spec.limits.vcpus.to_string())));
    list.push(Box::new(Valued(
        "-m",
        format!("{}M", spec.limits.memory.as_mib()),
    )));
    ram(list, plan);
    list.push(Box::new(Flag("-nodefaults")));
    list.push(Box::new(Flag("-no-user-config")));
    list.push(Box::new(Flag("-no-reboot")));
    list.push(Box::new(Valued("-display", "none".into())));
}

/// The guest's memory as a file, and the way its other state comes in.
fn ram(list: &mut Vec<Box<dyn Argument>>, plan: &Plan) {
    let object = |kind| {
        let size = format!("{}M", plan.memory.as_mib());
        Options::new(kind).set("id", "ram").set("size", size)
    };
    let file = |shared| {
        let file = object("memory-backend-file").set("mem-path", ram::RAM);
        Some(file.set("share", shared))
    };
    let object = match plan.ram {
        Ram::Own | Ram::Restored { backed: false } => None,
        Ram::Restored { backed: true } => Some(object("memory-backend-ram")),
        Ram::Saved { .. } => file("on"),
        Ram::Cloned { .. } => file("off"),
    };
    list.extend(object.map(|object| Box::new(Valued("-object", object.0)) as Box<dyn Argument>));
    if matches!(plan.ram, Ram::Cloned { .. } | Ram::Restored { .. }) {
        list.push(Box::new(Valued("-incoming", "defer".into())));
    }
}

fn boot(list: &mut Vec<Box<dyn Argument>>, image: &Image, plan: &Plan) {
    if plan.jail.has(JailLayer::Files) {
        list.push(Box::new(Valued("-L", jail::FIRMWARE.into())));
    }
    for (flag, place, host) in [
        ("-kernel", jail::KERNEL, plan.kernel.path.clone()),
        ("-initrd", jail::INITRAMFS, image.initramfs()),
    ] {
        let path = plan.jail.path(place, host);
        list.push(Box::new(Valued(flag, path.display().to_string())));
    }
    list.push(Box::new(Valued("-append", plan.cmdline.clone())));
}

fn monitor_and_ports(list: &mut Vec<Box<dyn Argument>>, plan: &Plan) {
    let socket = |id, descriptor| {
        let listens = plan.adoptable;
        plan.fd(descriptor)
            .map(|fd| SocketChardev { id, fd, listens })
    };
    for (id, descriptor) in [
        ("qmp", Descriptor::Qmp),
        ("serial", Descriptor::Serial),
        ("console", Descriptor::Console),
        ("qga", Descriptor::Qga),
        ("agent", Descriptor::Agent),
    ] {
        if let Some(chardev) = socket(id, descriptor) {
            list.push(Box::new(chardev));
        }
    }
    list.push(Box::new(Valued("-mon", "chardev=qmp,mode=control".into())));
    list.push(Box::new(Valued("-serial", "chardev:serial".into())));
    let machine = plan.machine;
    let ports = vec![("id", "ports".to_owned()), ("max_ports", "4".into())];
    list.push(Box::new(VirtioDevice {
        kind: "virtio-serial",
        machine,
        options: ports,
    }));
    let port = |kind, chardev, nr, name| {
        Box::new(SerialPort {
            kind,
            chardev,
            nr,
            name,
        })
    };
    // Port 0 is the console's by convention.
    list.push(port("virtconsole", "console", 0, None));
    if plan.channel == Channel::Serial {
        list.push(port("virtserialport", "agent", 1, Some(AGENT_PORT)));
    }
    list.push(port("virtserialport", "qga", 2, Some(QGA_PORT)));
    if let Some(fd) = plan.fd(Descriptor::Vsock) {
        // The CID set on the descriptor is QEMU's to set again; {cid} is put in
        // once it is leased.
        let options = vec![("vhostfd", fd.to_string()), ("guest-cid", CID.to_owned())];
        list.push(Box::new(VirtioDevice {
            kind: "vhost-vsock",
            machine,
            options,
        }));
    }
}

/// Stands in the arguments for the vsock CID, which is leased at start.
pub(crate) const CID: &str = "{cid}";
/// Block node of the scratch disk.
pub(crate) const SCRATCH_NODE: &str = "scratch";
/// Device id of the root disk.
pub(crate) const ROOT_ID: &str = "root-disk";
/// Device id of the scratch disk.
pub(crate) const SCRATCH_ID: &str = "scratch-disk";

fn disks(list: &mut Vec<Box<dyn Argument>>, plan: &Plan) {
    for (set, disk) in (1..).zip([
        (ROOT_ID, "root", Descriptor::Root, ROOT_SERIAL, true),
        (
            SCRATCH_ID,
            SCRATCH_NODE,
            Descriptor::Scratch,
            SCRATCH_SERIAL,
            false,
        ),
    ]) {
        let (id, node, descriptor, serial, read_only) = disk;
        let Some(fd) = plan.fd(descriptor) else {
            continue;
        };
        let [add_fd, blockdev] = Disk {
            node,
            fd,
            set,
            read_only,
            keep: plan.keep_disk,
        }
        .arguments();
        list.push(Box::new(add_fd));
        list.push(Box::new(blockdev));
        let mut options = vec![
            ("id", id.to_owned()),
            ("drive", node.to_owned()),
            ("serial", serial.to_owned()),
            // What cannot be read now cannot be read later: the guest's to know.
            ("rerror", "report".to_owned()),
        ];
        if !read_only {
            // The guest never sees a write fail that may succeed later: the
            // machine stops, and goes on with the same write (run/disk.rs).
            options.push(("werror", "stop".to_owned()));
        }
        list.push(Box::new(VirtioDevice {
            kind: "virtio-blk",
            machine: plan.machine,
            options,
        }));
    }
}

fn balloon(list: &mut Vec<Box<dyn Argument>>, plan: &Plan) {
    if !plan.balloon {
        return;
    }
    let mut options = vec![
        ("id", "balloon".to_owned()),
        // A guest that runs out takes memory back by itself.
        ("deflate-on-oom", "on".to_owned()),
        // What the guest frees goes back to the host without being asked for.
        ("free-page-reporting", "on".to_owned()),
    ];
    options.extend(slot(plan, 2));
    list.push(Box::new(VirtioDevice {
        kind: "virtio-balloon",
        machine: plan.machine,
        options,
    }));
}

/// Where on microvm's bus a device is that not every machine has. QEMU fills it
/// from slot 7 down, and slot 3 has interrupt 8, which is the clock's: the fifth
/// device would be dead. The slots below have interrupts of their own.
fn slot(plan: &Plan, number: u32) -> Option<(&'static str, String)> {
    (plan.machine == MachineType::Microvm).then(|| ("bus", format!("virtio-mmio-bus.{number}")))
}

fn nic(list: &mut Vec<Box<dyn Argument>>, plan: &Plan) {
    let Some(fd) = plan.fd(Descriptor::Tap) else {
        return;
    };
    let mac = plan
        .network
        .as_ref()
        .map_or(network::GUEST_MAC, network::Network::mac);
    let netdev = Options::new("tap")
        .set("id", "net")
        .set("fd", fd)
        .set("vhost", "off");
    list.push(Box::new(Valued("-netdev", netdev.0)));
    let mut options = vec![
        ("id", "nic".to_owned()),
        ("netdev", "net".to_owned()),
        ("mac", network::mac(mac)),
    ];
    match plan.machine {
        MachineType::Microvm => options.extend(slot(plan, 0)),
        // Nothing boots from the network.
        MachineType::Q35 => options.push(("romfile", String::new())),
    }
    list.push(Box::new(VirtioDevice {
        kind: "virtio-net",
        machine: plan.machine,
        options,
    }));
}

fn share(list: &mut Vec<Box<dyn Argument>>, plan: &Plan) {
    let Some(share) = &plan.share else {
        return;
    };
    let path = match plan.fd(Descriptor::Share) {
        // Not its name, which somebody else may give to another directory.
        Some(fd) => format!("/proc/self/fd/{fd}"),
        None => jail::SHARE.into(),
    };
    let mut fsdev = Options::new("local")
        .set("id", SHARE_TAG)
        .set("path", path)
        .set(
            "security_model",
            match share.read_only {
                // Nothing is written, and links can be read: with the other
                // model the guest is told of a loop instead (ELOOP).
                true => "none",
                // What the guest believes of owners and modes is kept in extended
                // attributes: it can make no device and no setuid file on the host.
                false => "mapped-xattr",
            },
        )
        .set("multidevs", "remap");
    if share.read_only {
        fsdev = fsdev.set("readonly", "on");
    }
    list.push(Box::new(Valued("-fsdev", fsdev.0)));
    let mut options = vec![
        ("fsdev", SHARE_TAG.to_owned()),
        ("mount_tag", SHARE_TAG.to_owned()),
    ];
    options.extend(slot(plan, 1));
    list.push(Box::new(VirtioDevice {
        kind: "virtio-9p",
        machine: plan.machine,
        options,
    }));
}
