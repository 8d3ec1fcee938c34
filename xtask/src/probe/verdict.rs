//! Whether what is on disk and what lives are the same, and nothing else is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bulkhead::run::{HISTORY, State, StateFile, Transition};
use bulkhead::snapshot::Store;
use bulkhead::spec::VmId;
use bulkhead::supervise::{Kind, View};

use super::place::{Place, VERB, entries};

/// What is there, and what is wrong with it.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) machines: Vec<View>,
    pub(crate) wrong: Vec<String>,
    /// Somebody alive is still at work on one of them.
    busy: bool,
}

impl Found {
    /// The machine of this name.
    pub(super) fn of(&self, vm: &str) -> Option<&View> {
        self.machines.iter().find(|view| view.id.as_str() == vm)
    }
}

impl Place {
    /// Waits until everything is in order, for as long as that may take. A machine that
    /// comes up or goes down in good hands may take its time besides.
    pub(crate) fn settled(&self) -> Result<Found> {
        let begin = Instant::now();
        let mut since = Instant::now();
        loop {
            let found = self.look()?;
            if found.busy && begin.elapsed() < VERB {
                since = Instant::now();
            } else if found.wrong.is_empty() || since.elapsed() > self.kit.within {
                return Ok(found);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What is wrong where nothing at all should be.
    pub(crate) fn left(&self) -> Vec<String> {
        let dirs = self.dirs();
        let mut left: Vec<String> = self.processes().iter().map(|one| one.shown()).collect();
        let allowed = [
            dirs.runs(),
            dirs.runs().join(".lock"),
            dirs.state.join("images"),
            dirs.state.join("kernels"),
            dirs.state.join("cache"),
            dirs.state.join("templates"),
        ];
        let places = [&dirs.runtime, &dirs.state, &dirs.runs()].map(|dir| entries(dir));
        // A whole template is nobody's leftover.
        let half = entries(&dirs.state.join("templates"))
            .into_iter()
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with('.') && name != ".lock"
            });
        // The file of an export that came to nothing.
        let files = fs::read_dir(dirs.state.parent().unwrap_or(&dirs.state));
        let files = files.into_iter().flatten().flatten();
        let half_made = |name: &str| name.starts_with(".bulkhead-export-");
        let files = files.filter(|file| half_made(&file.file_name().to_string_lossy()));
        let places = places
            .into_iter()
            .flatten()
            .chain(files.map(|file| file.path()))
            .chain(self.used_by())
            .chain(half);
        let more = places.filter(|path| !allowed.contains(path));
        left.extend(more.map(|path| path.display().to_string()));
        match self.networks() {
            Ok((0, 0)) => {}
            found => left.push(format!(
                "of networks {found:?} (links, members of the gate)"
            )),
        }
        left
    }

    fn look(&self) -> Result<Found> {
        let given = self.run(&["ls", "--json"])?;
        let mut found = Found::default();
        if given.code != Some(0) {
            let said = given.stderr.trim();
            found
                .wrong
                .push(format!("ls gave {:?}: {said}", given.code));
            return Ok(found);
        }
        found.machines = serde_json::from_slice(&given.stdout).context("ls gave no JSON")?;
        let (wrong, mut expected) = (&mut found.wrong, BTreeSet::new());
        let processes = self.processes();
        let living: BTreeSet<i32> = processes.iter().map(|process| process.pid).collect();
        let dirs = self.dirs();
        let (mut runtime, mut records) = (BTreeSet::new(), BTreeSet::new());
        for view in &found.machines {
            let (id, state) = (&view.id, view.state);
            let mut say = |what: String| wrong.push(format!("{id} is {state}: {what}"));
            if view.kind == Kind::Run {
                say("it is that of a `bulkhead run`".into());
                continue;
            }
            records.insert(dirs.run(id));
            illegal(&view.history).into_iter().for_each(&mut say);
            let last = view.history.last();
            if last.is_none_or(|last| last.to != state || last.reason != view.reason) {
                say("its history ends otherwise".into());
            }
            let supervisor = view.supervisor.as_ref().map(|owner| owner.pid);
            let vmm = view.live.as_ref().and_then(|live| live.vmm_pid);
            if state == State::Lost {
                say("it was not cleared away".into());
            }
            if state.is_live() {
                expected.extend(supervisor.into_iter().chain(vmm));
                runtime.extend([dirs.control_socket(id), dirs.machine_sockets(id)]);
                runtime.insert(dirs.netns(id));
                if !supervisor.is_some_and(|pid| living.contains(&pid)) {
                    say(format!("its supervisor ({supervisor:?}) is dead"));
                } else if matches!(state, State::Starting | State::Stopping) {
                    found.busy = true;
                } else if !vmm.is_some_and(|pid| living.contains(&pid)) {
                    say(format!("its VMM ({vmm:?}) is dead"));
                } else if !view.live.as_ref().is_some_and(|live| live.agent) {
                    say("its guest agent does not answer".into());
                }
            } else if supervisor.is_some() || view.live.is_some() {
                say("it has a supervisor".into());
            }
        }
        for process in &processes {
            if !expected.contains(&process.pid) {
                wrong.push(format!("{} is left", process.shown()));
            }
        }
        // Each machine that is up has one.
        let users = entries(&dirs.uids()).len();
        let up = found.machines.iter().filter(|view| view.state.is_live());
        let up = up.count();
        if users > up {
            wrong.push(format!("{users} user ids are taken for {up} machines"));
        }
        let (links, members) = self.networks()?;
        if links > up || members > up {
            wrong.push(format!(
                "{links} links and {members} members of the gate are there for {up} machines"
            ));
        }
        for path in entries(&dirs.runtime) {
            if !runtime.contains(&path) && path != dirs.uids() {
                wrong.push(format!("{} is left", path.display()));
            }
        }
        for dir in entries(&dirs.runs()) {
            if !records.contains(&dir) && dir.is_dir() {
                wrong.push(format!("{} is no machine's", dir.display()));
            } else if dir.is_dir() && !StateFile::is_in(&dir) {
                wrong.push(format!("{} has no state", dir.display()));
            }
            wrong.extend(snapshots(&dir));
            for file in entries(&dir) {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                if name.starts_with('.') || name == "scratch.img" {
                    wrong.push(format!("{} is half made", file.display()));
                }
            }
        }
        let uses = self.used_by();
        for file in &uses {
            let of = fs::read_to_string(file).unwrap_or_default();
            if !records.iter().any(|dir| dir.as_os_str() == of.as_str()) {
                wrong.push(format!("{} is left", file.display()));
            }
        }
        if uses.len() != records.len() {
            let (uses, records) = (uses.len(), records.len());
            wrong.push(format!("{records} machines have {uses} files of use"));
        }
        Ok(found)
    }
}

/// What is wrong with the snapshots of the machine with this record.
fn snapshots(record: &Path) -> Vec<String> {
    let name = record.file_name().and_then(|name| name.to_str());
    let Some(vm) = name.and_then(|name| name.parse::<VmId>().ok()) else {
        return Vec::new();
    };
    let half = entries(&record.join("snapshots"))
        .into_iter()
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with('.') && name != ".lock" && name != ".forks"
        });
    let half = half.map(|path| format!("{} is half made", path.display()));
    let (all, errors) = match Store::new(record, &vm).list() {
        Ok(listed) => listed,
        Err(error) => return vec![error.to_string()],
    };
    let forks = all.into_iter().filter(|one| one.manifest.transient);
    let forks = forks.map(|one| format!("{} of a dead fork of {vm} is left", one.manifest.name));
    let errors = errors.into_iter().map(|error| error.to_string());
    half.chain(forks).chain(errors).collect()
}

