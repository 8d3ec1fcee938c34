//! What this host's own apt knows: mirrors, dates and kernel packages.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::{Error, Result};
use super::tool::{APT_CACHE, APT_GET, DPKG_DEB};

/// Where a suite's packages come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sources {
    /// Lines for sources.list.
    pub(super) lines: Vec<String>,
    /// When the newest of the indexes was made, in seconds since 1970: the
    /// time stamp of everything the build itself writes.
    pub(super) epoch: u64,
}

/// A package and its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pinned {
    pub(super) name: String,
    pub(super) version: String,
}

/// The host's sources for a suite, its updates and its security fixes.
pub(super) fn sources(suite: &str, dir: &Path) -> Result<Sources> {
    let format = "$(RELEASE)|$(COMPONENT)|$(REPO_URI)|$(FILENAME)";
    let mut command = APT_GET.command();
    command.args(["indextargets", "--format", format]);
    command.args(["Created-By: Packages", "Architecture: amd64"]);
    let text = APT_GET.output(&mut command, dir)?;
    let mut found: Vec<(&str, &str, Vec<&str>)> = Vec::new();
    let mut epoch = 0;
    for line in text.lines() {
        let [release, component, uri, file] = line.split('|').collect::<Vec<_>>()[..] else {
            continue;
        };
        let name = release.strip_suffix('/').unwrap_or(release);
        let wanted = name == suite
            || name == format!("{suite}-updates")
            || name == format!("{suite}-security");
        if !wanted {
            continue;
        }
        epoch = epoch.max(date_of(file, component).unwrap_or(0));
        match found
            .iter_mut()
            .find(|(r, u, _)| (*r, *u) == (release, uri))
        {
            Some((_, _, components)) => components.push(component),
            None => found.push((release, uri, vec![component])),
        }
    }
    if !found.iter().any(|(release, ..)| *release == suite) {
        return Err(Error::Suite {
            suite: suite.to_owned(),
        });
    }
    let lines = found
        .iter()
        .map(|(release, uri, components)| format!("deb {uri} {release} {}", components.join(" ")))
        .collect();
    Ok(Sources { lines, epoch })
}

/// The date in the signed release file an index belongs to.
fn date_of(index: &str, component: &str) -> Option<u64> {
    let stem = &index[..index.rfind(&format!("_{component}_binary"))?];
    let text = ["_InRelease", "_Release"]
        .iter()
        .find_map(|suffix| fs::read_to_string(format!("{stem}{suffix}")).ok())?;
    let date = text.lines().find_map(|line| line.strip_prefix("Date: "))?;
    parse_date(date)
}

/// Seconds since 1970 of "Sat, 21 Nov 2026 00:53:02 UTC".
fn parse_date(text: &str) -> Option<u64> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let fields: Vec<&str> = text.split_whitespace().collect();
    let [_, day, month, year, time, "UTC" | "+0000"] = fields[..] else {
        return None;
    };
    let day: u64 = day.parse().ok()?;
    let month = MONTHS.find(month)? as u64 / 3 + 1;
    let year: u64 = year.parse().ok()?;
    let clock: Vec<u64> = time
        .split(':')
        .filter_map(|part| part.parse().ok())
        .collect();
    let [hours, minutes, seconds] = clock[..] else {
        return None;
    };
    // Days from the civil date, with years that begin in March.
    let (y, m) = match month {
        1 | 2 => (year - 1, month + 9),
        _ => (year, month - 3),
    };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    Some((days.checked_sub(719_468)? * 24 + hours) * 3600 + minutes * 60 + seconds)
}

/// The kernel package a metapackage depends on, at its current version.
pub(super) fn kernel_package(meta: &str, dir: &Path) -> Result<Pinned> {
    let unusable = |reason: &str| Error::Kernel {
        path: PathBuf::from(meta),
        reason: reason.to_owned(),
    };
    let mut command = APT_CACHE.command();
    command.args(["show", "--no-all-versions", "--", meta]);
    let text = APT_CACHE.output(&mut command, dir)?;
    let depends = text
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))
        .ok_or_else(|| unusable("apt knows no package it depends on"))?;
    // "linux-image-6.1.0-56-amd64 (= 6.1.192-2), ..."
    depends
        .split(", ")
        .find_map(|one| {
            let (name, rest) = one.split_once(" (= ")?;
            name.starts_with("linux-image-").then(|| Pinned {
                name: name.to_owned(),
                version: rest.trim_end_matches(')').to_owned(),
            })
        })
        .ok_or_else(|| unusable("it depends on no linux-image package of one version"))
}

/// Downloads a package (checked against apt's signed indexes) and writes its
/// files as a tar archive into `dir`.
pub(super) fn files_of(package: &Pinned, dir: &Path) -> Result<PathBuf> {
    let mut command = APT_GET.command();
    command.args(["-qq", "download", "--"]);
    command.arg(format!("{}={}", package.name, package.version));
    APT_GET.output(command.current_dir(dir), dir)?;
    let fail = |source| Error::io("list", dir, source);
    let mut deb = None;
    for entry in fs::read_dir(dir).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            deb = Some(path);
        }
    }
    let deb = deb.ok_or_else(|| Error::Kernel {
        path: PathBuf::from(&package.name),
        reason: "apt-get download left no file".into(),
    })?;
    let tar = dir.join("package.tar");
    let out = fs::File::create(&tar).map_err(|source| Error::io("create", &tar, source))?;
    let mut command = DPKG_DEB.command();
    command.arg("--fsys-tarfile").arg(&deb).stdout(out);
    DPKG_DEB.spawn(&mut command, dir)?.finish()?;
    fs::remove_file(&deb).map_err(|source| Error::io("remove", &deb, source))?;
    Ok(tar)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_agree_with_date_1() {
        for (text, seconds) in [
            ("Thu, 01 Jan 1970 00:00:00 UTC", 0),
            ("Thu, 29 Feb 2024 23:59:59 UTC", 1_709_251_199),
            ("Sat, 21 Nov 2026 00:53:02 UTC", 1_795_222_382),
        ] {
            assert_eq!(parse_date(text), Some(seconds), "{text}");
        }
        assert_eq!(parse_date("yesterday"), None);
    }
}
