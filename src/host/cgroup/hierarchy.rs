//! Where the hierarchies of control groups are, and where ours go.

use std::fs;
use std::path::{Path, PathBuf};

use super::CgroupError;

/// A controller in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Cpu,
    Memory,
    Pids,
}

impl Controller {
    pub(super) const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }
}

/// Whether a file of the kernel's names a controller.
pub(super) fn lists(names: &str, controller: Controller) -> bool {
    names
        .split_whitespace()
        .any(|name| name == controller.name())
}

/// What the kernel says of the hierarchies (proc(5), cgroups(7)).
pub(super) struct Hierarchies {
    /// /proc/self/mountinfo
    pub(super) mounts: String,
    /// /proc/self/cgroup
    pub(super) own: String,
}

impl Hierarchies {
    /// The group below which ours goes for a controller: v2's where it has it.
    pub(super) fn base(&self, controller: Controller) -> Result<PathBuf, CgroupError> {
        if let Some((mount, own)) = self.find(None)
            && let Some(base) = self.base_v2(controller, &mount, &own)
        {
            return Ok(base);
        }
        // Below our own group, so that its limits are the machine's, too.
        match self.find(Some(controller.name())) {
            Some((_, own)) => Ok(own),
            None => Err(CgroupError::Unavailable {
                why: format!("the controller `{}` is not mounted", controller.name()),
            }),
        }
    }

    /// The group below which v1's goes for reads and writes, where v1 has that
    /// controller and we may.
    pub(super) fn io_v1(&self) -> Option<PathBuf> {
        let (_, own) = self.find(Some("blkio"))?;
        rustix::fs::access(&own, rustix::fs::Access::WRITE_OK).ok()?;
        Some(own)
    }

    /// On v2 a group has processes or hands controllers down, and our own has
    /// processes: us. The nearest one above that hands it down takes ours; the
    /// root may do both.
    fn base_v2(&self, controller: Controller, mount: &Path, own: &Path) -> Option<PathBuf> {
        // A process is in one group of v2: the same one for every controller
        // that this hierarchy has.
        let all = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
        let offered = Controller::ALL.map(|one| (one, lists(&all, one)));
        if !offered.contains(&(controller, true)) {
            return None;
        }
        let has = |dir: &Path, file: &str| {
            fs::read_to_string(dir.join(file)).is_ok_and(|names| {
                let mut needed = offered.iter().filter(|(_, offered)| *offered);
                needed.all(|(one, _)| lists(&names, *one))
            })
        };
        own.ancestors()
            .take_while(|dir| dir.starts_with(mount))
            .find(|dir| {
                has(dir, "cgroup.subtree_control")
                    || (*dir == mount && has(dir, "cgroup.controllers"))
            })
            .map(Path::to_owned)
    }

    /// Where a hierarchy is mounted, and our own group in it: that of a v1
    /// controller, or v2's.
    fn find(&self, controller: Option<&str>) -> Option<(PathBuf, PathBuf)> {
        let wanted = controller.unwrap_or_default();
        let own = self.own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let names = fields.next()?;
            let path = fields.next()?;
            names.split(',').any(|name| name == wanted).then_some(path)
        })?;
        self.mounts.lines().find_map(|line| {
            let (mount, source) = line.split_once(" - ")?;
            let mut source = source.split(' ');
            let kind = source.next()?;
            let options = source.nth(1)?;
            let matches = match controller {
                None => kind == "cgroup2",
                Some(_) => kind == "cgroup" && options.split(',').any(|name| name == wanted),
            };
            let mut mount = mount.split(' ').skip(3);
            let (root, place) = (mount.next()?, PathBuf::from(mount.next()?));
            // In a container the mount may show a part of the hierarchy only.
            let below = Path::new(own).strip_prefix(root).unwrap_or(Path::new(""));
            let hidden = below.components().any(|part| part.as_os_str() == "..");
            let own = match hidden {
                true => place.clone(),
                false => place.join(below),
            };
            matches.then_some((place, own))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Explain as _;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn host(mounts: &str, own: &str) -> Hierarchies {
        Hierarchies {
            mounts: mounts.to_owned(),
            own: own.to_owned(),
        }
    }

    #[test]
    fn our_own_group_is_found_in_each_hierarchy() {
        let host = host(
            HYBRID,
            "4:memory:/\n1:cpu,cpuacct:/user/a b\n0::/user.slice\n",
        );
        let cpu = host.find(Some("cpu")).unwrap();
        assert_eq!(cpu.1, Path::new("/sys/fs/cgroup/cpu,cpuacct/user/a b"));
        let unified = host.find(None).unwrap();
        assert_eq!(unified.0, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(unified.1, Path::new("/sys/fs/cgroup/unified/user.slice"));
        assert_eq!(host.base(Controller::Cpu).unwrap(), cpu.1);
    }

    #[test]
    fn a_container_sees_a_part_of_the_hierarchy() {
        let mounts = "32 31 0:29 /docker/1 /cg ro - cgroup cgroup rw,cpu\n";
        let inside = host(mounts, "1:cpu:/docker/1/sub\n");
        let cpu = Some("cpu");
        assert_eq!(inside.find(cpu).unwrap().1, Path::new("/cg/sub"));
        for other in ["1:cpu:/elsewhere\n", "1:cpu:/docker/1/../2\n"] {
            let found = host(mounts, other).find(cpu).unwrap();
            assert_eq!(found.1, Path::new("/cg"), "{other}");
        }
        let error = host("", "").base(Controller::Cpu).unwrap_err();
        assert_eq!(error.code(), "cgroup-unavailable");
    }

    #[test]
    fn on_v2_the_nearest_group_that_hands_down_is_the_base() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let own = root.join("system.slice/a.service");
        fs::create_dir_all(&own).unwrap();
        let say = |group: &Path, file: &str, text: &str| fs::write(group.join(file), text).unwrap();
        let mounts = format!("1 0 0:1 / {} rw - cgroup2 cgroup2 rw\n", root.display());
        let host = host(&mounts, "0::/system.slice/a.service\n");
        let base = || host.base_v2(Controller::Cpu, root, &own);
        assert_eq!(base(), None, "no controllers at all");
        say(root, "cgroup.controllers", "cpuset cpu io\n");
        assert_eq!(base().as_deref(), Some(root));
        say(&own, "cgroup.controllers", "cpu\n");
        say(&own, "cgroup.subtree_control", "\n");
        say(root, "cgroup.subtree_control", "cpu memory\n");
        assert_eq!(base().as_deref(), Some(root));
        say(
            &root.join("system.slice"),
            "cgroup.subtree_control",
            "memory cpu\n",
        );
        assert_eq!(base(), Some(root.join("system.slice")));
        // One group for all of them, or their limits would not hold together.
        say(root, "cgroup.controllers", "cpu io memory pids\n");
        say(root, "cgroup.subtree_control", "cpu memory pids\n");
        assert_eq!(base().as_deref(), Some(root));
    }
}
