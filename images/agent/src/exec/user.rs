//! Users and groups from /etc/passwd and /etc/group.
//!
//! A static binary has no name service; machines have these files.

use std::fs;

use bulkhead_agent::FailureKind;

use crate::failure::{Context, Result, failure};

/// A user commands can run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All groups, the primary one first.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// The machine's users.
#[derive(Debug)]
pub(crate) struct Users {
    passwd: String,
    group: String,
}

impl Users {
    /// Reads the files; a machine without them has root only.
    pub(crate) fn read() -> Result<Self> {
        let read = |path: &str| match fs::read(path) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error).context(|| format!("cannot read {path}")),
        };
        Ok(Self {
            passwd: read("/etc/passwd")?,
            group: read("/etc/group")?,
        })
    }

    /// Finds a user by name or numeric id. An id needs no entry.
    ///
    /// # Errors
    /// No user of that name.
    pub(crate) fn find(&self, wanted: &str) -> Result<User> {
        let id: Option<u32> = wanted.parse().ok().filter(|id| *id != u32::MAX);
        let users = || self.passwd.lines().filter_map(parse_user);
        let found = users()
            .find(|user| user.name == wanted)
            .or_else(|| users().find(|user| Some(user.uid) == id));
        let mut user = match (found, id) {
            (Some(user), _) => user,
            (None, Some(0)) => unlisted("root", 0, "/root"),
            (None, _) if wanted == "root" => unlisted("root", 0, "/root"),
            (None, Some(id)) => unlisted(wanted, id, "/"),
            (None, None) => {
                let message = format!("no user {wanted} in the machine's /etc/passwd");
                return Err(failure(FailureKind::NoUser, message));
            }
        };
        user.groups = self.groups_of(&user);
        Ok(user)
    }

    fn groups_of(&self, user: &User) -> Vec<u32> {
        let mut groups = vec![user.gid];
        for line in self.group.lines() {
            let mut fields = line.split(':').skip(2);
            let (Some(gid), Some(members)) = (fields.next(), fields.next()) else {
                continue;
            };
            if let Ok(gid) = gid.parse()
                && members.split(',').any(|member| member == user.name)
                && !groups.contains(&gid)
            {
                groups.push(gid);
            }
        }
        groups
    }
}

fn unlisted(name: &str, id: u32, home: &str) -> User {
    User {
        name: name.into(),
        uid: id,
        gid: id,
        groups: Vec::new(),
        home: home.into(),
        shell: "/bin/sh".into(),
    }
}

fn parse_user(line: &str) -> Option<User> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, shell] = fields[..] else {
        return None;
    };
    let or = |text: &str, default: &str| if text.is_empty() { default } else { text }.to_owned();
    Some(User {
        name: name.into(),
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        groups: Vec::new(),
        home: or(home, "/"),
        shell: or(shell, "/bin/sh"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users() -> Users {
        Users {
            passwd: "root:x:0:0:root:/root:/bin/bash\nbad line\n\
                     agent:x:1000:1000:Agent,,,:/home/agent:\n1234:x:7:8::/seven:/bin/sh\n"
                .into(),
            group: "root:x:0:\nadm:x:4:syslog,agent\nagent:x:1000:agent\nagentx:x:5:agentx\n"
                .into(),
        }
    }

    #[test]
    fn by_name_with_supplementary_groups() {
        let user = users().find("agent").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups),
            (1000, 1000, vec![1000, 4])
        );
        assert_eq!(
            (&user.home[..], &user.shell[..]),
            ("/home/agent", "/bin/sh")
        );
    }

    #[test]
    fn by_id_and_a_numeric_name_first() {
        assert_eq!(users().find("1000").unwrap().name, "agent");
        assert_eq!(users().find("1234").unwrap().uid, 7);
        assert_eq!(users().find("4242").unwrap().home, "/");
    }

    #[test]
    fn unknown_names_are_refused() {
        assert_eq!(
            users().find("nobody").unwrap_err().kind,
            FailureKind::NoUser
        );
        assert_eq!(users().find("-1").unwrap_err().kind, FailureKind::NoUser);
    }
}
