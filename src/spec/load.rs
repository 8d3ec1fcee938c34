//! From flags and TOML files to a [`Spec`], resolved once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    Accel, Bytes, ChannelKind, Command, LabelName, Lifetime, MachineType, NetworkMode, Profile,
    Script, Spec, Survivors, Timeout, VmId, Workspace, WorkspaceMode,
};
use crate::error::Explain;

/// Asked for something that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be; the source names line and key.
    #[error("cannot use {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("{what} cannot be {value}: {why}")]
    Value {
        /// Which value.
        what: &'static str,
        /// What was asked for.
        value: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A script that cannot be run.
    #[error("cannot run the script {name}: {why}")]
    Script {
        /// Its name.
        name: String,
        /// Why.
        why: String,
    },
    /// Two wishes that exclude each other.
    #[error("{first} does not go with {second}")]
    Clash {
        /// One.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// Nothing to run.
    #[error("no command was given")]
    NoCommand,
}

impl Explain for SpecError {
    fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "config-unreadable",
            Self::Parse { .. } => "config-invalid",
            Self::Value { .. } => "value-invalid",
            Self::Script { .. } => "script-invalid",
            Self::Clash { .. } => "flags-clash",
            Self::NoCommand => "no-command",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Read { path, .. } => {
                format!("Check that {} exists and can be read.", path.display())
            }
            Self::Parse { path, .. } => format!("Correct {} at the line shown.", path.display()),
            Self::Value { what, .. } => format!("Give another value for {what}."),
            Self::Script { .. } => {
                "Start it with a `#!` line, or name it .py, .js, .sh, .bash or .pl.".into()
            }
            Self::Clash { first, second } => format!("Leave out {first} or {second}."),
            Self::NoCommand => "Put it after `--`: bulkhead run -- python3 -V".into(),
        }
    }
}

/// A run as asked for: what is absent takes the profile's or the built-in
/// default. Flags and files both become this, so they cannot differ.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Request {
    /// Name of the machine.
    pub name: Option<VmId>,
    /// Name or id of the image.
    pub image: Option<String>,
    /// Another kernel.
    pub kernel: Option<String>,
    /// The profile.
    pub profile: Option<Profile>,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Guest memory.
    pub memory: Option<Bytes>,
    /// Disk.
    pub disk: Option<Bytes>,
    /// How long the command may run.
    pub timeout: Option<Timeout>,
    /// How long after its start a detached machine is stopped.
    pub ttl: Option<Timeout>,
    /// How long nothing may happen in a detached machine.
    pub idle_timeout: Option<Timeout>,
    /// What happens to a detached machine whose supervisor dies.
    pub survivors: Option<Survivors>,
    /// How long the guest may take to power off.
    pub stop_grace: Option<Timeout>,
    /// Give the machine a balloon: its memory can be taken back while it runs.
    /// By default a detached machine has one, and a run of one command has none.
    pub balloon: Option<bool>,
    /// Names and values to find the machine by.
    pub labels: BTreeMap<LabelName, String>,
    /// Network mode.
    pub network: Option<NetworkMode>,
    /// Accelerator.
    pub accel: Option<Accel>,
    /// Machine type.
    pub machine: Option<MachineType>,
    /// Guest channel.
    pub channel: Option<ChannelKind>,
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
    /// Added environment.
    pub env: BTreeMap<String, String>,
    /// Working directory in the guest.
    pub workdir: Option<String>,
    /// User in the guest.
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
        toml::from_str(&text).map_err(|source| SpecError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// This request with everything absent taken from `below`.
    pub fn over(self, below: Self) -> Self {
        let mut env = below.env;
        env.extend(self.env);
        let mut labels = below.labels;
        labels.extend(self.labels);
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
            labels,
            network: self.network.or(below.network),
            accel: self.accel.or(below.accel),
            machine: self.machine.or(below.machine),
            channel: self.channel.or(below.channel),
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
    /// Values out of range, wishes that exclude each other, no command.
    pub fn resolve(mut self) -> Result<Spec, SpecError> {
        if self.command.is_empty() && self.script.is_none() {
            return Err(SpecError::NoCommand);
        }
        // A device less to start, for a machine that is gone in a moment.
        self.balloon.get_or_insert(false);
        self.resolve_machine()
    }

    /// Fills in the defaults and checks the whole, for a detached machine: it
    /// needs no command.
    ///
    /// # Errors
    /// Values out of range and wishes that exclude each other.
    pub fn resolve_machine(self) -> Result<Spec, SpecError> {
        let profile = self.profile.unwrap_or_default();
        let mut limits = profile.limits();
        limits.vcpus = self.cpus.unwrap_or(limits.vcpus);
        limits.memory = self.memory.unwrap_or(limits.memory);
        limits.disk = self.disk.unwrap_or(limits.disk);
        limits.timeout = self.timeout.unwrap_or(limits.timeout);
        let value = |what, value: String, why| Err(SpecError::Value { what, value, why });
        if !(1..=64).contains(&limits.vcpus) {
            return value("--cpus", limits.vcpus.to_string(), "1 to 64 are possible");
        }
        if !(64..=1 << 20).contains(&limits.memory.as_mib()) {
            return value(
                "--memory",
                limits.memory.to_string(),
                "64M to 1T are possible",
            );
        }
        if !(64..=16 << 20).contains(&limits.disk.as_mib()) {
            return value("--disk", limits.disk.to_string(), "64M to 16T are possible");
        }
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
        let workspace = workspace(&self)?;
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
            profile,
            limits,
            network: self.network.unwrap_or_default(),
            accel: self.accel.unwrap_or_default(),
            machine: self.machine.unwrap_or_default(),
            channel: self.channel.unwrap_or_default(),
            workspace,
            lifetime,
            balloon: self.balloon.unwrap_or(true),
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
        let spec = flags.over(file).resolve().unwrap();
        assert_eq!(spec.limits.vcpus, 4);
        assert_eq!(spec.limits.memory, Bytes::gib(2));
        assert_eq!(spec.limits.timeout, Timeout::secs(60));
        assert_eq!(spec.command.argv, ["b"]);
    }

    #[test]
    fn only_a_detached_machine_has_a_balloon_unasked() {
        let ask = |text: &str| parse(&format!("command = [\"true\"]\n{text}")).unwrap();
        assert!(!ask("").resolve().unwrap().balloon);
        assert!(ask("").resolve_machine().unwrap().balloon);
        assert!(ask("balloon = true").resolve().unwrap().balloon);
        assert!(!ask("balloon = false").resolve_machine().unwrap().balloon);
    }

    #[test]
    fn impossible_wishes_are_refused() {
        let ask = |text: &str| {
            parse(&format!("command = [\"true\"]\n{text}"))
                .unwrap()
                .resolve()
        };
        assert!(ask("").is_ok());
        for bad in [
            "cpus = 0",
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
            Request::default().resolve(),
            Err(SpecError::NoCommand)
        ));
    }
}