/// What is wrong with a history.
fn illegal(history: &[Transition]) -> Vec<String> {
    let mut wrong = Vec::new();
    for pair in history.windows(2) {
        if !pair[0].to.may_become(pair[1].to) {
            let (from, to) = (pair[0].to, pair[1].to);
            wrong.push(format!("it went from {from} to {to}"));
        }
    }
    // What is older than that is forgotten, its creation too.
    let whole = history.len() < HISTORY;
    if whole
        && history
            .first()
            .is_none_or(|first| first.to != State::Created)
    {
        wrong.push("its history does not begin with its creation".into());
    }
    if history.iter().any(|one| one.reason.is_empty()) {
        wrong.push("its history has a state without a reason".into());
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(states: &[State]) -> Vec<Transition> {
        let one = |to: &State| Transition {
            at_ms: 1,
            to: *to,
            reason: "why".into(),
        };
        states.iter().map(one).collect()
    }

    #[test]
    fn a_history_is_held_to_the_states_that_may_follow() {
        use State as S;
        let good = [S::Created, S::Starting, S::Running, S::Lost, S::Failed];
        assert!(illegal(&history(&good)).is_empty());
        let jump = [S::Created, S::Running];
        assert_eq!(
            illegal(&history(&jump)),
            ["it went from created to running"]
        );
        assert_eq!(illegal(&history(&good[1..])).len(), 1);
        // A long one has lost its beginning.
        let turn = [S::Starting, S::Running, S::Stopping, S::Stopped];
        let long = turn.into_iter().cycle().skip(1).take(HISTORY);
        let long: Vec<State> = long.collect();
        assert!(illegal(&history(&long)).is_empty());
        assert_eq!(illegal(&history(&long[1..])).len(), 1);
        let mut silent = history(&good);
        silent[1].reason.clear();
        assert_eq!(illegal(&silent).len(), 1);
    }
}
