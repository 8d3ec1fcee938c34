//! Code given as a file or on stdin, and the interpreter that runs it.

use serde::{Deserialize, Serialize};

use super::error::SpecError;

/// A script and what runs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// File name it gets in the guest.
    pub name: String,
    /// Program and arguments that take the script's path as the next argument;
    /// empty when the script's own `#!` line is used.
    pub interpreter: Vec<String>,
    /// Its text.
    pub content: Vec<u8>,
}

impl Script {
    /// Largest script accepted, in bytes.
    pub const MAX: usize = 16 << 20;

    /// Picks the interpreter: the `#!` line, else the extension of `name`.
    ///
    /// # Errors
    /// Neither says how to run it, the script is empty or too large.
    pub fn new(name: &str, content: Vec<u8>) -> Result<Self, SpecError> {
        let refuse = |why: &str| SpecError::Script {
            name: name.to_owned(),
            why: why.to_owned(),
        };
        if content.is_empty() {
            return Err(refuse("it is empty"));
        }
        if content.len() > Self::MAX {
            return Err(refuse("it is larger than 16 MiB"));
        }
        let base = name.rsplit('/').next().unwrap_or(name).to_owned();
        let base = if base.is_empty() || base == "-" {
            "script".to_owned()
        } else {
            base
        };
        let interpreter = if content.starts_with(b"#!") {
            Vec::new()
        } else {
            let extension = base.rsplit_once('.').map_or("", |(_, extension)| extension);
            let words: &[&str] = match extension {
                "py" => &["python3"],
                "js" | "mjs" | "cjs" => &["node"],
                "sh" => &["sh"],
                "bash" => &["bash"],
                "pl" => &["perl"],
                _ => return Err(refuse("it has neither a `#!` line nor a known extension")),
            };
            words.iter().map(|word| (*word).to_owned()).collect()
        };
        Ok(Self {
            name: base,
            interpreter,
            content,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interpreter(name: &str, content: &str) -> Result<Vec<String>, SpecError> {
        Script::new(name, content.as_bytes().to_vec()).map(|script| script.interpreter)
    }

    #[test]
    fn shebang_wins_over_extension() {
        assert_eq!(
            interpreter("a.py", "#!/bin/sh\n").unwrap(),
            Vec::<String>::new()
        );
        assert_eq!(interpreter("dir/a.py", "print()").unwrap(), ["python3"]);
        assert_eq!(interpreter("a.mjs", "1").unwrap(), ["node"]);
    }

    #[test]
    fn unknown_scripts_are_refused() {
        assert!(interpreter("-", "print()").is_err());
        assert!(interpreter("a.xyz", "print()").is_err());
        assert!(interpreter("a.py", "").is_err());
    }
}
