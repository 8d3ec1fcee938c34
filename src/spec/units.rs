//! Values that are parsed once and right from then on.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Explain;

/// A value that does not have the form it must have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {expected}")]
pub struct Malformed {
    /// What was given.
    pub value: String,
    /// The form it should have, with an example.
    pub expected: &'static str,
}

impl Explain for Malformed {
    fn code(&self) -> &'static str {
        "value-invalid"
    }

    fn remedy(&self) -> String {
        format!("Give {}.", self.expected)
    }
}

pub(super) fn malformed(value: &str, expected: &'static str) -> Malformed {
    Malformed {
        value: value.to_owned(),
        expected,
    }
}

/// Makes serde go through `FromStr` and `Display`.
macro_rules! as_text {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = Malformed;
            fn try_from(value: String) -> Result<Self, Malformed> {
                value.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    };
}

/// Name of a machine: 1 to 63 of `a-z`, `0-9` and `-`, starting with a letter
/// or digit; it is a host name and a directory name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("pattern" = r"^[a-z0-9][a-z0-9-]{0,62}$")))]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

impl VmId {
    /// A fresh random name such as `vm-1f09c2d4`.
    pub fn random() -> Self {
        let mut bytes = [0; 4];
        crate::spec::fill_random(&mut bytes);
        Self(format!("vm-{:08x}", u32::from_le_bytes(bytes)))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmId {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if (1..=63).contains(&text.len()) && text.chars().all(allowed) && !text.starts_with('-') {
            Ok(Self(text.to_owned()))
        } else {
            Err(malformed(
                text,
                "a machine name (1 to 63 of a-z, 0-9 and -, such as `build-7`)",
            ))
        }
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

as_text!(VmId);

/// A name that is a key in configuration files: a text newtype with `FromStr`,
/// `Display` and serde through them.
macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $expected:literal) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
        )]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[cfg_attr(
            feature = "schema",
            schemars(extend("pattern" = "^[a-z0-9][a-z0-9_-]{0,62}$"))
        )]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = crate::spec::Malformed;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let allowed =
                    |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c);
                let starts_well = !text.starts_with(['_', '-']);
                if (1..=63).contains(&text.len()) && starts_well && text.chars().all(allowed) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(crate::spec::Malformed {
                        value: text.to_owned(),
                        expected: $expected,
                    })
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = crate::spec::Malformed;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}
pub(super) use {as_text, name_type};

/// An amount of memory or disk, in bytes. Parsed from `512M`, `2G`, `2GiB`,
/// `1048576`: units are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("pattern" = r"^[0-9]+(B|[kKmMgGtT]|[KMGT]iB)?$")))]
#[serde(try_from = "String", into = "String")]
pub struct Bytes(pub u64);

impl Bytes {
    /// So many MiB.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// So many GiB.
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }

    /// Whole MiB in it.
    pub const fn as_mib(self) -> u64 {
        self.0 >> 20
    }
}

impl FromStr for Bytes {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let expected = "an amount of bytes such as `512M`, `2G` or `1048576`";
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "" | "B" => 0,
            "k" | "K" | "KiB" => 10,
            "m" | "M" | "MiB" => 20,
            "g" | "G" | "GiB" => 30,
            "t" | "T" | "TiB" => 40,
            _ => return Err(malformed(text, expected)),
        };
        let number: u64 = number.parse().map_err(|_| malformed(text, expected))?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| malformed(text, expected))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

as_text!(Bytes);

/// A time limit. Parsed from `30`, `30s`, `500ms`, `5m`, `2h`; never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("pattern" = r"^[0-9]+(ms|s|m|h)?$")))]
#[serde(try_from = "String", into = "String")]
pub struct Timeout(pub Duration);

impl Timeout {
    /// So many seconds.
    pub const fn secs(count: u64) -> Self {
        Self(Duration::from_secs(count))
    }
}

