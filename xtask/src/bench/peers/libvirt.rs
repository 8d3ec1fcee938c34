//! libvirt on the same QEMU, kernel and disks: virsh over one kept connection,
//! and qemu-guest-agent for commands.
//!
//! Its guest is smaller than ours: busybox and qemu-guest-agent in an initramfs.
//! libvirt 9 knows no microvm, so its machine is a q35 whatever ours is.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bulkhead::image::scratch;
use bulkhead::plan::Plan;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;

use super::{LIBVIRT, alone, lacks, program};
use crate::bench::config::{Bed, Config, PATIENCE, explain, ms};
use crate::bench::facts::first_line;
use crate::bench::ours::{AGENT, ALL, COMMAND, POWER_OFF};
use crate::bench::report::Missing;
use crate::bench::rounds::Sample;
use crate::setup;

/// Between two questions whether something has happened.
const POLL: Duration = Duration::from_millis(2);

/// A libvirtd of our own, and a virsh that talks to it.
pub(crate) struct Libvirt {
    version: String,
    virsh: Mutex<Virsh>,
    plan: Plan,
    cache: PathBuf,
    /// Its configuration, state, sockets and disks.
    dir: tempfile::TempDir,
    _daemon: Child,
}

/// What the daemon runs in. Its control groups would be the host's.
const DAEMON: &str = r#"
mount -t tmpfs none /run
for place in lib cache log; do
    mkdir -p $DIR/$place /var/$place/libvirt
    mount --bind $DIR/$place /var/$place/libvirt
done
mount --bind $DIR/etc /etc/libvirt
# libvirtd looks its usual user up even where it is told another.
for list in passwd group; do
    cp /etc/$list $DIR/$list
    grep -q ^libvirt-qemu: $DIR/$list || echo "$(eval echo \$$list)" >> $DIR/$list
    mount --bind $DIR/$list /etc/$list
done
exec "$XTASK" bench reap -- "$LIBVIRTD" --config $DIR/etc/libvirtd.conf
"#;

const QEMU_CONF: &str = r#"user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = [ ]
cgroup_controllers = [ ]
stdio_handler = "file"
"#;

/// Packs the guest: what busybox and qemu-guest-agent need, and no more. Its
/// `true` is the distribution's, as ours is.
const GUEST: &str = r#"
mkdir -p bin dev proc sys run tmp usr/sbin sbin
cp "$BUSYBOX" bin/busybox
ln -s busybox bin/sh
cp "$TRUE" bin/true
cp "$AGENT" usr/sbin/qemu-ga
for program in "$AGENT" "$TRUE"; do ldd "$program"; done | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p ".$(dirname "$library")"
    cp -L "$library" ".$library"
done
cat > init <<'END'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
while [ ! -e /dev/vport0p1 ]; do /bin/busybox usleep 1000; done
exec /usr/sbin/qemu-ga -m virtio-serial -p /dev/vport0p1 -t /run
END
cat > sbin/shutdown <<'END'
#!/bin/busybox sh
exec /bin/busybox reboot -f
END
chmod 755 init sbin/shutdown
find . | "$BUSYBOX" cpio -o -H newc > ../initrd 2> /dev/null
"#;

