//! A machine's life in phases: ours, that of a QEMU started by hand with the
//! same kernel, disks and devices, and that of others who start QEMU.

use anyhow::Result;

use super::config::{Bed, Common, Config};
use super::facts::Facts;
use super::report::{FLOOR, OURS, Report, Unit};
use super::rounds::{Subject, interleaved};
use super::template::Made;
use super::{floor, ours, peers};

/// The four that a user chooses from, and what tells them apart.
const PROFILES: [(&str, &str); 4] = [
    ("tuned microvm", "kernel=tuned,machine=microvm"),
    ("tuned q35", "kernel=tuned,machine=q35"),
    ("stock microvm", "kernel=,machine=microvm"),
    ("stock q35", "kernel=,machine=q35"),
];

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Compare two configurations instead, such as `kernel=tuned` and
    /// `kernel=tuned,machine=q35`. Keys: image, kernel, machine, accel, cpus,
    /// memory, qemu, cold, warm, clone; jail, nojail and waive=LAYER+LAYER (what the
    /// jail costs: `--ab jail nojail`); bare (without Bulkhead), and with it append,
    /// without (words of the kernel's command line) option (of -machine)
    /// and cpu (of -cpu).
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["profiles", "peers"])]
    ab: Option<Vec<String>>,
    /// Compare tuned and stock kernel on microvm and q35.
    #[arg(long, conflicts_with = "peers")]
    profiles: bool,
    /// Compare with a clone of a template of the same machine, too.
    #[arg(long, conflicts_with_all = ["profiles", "peers", "ab"])]
    clone: bool,
    /// Compare with libvirt, vmtest and virtme-ng, too.
    #[arg(long)]
    peers: bool,
    #[command(flatten)]
    install: peers::Install,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(args))
}

async fn measure(args: Args) -> Result<()> {
    args.install.run()?;
    let common = &args.common;
    let bed = Bed::new(common)?;
    let mut facts = Facts::gather(&bed, &common.config)?;
    let life = |config: Config| {
        let bed = &bed;
        move || {
            let config = config.clone();
            async move {
                match config.bare {
                    true => floor::life(bed, &config).await,
                    false => ours::life(bed, &config).await,
                }
            }
        }
    };
    let mut missing = Vec::new();
    let mut kept = peers::Peers::default();
    let chosen: Vec<(String, Config)> = match &args.ab {
        Some(pair) => {
            let parse = |words: &String| Ok((words.clone(), common.config.with(words)?));
            pair.iter().map(parse).collect::<Result<_>>()?
        }
        None if args.profiles => {
            let profile = |(name, words): (&str, &str)| {
                let config = common.config.with(words)?;
                Ok((name.to_owned(), config))
            };
            PROFILES.into_iter().map(profile).collect::<Result<_>>()?
        }
        None => {
            let mut both = vec![
                (OURS.to_owned(), common.config.clone()),
                (FLOOR.to_owned(), common.config.with("bare")?),
            ];
            if args.clone {
                both.push((format!("{OURS} clone"), common.config.with("clone")?));
            }
            both
        }
    };
    let mut templates = Vec::new();
    for (_, config) in &chosen {
        if config.clone {
            templates.push(Made::new(&bed, config).await?);
        }
    }
    let mut name = "boot".to_owned();
    if args.peers {
        name += " peers";
        kept = peers::Peers::find(&bed, &common.config, &mut missing).await?;
        facts.versions = kept.versions();
    }
    if args.ab.is_some() {
        name += " ab";
    }
    if args.clone {
        name += " clone";
    }
    if args.profiles {
        name += " profiles";
    }
    if common.config.cold {
        name += " cold";
    }
    let mut subjects: Vec<Subject<'_>> = chosen
        .into_iter()
        .map(|(name, config)| Subject::new(name, life(config)))
        .collect();
    subjects.extend(kept.boots());
    let all = interleaved(&name, common.n, subjects).await;
    for template in templates {
        template.remove()?;
    }
    let all = all?;
    let report = Report::new(&name, facts, Unit::Ms, &all, missing);
    report.give(common.json, common.save.as_deref())
}
