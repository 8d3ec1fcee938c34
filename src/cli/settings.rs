//! Where the configuration is on this host, and what it says: resolved once,
//! into plain data.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Global;
use crate::host::network::Site;
use crate::run::{Dirs, Host};
use crate::spec::{
    Cidr, Config, Layer, Merged, Request, Resolvers, Spec, SpecError, Timeout, UidRange, merge,
};
use crate::supervise::Launcher;

/// The system's configuration file.
const SYSTEM: &str = "/etc/bulkhead/config.toml";

/// Instead of a file's name: no file.
const NO_FILE: &str = "none";

/// What files, the environment and the options of every verb say.
#[derive(Debug)]
pub(super) struct Settings {
    /// Where things are kept.
    pub(super) dirs: Dirs,
    /// The QEMU binary, where one is named.
    pub(super) qemu: Option<PathBuf>,
    /// How long a guest may take until its agent answers, where it is said.
    boot_timeout: Option<Timeout>,
    /// User ids for machines.
    pub(super) uids: UidRange,
    /// Addresses for machines, where they are given.
    network_pool: Option<Cidr>,
    /// Who resolves names for machines, where it is said.
    resolvers: Option<Resolvers>,
    /// Lowest first.
    layers: Vec<Layer>,
}

impl Settings {
    /// Reads all of it.
    ///
    /// # Errors
    /// A file or variable that cannot be used, or must not be trusted.
    pub(super) fn load(global: &Global) -> Result<Self, SpecError> {
        let variable = |name: &str| std::env::var_os(name);
        let is_root = nix::unistd::geteuid().is_root();
        let mut layers = Vec::new();
        for (path, needed) in files(global.config.as_deref(), variable) {
            if let Some(text) = read(&path, needed, is_root)? {
                layers.push(Layer::file(&path, &text)?);
            }
        }
        layers.push(Layer::environment(variable)?);
        layers.push(Layer::flags(Config {
            state_dir: global.state_dir.clone(),
            runtime_dir: global.runtime_dir.clone(),
            qemu: global.qemu.clone(),
            boot_timeout: global.boot_timeout,
            uids: global.uids,
            network_pool: global.network_pool,
            resolvers: global.resolvers.clone(),
            ..Config::default()
        }));
        let config = merge(&layers)?.config;
        // A machine's supervisor may stand elsewhere.
        let absolute = |dir: PathBuf| std::path::absolute(&dir).unwrap_or(dir);
        let dirs = Dirs::usual(
            is_root,
            config.state_dir.map(absolute),
            config.runtime_dir.map(absolute),
            variable,
        );
        Ok(Self {
            dirs: dirs.ok_or(SpecError::NoPlace)?,
            qemu: config.qemu,
            boot_timeout: config.boot_timeout,
            uids: config.uids.unwrap_or_default(),
            network_pool: config.network_pool,
            resolvers: config.resolvers,
            layers,
        })
    }

    /// The host these settings describe.
    pub(super) fn host(&self) -> Host {
        // The one thread of this program lives as long as its machines.
        let mut host = Host {
            qemu: self.qemu.clone(),
            uids: self.uids,
            die_with_thread: true,
            site: Site {
                pool: self.network_pool,
                resolvers: self
                    .resolvers
                    .clone()
                    .map_or(Vec::new(), |resolvers| resolvers.0),
                ..Site::default()
            },
            ..Host::new(self.dirs.clone())
        };
        if let Some(timeout) = self.boot_timeout {
            (host.boot_timeout, host.proof_timeout) = (timeout.0, timeout.0);
        }
        host
    }

    /// How a supervisor with these settings is started.
    pub(super) fn launcher(&self) -> Launcher {
        let program = std::env::current_exe();
        let mut args: Vec<OsString> = ["--config", NO_FILE, "--state-dir"].map(Into::into).into();
        args.push(self.dirs.state.clone().into());
        args.push("--runtime-dir".into());
        args.push(self.dirs.runtime.clone().into());
        if let Some(qemu) = &self.qemu {
            args.push("--qemu".into());
            // A bare name is looked up; a path is one from here.
            let qemu = match qemu.components().count() {
                1 => qemu.clone(),
                _ => std::path::absolute(qemu).unwrap_or_else(|_| qemu.clone()),
            };
            args.push(qemu.into());
        }
        if let Some(timeout) = self.boot_timeout {
            args.extend(["--boot-timeout".into(), timeout.to_string().into()]);
        }
        args.push("--uids".into());
        args.push(self.uids.to_string().into());
        if let Some(pool) = &self.network_pool {
            args.push("--network-pool".into());
            args.push(pool.to_string().into());
        }
        if let Some(resolvers) = &self.resolvers {
            args.push("--resolvers".into());
            args.push(resolvers.to_string().into());
        }
        args.push("supervise".into());
        Launcher {
            // Replaced by an update, it is still this very program.
            program: program.unwrap_or_else(|_| "/proc/self/exe".into()),
            args,
        }
    }

    /// All layers, with a verb's own on top: the file of `--spec`, and flags.
    ///
    /// # Errors
    /// The file cannot be used.
    pub(super) fn with(&self, flags: Request, spec: Option<&Path>) -> Result<Merged, SpecError> {
        self.with_below(Request::default(), flags, spec)
    }