impl Libvirt {
    /// Starts a daemon where libvirt is installed.
    pub(crate) async fn find(
        bed: &Bed,
        config: &Config,
        missing: &mut Vec<Missing>,
    ) -> Result<Option<Self>> {
        let mut found = Vec::new();
        for name in ["libvirtd", "virsh", "qemu-ga", "busybox", "true"] {
            match program(name, &[]) {
                Some(path) => found.push(path),
                None => {
                    lacks(missing, LIBVIRT, &format!("{name} is not installed"));
                    return Ok(None);
                }
            }
        }
        if config.kernel.is_none() {
            lacks(
                missing,
                LIBVIRT,
                "its guest has no modules: name a --kernel",
            );
            return Ok(None);
        }
        let [libvirtd, virsh, agent, busybox, command] = &found[..] else {
            return Ok(None);
        };
        let (_, plan) = bed.plan(config)?;
        let dir = tempfile::Builder::new()
            .prefix("lv")
            .tempdir_in(bed.temp())?;
        let place = dir.path();
        let root = place.join("guest");
        std::fs::create_dir_all(&root)?;
        let mut pack = std::process::Command::new("sh");
        pack.args(["-e", "-c", GUEST]).current_dir(&root);
        pack.env("BUSYBOX", busybox).env("AGENT", agent);
        setup::call(pack.env("TRUE", command))?;
        std::fs::create_dir_all(place.join("etc"))?;
        std::fs::write(place.join("etc/qemu.conf"), QEMU_CONF)?;
        let run = place.join("run");
        std::fs::create_dir_all(&run)?;
        let conf = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n\
             host_uuid = \"6b756c62-6561-4864-a100-62656e636800\"\n",
            run.display()
        );
        std::fs::write(place.join("etc/libvirtd.conf"), conf)?;
        std::fs::write(place.join("domain.xml"), domain(&plan, config, place))?;
        let mut daemon = alone(config, place, DAEMON)?;
        daemon.env("XTASK", std::env::current_exe()?);
        daemon.env("LIBVIRTD", libvirtd);
        daemon.env(
            "passwd",
            "libvirt-qemu:x:64055:64055::/nonexistent:/bin/false",
        );
        daemon.env("group", "libvirt-qemu:x:64055:");
        let log = std::fs::File::create(place.join("log.txt"))?;
        daemon
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut daemon = Command::from(daemon).kill_on_drop(true).spawn()?;
        let socket = run.join("libvirt-sock");
        let begin = Instant::now();
        while !socket.exists() {
            if begin.elapsed() > PATIENCE || daemon.try_wait()?.is_some() {
                let log = std::fs::read_to_string(place.join("log.txt"))?;
                bail!("libvirtd does not come up: {log}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Some(Self {
            version: format!(
                "{}, always on q35, guest: busybox and qemu-guest-agent",
                first_line(libvirtd, &["--version"])?
            ),
            virsh: Mutex::new(Virsh::connect(virsh, &socket)?),
            plan,
            cache: bed.dirs().cache(),
            dir,
            _daemon: daemon,
        }))
    }

    pub(crate) fn version(&self) -> String {
        self.version.clone()
    }

    async fn call(&self, words: &str) -> Result<String> {
        self.virsh.lock().await.call(words).await
    }

    /// Starts the guest and waits for its agent.
    pub(crate) async fn start(&self) -> Result<Guest<'_>> {
        let disk = self.dir.path().join("scratch.img");
        let _ = std::fs::remove_file(&disk);
        // Made beforehand, as for bare QEMU.
        let template = scratch::template(&self.cache, self.plan.scratch.0).map_err(explain)?;
        scratch::copy(&template, &disk).map_err(explain)?;
        let begin = Instant::now();
        let domain = self.dir.path().join("domain.xml");
        self.call(&format!("create {}", domain.display())).await?;
        self.answering(begin).await
    }

    /// Waits until the guest's agent answers.
    async fn answering(&self, begin: Instant) -> Result<Guest<'_>> {
        let guest = Guest {
            libvirt: self,
            begin,
        };
        while let Err(error) = guest.ping().await {
            if begin.elapsed() > PATIENCE {
                return Err(error.context("the guest's agent does not answer"));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(guest)
    }

    /// Saves a booted guest, and keeps its disk of that moment.
    pub(crate) async fn save(&self) -> Result<()> {
        let guest = self.start().await?;
        guest.run_true().await?;
        let file = self.dir.path().join("saved");
        self.call(&format!("save bench {}", file.display())).await?;
        let disk = self.dir.path().join("scratch.img");
        std::fs::rename(disk, self.dir.path().join("saved.img"))?;
        Ok(())
    }

    /// From what was saved to nothing.
    pub(crate) async fn restored_life(&self) -> Result<Sample> {
        let dir = self.dir.path();
        let disk = dir.join("scratch.img");
        let _ = std::fs::remove_file(&disk);
        scratch::copy(&dir.join("saved.img"), &disk).map_err(explain)?;
        let begin = Instant::now();
        let saved = dir.join("saved");
        self.call(&format!("restore {}", saved.display())).await?;
        let guest = self.answering(begin).await?;
        guest.lived().await
    }

    /// From nothing to nothing.
    pub(crate) async fn life(&self) -> Result<Sample> {
        self.start().await?.lived().await
    }
}

/// A running guest of libvirt's.
pub(crate) struct Guest<'a> {
    libvirt: &'a Libvirt,
    begin: Instant,
}

