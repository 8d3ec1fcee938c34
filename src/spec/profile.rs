//! Named sets of limits, and the names a request may use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::SpecError;
use super::network::{NetworkMode, NetworkName, NetworkPolicy};
use super::units::{Bytes, Timeout, name_type};

name_type! {
    /// Name of a profile: 1 to 63 of `a-z`, `0-9`, `_` and `-`, starting with a
    /// letter or digit.
    ProfileName, "a profile's name (1 to 63 of a-z, 0-9, _ and -, such as `big`)"
}

impl Default for ProfileName {
    fn default() -> Self {
        Self("standard".into())
    }
}

/// What a machine may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Virtual CPUs, 1 to 64.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Bytes,
    /// Size of the disk that takes what the guest writes.
    pub disk: Bytes,
    /// How long the command may run.
    pub timeout: Timeout,
}

/// A named set of limits, and the network of its machines where it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// What a machine may use.
    pub limits: Limits,
    /// The network; a request's own when absent.
    pub network: Option<NetworkName>,
}

/// A profile as configuration files define it: a built-in one with some limits
/// changed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CustomProfile {
    /// The built-in profile that gives what is absent here.
    pub base: ProfileName,
    /// Virtual CPUs, 1 to 64.
    pub cpus: Option<u32>,
    /// Guest memory, such as `512M` or `2G`.
    pub memory: Option<Bytes>,
    /// Size of the disk that takes what the guest writes.
    pub disk: Option<Bytes>,
    /// How long the command may run, such as `90s` or `5m`.
    pub timeout: Option<Timeout>,
    /// Name of the network its machines get.
    pub network: Option<NetworkName>,
}

/// The built-in profiles: name, vCPUs, GiB of memory, GiB of disk, seconds.
const BUILT_IN: [(&str, u32, u64, u64, u64); 4] = [
    ("light", 1, 1, 10, 60),
    ("standard", 2, 2, 20, 300),
    ("intensive", 4, 4, 40, 600),
    // As standard, and never a network.
    ("isolated", 2, 2, 20, 300),
];

/// The profiles and networks that can be asked for by name: those built in,
/// and those a configuration adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalog {
    profiles: BTreeMap<ProfileName, Profile>,
    networks: BTreeMap<NetworkName, NetworkPolicy>,
}

impl Default for Catalog {
    fn default() -> Self {
        let isolated: NetworkName = NetworkMode::Isolated.into();
        let profiles = BUILT_IN.map(|(name, vcpus, memory, disk, timeout)| {
            let limits = Limits {
                vcpus,
                memory: Bytes::gib(memory),
                disk: Bytes::gib(disk),
                timeout: Timeout::secs(timeout),
            };
            let network = (name == "isolated").then(|| isolated.clone());
            (ProfileName(name.into()), Profile { limits, network })
        });
        Self {
            profiles: profiles.into(),
            networks: NetworkName::built_in().collect(),
        }
    }
}

impl Catalog {
    /// All profiles, by name.
    pub fn profiles(&self) -> impl Iterator<Item = (&ProfileName, &Profile)> {
        self.profiles.iter()
    }

    /// The profile of this name.
    ///
    /// # Errors
    /// There is none; the error names those there are.
    pub fn profile(&self, name: &ProfileName) -> Result<&Profile, SpecError> {
        self.profiles
            .get(name)
            .ok_or_else(|| unknown("profile", name, &self.profiles))
    }

    /// The network of this name.
    ///
    /// # Errors
    /// There is none; the error names those there are.
    pub fn network(&self, name: &NetworkName) -> Result<&NetworkPolicy, SpecError> {
        self.networks
            .get(name)
            .ok_or_else(|| unknown("network", name, &self.networks))
    }

    /// Adds a profile, or replaces one that was added before.
    ///
    /// # Errors
    /// The name is a built-in one, the base is none, or what it says cannot be.
    pub fn add_profile(
        &mut self,
        name: ProfileName,
        custom: &CustomProfile,
    ) -> Result<(), SpecError> {
        let built_in = Self::default();
        if built_in.profiles.contains_key(&name) {
            return Err(SpecError::Taken {
                kind: "profile",
                name: name.to_string(),
            });
        }
        let base = built_in.profile(&custom.base)?;
        let limits = Limits {
            vcpus: custom.cpus.unwrap_or(base.limits.vcpus),
            memory: custom.memory.unwrap_or(base.limits.memory),
            disk: custom.disk.unwrap_or(base.limits.disk),
            timeout: custom.timeout.unwrap_or(base.limits.timeout),
        };
        limits.check()?;
        let network = custom.network.clone().or_else(|| base.network.clone());
        if let Some(network) = &network {
            self.network(network)?;
        }
        self.profiles.insert(name, Profile { limits, network });
        Ok(())
    }

