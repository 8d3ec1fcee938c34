//! What can go wrong between host and guest agent.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::{Failure, FailureKind, FrameError};

use crate::error::Explain;

/// The guest agent did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GuestError {
    /// The stream of bytes broke.
    #[error("the channel to the guest agent broke while {action}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The other end closed it.
    #[error("the guest agent closed the channel")]
    Closed,
    /// The guest broke the rules of the protocol.
    #[error("the guest agent broke the protocol: {0}")]
    Protocol(String),
    /// Another version of the messages.
    #[error("the image's guest agent speaks version {theirs} of the messages, this program {ours}")]
    Version {
        /// Ours.
        ours: u16,
        /// The guest's.
        theirs: u16,
    },
    /// No answer in time.
    #[error("the guest did not {what} within {}", crate::spec::Timeout(*.after))]
    Timeout {
        /// What it was asked.
        what: String,
        /// How long it was given.
        after: Duration,
    },
    /// It refused, or tried and failed.
    #[error("the guest could not {what}: {}", .failure.message)]
    Refused {
        /// What it was asked.
        what: String,
        /// Its answer.
        failure: Failure,
    },
    /// What is asked for does not fit into one frame.
    #[error(
        "{what} is too large to be sent: {size} bytes, {} are possible",
        bulkhead_agent::MAX_PAYLOAD
    )]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
    },
}

impl From<FrameError> for GuestError {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl Explain for GuestError {
    fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } | Self::Closed => "channel-lost",
            Self::Protocol(_) => "channel-protocol",
            Self::Version { .. } => "agent-version",
            Self::Timeout { .. } => "agent-silent",
            Self::TooLarge { .. } => "request-too-large",
            Self::Refused { failure, .. } => match failure.kind {
                FailureKind::NotFound => "command-not-found",
                FailureKind::NotExecutable => "command-not-executable",
                FailureKind::NoUser => "guest-user-unknown",
                FailureKind::NoSpace => "guest-disk-full",
                FailureKind::Invalid => "guest-refused",
                FailureKind::System => "guest-failed",
            },
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Io { .. } | Self::Closed | Self::Timeout { .. } => {
                "Look at the console's last lines; give the machine more memory with --memory if it ran out."
            }
            Self::Protocol(_) => "Do not trust this machine any more; start a new one.",
            Self::Version { .. } => "Build the image again with `bulkhead image build`.",
            Self::TooLarge { .. } => "Shorten the arguments or environment, or pass them in a file.",
            Self::Refused { failure, .. } => match failure.kind {
                FailureKind::NotFound => "Check the name, or use an image that has the program.",
                FailureKind::NotExecutable => "Make the file executable, or start it through its interpreter.",
                FailureKind::NoUser => "Name a user of the image, a numeric id, or root.",
                FailureKind::NoSpace => "Give the machine a larger disk with --disk.",
                FailureKind::Invalid | FailureKind::System => "Correct what was asked for as the message says.",
            },
        }
        .into()
    }
}
