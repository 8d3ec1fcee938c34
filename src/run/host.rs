//! A host to run machines on: its directories, its QEMU, and what is known of both.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::clone::Origin;
use super::dirs::Dirs;
use super::machine::Machine;
use super::network::Given;
use super::options::{Memory, StartOptions};
use super::record::Record;
use super::{RunError, prove};
use crate::guest::archive::HostDir;
use crate::host::network::Site;
use crate::host::probe;
use crate::image::{Image, KernelFormat, Store};
use crate::plan::{HostFacts, KernelChoice, Plan, Ram};
use crate::spec::{Accel, ChannelKind, Spec, UidRange};
use crate::template::{self, Key, Template, TemplateError};

/// A host to run machines on. Everything is given; nothing is looked up in the
/// environment but QEMU in `PATH` where none is named.
#[derive(Debug, Clone)]
pub struct Host {
    /// Where things are kept.
    pub dirs: Dirs,
    /// The QEMU binary; the first in `PATH` when absent.
    pub qemu: Option<PathBuf>,
    /// User ids that are nobody else's: machines take one each.
    pub uids: UidRange,
    /// How long a guest may take until its agent answers.
    pub boot_timeout: Duration,
    /// How long a small guest may take in the proof that KVM works.
    pub proof_timeout: Duration,
    /// End machines with the thread that starts them.
    pub die_with_thread: bool,
    /// Where machines' networks lead.
    pub site: Site,
}

impl Host {
    /// How long a guest may take unless said otherwise: generous, for
    /// emulation on a busy host.
    pub const BOOT_TIMEOUT: Duration = Duration::from_secs(90);

    /// How long a small guest may take under KVM: real hardware needs less than
    /// two seconds with the slowest kernel here.
    pub const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

    /// A host with these directories and the QEMU of its `PATH`.
    pub fn new(dirs: Dirs) -> Self {
        Self {
            dirs,
            qemu: None,
            uids: UidRange::default(),
            boot_timeout: Self::BOOT_TIMEOUT,
            proof_timeout: Self::PROOF_TIMEOUT,
            die_with_thread: false,
            site: Site::default(),
        }
    }

    /// The image store.
    pub fn images(&self) -> Store {
        Store::new(self.dirs.state.clone())
    }

    /// Plans a machine for `spec`: finds and checks image, kernel and QEMU.
    ///
    /// # Errors
    /// One of them is missing or not usable.
    pub fn plan(&self, spec: &Spec) -> Result<(Image, Plan), RunError> {
        let (image, kernel, facts) = self.parts(spec)?;
        let plan = Plan::new(spec, &image, kernel, &facts)?;
        Ok((image, plan))
    }

    pub(super) fn parts(&self, spec: &Spec) -> Result<(Image, KernelChoice, HostFacts), RunError> {
        let image = self.images().get(&spec.image)?;
        let qemu = probe::find_qemu(self.qemu.as_deref())?;
        let kernel = self.kernel(spec, &image)?;
        let facts = probe::facts(qemu, &self.dirs.cache());
        Ok((image, kernel, facts))
    }

    /// The template store.
    pub fn templates(&self) -> template::Store {
        template::Store::new(&self.dirs.state)
    }

    /// Plans a machine whose memory is in a file, and gives the key of its
    /// template.
    ///
    /// # Errors
    /// As [`Host::plan`]; a file that the key is made of cannot be read.
    pub(super) fn plan_with(&self, spec: &Spec, ram: Ram) -> Result<(Image, Plan, Key), RunError> {
        let (image, kernel, facts) = self.parts(spec)?;
        let plan = Plan::with_ram(spec, &image, kernel, &facts, ram)?;
        let domain = &spec.templates.domain;
        let key = Key::of(&plan, &image, domain, &facts, &self.dirs.cache()).map_err(|source| {
            TemplateError::Io {
                action: "read what the key of a template is made of in",
                path: image.dir.clone(),
                source,
            }
        })?;
        Ok((image, plan, key))
    }

    /// Plans a machine for `spec`: a clone, where a template matches.
    ///
    /// # Errors
    /// As [`Host::plan`]; the template asked for does not match, or the one that
    /// does is damaged.
    pub(super) fn choose(&self, spec: &Spec) -> Result<(Image, Plan, Option<Template>), RunError> {
        let (wish, templates) = (&spec.templates, self.templates());
        let found = match (wish.cold, &wish.id) {
            (true, _) => None,
            (false, None) if templates.is_empty() => None,
            // No template is reached so.
            (false, None) if spec.channel == ChannelKind::Vsock => None,
            (false, id) => {
                let ram = Ram::Cloned {
                    template: String::new(),
                    file: PathBuf::new(),
                    inode: (0, 0),
                };
                let (image, plan, key) = self.plan_with(spec, ram)?;
                let found = match id {
                    Some(id) => Some(matching(templates.get(id)?, &key)?),
                    None => templates.find(&key)?,
                };
                found.map(|template| (image, plan, template))
            }
        };
        let Some((image, mut plan, template)) = found else {
            let (image, plan) = self.plan(spec)?;
            return Ok((image, plan, None));
        };
        plan.ram = Ram::Cloned {
            file: templates.ram(&template.id),
            inode: template.inode,
            template: template.id.clone(),
        };
        Ok((image, plan, Some(template)))
    }

