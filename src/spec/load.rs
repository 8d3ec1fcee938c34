//! From flags and TOML files to a [`Spec`], resolved once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    Accel, Bridge, Bytes, Catalog, ChannelKind, Command, DomainName, Exception, HostPattern,
    LabelName, Lifetime, LsmLabel, MachineType, NetworkMode, NetworkName, NetworkPolicy, Port,
    Profile, ProfileName, Publish, Script, Spec, SpecError, Survivors, Templates, Timeout, Tuning,
    VmId, Waived, Workspace, WorkspaceMode,
};

/// A run as asked for: what is absent takes the profile's or the built-in
/// default. Flags and files both become this, so they cannot differ.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Request {
    /// Name of the machine.
    pub name: Option<VmId>,
    /// Name or id of the image.
    pub image: Option<String>,
    /// Kernel other than the image's: the name of an installed one such as
    /// `tuned`, or a path.
    pub kernel: Option<String>,
    /// Name of the profile: a set of limits.
    pub profile: Option<ProfileName>,
    /// Virtual CPUs, 1 to 64; the profile's when absent.
    pub cpus: Option<u32>,
    /// Guest memory, 64M to 1T; the profile's when absent.
    pub memory: Option<Bytes>,
    /// Size of the disk that takes what the guest writes; the profile's when
    /// absent.
    pub disk: Option<Bytes>,
    /// How long the command may run; the profile's when absent.
    pub timeout: Option<Timeout>,
    /// How long after its start a detached machine is stopped; never when
    /// absent.
    pub ttl: Option<Timeout>,
    /// After how long without anything happening a detached machine is stopped;
    /// never when absent.
    pub idle_timeout: Option<Timeout>,
    /// What happens to a detached machine whose supervisor dies.
    pub survivors: Option<Survivors>,
    /// How long the guest may take to power off before it is killed.
    pub stop_grace: Option<Timeout>,
    /// Give the machine a balloon: its memory can be taken back while it runs.
    /// By default a detached machine has one, and a run of one command has none.
    pub balloon: Option<bool>,
    /// Let the guest run virtual machines of its own: more of the host's kernel
    /// to attack. Not among the keys of configuration files: who wants it says
    /// so for each machine.
    pub nested: Option<bool>,
    /// Boot, also where there is a template to clone. A machine that is asked
    /// to have a balloon always boots: clones have none.
    pub cold: Option<bool>,
    /// Id of the template to clone: it must match. By default any that does.
    pub template: Option<String>,
    /// Trust domain of the machine: only templates of the same one are cloned.
    pub domain: Option<DomainName>,
    /// Names and values to find the machine by.
    pub labels: BTreeMap<LabelName, String>,
    /// Name of the network: a mode, or one of `[network.NAME]`.
    pub network: Option<NetworkName>,
    /// The network where neither `network` nor the profile says one: what
    /// layers below the profile's asked for. Not part of files.
    #[serde(skip)]
    pub network_below: Option<NetworkName>,
    /// In the place of a network, an existing bridge or tap, and the machine's address
    /// and gateway there, such as `br0:192.0.2.50/24@192.0.2.1`. Advanced: what
    /// can be reached there is not filtered.
    pub bridge: Option<Bridge>,
    /// Hosts that may be reached besides those of the network, such as
    /// `example.org`, `*.example.org` or `example.org:8443`.
    pub allow_hosts: BTreeSet<HostPattern>,
    /// Hosts that may not, whatever else allows them.
    pub deny_hosts: BTreeSet<HostPattern>,
    /// Read the name in every connection to ports 80 and 443, and hold it to
    /// the hosts that may be reached; as the network says when absent.
    pub strict: Option<bool>,
    /// Ports that may be reached besides those of the network, such as `8443`
    /// or `8000-8100`.
    pub allow_ports: BTreeSet<Port>,
    /// Exceptions from what no machine may reach, besides those of the network,
    /// such as `10.1.2.3/32:5432`.
    pub allow_cidrs: BTreeSet<Exception>,
    /// With IPv6, filtered as IPv4 is; as the network says when absent.
    pub ipv6: Option<bool>,
    /// Ports of the host that lead to services in the guest, over the guest
    /// channel, such as `127.0.0.1:8080:80`: the firewall stays closed.
    pub publish: Vec<Publish>,
    /// Propose a policy from what a run tried.
    pub learn: Option<bool>,
    /// What executes the guest's instructions: `kvm`, or `tcg`, software
    /// emulation, slow and no isolation by hardware.
    pub accel: Option<Accel>,
    /// QEMU machine type.
    pub machine: Option<MachineType>,
    /// How host and guest agent reach each other.
    pub channel: Option<ChannelKind>,
    /// Layers of the jail to do without, with commas between: `user`, `files`,
    /// `namespaces`, `seccomp`, `landlock`, `cgroup`, `lsm`.
    pub waive: Option<Waived>,
    /// AppArmor profile or SELinux context that QEMU is started in; the profile
    /// Bulkhead brings where absent and loaded.
    pub lsm_label: Option<LsmLabel>,
    /// Host directory to exchange.
    pub workspace: Option<PathBuf>,
    /// How it is exchanged.
    pub workspace_mode: Option<WorkspaceMode>,
    /// The shared workspace cannot be written.
    pub read_only: Option<bool>,
    /// Where artifacts go.
    pub artifacts: Option<PathBuf>,
    /// Bring changes back.
    pub apply: Option<bool>,
    /// Overwrite what changed on the host.
    pub force: Option<bool>,
    /// Show changes.
    pub diff: Option<bool>,
    /// Variables in the command's environment.
    pub env: BTreeMap<String, String>,
    /// Working directory in the guest; `/workspace/work` when absent.
    pub workdir: Option<String>,
    /// User in the guest, by name or number; the image's unprivileged user when
    /// absent.
    pub user: Option<String>,
    /// On a terminal.
    pub terminal: Option<bool>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// A script instead of a program. Not part of files.
    #[serde(skip)]
    pub script: Option<Script>,
}

