//! What needs a KVM host with vhost: run there by `cargo xtask lab test`, and
//! so by CI. Machines in the lab are machines in a machine under emulation:
//! nothing here asserts how long something takes.

mod support;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead::guest::Channel;
use bulkhead::image::Store;
use bulkhead_agent::{AGENT_PORT, ROOT_SERIAL};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use support::live::sh_over;
use support::{Bulkhead, Ran, machines};

/// The smallest machine that boots soonest.
const SMALL: [&str; 10] = [
    "--image", "base", "--kernel", "tuned", "--memory", "256M", "--cpus", "1", "--disk", "64M",
];

/// `bulkhead --json run`, without a word about the accelerator.
fn outcome(words: &[&str], input: &[u8]) -> (Value, Ran) {
    let fixed = [&["--json", "run"], &SMALL[..]].concat();
    let ran = Bulkhead::new().raw_with_input(&[&fixed, words].concat(), input);
    let outcome = serde_json::from_str(&ran.stdout);
    (outcome.unwrap_or_else(|_| panic!("{ran:?}")), ran)
}

#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn doctor_says_that_kvm_works() {
    let bulkhead = Bulkhead::new();
    let doctor = || -> Vec<Value> {
        let doctor = bulkhead.raw(&["--json", "doctor"]);
        serde_json::from_str(&doctor.stdout).unwrap_or_else(|_| panic!("{doctor:?}"))
    };
    let find = |checks: &[Value], name: &str| {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        assert_eq!(check["status"], "ok", "{check}");
        check["seen"].as_str().unwrap().to_owned()
    };
    let checks = doctor();
    let kvm = find(&checks, "kvm");
    assert!(kvm.contains("reached its agent"), "{kvm}");
    assert_eq!(find(&checks, "vsock"), "/dev/vhost-vsock opens");
    let cgroup = find(&checks, "cgroup");
    assert!(cgroup.starts_with("version 2"), "{cgroup}");
    // The proof is good for the rest of this boot of the host.
    assert_eq!(find(&doctor(), "kvm"), kvm);
}

#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn a_run_is_isolated_by_hardware_and_reached_over_vsock() {
    let input: String = (0..60_000).map(|n| format!("{n}\n")).collect();
    let script = "cat; grep -c -w -e svm -e vmx /proc/cpuinfo >&2; exit 7";
    let (outcome, ran) = outcome(&["--", "sh", "-c", script], input.as_bytes());
    assert_eq!((ran.code, &outcome["exit_code"]), (7, &Value::from(7)));
    assert_eq!(outcome["accel"], "kvm");
    assert_eq!(outcome["hardware_isolation"], true);
    assert_eq!(outcome["channel"], "vsock");
    assert!(outcome["stdout"]["text"] == input, "{}", outcome["stdout"]);
    // Nested virtualization was not asked for.
    assert_eq!(outcome["stderr"]["text"], "0\n");
    assert_eq!(outcome["warnings"], Value::Array(Vec::new()));
    assert_eq!(machines(outcome["id"].as_str().unwrap()), [""; 0]);
}

#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn serial_channel_and_nested_virtualization_where_they_are_asked_for() {
    let script = "grep -o -w -m 1 -e svm -e vmx /proc/cpuinfo";
    // Without a user of its own it gets the host's /dev/kvm.
    let words = ["--channel", "serial", "--nested", "--waive", "user"];
    let words = [&words[..], &["--", "sh", "-c", script]].concat();
    let (outcome, ran) = outcome(&words, b"");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(outcome["channel"], "serial");
    assert_eq!(outcome["hardware_isolation"], true);
    let found = outcome["stdout"]["text"].as_str().unwrap();
    assert!(["svm\n", "vmx\n"].contains(&found), "{found}");
    let layers = outcome["layers"].as_array().unwrap();
    let user = layers.iter().find(|one| one["what"] == "Uid").unwrap();
    assert_eq!(user["verdict"], "waived", "{user}");
}