    /// As [`Settings::with`], of a machine that is `below` unless the file of
    /// `--spec` or a flag says otherwise.
    ///
    /// # Errors
    /// The file cannot be used.
    pub(super) fn with_below(
        &self,
        below: Request,
        flags: Request,
        spec: Option<&Path>,
    ) -> Result<Merged, SpecError> {
        let mut layers = self.layers.clone();
        layers.push(Layer::flags(Config {
            machine: below,
            ..Config::default()
        }));
        if let Some(path) = spec {
            let text = std::fs::read_to_string(path).map_err(|source| unreadable(path, source))?;
            layers.push(Layer::spec(path, &text)?);
        }
        layers.push(Layer::flags(Config {
            machine: flags,
            ..Config::default()
        }));
        let mut merged = merge(&layers)?;
        merged.config.state_dir = Some(self.dirs.state.clone());
        merged.config.runtime_dir = Some(self.dirs.runtime.clone());
        merged.config.uids = Some(self.uids);
        Ok(merged)
    }

    /// The spec for a run of one command.
    ///
    /// # Errors
    /// The file of `--spec` cannot be used, or the whole is refused.
    pub(super) fn spec(&self, flags: Request, spec: Option<&Path>) -> Result<Spec, SpecError> {
        self.with(flags, spec)?.resolve()
    }
}

/// The configuration files, lowest first, and whether each must be there.
fn files(
    named: Option<&Path>,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Vec<(PathBuf, bool)> {
    let set = |name| variable(name).filter(|value| !value.is_empty());
    let named = named
        .map(Path::to_owned)
        .or_else(|| set("BULKHEAD_CONFIG").map(PathBuf::from));
    if let Some(path) = named {
        return match path.as_os_str() == OsStr::new(NO_FILE) {
            true => Vec::new(),
            false => vec![(path, true)],
        };
    }
    // The specification ignores relative paths.
    let dir = |name| {
        set(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let home = || Some(dir("HOME")?.join(".config"));
    let user = dir("XDG_CONFIG_HOME").or_else(home);
    let user = user.map(|dir| (dir.join("bulkhead/config.toml"), false));
    [(PathBuf::from(SYSTEM), false)]
        .into_iter()
        .chain(user)
        .collect()
}

fn unreadable(path: &Path, source: io::Error) -> SpecError {
    SpecError::Read {
        path: path.to_owned(),
        source,
    }
}

/// The text of a configuration file; none where there is no file.
fn read(path: &Path, needed: bool, is_root: bool) -> Result<Option<String>, SpecError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !needed => return Ok(None),
        Err(error) => return Err(unreadable(path, error)),
    };
    // Of the open file: another may have its name by now.
    let meta = file.metadata().map_err(|error| unreadable(path, error))?;
    if is_root && let Some(why) = distrust(meta.uid(), meta.mode()) {
        let path = path.to_owned();
        return Err(SpecError::Untrusted { path, why });
    }
    let mut text = String::new();
    file.read_to_string(&mut text)
        .map_err(|error| unreadable(path, error))?;
    Ok(Some(text))
}

/// Why root must not obey a file of this owner and mode.
fn distrust(owner: u32, mode: u32) -> Option<&'static str> {
    if owner != 0 {
        return Some("it belongs to another user than root, and it chooses what runs as root");
    }
    (mode & 0o022 != 0)
        .then_some("its group or everybody can write to it, and it chooses what runs as root")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(named: Option<&str>, variables: &[(&str, &str)]) -> Vec<String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let files = files(named.map(Path::new), variable);
        let text = files.iter().map(|(path, _)| path.to_str().unwrap());
        text.map(str::to_owned).collect()
    }

    #[test]
    fn the_users_file_is_above_the_systems() {
        assert_eq!(
            found(None, &[("HOME", "/h")]),
            [SYSTEM, "/h/.config/bulkhead/config.toml"]
        );
        assert_eq!(
            found(None, &[("HOME", "/h"), ("XDG_CONFIG_HOME", "/c")]),
            [SYSTEM, "/c/bulkhead/config.toml"]
        );
        assert_eq!(found(None, &[("XDG_CONFIG_HOME", "c")]), [SYSTEM]);
    }

    #[test]
    fn a_named_file_stands_for_both() {
        let variables = [("HOME", "/h"), ("BULKHEAD_CONFIG", "/b.toml")];
        assert_eq!(found(None, &variables), ["/b.toml"]);
        assert_eq!(found(Some("a.toml"), &variables), ["a.toml"]);
        assert_eq!(found(Some("none"), &variables), [""; 0]);
        assert_eq!(found(None, &[("BULKHEAD_CONFIG", "none")]), [""; 0]);
    }

    #[test]
    fn root_trusts_files_only_root_can_change() {
        for mode in [0o100_644, 0o100_600, 0o100_755] {
            assert_eq!(distrust(0, mode), None);
            assert!(distrust(1000, mode).is_some());
        }
        for mode in [0o100_664, 0o100_646, 0o100_666] {
            assert!(distrust(0, mode).is_some(), "{mode:o}");
        }
    }

    #[test]
    fn only_a_named_file_must_be_there() {
        let nowhere = Path::new("/nowhere/config.toml");
        assert!(read(nowhere, false, false).unwrap().is_none());
        assert!(matches!(
            read(nowhere, true, false),
            Err(SpecError::Read { .. })
        ));
    }
}