    fn kernel(&self, spec: &Spec, image: &Image) -> Result<KernelChoice, RunError> {
        let Some(asked) = &spec.kernel else {
            return Ok(KernelChoice::own(image));
        };
        let path = if asked.contains('/') {
            PathBuf::from(asked)
        } else {
            self.dirs.kernels().join(asked).join("vmlinux")
        };
        let format = kernel_format(&path).map_err(|source| RunError::Kernel {
            name: asked.clone(),
            path: path.clone(),
            source,
        })?;
        Ok(KernelChoice { path, format })
    }

    /// Starts a machine for `spec`. KVM is proved first where it is asked for.
    ///
    /// # Errors
    /// See [`RunError`]; nothing is left behind.
    pub async fn start(&self, spec: &Spec) -> Result<(Image, Machine), RunError> {
        self.start_with(spec, None).await
    }

    /// As [`Host::start`], with what the caller has for its network.
    ///
    /// # Errors
    /// As [`Host::start`]; what is given does not go with the spec's network.
    pub async fn start_on(&self, spec: &Spec, given: Given) -> Result<(Image, Machine), RunError> {
        self.start_chosen(spec, None, given, self.choose(spec)?)
            .await
    }

    /// Starts a machine; `share` is the shared workspace, opened before.
    pub(super) async fn start_with(
        &self,
        spec: &Spec,
        share: Option<&HostDir>,
    ) -> Result<(Image, Machine), RunError> {
        let given = Given::default();
        self.start_chosen(spec, share, given, self.choose(spec)?)
            .await
    }

    /// Starts what [`Host::choose`] chose.
    pub(super) async fn start_chosen(
        &self,
        spec: &Spec,
        share: Option<&HostDir>,
        given: Given,
        (image, plan, template): (Image, Plan, Option<Template>),
    ) -> Result<(Image, Machine), RunError> {
        self.prove(spec, &image, &plan).await?;
        let lock = image.lock()?;
        let memory = match template {
            Some(template) => Memory::Cloned(Arc::new(Origin::template(
                template,
                super::runner::identity(spec),
            ))),
            None => Memory::Empty,
        };
        let record = Record::create(&self.dirs, spec, &plan)?;
        let options = StartOptions {
            share: share.cloned(),
            given,
            memory,
            ..self.options(&plan, &record)
        };
        let mut machine = Machine::start(plan, record, &options).await?;
        machine.hold(lock);
        Ok((image, machine))
    }

    /// Proves that the accelerator asked for works.
    ///
    /// # Errors
    /// It does not.
    pub(crate) async fn prove(
        &self,
        spec: &Spec,
        image: &Image,
        plan: &Plan,
    ) -> Result<(), RunError> {
        if spec.accel == Accel::Kvm {
            let (kernel, earlier) = (plan.kernel.clone(), prove::Earlier::Any);
            let verdict =
                prove::kvm(self, &plan.qemu, image, kernel, spec.waive.clone(), earlier).await?;
            if !verdict.usable {
                return Err(RunError::NoKvm {
                    reason: verdict.reason,
                });
            }
        }
        Ok(())
    }

    /// Starts a planned machine, whatever is known of the accelerator.
    pub(super) async fn start_unproved(
        &self,
        spec: &Spec,
        plan: Plan,
        boot_timeout: Duration,
    ) -> Result<Machine, RunError> {
        let record = Record::create(&self.dirs, spec, &plan)?;
        let options = StartOptions {
            boot_timeout,
            ..self.options(&plan, &record)
        };
        Ok(Machine::start(plan, record, &options).await?)
    }

    /// What a machine of this host is started with.
    pub(crate) fn options(&self, plan: &Plan, record: &Record) -> StartOptions {
        StartOptions {
            cache: self.dirs.cache(),
            boot_timeout: self.boot_timeout,
            die_with_thread: self.die_with_thread && !plan.adoptable,
            share: None,
            uid_dir: self.dirs.uids(),
            uids: self.uids,
            disk: plan.keep_disk.then(|| record.dir().join("disk.img")),
            netns: self.dirs.netns(&plan.id),
            site: self.site.clone(),
            given: Given::default(),
            violations: self.dirs.violations(),
            exceptions: self.dirs.exceptions(),
            memory: Memory::Empty,
            paused: false,
            sockets: plan.adoptable.then(|| self.dirs.machine_sockets(&plan.id)),
        }
    }
}

/// `template`, if it is one for machines of this key.
fn matching(template: Template, key: &Key) -> Result<Template, TemplateError> {
    let differences = key.differences(&template.manifest.key);
    match differences.is_empty() {
        true => Ok(template),
        false => Err(TemplateError::Mismatch {
            id: template.id,
            differences,
        }),
    }
}

/// Tells an uncompressed kernel from a compressed one by its first bytes.
fn kernel_format(path: &Path) -> std::io::Result<KernelFormat> {
    use std::io::Read;
    let mut start = [0; 0x206];
    std::fs::File::open(path)?.read_exact(&mut start)?;
    if start.starts_with(b"\x7fELF") {
        return Ok(KernelFormat::Vmlinux);
    }
    // The boot protocol's magic (Documentation/arch/x86/boot.rst).
    if &start[0x202..0x206] == b"HdrS" {
        return Ok(KernelFormat::Bzimage);
    }
    Err(std::io::Error::new(
        std::io::ErrorKind::InvalidData,
        "it is not an x86 Linux kernel",
    ))
}
