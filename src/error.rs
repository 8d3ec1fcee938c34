//! What every error of this crate can tell a user.

use crate::text::visible;

/// An error that names its cause and its cure.
///
/// Each module has its own error enum; all of them implement this, so that the
/// command line and a service can print `{code, what, cause, remedy}` for any.
pub trait Explain: std::error::Error {
    /// Stable, kebab-case identifier, for scripts: `image-not-found`.
    fn code(&self) -> &'static str;
    /// What the user can do next, one imperative sentence.
    fn remedy(&self) -> String;
    /// The system call that QEMU was ended for, where that is the error.
    fn system_call(&self) -> Option<&str> {
        None
    }
    /// What another process of ours told of a failure there, where the error is
    /// that; it is passed on as it came.
    fn told(&self) -> Option<&Report> {
        None
    }
}

/// An [`Explain`] error as plain data, with nothing in it that steers a
/// terminal: causes quote guests, images and files.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Report {
    /// Stable identifier.
    pub code: String,
    /// What failed, on which object.
    pub what: String,
    /// Why: the chain of sources, outermost first; empty when `what` says it all.
    pub cause: String,
    /// What to do next.
    pub remedy: String,
    /// The system call that QEMU was ended for, as `socket(2)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_call: Option<Box<str>>,
}

/// What a verb with `--json` prints on stderr when it fails.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Failed {
    /// What failed, and why.
    pub error: Report,
}

impl Report {
    /// Flattens an error and its sources.
    pub fn of(error: &dyn Explain) -> Self {
        if let Some(report) = error.told() {
            return report.clone();
        }
        let mut cause = Vec::new();
        let mut source = error.source();
        while let Some(inner) = source {
            let text = inner.to_string();
            // `#[error(transparent)]`-like chains repeat themselves.
            if cause.last() != Some(&text) {
                cause.push(text);
            }
            source = inner.source();
        }
        Self {
            code: error.code().to_owned(),
            what: visible(&error.to_string()),
            cause: visible(&cause.join(": ")),
            remedy: visible(&error.remedy()),
            system_call: error.system_call().map(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_do_not_steer_a_terminal() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot use \u{1b}]0;x\u{7}\nhere")]
        struct Hostile(#[source] std::io::Error);
        impl Explain for Hostile {
            fn code(&self) -> &'static str {
                "hostile"
            }
            fn remedy(&self) -> String {
                "Rename \u{9b}2J.".into()
            }
        }
        let report = Report::of(&Hostile(std::io::Error::other("no `\u{7f}`\u{202e}")));
        assert_eq!(report.what, "cannot use \\u{1b}]0;x\\u{7}\nhere");
        assert_eq!(report.cause, "no `\\u{7f}`\\u{202e}");
        assert_eq!(report.remedy, "Rename \\u{9b}2J.");
    }
}
