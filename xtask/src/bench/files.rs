//! Files into the guest and out of it, against a bare copy over another port
//! of the same virtio-serial device in the same machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use bulkhead::guest::Channel;
use bulkhead::guest::archive::{self, HostDir, PackLimits};
use bulkhead::run::{receive, send};
use bulkhead_agent::Request;
use tokio::sync::Mutex;

use super::config::{Bed, Common, explain, ms};
use super::echo::Echo;
use super::facts::Facts;
use super::report::{FLOOR, OURS, Report, Unit};
use super::rounds::{Sample, Subject, interleaved};
use super::{ours, peers};

const SMALL_IN: &str = "1-kb-in";
const LARGE_OUT: &str = "1-mb-out";
/// CPU time of the VMM for it.
const LARGE_OUT_CPU: &str = "1-mb-out-vmm-cpu";
const MANY_IN: &str = "many-in";
const MANY_OUT: &str = "many-out";
/// Bytes of each of the many.
const SMALL: usize = 1000;
const LARGE: usize = 1_000_000;
/// Files in a directory of the many.
const FANOUT: usize = 100;
/// Where the large one is in libvirt's guest.
const PEER_LARGE: &str = "/tmp/large";
/// Where each subject's files are in the guest.
const PLACES: [&str; 2] = ["/root/bulkhead", "/root/bare"];

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// How many the many files are.
    #[arg(long, default_value_t = 10_000)]
    files: usize,
    /// Compare with libvirt and qemu-guest-agent, too: one file in, one out.
    #[arg(long)]
    peers: bool,
    #[command(flatten)]
    install: peers::Install,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(args))
}

/// What goes in.
struct Material {
    small: PathBuf,
    tree: PathBuf,
    /// The tree for the bare program.
    list: Vec<(String, Vec<u8>)>,
}

impl Material {
    fn make(dir: &Path, count: usize) -> Result<Self> {
        let small = dir.join("small");
        fs::write(&small, vec![7; SMALL])?;
        let tree = dir.join("tree");
        let mut list = Vec::new();
        for at in 0..count {
            let name = format!("d{}/f{at}", at / FANOUT);
            let content = format!("{at:0SMALL$}").into_bytes();
            let path = tree.join(&name);
            if at % FANOUT == 0 {
                fs::create_dir_all(path.parent().unwrap_or(&tree))?;
            }
            fs::write(&path, &content)?;
            list.push((format!("{}/tree/{name}", PLACES[1]), content));
        }
        Ok(Self { small, tree, list })
    }
}

async fn measure(args: Args) -> Result<()> {
    args.install.run()?;
    let common = &args.common;
    let bed = Bed::new(common)?;
    let mut facts = Facts::gather(&bed, &common.config)?;
    let (mut missing, mut name) = (Vec::new(), "files".to_owned());
    let mut libvirt = None;
    if args.peers {
        name += " peers";
        libvirt = peers::Libvirt::find(&bed, &common.config, &mut missing).await?;
        if let Some(libvirt) = &libvirt {
            let version = libvirt.version();
            facts.versions.insert(peers::LIBVIRT.into(), version);
        }
    }
    let guest = match &libvirt {
        Some(libvirt) => Some(libvirt.start().await?),
        None => None,
    };
    if let Some(guest) = &guest {
        guest.make(PEER_LARGE, LARGE).await?;
    }
    let material = Material::make(bed.temp(), args.files)?;
    let mut machine = ours::start(&bed, &common.config).await?;
    let echo = Mutex::new(Echo::start(&mut machine).await?);
    let (channel, pid) = (machine.channel(), machine.process().pid());
    for place in PLACES {
        // Not of zeroes, which somebody might not carry.
        let make = format!("mkdir -p {place} && head -c {LARGE} /dev/urandom > {place}/large");
        ours::run(channel, &["sh", "-c", &make], Vec::new()).await?;
    }
    let (echo, material, temp) = (&echo, &material, bed.temp());
    let mut subjects = vec![
        Subject::new(OURS, || ours_once(channel, pid, material, temp)),
        Subject::new(FLOOR, move || async move {
            let sample = bare_once(&mut *echo.lock().await, pid, material, temp).await?;
            ours::run(channel, &["rm", "-r", "/root/bare/tree"], Vec::new()).await?;
            Ok(sample)
        }),
    ];
    if let Some(guest) = &guest {
        subjects.push(Subject::new(peers::LIBVIRT, move || async move {
            let content = fs::read(&material.small)?;
            let begin = Instant::now();
            guest.put("/tmp/small", &content).await?;
            let small = begin.elapsed();
            let begin = Instant::now();
            let size = guest.get(PEER_LARGE, LARGE).await?;
            ensure!(size == LARGE, "{size} bytes came");
            Ok(Sample::from(vec![
                (SMALL_IN, ms(small)),
                (LARGE_OUT, ms(begin.elapsed())),
            ]))
        }));
    }
    let all = interleaved(&name, common.n, subjects).await?;
    if let Some(guest) = guest {
        guest.destroy().await?;
    }
    ours::stop(machine).await?;
    let report = Report::new(&name, facts, Unit::Ms, &all, missing);
    report.give(common.json, common.save.as_deref())
}

