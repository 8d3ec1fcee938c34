//! What can go wrong on a monitor or guest agent connection.

use std::{fmt, io, sync::Arc, time::Duration};

use crate::error::Explain;

/// Longest text of the peer that is repeated in an error, in characters.
const MAX_QUOTE: usize = 512;

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The QMP monitor of a QEMU process.
    Monitor,
    /// qemu-guest-agent inside a guest.
    GuestAgent,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Monitor => "QEMU's monitor",
            Self::GuestAgent => "qemu-guest-agent",
        })
    }
}

/// Why a connection is over. Every command still waiting gets a copy.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectionEnd {
    /// End of stream between two messages.
    #[error("the other end closed it")]
    Closed,
    /// End of stream inside a message.
    #[error("the other end closed it in the middle of a message")]
    Truncated,
    /// Reading or writing failed.
    #[error("its socket failed: {0}")]
    Io(Arc<io::Error>),
    /// A message had no end within the limit, in bytes.
    #[error("a message was longer than {0} bytes")]
    TooLong(usize),
    /// A line was not a JSON object; its start is quoted.
    #[error("it sent something that is not a message: `{0}`")]
    Garbage(String),
    /// The last handle on this side was dropped.
    #[error("this side dropped it")]
    Dropped,
}

impl From<io::Error> for ConnectionEnd {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // A Unix socket says so when the peer died with input unread.
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Io(Arc::new(error)),
        }
    }
}

/// A command, or the connection it needed, failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The connection was not ready in time.
    #[error("{peer} did not greet within {after:?}")]
    Greeting {
        /// Who should have.
        peer: Peer,
        /// How long it was given.
        after: Duration,
    },
    /// The first message was not the greeting of a monitor.
    #[error("the socket does not lead to {peer}: it said `{said}`")]
    Stranger {
        /// Who should have been there.
        peer: Peer,
        /// Start of what came instead.
        said: String,
    },
    /// The peer understood the command and refused it.
    #[error("{peer} refused `{command}`: {description} ({class})")]
    Refused {
        /// Who refused.
        peer: Peer,
        /// The command.
        command: String,
        /// QEMU's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// The peer's own words, control characters escaped, shortened.
        description: String,
    },
    /// No reply in time. The command may still take effect.
    #[error("{peer} did not answer `{command}` within {after:?}")]
    Timeout {
        /// Who should have.
        peer: Peer,
        /// The command.
        command: String,
        /// How long it was given.
        after: Duration,
    },
    /// The connection was over before the reply came.
    #[error("the connection to {peer} ended before `{command}` was answered")]
    Closed {
        /// Who was at the other end.
        peer: Peer,
        /// The command.
        command: String,
        /// Why it is over.
        #[source]
        source: ConnectionEnd,
    },
    /// The connection was over while waiting for events.
    #[error("the connection to {peer} ended while waiting for its events")]
    NoMoreEvents {
        /// Who was at the other end.
        peer: Peer,
        /// Why it is over.
        #[source]
        source: ConnectionEnd,
    },
    /// Events came faster than they were taken. Later ones still come.
    #[error("{count} events of {peer} were lost: they came faster than they were taken")]
    EventsLost {
        /// Whose events.
        peer: Peer,
        /// How many.
        count: u64,
    },
    /// No matching event in time.
    #[error("{peer} sent no {event} event within {after:?}")]
    NoEvent {
        /// Who should have.
        peer: Peer,
        /// Name of the event.
        event: String,
        /// How long was waited.
        after: Duration,
    },
    /// The arguments cannot be written as a JSON object.
    #[error("the arguments of `{command}` cannot be sent to {peer}")]
    Encode {
        /// Who should have got them.
        peer: Peer,
        /// The command.
        command: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The reply, or an event's data, has another shape than expected.
    #[error("what {peer} answered to `{command}` cannot be understood")]
    Decode {
        /// Who answered.
        peer: Peer,
        /// The command or event.
        command: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl QmpError {
    /// Whether the peer does not know the command at all.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }

    /// Whether the connection is over.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::NoMoreEvents { .. })
    }
}

impl Explain for QmpError {
    fn code(&self) -> &'static str {
        match self {
            Self::Greeting { .. } => "qmp-no-greeting",
            Self::Stranger { .. } => "qmp-stranger",
            Self::Refused { .. } if self.is_unknown_command() => "qmp-unknown-command",
            Self::Refused { .. } => "qmp-refused",
            Self::Timeout { .. } => "qmp-timeout",
            Self::Closed { .. } | Self::NoMoreEvents { .. } => "qmp-closed",
            Self::EventsLost { .. } => "qmp-events-lost",
            Self::NoEvent { .. } => "qmp-no-event",
            Self::Encode { .. } => "qmp-encode",
            Self::Decode { .. } => "qmp-decode",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Greeting {
                peer: Peer::GuestAgent,
                ..
            } => "check that the image carries qemu-guest-agent and that it is running".into(),
            Self::Stranger { .. } => {
                "give the socket of a chardev that has `-mon mode=control`".into()
            }
            Self::Refused { command, .. } if self.is_unknown_command() => {
                format!(
                    "use a version that offers `{command}`; `bulkhead doctor` names what is missing"
                )
            }
            Self::Refused { .. } => "correct what the message names, then try again".into(),
            Self::Greeting { .. } | Self::Timeout { .. } | Self::NoEvent { .. } => {
                "look at the machine's console and at the host's load, or allow more time".into()
            }
            Self::Closed { .. } | Self::NoMoreEvents { .. } => {
                "look at QEMU's error output and exit status for the reason it ended".into()
            }
            Self::EventsLost { .. } => "query the state again instead of relying on events".into(),
            Self::Encode { .. } | Self::Decode { .. } => {
                "report this, with the QEMU version: Bulkhead and this QEMU disagree on the format"
                    .into()
            }
        }
    }
}

/// Text of the peer as it may be shown: no control characters, bounded.
pub(super) fn quote(text: &str) -> String {
    let mut shown = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == MAX_QUOTE {
            shown.push('…');
            break;
        }
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_are_printable_and_bounded() {
        assert_eq!(quote("a\u{1b}[31m\n"), "a\\u{1b}[31m\\n");
        assert_eq!(quote(&"x".repeat(10_000)).chars().count(), MAX_QUOTE + 1);
    }

    #[test]
    fn a_dead_peer_is_an_end_and_not_a_socket_failure() {
        let end = ConnectionEnd::from(io::Error::from(io::ErrorKind::ConnectionReset));
        assert!(matches!(end, ConnectionEnd::Closed));
    }
}