impl Request {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// Unreadable, not TOML, an unknown key or a malformed value, with the line.
    pub fn load(path: &Path) -> Result<Self, SpecError> {
        let text = std::fs::read_to_string(path).map_err(|source| SpecError::Read {
            path: path.to_owned(),
            source,
        })?;
        super::layer::from_toml(path, &text)
    }

    /// This request with everything absent taken from `below`. Who names a
    /// profile means all of its limits: those below do not count then, and a
    /// network below counts only where the profile has none.
    pub fn over(self, below: Self) -> Self {
        let below = match &self.profile {
            None => below,
            Some(_) => Self {
                cpus: None,
                memory: None,
                disk: None,
                timeout: None,
                network: None,
                network_below: below.network.or(below.network_below),
                ..below
            },
        };
        let mut env = below.env;
        env.extend(self.env);
        let mut labels = below.labels;
        labels.extend(self.labels);
        let mut allow_hosts = below.allow_hosts;
        allow_hosts.extend(self.allow_hosts);
        let mut deny_hosts = below.deny_hosts;
        deny_hosts.extend(self.deny_hosts);
        let mut publish = below.publish;
        publish.extend(self.publish);
        let mut allow_ports = below.allow_ports;
        allow_ports.extend(self.allow_ports);
        let mut allow_cidrs = below.allow_cidrs;
        allow_cidrs.extend(self.allow_cidrs);
        Self {
            name: self.name.or(below.name),
            image: self.image.or(below.image),
            kernel: self.kernel.or(below.kernel),
            profile: self.profile.or(below.profile),
            cpus: self.cpus.or(below.cpus),
            memory: self.memory.or(below.memory),
            disk: self.disk.or(below.disk),
            timeout: self.timeout.or(below.timeout),
            ttl: self.ttl.or(below.ttl),
            idle_timeout: self.idle_timeout.or(below.idle_timeout),
            survivors: self.survivors.or(below.survivors),
            stop_grace: self.stop_grace.or(below.stop_grace),
            balloon: self.balloon.or(below.balloon),
            nested: self.nested.or(below.nested),
            cold: self.cold.or(below.cold),
            template: self.template.or(below.template),
            domain: self.domain.or(below.domain),
            labels,
            network: self.network.or(below.network),
            network_below: self.network_below.or(below.network_below),
            bridge: self.bridge.or(below.bridge),
            allow_hosts,
            deny_hosts,
            strict: self.strict.or(below.strict),
            allow_ports,
            allow_cidrs,
            ipv6: self.ipv6.or(below.ipv6),
            publish,
            learn: self.learn.or(below.learn),
            accel: self.accel.or(below.accel),
            machine: self.machine.or(below.machine),
            channel: self.channel.or(below.channel),
            waive: self.waive.or(below.waive),
            lsm_label: self.lsm_label.or(below.lsm_label),
            workspace: self.workspace.or(below.workspace),
            workspace_mode: self.workspace_mode.or(below.workspace_mode),
            read_only: self.read_only.or(below.read_only),
            artifacts: self.artifacts.or(below.artifacts),
            apply: self.apply.or(below.apply),
            force: self.force.or(below.force),
            diff: self.diff.or(below.diff),
            env,
            workdir: self.workdir.or(below.workdir),
            user: self.user.or(below.user),
            terminal: self.terminal.or(below.terminal),
            command: if self.command.is_empty() {
                below.command
            } else {
                self.command
            },
            script: self.script.or(below.script),
        }
    }

