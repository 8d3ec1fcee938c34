//! The package list of a root file system, from its own databases.

use std::collections::HashMap;

use super::Package;
use super::tarball::Meta;

/// Packages in the databases kept while merging, sorted.
pub(super) fn list(kept: &HashMap<Vec<u8>, (Meta, Vec<u8>)>) -> Vec<Package> {
    let mut packages = Vec::new();
    for (path, (_, bytes)) in kept {
        let text = String::from_utf8_lossy(bytes);
        if path.starts_with(b"var/lib/dpkg/") {
            packages.extend(paragraphs(&text, ["Package", "Version"]));
        } else if path.ends_with(b"lib/apk/db/installed") {
            packages.extend(paragraphs(&text, ["P", "V"]));
        }
    }
    packages.sort();
    packages.dedup();
    packages
}

fn paragraphs(text: &str, [name, version]: [&str; 2]) -> Vec<Package> {
    text.split("\n\n")
        .filter_map(|paragraph| {
            let field = |key: &str| {
                paragraph
                    .lines()
                    .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
                    .map(|value| value.trim().to_owned())
            };
            // Removed packages leave their configuration behind.
            if field("Status").is_some_and(|status| !status.ends_with(" installed")) {
                return None;
            }
            Some(Package {
                name: field(name)?,
                version: field(version)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_packages_do_not_count() {
        let text = "Package: b\nStatus: install ok installed\nVersion: 1\n\n\
                    Package: a\nStatus: deinstall ok config-files\nVersion: 2\n";
        let kept = HashMap::from([(
            b"var/lib/dpkg/status".to_vec(),
            (Meta::root(0o644), text.into()),
        )]);
        let names: Vec<_> = list(&kept).into_iter().map(|p| p.name).collect();
        assert_eq!(names, ["b"]);
    }
}