impl Guest<'_> {
    async fn ask(&self, request: &serde_json::Value) -> Result<serde_json::Value> {
        let words = format!("qemu-agent-command bench '{request}'");
        let answer = self.libvirt.call(&words).await?;
        let answer: serde_json::Value = serde_json::from_str(answer.trim())
            .with_context(|| format!("qemu-guest-agent answered {answer:?}"))?;
        Ok(answer["return"].clone())
    }

    /// A command and the end of a guest whose agent has just answered.
    async fn lived(self) -> Result<Sample> {
        let begin = self.begin;
        let ready = begin.elapsed();
        let start = Instant::now();
        self.run_true().await?;
        let command = start.elapsed();
        let down = Instant::now();
        self.power_off().await?;
        Ok(Sample::from(vec![
            (AGENT, ms(ready)),
            (COMMAND, ms(command)),
            (POWER_OFF, ms(down.elapsed())),
            (ALL, ms(begin.elapsed())),
        ]))
    }

    pub(crate) async fn ping(&self) -> Result<()> {
        let ping = serde_json::json!({"execute": "guest-ping"});
        self.ask(&ping).await.map(|_| ())
    }

    pub(crate) async fn run_true(&self) -> Result<()> {
        let exec = serde_json::json!({"execute": "guest-exec", "arguments": {"path": "/bin/true"}});
        let pid = self.ask(&exec).await?["pid"].clone();
        let status = serde_json::json!({"execute": "guest-exec-status", "arguments": {"pid": pid}});
        let begin = Instant::now();
        loop {
            let now = self.ask(&status).await?;
            if now["exited"] == true {
                anyhow::ensure!(now["exitcode"] == 0, "true gave {now}");
                return Ok(());
            }
            anyhow::ensure!(begin.elapsed() < PATIENCE, "true does not end");
            tokio::time::sleep(POLL).await;
        }
    }

    async fn open(&self, path: &str, mode: &str) -> Result<serde_json::Value> {
        let arguments = serde_json::json!({"path": path, "mode": mode});
        let open = serde_json::json!({"execute": "guest-file-open", "arguments": arguments});
        self.ask(&open).await
    }

    async fn close(&self, handle: &serde_json::Value) -> Result<()> {
        let arguments = serde_json::json!({"handle": handle});
        let close = serde_json::json!({"execute": "guest-file-close", "arguments": arguments});
        self.ask(&close).await.map(|_| ())
    }

    /// Writes a file in the guest.
    pub(crate) async fn put(&self, path: &str, content: &[u8]) -> Result<()> {
        let handle = self.open(path, "w").await?;
        let arguments = serde_json::json!({"handle": handle, "buf-b64": base64(content)});
        let write = serde_json::json!({"execute": "guest-file-write", "arguments": arguments});
        let wrote = self.ask(&write).await?;
        anyhow::ensure!(wrote["count"] == content.len(), "it wrote {wrote}");
        self.close(&handle).await
    }

    /// Reads a file of the guest, all at once; gives its size.
    pub(crate) async fn get(&self, path: &str, most: usize) -> Result<usize> {
        let handle = self.open(path, "r").await?;
        let arguments = serde_json::json!({"handle": handle, "count": most});
        let read = serde_json::json!({"execute": "guest-file-read", "arguments": arguments});
        let read = self.ask(&read).await?;
        self.close(&handle).await?;
        let count = read["count"].as_u64().context("it read nothing")?;
        Ok(usize::try_from(count)?)
    }

    /// Makes a file of so many bytes in the guest.
    pub(crate) async fn make(&self, path: &str, size: usize) -> Result<()> {
        let piece = vec![7; 100_000];
        let handle = self.open(path, "w").await?;
        for _ in 0..size / piece.len() {
            let arguments = serde_json::json!({"handle": handle, "buf-b64": base64(&piece)});
            let write = serde_json::json!({"execute": "guest-file-write", "arguments": arguments});
            self.ask(&write).await?;
        }
        self.close(&handle).await
    }

    async fn gone(&self) -> Result<()> {
        let begin = Instant::now();
        while self.libvirt.call("domstate bench").await.is_ok() {
            anyhow::ensure!(begin.elapsed() < PATIENCE, "the guest does not power off");
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    async fn power_off(self) -> Result<()> {
        self.libvirt.call("shutdown bench --mode agent").await?;
        self.gone().await
    }

    pub(crate) async fn destroy(self) -> Result<()> {
        self.libvirt.call("destroy bench").await?;
        self.gone().await
    }
}

/// virsh as a person would use it: started once, one command after the other.
struct Virsh {
    _process: Child,
    input: ChildStdin,
    output: ChildStdout,
    asked: usize,
    read: Vec<u8>,
}

impl Virsh {
    fn connect(virsh: &Path, socket: &Path) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$0\" -q -c \"$1\" 2>&1"]);
        command.arg(virsh);
        command.arg(format!("qemu+unix:///system?socket={}", socket.display()));
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self {
            input: process.stdin.take().context("virsh has no input")?,
            output: process.stdout.take().context("virsh has no output")?,
            _process: process,
            asked: 0,
            read: Vec::new(),
        })
    }

    /// Has a command done, and gives what it printed.
    async fn call(&mut self, words: &str) -> Result<String> {
        self.asked += 1;
        let mark = format!("done-{}.", self.asked);
        let line = format!("{words}\necho {mark}\n");
        self.input.write_all(line.as_bytes()).await?;
        // At the beginning of a line: elsewhere it is our own line, echoed.
        let end = format!("\n{mark}");
        let read = async {
            loop {
                let text = String::from_utf8_lossy(&self.read).into_owned();
                if let Some(at) = text.find(&end) {
                    return Ok(text[..at].to_owned());
                }
                if self.output.read_buf(&mut self.read).await? == 0 {
                    bail!("virsh ended: {text}");
                }
            }
        };
        let text = tokio::time::timeout(PATIENCE, read).await;
        let text = text.with_context(|| format!("virsh does not answer to {words}"))??;
        self.read.clear();
        let said: Vec<&str> = text
            .lines()
            // It repeats what it is told, after a prompt that may have come before.
            .filter(|line| {
                !line.is_empty() && !line.starts_with("virsh # ") && !line.ends_with(words)
            })
            .filter(|line| !line.ends_with(&format!("echo {mark}")))
            .collect();
        let said = said.join("\n");
        if said.contains("error: ") {
            bail!("{words}: {said}");
        }
        Ok(said)
    }
}