#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn q35_works_under_kvm_and_over_vsock() {
    let words = ["--machine", "q35", "--channel", "vsock"];
    let script = "ls /sys/bus/pci/devices | wc -l; nproc";
    let words = [&words[..], &["--cpus", "2", "--", "sh", "-c", script]].concat();
    let fixed = [&["--json", "run"], &SMALL[..6]].concat();
    let ran = Bulkhead::new().raw(&[&fixed, &words[..]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    let outcome: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(outcome["channel"], "vsock");
    let text = outcome["stdout"]["text"].as_str().unwrap();
    let numbers: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert!(numbers[0] > 4 && numbers[1] == 2, "{text}");
}

/// Decision 0007: any user of the host can connect to a guest, from a port of
/// no privilege.
#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn the_guest_hears_the_hosts_root_only() {
    let bulkhead = Bulkhead::new();
    let words = [&SMALL[2..], &["--", "sh", "-c", "echo ready; cat"]].concat();
    let mut runs = ["heard", "beside"].map(|name| bulkhead.start(name, &words));
    let cids = ["heard", "beside"].map(|name| {
        let plan = bulkhead.state().join("runs").join(name).join("plan.json");
        let plan: Value = serde_json::from_slice(&std::fs::read(plan).unwrap()).unwrap();
        assert_eq!(plan["channel"], "vsock");
        u32::try_from(plan["cid"].as_u64().unwrap()).unwrap()
    });
    assert_ne!(cids[0], cids[1]);
    for _ in 0..3 {
        let port = bulkhead_agent::VSOCK_PORT;
        let mut stream = vsock::VsockStream::connect_with_cid_port(cids[0], port).unwrap();
        let patience = Some(Duration::from_secs(60));
        stream.set_read_timeout(patience).unwrap();
        // Not even a greeting: it is hung up on.
        let mut buffer = [0; 64];
        match stream.read(&mut buffer) {
            Ok(0) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}: {buffer:?}"),
        }
    }
    // The run did not notice, nor did the other.
    for (n, run) in runs.iter_mut().enumerate() {
        assert_eq!(run.ask(&format!("hello {n}")), format!("hello {n}\n"));
    }
    for run in runs {
        let ran = run.finish();
        assert_eq!(ran.code, 0, "{ran:?}");
    }
}

/// The rest of a survivor's life is in tests/supervisors.rs, which the lab can
/// run, too: it takes many starts.
#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn a_survivor_is_reached_over_vsock_again() {
    let bulkhead = Bulkhead::new();
    let words = ["--disk", "64M", "--channel", "vsock", "--survivors"];
    let vm = bulkhead.create("survivor", &[&words[..], &["adopt", "--start"]].concat());
    let mark = "echo alive > /dev/shm/mark";
    bulkhead.must(&["exec", "-u", "root", "survivor", "sh", "-c", mark]);
    kill(vm.supervisor(), Signal::SIGKILL).unwrap();
    vm.becomes("lost");
    assert!(bulkhead.must(&["gc"]).contains("took over survivor"));
    let seen = bulkhead.must(&["exec", "survivor", "cat", "/dev/shm/mark"]);
    assert_eq!(seen, "alive\n");
    bulkhead.must(&["rm", "--force", "survivor"]);
    assert_eq!(machines("survivor"), [""; 0]);
}

#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn a_guest_that_runs_out_of_memory_is_told_of() {
    let (outcome, ran) = outcome(&["--", "tail", "/dev/zero"], b"");
    assert_eq!(ran.code, 137, "{ran:?}");
    let warnings = outcome["warnings"].to_string();
    assert!(warnings.contains("ran out of memory (256M)"), "{warnings}");
}