    /// Fills in the defaults and checks the whole, for a run of one command.
    ///
    /// # Errors
    /// Values out of range, names that `catalog` does not have, wishes that
    /// exclude each other, no command.
    pub fn resolve(self, catalog: &Catalog) -> Result<Spec, SpecError> {
        if self.command.is_empty() && self.script.is_none() {
            return Err(SpecError::NoCommand);
        }
        self.check(catalog, false)
    }

    /// What a network becomes with this request.
    fn policy(&self, network: &NetworkPolicy) -> Result<NetworkPolicy, SpecError> {
        let hosts = self.allow_hosts.iter().chain(&self.deny_hosts);
        let asked = hosts.count() > 0
            || !self.allow_ports.is_empty()
            || !self.allow_cidrs.is_empty()
            || self.ipv6 == Some(true)
            || self.strict == Some(true);
        let bridged = self.bridge.clone().map(NetworkPolicy::of_bridge);
        let network = bridged.as_ref().unwrap_or(network);
        if asked && network.mode != NetworkMode::NatFiltered {
            return Err(SpecError::Clash {
                first: "--allow-host, --deny-host, --strict, --allow-port, --allow-cidr or --ipv6",
                second: "a network mode other than nat-filtered",
            });
        }
        let mut policy = network.clone();
        policy.allow_hosts.extend(self.allow_hosts.iter().cloned());
        policy.deny_hosts.extend(self.deny_hosts.iter().cloned());
        policy.strict = self.strict.unwrap_or(policy.strict);
        if !self.allow_ports.is_empty() {
            let ports = policy.ports().union(&self.allow_ports).copied().collect();
            policy.ports = Some(ports);
        }
        policy.exceptions.extend(&self.allow_cidrs);
        policy.ipv6 = self.ipv6.unwrap_or(policy.ipv6);
        policy.check()?;
        Ok(policy)
    }

    /// Name of the network it gets with this profile.
    pub(super) fn network_with(&self, profile: &Profile) -> NetworkName {
        let named = self.network.as_ref();
        named
            .or(profile.network.as_ref())
            .or(self.network_below.as_ref())
            .cloned()
            .unwrap_or_default()
    }

    /// Fills in the defaults and checks the whole, for a detached machine: it
    /// needs no command.
    ///
    /// # Errors
    /// As [`Request::resolve`], but for the command; and what only a run does
    /// when it is over.
    pub fn resolve_machine(self, catalog: &Catalog) -> Result<Spec, SpecError> {
        if self.apply == Some(true) || self.diff == Some(true) || self.artifacts.is_some() {
            return Err(SpecError::Clash {
                first: "--apply, --diff or --artifacts",
                second: "a detached machine, whose files `bulkhead cp` brings back",
            });
        }
        self.check(catalog, true)
    }