fn put(path: &str) -> Request {
    Request::Put {
        path: path.into(),
        user: Some("root".into()),
        track: false,
    }
}

async fn ours_once(
    channel: &Channel,
    pid: i32,
    material: &Material,
    temp: &Path,
) -> Result<Sample> {
    let mut sample = Sample::default();
    let place = PLACES[0];
    let begin = Instant::now();
    let small = material.small.clone();
    let pack =
        move |writer| archive::pack_file(&small, "small".as_ref(), writer, &PackLimits::default());
    let sent = send(channel, &put(place), "take a file", pack).await;
    sent.map_err(explain)?;
    sample.set(SMALL_IN, ms(begin.elapsed()));

    let cpu = ours::cpu_of(pid)?;
    let begin = Instant::now();
    let into = tempfile::tempdir_in(temp)?;
    fetch(channel, &format!("{place}/large"), into.path()).await?;
    sample.set(LARGE_OUT, ms(begin.elapsed()));
    let used = ours::cpu_of(pid)?.saturating_sub(cpu);
    sample.set(LARGE_OUT_CPU, ms(used));
    let size = fs::metadata(into.path().join("large"))?.len();
    ensure!(size == LARGE as u64, "{size} of {LARGE} bytes came");

    let tree = format!("{place}/tree");
    let begin = Instant::now();
    let dir = HostDir::open(&material.tree)?;
    let pack = move |writer| archive::pack(&dir, writer, &PackLimits::default());
    let sent = send(channel, &put(&tree), "take files", pack).await;
    sent.map_err(explain)?;
    sample.set(MANY_IN, ms(begin.elapsed()));

    let begin = Instant::now();
    let into = tempfile::tempdir_in(temp)?;
    let count = fetch(channel, &tree, into.path()).await?;
    sample.set(MANY_OUT, ms(begin.elapsed()));
    let least = material.list.len();
    ensure!(count >= least, "{count} of {least} files came");
    ours::run(channel, &["rm", "-r", &tree], Vec::new()).await?;
    Ok(sample)
}

/// Brings something of the guest into an empty directory; gives how many
/// entries came.
async fn fetch(channel: &Channel, path: &str, into: &Path) -> Result<usize> {
    let get = Request::Get { path: path.into() };
    let into = into.to_owned();
    let unpack = move |archive, side| {
        // Nothing belongs there.
        drop::<std::os::unix::net::UnixStream>(side);
        let unpacked = archive::unpack(archive, &into, &archive::Options::default())?;
        Ok(unpacked.entries.len())
    };
    let got = receive(channel, &get, "send files", unpack).await;
    got.map_err(explain)
}

async fn bare_once(echo: &mut Echo, pid: i32, material: &Material, temp: &Path) -> Result<Sample> {
    let mut sample = Sample::default();
    let begin = Instant::now();
    let small = fs::read(&material.small)?;
    let name = format!("{}/small", PLACES[1]);
    echo.put(&[(name, small)]).await?;
    sample.set(SMALL_IN, ms(begin.elapsed()));

    let cpu = ours::cpu_of(pid)?;
    let begin = Instant::now();
    let into = tempfile::tempdir_in(temp)?;
    let content = echo.get(&format!("{}/large", PLACES[1])).await?;
    fs::write(into.path().join("large"), &content)?;
    sample.set(LARGE_OUT, ms(begin.elapsed()));
    let used = ours::cpu_of(pid)?.saturating_sub(cpu);
    sample.set(LARGE_OUT_CPU, ms(used));
    ensure!(content.len() == LARGE, "{} bytes came", content.len());

    let begin = Instant::now();
    echo.put(&material.list).await?;
    sample.set(MANY_IN, ms(begin.elapsed()));

    let begin = Instant::now();
    let into = tempfile::tempdir_in(temp)?;
    let tree = format!("{}/tree", PLACES[1]);
    let count = echo.tree(&tree, into.path()).await?;
    sample.set(MANY_OUT, ms(begin.elapsed()));
    ensure!(count == material.list.len(), "{count} files came");
    Ok(sample)
}
