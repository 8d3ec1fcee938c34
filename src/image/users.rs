//! The unprivileged user every image has.

use std::collections::HashMap;

use bulkhead_agent::DEFAULT_USER;

use super::rules::ACCOUNTS;
use super::tarball::Meta;

/// First choice for the user's uid and gid.
const UID: u64 = 1000;

/// Completed account databases.
pub(super) struct Accounts {
    /// The databases by name.
    pub(super) files: Vec<(&'static [u8], Vec<u8>)>,
    /// Uid of the default user.
    pub(super) uid: u64,
    /// Gid of the default user.
    pub(super) gid: u64,
}

impl Accounts {
    /// Adds the default user, and root, where they are missing. `has` tells
    /// whether the root file system has a name.
    pub(super) fn complete(
        kept: &HashMap<Vec<u8>, (Meta, Vec<u8>)>,
        has: impl Fn(&[u8]) -> bool,
    ) -> Self {
        let [passwd, group, shadow, gshadow] = ACCOUNTS.map(|path| {
            let bytes = kept.get(path).map_or(&[][..], |(_, bytes)| bytes);
            Table(lines(bytes))
        });
        let (mut passwd, mut group, mut shadow, mut gshadow) = (passwd, group, shadow, gshadow);
        let shell = match has(b"bin/bash") || has(b"usr/bin/bash") {
            true => "/bin/bash",
            false => "/bin/sh",
        };
        passwd.add("root", format!("root:x:0:0:root:/root:{shell}"));
        group.add("root", "root:x:0:".into());
        let gid = group.id(DEFAULT_USER).unwrap_or_else(|| group.free());
        group.add(DEFAULT_USER, format!("{DEFAULT_USER}:x:{gid}:"));
        let uid = passwd.id(DEFAULT_USER).unwrap_or_else(|| passwd.free());
        passwd.add(
            DEFAULT_USER,
            format!("{DEFAULT_USER}:x:{uid}:{gid}:,,,:/home/{DEFAULT_USER}:{shell}"),
        );
        // "!" and "*": no password opens them.
        shadow.add("root", "root:*:19000:0:99999:7:::".into());
        shadow.add(DEFAULT_USER, format!("{DEFAULT_USER}:!:19000:0:99999:7:::"));
        gshadow.add("root", "root:*::".into());
        gshadow.add(DEFAULT_USER, format!("{DEFAULT_USER}:!::"));
        let gid = passwd.field(DEFAULT_USER, 3).unwrap_or(gid);
        // Ours is the plain case: a database behind a link is left as it is.
        let files = ACCOUNTS
            .into_iter()
            .zip([passwd, group, shadow, gshadow])
            .filter(|(path, _)| kept.contains_key(*path) || !has(path))
            .map(|(path, table)| (path, table.bytes()))
            .collect();
        Self { files, uid, gid }
    }
}

struct Table(Vec<Vec<u8>>);

impl Table {
    fn row(&self, name: &str) -> Option<&Vec<u8>> {
        let prefix = format!("{name}:");
        self.0.iter().find(|row| row.starts_with(prefix.as_bytes()))
    }

    fn field(&self, name: &str, at: usize) -> Option<u64> {
        number(self.row(name)?, at)
    }

    fn id(&self, name: &str) -> Option<u64> {
        self.field(name, 2)
    }

    fn free(&self) -> u64 {
        let taken: Vec<u64> = self.0.iter().filter_map(|row| number(row, 2)).collect();
        (UID..).find(|id| !taken.contains(id)).unwrap_or(UID)
    }

    fn add(&mut self, name: &str, row: String) {
        if self.row(name).is_none() {
            self.0.push(row.into_bytes());
        }
    }

    fn bytes(self) -> Vec<u8> {
        let mut bytes = self.0.join(&b'\n');
        bytes.push(b'\n');
        bytes
    }
}

fn number(row: &[u8], at: usize) -> Option<u64> {
    let field = row.split(|byte| *byte == b':').nth(at)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(<[u8]>::to_vec)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(passwd: &str) -> (Accounts, String) {
        let kept = HashMap::from([(
            b"etc/passwd".to_vec(),
            (Meta::root(0o644), passwd.as_bytes().to_vec()),
        )]);
        let accounts = Accounts::complete(&kept, |path| path == b"etc/passwd");
        let text = String::from_utf8(accounts.files[0].1.clone()).unwrap();
        (accounts, text)
    }

    #[test]
    fn the_user_is_added_beside_others() {
        let (accounts, text) =
            complete("root:x:0:0::/root:/bin/sh\nnode:x:1000:1000::/h:/bin/sh\n");
        assert_eq!((accounts.uid, accounts.gid), (1001, 1000));
        assert!(
            text.ends_with("agent:x:1001:1000:,,,:/home/agent:/bin/sh\n"),
            "{text}"
        );
        assert_eq!(text.matches("root:x:").count(), 1);
        assert_eq!(accounts.files.len(), 4);
    }

    #[test]
    fn an_existing_user_stays() {
        let (accounts, text) = complete("agent:x:77:88::/a:/bin/sh\n");
        assert_eq!((accounts.uid, accounts.gid), (77, 88));
        assert_eq!(text.matches("agent:").count(), 1);
    }
}