/// As RFC 4648 has it.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            text.push(match digit > three.len() {
                true => '=',
                false => char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize]),
            });
        }
    }
    text
}

/// The guest in libvirt's words: the plan's kernel, disks and processor.
fn domain(plan: &Plan, config: &Config, dir: &Path) -> String {
    let (kind, cpu) = match config.accel.as_str() {
        "kvm" => ("kvm", "<cpu mode='host-passthrough'/>"),
        _ => (
            "qemu",
            "<cpu mode='maximum'><feature policy='disable' name='svm'/>\
             <feature policy='disable' name='la57'/></cpu>",
        ),
    };
    let cmdline: Vec<&str> = plan
        .cmdline
        .split(' ')
        // What only microvm or our agent understands.
        .filter(|word| !word.starts_with("bulkhead.") && *word != "pci=off" && *word != "reboot=t")
        .collect();
    let disk = |at: usize, path: &Path, more: &str| {
        let letter = ["a", "b"][at];
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
             <source file='{}'/><target dev='vd{letter}' bus='virtio'/>{more}</disk>",
            path.display()
        )
    };
    format!(
        "<domain type='{kind}'><name>bench</name><memory unit='MiB'>{}</memory>\
         <vcpu>{}</vcpu><os><type arch='x86_64' machine='q35'>hvm</type>\
         <kernel>{}</kernel><initrd>{}</initrd><cmdline>{}</cmdline></os>\
         <features><acpi/></features>{cpu}\
         <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot>\
         <on_crash>destroy</on_crash><devices><emulator>{}</emulator>\
         {}{}<controller type='usb' model='none'/><memballoon model='none'/>\
         <serial type='file'><source path='{}'/></serial>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         </devices></domain>\n",
        config.memory,
        config.cpus,
        plan.kernel.path.display(),
        dir.join("initrd").display(),
        cmdline.join(" "),
        plan.qemu.display(),
        disk(0, &plan.root, "<readonly/>"),
        disk(1, &dir.join("scratch.img"), ""),
        dir.join("serial.txt").display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        let cases = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, coded) in cases {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
