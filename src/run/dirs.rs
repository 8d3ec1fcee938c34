//! Where Bulkhead keeps things.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The places a host gives to Bulkhead. Injected, never looked up inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirs {
    /// Images and runs; survives a reboot.
    pub state: PathBuf,
    /// Sockets and verdicts about this boot; need not survive.
    pub runtime: PathBuf,
}

impl Dirs {
    /// The places of the user: those given, else root's `/var/lib/bulkhead` and
    /// `/run/bulkhead`, or what the XDG base directory specification gives
    /// others: `$XDG_STATE_HOME/bulkhead` (`~/.local/state/bulkhead`) and
    /// `$XDG_RUNTIME_DIR/bulkhead` (`run` in the state directory). `variable`
    /// looks up the environment. None when no variable tells a place.
    pub fn usual(
        is_root: bool,
        state: Option<PathBuf>,
        runtime: Option<PathBuf>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Option<Self> {
        if is_root {
            return Some(Self {
                state: state.unwrap_or_else(|| "/var/lib/bulkhead".into()),
                runtime: runtime.unwrap_or_else(|| "/run/bulkhead".into()),
            });
        }
        // The specification ignores relative paths.
        let dir = |name| {
            variable(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let state = state.or_else(|| {
            let home = || Some(dir("HOME")?.join(".local/state"));
            Some(dir("XDG_STATE_HOME").or_else(home)?.join("bulkhead"))
        })?;
        let runtime = runtime
            .or_else(|| Some(dir("XDG_RUNTIME_DIR")?.join("bulkhead")))
            .unwrap_or_else(|| state.join("run"));
        Some(Self { state, runtime })
    }

    /// Records of runs.
    pub fn runs(&self) -> PathBuf {
        self.state.join("runs")
    }

    /// Record of one run, or of one detached machine.
    pub fn run(&self, id: &crate::spec::VmId) -> PathBuf {
        self.runs().join(id.as_str())
    }

    /// Files that can be made again at any time.
    pub fn cache(&self) -> PathBuf {
        self.state.join("cache")
    }

    /// What runs could not bring back, by run.
    pub fn kept(&self, id: &crate::spec::VmId) -> PathBuf {
        self.state.join("kept").join(id.as_str())
    }

    /// Installed kernels.
    pub fn kernels(&self) -> PathBuf {
        self.state.join("kernels")
    }

    /// Where a machine's own sockets are, where it can outlive its supervisor.
    pub fn machine_sockets(&self, id: &crate::spec::VmId) -> PathBuf {
        self.runtime.join(format!("{id}.vmm"))
    }

    /// What VMMs did that they may not; JSON, one object a line.
    pub fn violations(&self) -> PathBuf {
        self.state.join("violations.jsonl")
    }

    /// Exceptions from what no machine may reach, and how they were used; JSON, one
    /// object a line.
    pub fn exceptions(&self) -> PathBuf {
        self.state.join("exceptions.jsonl")
    }

    /// Which user ids machines have.
    pub fn uids(&self) -> PathBuf {
        self.runtime.join("uids")
    }

    /// Where a machine's network namespace is kept.
    pub fn netns(&self, id: &crate::spec::VmId) -> PathBuf {
        self.runtime.join(format!("{id}.netns"))
    }

    /// The control socket of a machine.
    pub fn control_socket(&self, id: &crate::spec::VmId) -> PathBuf {
        self.runtime.join(format!("{id}.sock"))
    }
}

/// Makes a directory that only its owner can look into.
pub(crate) fn make_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual(is_root: bool, variables: &[(&str, &str)]) -> Option<(String, String)> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let dirs = Dirs::usual(is_root, None, None, variable)?;
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        Some((text(dirs.state), text(dirs.runtime)))
    }

    fn places(state: &str, runtime: &str) -> Option<(String, String)> {
        Some((state.to_owned(), runtime.to_owned()))
    }

    #[test]
    fn root_has_the_systems_places() {
        let variables = [("XDG_STATE_HOME", "/s"), ("XDG_RUNTIME_DIR", "/r")];
        assert_eq!(
            usual(true, &variables),
            places("/var/lib/bulkhead", "/run/bulkhead")
        );
    }

    #[test]
    fn others_have_places_of_their_own() {
        assert_eq!(
            usual(
                false,
                &[
                    ("HOME", "/h"),
                    ("XDG_STATE_HOME", "/s"),
                    ("XDG_RUNTIME_DIR", "/r")
                ]
            ),
            places("/s/bulkhead", "/r/bulkhead")
        );
        let home = "/h/.local/state/bulkhead";
        for variables in [
            &[("HOME", "/h")][..],
            &[("HOME", "/h"), ("XDG_STATE_HOME", "relative")],
        ] {
            let expected = places(home, &format!("{home}/run"));
            assert_eq!(usual(false, variables), expected);
        }
        assert_eq!(usual(false, &[]), None);
    }

    #[test]
    fn what_is_given_wins() {
        let given = Dirs::usual(false, Some("/s".into()), None, |_| None);
        assert_eq!(given.unwrap().runtime, Path::new("/s/run"));
    }
}