    /// Adds a network, or replaces one that was added before.
    ///
    /// # Errors
    /// The name is built in, or what it says cannot be.
    pub fn add_network(
        &mut self,
        name: NetworkName,
        policy: NetworkPolicy,
    ) -> Result<(), SpecError> {
        if name.is_built_in() {
            return Err(SpecError::Taken {
                kind: "network",
                name: name.to_string(),
            });
        }
        policy.check()?;
        self.networks.insert(name, policy);
        Ok(())
    }
}

fn unknown<N: ToString, T>(kind: &'static str, name: &N, known: &BTreeMap<N, T>) -> SpecError {
    SpecError::Unknown {
        kind,
        name: name.to_string(),
        known: known.keys().map(N::to_string).collect(),
    }
}

impl Limits {
    /// Says whether they can be.
    ///
    /// # Errors
    /// One is out of range.
    pub(super) fn check(&self) -> Result<(), SpecError> {
        let value = |what, value: String, why| Err(SpecError::Value { what, value, why });
        if !(1..=64).contains(&self.vcpus) {
            return value("cpus", self.vcpus.to_string(), "1 to 64 are possible");
        }
        if !(64..=1 << 20).contains(&self.memory.as_mib()) {
            return value("memory", self.memory.to_string(), "64M to 1T are possible");
        }
        if !(64..=16 << 20).contains(&self.disk.as_mib()) {
            return value("disk", self.disk.to_string(), "64M to 16T are possible");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ProfileName {
        text.parse().unwrap()
    }

    #[test]
    fn a_custom_profile_changes_what_it_names() {
        let mut catalog = Catalog::default();
        let custom = CustomProfile {
            base: name("intensive"),
            memory: Some(Bytes::gib(3)),
            ..CustomProfile::default()
        };
        catalog.add_profile(name("big"), &custom).unwrap();
        let Limits {
            vcpus,
            memory,
            disk,
            timeout,
        } = catalog.profile(&name("big")).unwrap().limits;
        assert_eq!((vcpus, memory), (4, Bytes::gib(3)));
        assert_eq!((disk, timeout), (Bytes::gib(40), Timeout::secs(600)));
    }

    #[test]
    fn an_unknown_profile_lists_those_there_are() {
        let mut catalog = Catalog::default();
        catalog
            .add_profile(name("big"), &CustomProfile::default())
            .unwrap();
        let error = catalog.profile(&name("huge")).unwrap_err().to_string();
        for word in ["huge", "big", "light", "standard", "intensive", "isolated"] {
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn profiles_that_cannot_be_are_refused() {
        let mut catalog = Catalog::default();
        let mut add = |text: &str, custom| catalog.add_profile(name(text), &custom).unwrap_err();
        let plain = CustomProfile::default;
        assert_eq!(
            add("light", plain()).to_string(),
            "the profile `light` is built in"
        );
        let base = name("nowhere");
        let error = add("a", CustomProfile { base, ..plain() });
        assert!(error.to_string().contains("nowhere"), "{error}");
        let memory = Some(Bytes::mib(1));
        let error = add("a", CustomProfile { memory, ..plain() });
        assert!(error.to_string().contains("memory"), "{error}");
        let network = Some("lan".parse().unwrap());
        let error = add("a", CustomProfile { network, ..plain() });
        assert!(error.to_string().contains("lan"), "{error}");
    }

    #[test]
    fn a_network_takes_the_name_of_no_mode() {
        let mut catalog = Catalog::default();
        let policy = NetworkPolicy::of_mode(NetworkMode::Isolated);
        let mut add = |text: &str| catalog.add_network(text.parse().unwrap(), policy.clone());
        assert!(add("quiet").is_ok());
        assert!(add("offline").is_err() && add("bridge").is_err());
        assert!(add("isolated").is_err() && add("nat-filtered").is_err());
        let offline = "quiet".parse().unwrap();
        assert_eq!(
            catalog.network(&offline).unwrap().mode,
            NetworkMode::Isolated
        );
    }
}