    fn check(self, catalog: &Catalog, detached: bool) -> Result<Spec, SpecError> {
        let name = self.profile.clone().unwrap_or_default();
        let profile = catalog.profile(&name)?;
        let network = self.policy(catalog.network(&self.network_with(profile))?)?;
        let mut limits = profile.limits;
        limits.vcpus = self.cpus.unwrap_or(limits.vcpus);
        limits.memory = self.memory.unwrap_or(limits.memory);
        limits.disk = self.disk.unwrap_or(limits.disk);
        limits.timeout = self.timeout.unwrap_or(limits.timeout);
        limits.check()?;
        let value = |what, value: String, why| Err(SpecError::Value { what, value, why });
        if let Some(name) = self
            .env
            .keys()
            .find(|name| name.is_empty() || name.contains(['=', '\0']))
        {
            return value(
                "--env",
                format!("{name:?}"),
                "a name has no `=` and is not empty",
            );
        }
        for (what, text) in [("--user", &self.user), ("--workdir", &self.workdir)] {
            if text
                .as_ref()
                .is_some_and(|text| text.is_empty() || text.contains('\0'))
            {
                return value(what, "empty".into(), "leave it out for the default");
            }
        }
        if self
            .workdir
            .as_ref()
            .is_some_and(|dir| !dir.starts_with('/'))
        {
            let dir = self.workdir.unwrap_or_default();
            return value("--workdir", dir, "it must begin with `/`");
        }
        if let Some(name) = self
            .env
            .iter()
            .find_map(|(name, text)| text.contains('\0').then_some(name))
        {
            let why = "no system takes a zero byte";
            return value("--env", format!("the value of {name}"), why);
        }
        if self.command.iter().any(|word| word.contains('\0')) {
            return value(
                "the command",
                "a text with a zero byte".into(),
                "no system takes it",
            );
        }
        if let Some(any) = self.publish.iter().find(|one| one.listen.port() == 0) {
            let why = "nobody would know which port it is: name one, or use `bulkhead forward`";
            return value("--publish", any.to_string(), why);
        }
        let workspace = workspace(&self)?;
        let templates = templates(&self)?;
        let lifetime = Lifetime {
            ttl: self.ttl,
            idle: self.idle_timeout,
            survivors: self.survivors.unwrap_or_default(),
            stop_grace: self.stop_grace.unwrap_or(Lifetime::default().stop_grace),
        };
        Ok(Spec {
            id: self.name.unwrap_or_else(VmId::random),
            image: self.image.unwrap_or_else(|| "default".into()),
            kernel: self.kernel,
            profile: name,
            limits,
            network,
            accel: self.accel.unwrap_or_default(),
            machine: self.machine.unwrap_or_default(),
            channel: self.channel.unwrap_or_default(),
            workspace,
            detached,
            tuning: Tuning::default(),
            lifetime,
            // A device less to start, for a machine that is gone in a moment.
            balloon: self.balloon.unwrap_or(detached),
            nested: self.nested.unwrap_or_default(),
            templates,
            waive: self.waive.unwrap_or_default(),
            lsm_label: self.lsm_label,
            publish: self.publish,
            learn: self.learn.unwrap_or_default(),
            labels: self.labels,
            command: Command {
                argv: self.command,
                env: self.env.into_iter().collect(),
                workdir: self.workdir,
                user: self.user,
                terminal: self.terminal.unwrap_or_default(),
                script: self.script,
            },
        })
    }
}

fn templates(request: &Request) -> Result<Templates, SpecError> {
    let cold = request.cold.unwrap_or(request.balloon == Some(true));
    if cold && request.template.is_some() {
        return Err(SpecError::Clash {
            first: "--template",
            second: "--cold, or a balloon",
        });
    }
    Ok(Templates {
        cold,
        id: request.template.clone(),
        domain: request.domain.clone().unwrap_or_default(),
    })
}