/// A tap of the lab's own; gone when dropped.
struct Tap(&'static str);

impl Tap {
    fn new(name: &'static str, address: &str) -> Self {
        let tap = Self(name);
        let ip = |words: &[&str]| {
            let mut command = std::process::Command::new("ip");
            assert!(command.args(words).status().unwrap().success(), "{words:?}");
        };
        ip(&["tuntap", "add", name, "mode", "tap"]);
        ip(&["address", "add", address, "dev", name]);
        ip(&["link", "set", name, "up"]);
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let mut command = std::process::Command::new("ip");
        let _ = command.args(["link", "del", self.0]).status();
    }
}

/// Sets the address of eth0 and brings it up: the image has no `ip`.
const NETWORK: &str = r#"
use Socket;
socket(my $s, PF_INET, SOCK_DGRAM, 0) or die;
sub set { my ($call, $value) = @_; ioctl($s, $call, pack("a16 a16", "eth0", $value)) or die "$call: $!"; }
set(0x8916, pack("S n a4", AF_INET, 0, inet_aton("10.99.0.2")));
set(0x891c, pack("S n a4", AF_INET, 0, inet_aton("255.255.255.0")));
set(0x8914, pack("s", 0x41));
"#;
/// Asks the host, again and again, until it answers.
const ASK: &str = r#"
use Socket;
socket(my $s, PF_INET, SOCK_DGRAM, 0) or die;
my $to = pack_sockaddr_in(4000, inet_aton("10.99.0.1"));
for (1..60) {
    send($s, "from the guest", 0, $to);
    my $set = ""; vec($set, fileno($s), 1) = 1;
    next unless select($set, undef, undef, 1);
    recv($s, my $answer, 100, 0); print $answer; exit 0;
}
die "no answer";
"#;

/// QEMU by hand with a tap on vhost-net: what networks are made of, whatever
/// Bulkhead makes of it.
fn qemu(dir: &Path, tap: &str) -> tokio::process::Child {
    let state: PathBuf = std::env::var_os("BULKHEAD_TEST_STATE").unwrap().into();
    let image = Store::new(state.clone()).get("base").unwrap();
    let show = |path: &Path| path.display().to_string();
    let agent = format!(
        "socket,id=agent,path={},server=on,wait=off",
        show(&dir.join("agent"))
    );
    let port = format!("virtserialport,chardev=agent,nr=1,name={AGENT_PORT}");
    let root = format!(
        "driver=raw,node-name=root,read-only=on,file.driver=file,file.filename={}",
        show(&image.root())
    );
    let disk = format!("virtio-blk-device,drive=root,serial={ROOT_SERIAL}");
    let netdev = format!("tap,id=n0,ifname={tap},script=no,downscript=no,vhost=on");
    let (kernel, initramfs) = (state.join("kernels/tuned/vmlinux"), image.initramfs());
    let mut command = tokio::process::Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "microvm,acpi=off,rtc=on,usb=off"])
        .args(["-accel", "kvm", "-cpu", "host", "-m", "256M", "-no-reboot"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-kernel", &show(&kernel), "-initrd", &show(&initramfs)])
        .args(["-append", "quiet panic=-1 reboot=t"])
        .args(["-chardev", &agent, "-device", "virtio-serial-device"])
        .args(["-device", &port, "-blockdev", &root, "-device", &disk])
        .args(["-netdev", &netdev, "-device", "virtio-net-device,netdev=n0"])
        .kill_on_drop(true);
    command.spawn().unwrap()
}

#[tokio::test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
async fn a_tap_with_vhost_carries_packets() {
    const PATIENCE: Duration = Duration::from_secs(300);
    let _tap = Tap::new("labtap0", "10.99.0.1/24");
    let socket = tokio::net::UdpSocket::bind("10.99.0.1:4000").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let qemu = qemu(dir.path(), "labtap0");
    let connect = async {
        let stream = loop {
            match tokio::net::UnixStream::connect(dir.path().join("agent")).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        Channel::connect(stream).await.unwrap().0
    };
    let channel = tokio::time::timeout(PATIENCE, connect).await.unwrap();
    let fds = format!("/proc/{}/fd", qemu.id().unwrap());
    let vhost = std::fs::read_dir(fds).unwrap().flatten();
    let mut vhost = vhost.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let vhost = vhost.any(|to| to.ends_with("vhost-net"));
    assert!(vhost, "QEMU does not use /dev/vhost-net");
    let answer = async {
        let mut buffer = [0; 100];
        let (count, from) = socket.recv_from(&mut buffer).await.unwrap();
        socket.send_to(b"from the host", from).await.unwrap();
        (buffer[..count].to_vec(), from)
    };
    let ask = async {
        sh_over(&channel, &format!("perl -e '{NETWORK}'")).await;
        sh_over(&channel, &format!("perl -e '{ASK}'")).await
    };
    let both = async { tokio::join!(answer, ask) };
    let ((asked, from), answered) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    assert_eq!(asked, b"from the guest");
    assert_eq!(from.ip().to_string(), "10.99.0.2");
    assert_eq!(answered, "from the host");
}
