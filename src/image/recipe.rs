//! What a built image consists of, as data.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

const BUILT_IN: &[(&str, &str)] = &[
    ("base", include_str!("../../images/base/image.toml")),
    ("default", include_str!("../../images/default/image.toml")),
];

/// A recipe for [`Builder::from_recipe`](super::Builder::from_recipe).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// One line about the image.
    pub description: String,
    /// Debian suite; this host's apt sources must have it.
    pub suite: String,
    /// Packages to begin with.
    pub variant: Variant,
    /// Packages to add, without what they only recommend.
    #[serde(default)]
    pub packages: Vec<String>,
    /// The package that depends on the suite's current kernel.
    pub kernel: String,
    /// Leave documentation and translations out; licences stay.
    #[serde(default = "yes")]
    pub trim: bool,
}

/// Packages a root file system begins with (mmdebstrap(1), VARIANTS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// What dpkg itself needs.
    Essential,
    /// That and apt.
    Apt,
    /// Everything of priority "required", and apt.
    Minbase,
}

impl Variant {
    /// As mmdebstrap spells it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Essential => "essential",
            Self::Apt => "apt",
            Self::Minbase => "minbase",
        }
    }
}

fn yes() -> bool {
    true
}

impl Recipe {
    /// Names of the built-in recipes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// A built-in recipe.
    ///
    /// # Errors
    /// [`Error::RecipeValue`] when there is none of this name.
    pub fn built_in(name: &str) -> Result<Self> {
        let path = PathBuf::from(name);
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::parse(text, &path),
            None => Err(Error::RecipeValue {
                path,
                reason: "there is no built-in recipe of this name: name its file with \
                         `--recipe FILE`"
                    .into(),
            }),
        }
    }

    /// The recipe in a file.
    ///
    /// # Errors
    /// What reading can give, an unknown key, or a value that cannot be used.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|source| Error::io("read", path, source))?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let recipe: Self = toml::from_str(text).map_err(|source| Error::Recipe {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let words = recipe
            .packages
            .iter()
            .chain([&recipe.kernel, &recipe.suite]);
        for word in words {
            // They become arguments of apt and mmdebstrap.
            if !is_package_name(word) {
                return Err(Error::RecipeValue {
                    path: path.to_owned(),
                    reason: format!("\"{word}\" is not a name apt could know"),
                });
            }
        }
        Ok(recipe)
    }
}

/// Debian policy, section 5.6.7.
fn is_package_name(text: &str) -> bool {
    text.len() >= 2
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'+' | b'-' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_recipes_are_good() {
        for name in Recipe::names() {
            Recipe::built_in(name).unwrap();
        }
    }

    #[test]
    fn mistakes_are_named() {
        let good = BUILT_IN[0].1;
        let parse = |text: &str| Recipe::parse(text, Path::new("r.toml")).unwrap_err();
        let source = |error: Error| std::error::Error::source(&error).unwrap().to_string();
        let unknown = source(parse(&format!("{good}\npackagse = []\n")));
        assert!(
            unknown.contains("packagse") && unknown.contains("line"),
            "{unknown}"
        );
        let option = parse(&good.replace("kernel = \"", "kernel = \"--x"));
        assert!(matches!(option, Error::RecipeValue { .. }), "{option}");
    }
}