fn workspace(request: &Request) -> Result<Workspace, SpecError> {
    let mode = match (&request.workspace, request.workspace_mode) {
        (None, Some(WorkspaceMode::Copy | WorkspaceMode::Share)) => {
            return Err(SpecError::Clash {
                first: "--workspace-mode",
                second: "a run without --workspace",
            });
        }
        (None, _) => WorkspaceMode::None,
        (Some(_), mode) => mode.unwrap_or_default(),
    };
    let workspace = Workspace {
        dir: request.workspace.clone(),
        mode,
        read_only: request.read_only.unwrap_or_default(),
        artifacts: request.artifacts.clone(),
        apply: request.apply.unwrap_or_default(),
        force: request.force.unwrap_or_default(),
        diff: request.diff.unwrap_or_default(),
    };
    let clash = |first, second| Err(SpecError::Clash { first, second });
    match mode {
        WorkspaceMode::Copy if workspace.read_only => clash("read-only", "workspace mode `copy`"),
        WorkspaceMode::Share if workspace.apply => clash("--apply", "workspace mode `share`"),
        WorkspaceMode::Share if workspace.diff => clash("--diff", "workspace mode `share`"),
        WorkspaceMode::None if workspace.apply => clash("--apply", "a run without a workspace"),
        WorkspaceMode::None if workspace.diff => clash("--diff", "a run without a workspace"),
        _ if workspace.force && !workspace.apply => clash("--force", "a run without --apply"),
        _ => Ok(workspace),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Request, SpecError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Request::load(file.path())
    }

    #[test]
    fn an_unknown_key_names_file_line_and_key() {
        let error = parse("image = \"base\"\nmemroy = \"1G\"\n").unwrap_err();
        let report = crate::error::Report::of(&error);
        assert_eq!(report.code, "config-invalid");
        assert!(
            report.cause.contains("line 2") && report.cause.contains("memroy"),
            "{report:?}"
        );
    }

    #[test]
    fn flags_win_over_files_and_files_over_the_profile() {
        let file =
            parse("profile = \"light\"\nmemory = \"2G\"\ncpus = 3\ncommand = [\"a\"]\n").unwrap();
        let flags = Request {
            cpus: Some(4),
            command: vec!["b".into()],
            ..Request::default()
        };
        let spec = flags.over(file).resolve(&Catalog::default()).unwrap();
        assert_eq!(spec.limits.vcpus, 4);
        assert_eq!(spec.limits.memory, Bytes::gib(2));
        assert_eq!(spec.limits.timeout, Timeout::secs(60));
        assert_eq!(spec.command.argv, ["b"]);
    }

    #[test]
    fn a_profile_named_above_sets_all_limits() {
        let file =
            "cpus = 3\nmemory = \"1G\"\ndisk = \"1G\"\ntimeout = \"1s\"\nprofile = \"light\"\n";
        let ask = |cpus| {
            let flags = Request {
                profile: Some("intensive".parse().unwrap()),
                cpus,
                ..Request::default()
            };
            let request = flags.over(parse(file).unwrap());
            request.resolve_machine(&Catalog::default()).unwrap().limits
        };
        let catalog = Catalog::default();
        let intensive = catalog.profile(&"intensive".parse().unwrap()).unwrap();
        assert_eq!(ask(None), intensive.limits);
        assert_eq!(ask(Some(8)).vcpus, 8);
    }

    /// Nobody loses a network they were denied by naming a profile for its
    /// limits; a profile's own network wins over the layers below it.
    #[test]
    fn a_profile_keeps_the_network_below_unless_it_has_one() {
        let network = |name: &str| Some(name.parse().unwrap());
        let below = Request {
            network: network("offline"),
            ..Request::default()
        };
        let ask = |profile: &str, own| {
            let flags = Request {
                profile: Some(profile.parse().unwrap()),
                network: own,
                ..Request::default()
            };
            let request = flags.over(below.clone());
            let catalog = Catalog::default();
            let profile = catalog.profile(request.profile.as_ref().unwrap()).unwrap();
            request.network_with(profile).to_string()
        };
        assert_eq!(ask("light", None), "offline");
        assert_eq!(ask("isolated", None), "isolated");
        assert_eq!(ask("light", network("lan")), "lan");
    }

    #[test]
    fn only_a_detached_machine_has_a_balloon_unasked() {
        let ask = |text: &str| parse(&format!("command = [\"true\"]\n{text}")).unwrap();
        assert!(!ask("").resolve(&Catalog::default()).unwrap().balloon);
        assert!(
            ask("")
                .resolve_machine(&Catalog::default())
                .unwrap()
                .balloon
        );
        assert!(
            ask("balloon = true")
                .resolve(&Catalog::default())
                .unwrap()
                .balloon
        );
        assert!(
            !ask("balloon = false")
                .resolve_machine(&Catalog::default())
                .unwrap()
                .balloon
        );
    }

    #[test]
    fn impossible_wishes_are_refused() {
        let ask = |text: &str| {
            parse(&format!("command = [\"true\"]\n{text}"))
                .unwrap()
                .resolve(&Catalog::default())
        };
        assert!(ask("").is_ok());
        for bad in [
            "cpus = 0",
            "profile = \"huge\"",
            "network = \"lan\"",
            "workdir = \"src\"",
            "user = \"\"",
            "workspace_mode = \"share\"",
            "[env]\nA = \"\\u0000\"",
            "memory = \"1M\"",
            "apply = true",
            "workspace = \"/x\"\nworkspace_mode = \"share\"\napply = true",
            "workspace = \"/x\"\nforce = true",
            "[env]\n\"A=B\" = \"1\"",
        ] {
            assert!(ask(bad).is_err(), "{bad}");
        }
        assert!(matches!(
            Request::default().resolve(&Catalog::default()),
            Err(SpecError::NoCommand)
        ));
    }
}