impl FromStr for Timeout {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let expected = "a time such as `30s`, `500ms`, `5m` or `2h`";
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let millis: u64 = match unit {
            "ms" => 1,
            "" | "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(malformed(text, expected)),
        };
        let number: u64 = number.parse().map_err(|_| malformed(text, expected))?;
        match number.checked_mul(millis) {
            Some(ms @ 1..) => Ok(Self(Duration::from_millis(ms))),
            _ => Err(malformed(text, expected)),
        }
    }
}

impl fmt::Display for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        if ms.is_multiple_of(1000) {
            write!(f, "{}s", ms / 1000)
        } else {
            write!(f, "{ms}ms")
        }
    }
}

as_text!(Timeout);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whatever is accepted reads the same after a round trip, also through
    /// JSON, and what is refused is refused alike.
    fn comes_back<T>(text: &str) -> Result<(), TestCaseError>
    where
        T: FromStr<Err = Malformed> + fmt::Display + fmt::Debug + PartialEq,
        T: Serialize + serde::de::DeserializeOwned,
    {
        let json = serde_json::to_string(text).unwrap();
        match text.parse::<T>() {
            Ok(value) => {
                prop_assert_eq!(&value.to_string().parse::<T>().unwrap(), &value);
                let kept = serde_json::to_string(&value).unwrap();
                prop_assert_eq!(&serde_json::from_str::<T>(&kept).unwrap(), &value);
                prop_assert_eq!(&serde_json::from_str::<T>(&json).unwrap(), &value);
            }
            Err(_) => prop_assert!(serde_json::from_str::<T>(&json).is_err()),
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn any_text_comes_back_or_is_refused(text in "[ -~]{0,8}|\\PC{0,12}") {
            comes_back::<VmId>(&text)?;
            comes_back::<Bytes>(&text)?;
            comes_back::<Timeout>(&text)?;
        }

        #[test]
        fn names_come_back(text in "[a-z0-9][a-z0-9-]{0,62}") {
            let name: VmId = text.parse().unwrap();
            prop_assert_eq!(name.as_str(), &text);
            comes_back::<VmId>(&text)?;
        }

        #[test]
        fn numbers_with_units_come_back(
            number in prop_oneof![any::<u64>(), 0..10_000_u64],
            unit in "|B|[kKmMgGtT](iB)?|ms|s|m|h|d",
        ) {
            let text = format!("{number}{unit}");
            comes_back::<Bytes>(&text)?;
            comes_back::<Timeout>(&text)?;
        }

        #[test]
        fn any_amount_has_a_name(bytes in prop_oneof![
            any::<u64>(),
            (any::<u32>(), 0..32_u32).prop_map(|(number, shift)| u64::from(number) << shift),
        ]) {
            prop_assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }

        #[test]
        fn any_time_has_a_name(millis in 1..u64::MAX / 1000) {
            let timeout = Timeout(Duration::from_millis(millis));
            prop_assert_eq!(timeout.to_string().parse(), Ok(timeout));
        }
    }

    #[test]
    fn machine_names() {
        for good in ["a", "build-7", &"x".repeat(63)] {
            assert_eq!(good.parse::<VmId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "A", "a_b", "a/b", "..", &"x".repeat(64)] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
        assert_ne!(VmId::random(), VmId::random());
    }

    #[test]
    fn amounts() {
        assert_eq!("512M".parse(), Ok(Bytes::mib(512)));
        assert_eq!("2GiB".parse(), Ok(Bytes::gib(2)));
        assert_eq!("7".parse(), Ok(Bytes(7)));
        for bad in ["", "M", "-1", "1.5G", "2X", "99999999999T"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
        for amount in [0, 1, 1024, 1536, 3 << 30] {
            assert_eq!(Bytes(amount).to_string().parse(), Ok(Bytes(amount)));
        }
    }

    #[test]
    fn times() {
        assert_eq!("5m".parse(), Ok(Timeout::secs(300)));
        assert_eq!("500ms".parse(), Ok(Timeout(Duration::from_millis(500))));
        for bad in ["", "0", "0s", "1d", "-1s", "s"] {
            assert!(bad.parse::<Timeout>().is_err(), "{bad}");
        }
        assert_eq!(Timeout::secs(90).to_string(), "90s");
    }
}
