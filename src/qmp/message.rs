//! The lines a monitor or guest agent sends, bounded and told apart.

use std::time::Duration;

use serde_json::{Map, Value};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use super::{
    error::{ConnectionEnd, quote},
    event::Event,
};

/// Longest event, in bytes. Real ones stay under 2 KiB; events are kept for
/// slow readers, so a larger one is dropped.
const MAX_EVENT: usize = 16 * 1024;

/// One message from the peer.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    /// The answer to the command with this id.
    Reply {
        /// As sent; `None` when the peer could not tell.
        id: Option<u64>,
        /// What came back.
        result: Result<Value, Refusal>,
    },
    /// Something happened.
    Event(Event),
    /// Well-formed, but of no kind we know.
    Other(Map<String, Value>),
}

/// Why a command was refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Error class.
    pub(super) class: String,
    /// In the peer's words.
    pub(super) description: String,
}

impl Message {
    /// Reads one line. `Ok(None)` for an empty line or an oversized event.
    pub(super) fn parse(line: &[u8]) -> Result<Option<Self>, ConnectionEnd> {
        if line.trim_ascii().is_empty() {
            return Ok(None);
        }
        let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else {
            return Err(garbage(line));
        };
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(value) = object.remove("return") {
            let result = Ok(value);
            return Ok(Some(Self::Reply { id, result }));
        }
        if let Some(error) = object.get("error") {
            let text = |key| quote(error[key].as_str().unwrap_or_default());
            let result = Err(Refusal {
                class: text("class"),
                description: text("desc"),
            });
            return Ok(Some(Self::Reply { id, result }));
        }
        let Some(Value::String(name)) = object.remove("event") else {
            return Ok(Some(Self::Other(object)));
        };
        if line.len() > MAX_EVENT {
            tracing::warn!(bytes = line.len(), "dropped an oversized event");
            return Ok(None);
        }
        let event = Event {
            name,
            data: object.remove("data").unwrap_or_default(),
            timestamp: timestamp(&object),
        };
        Ok(Some(Self::Event(event)))
    }
}

/// The error for a line that is not a JSON object.
pub(super) fn garbage(line: &[u8]) -> ConnectionEnd {
    let start = &line[..line.len().min(64)];
    ConnectionEnd::Garbage(quote(&String::from_utf8_lossy(start)))
}

/// QEMU writes -1 where it could not read the clock.
fn timestamp(event: &Map<String, Value>) -> Option<Duration> {
    let timestamp = event.get("timestamp")?;
    let part = |name: &str| timestamp.get(name).and_then(Value::as_u64);
    let seconds = Duration::from_secs(part("seconds")?);
    seconds.checked_add(Duration::from_micros(part("microseconds")?))
}

/// Splits a stream into lines of bounded length.
pub(super) struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    limit: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of `reader`, of at most `limit` bytes each.
    pub(super) fn new(reader: R, limit: usize) -> Self {
        Self {
            reader: BufReader::new(reader),
            line: Vec::new(),
            limit,
        }
    }

    /// The next line without its end. Not safe to cancel.
    pub(super) async fn next(&mut self) -> Result<&[u8], ConnectionEnd> {
        self.line.clear();
        // One huge reply must not hold its memory for the machine's lifetime.
        self.line.shrink_to(64 * 1024);
        loop {
            let chunk = self.reader.fill_buf().await?;
            if chunk.is_empty() {
                return Err(match self.line.trim_ascii() {
                    [] => ConnectionEnd::Closed,
                    _ => ConnectionEnd::Truncated,
                });
            }
            let end = chunk.iter().position(|&byte| byte == b'\n');
            let part = &chunk[..end.unwrap_or(chunk.len())];
            if self.line.len() + part.len() > self.limit {
                return Err(ConnectionEnd::TooLong(self.limit));
            }
            self.line.extend_from_slice(part);
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                return Ok(&self.line);
            }
        }
    }

    /// Discards everything up to and including `sentinel`. Not safe to cancel.
    pub(super) async fn skip_past(&mut self, sentinel: u8) -> Result<(), ConnectionEnd> {
        loop {
            let chunk = self.reader.fill_buf().await?;
            if chunk.is_empty() {
                return Err(ConnectionEnd::Closed);
            }
            let found = chunk.iter().position(|&byte| byte == sentinel);
            let used = found.map_or(chunk.len(), |at| at + 1);
            self.reader.consume(used);
            if found.is_some() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Message {
        Message::parse(line.as_bytes()).unwrap().unwrap()
    }

    #[test]
    fn tells_messages_apart() {
        assert_eq!(
            parse(r#"{"return": null, "id": 3}"#),
            Message::Reply {
                id: Some(3),
                result: Ok(Value::Null)
            }
        );
        let Message::Reply { id, result } =
            parse(r#"{"error": {"class": "NewClass", "desc": "no\u001b"}}"#)
        else {
            panic!("not a reply");
        };
        assert_eq!(id, None);
        assert_eq!(
            result.unwrap_err(),
            Refusal {
                class: "NewClass".into(),
                description: "no\\u{1b}".into()
            }
        );
        assert!(matches!(parse(r#"{"news": 1}"#), Message::Other(_)));
    }

    #[test]
    fn reads_events_with_and_without_a_clock() {
        let event = |seconds: &str| {
            parse(&format!(
                r#"{{"event": "NEVER_SEEN", "data": {{"a": 1}},
                "timestamp": {{"seconds": {seconds}, "microseconds": 5}}}}"#
            ))
        };
        let expected = |timestamp| {
            Message::Event(Event {
                name: "NEVER_SEEN".into(),
                data: serde_json::json!({"a": 1}),
                timestamp,
            })
        };
        assert_eq!(event("2"), expected(Some(Duration::new(2, 5_000))));
        assert_eq!(event("-1"), expected(None));
        assert_eq!(
            event(&u64::MAX.to_string()),
            expected(Some(Duration::new(u64::MAX, 5_000)))
        );
    }

    #[test]
    fn drops_oversized_events_and_refuses_garbage() {
        let big = format!(r#"{{"event": "X", "data": "{}"}}"#, "x".repeat(MAX_EVENT));
        assert_eq!(Message::parse(big.as_bytes()).unwrap(), None);
        for line in ["nonsense", "[1]", "\u{1}", "{\"a\":"] {
            assert!(Message::parse(line.as_bytes()).is_err(), "{line}");
        }
        assert!(Message::parse(&[b'['; 100_000]).is_err());
    }

    #[tokio::test]
    async fn lines_are_bounded() {
        let mut lines = Lines::new(&b"12345678\r\n123456789\n"[..], 9);
        assert_eq!(lines.next().await.unwrap(), b"12345678\r");
        assert_eq!(lines.next().await.unwrap(), b"123456789");
        assert!(matches!(lines.next().await, Err(ConnectionEnd::Closed)));
        let mut lines = Lines::new(&b"1234567890\n"[..], 9);
        assert!(matches!(lines.next().await, Err(ConnectionEnd::TooLong(9))));
        let mut lines = Lines::new(&b"{\"ret"[..], 9);
        assert!(matches!(lines.next().await, Err(ConnectionEnd::Truncated)));
    }
}
