//! Asking the host's resolvers.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use crate::net::outgoing::Outgoing;

/// Largest answer over UDP that is asked for (DNS flag day 2020).
const UDP_SIZE: u16 = 1232;
/// How long one upstream is waited for before the next is asked.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Packets that are not the answer, after which a try is given up: somebody
/// is guessing.
const STRAY: usize = 32;

/// Why no upstream gave an answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    /// There is nobody to ask.
    #[error("no resolver is known to ask")]
    None,
    /// Nobody answered in time.
    #[error("no resolver answered within {} s", .0.as_secs_f32())]
    Slow(Duration),
    /// It could not be asked.
    #[error("cannot ask the resolver {address}")]
    Io {
        /// Whom.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It answered, but not with what can be used.
    #[error("the resolver {address} gave no usable answer: {why}")]
    Answer {
        /// Who.
        address: SocketAddr,
        /// What is wrong.
        why: String,
    },
}

/// The resolvers that questions are forwarded to.
#[derive(Debug)]
pub(super) struct Upstreams {
    all: Vec<SocketAddr>,
    from: Outgoing,
    /// The one that answered last.
    first: AtomicUsize,
    deadline: Duration,
}

impl Upstreams {
    pub(super) fn new(all: Vec<SocketAddr>, from: Outgoing, deadline: Duration) -> Self {
        let first = AtomicUsize::new(0);
        Self {
            all,
            from,
            first,
            deadline,
        }
    }

    /// The answer to one question, from the first upstream that gives one.
    pub(super) async fn ask(&self, query: &Query) -> Result<Message, UpstreamError> {
        let late = |_| UpstreamError::Slow(self.deadline);
        let end = Instant::now() + self.deadline;
        tokio::time::timeout_at(end, self.try_all(query, end))
            .await
            .map_err(late)?
    }

    async fn try_all(&self, query: &Query, end: Instant) -> Result<Message, UpstreamError> {
        let first = self.first.load(Ordering::Relaxed);
        let mut last = UpstreamError::None;
        // Lost packets happen: everybody is asked twice.
        for number in 0..self.all.len() * 2 {
            let index = (first + number) % self.all.len();
            let address = self.all[index];
            let patience = end.min(Instant::now() + PATIENCE);
            let attempt = tokio::time::timeout_at(patience, self.exchange(address, query)).await;
            match attempt {
                Ok(Ok(answer)) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(error)) => last = error,
                Err(_) => last = UpstreamError::Slow(self.deadline),
            }
        }
        Err(last)
    }

    /// One question to one upstream: over UDP, and over TCP when the answer is cut.
    async fn exchange(&self, address: SocketAddr, query: &Query) -> Result<Message, UpstreamError> {
        let failed = |source| UpstreamError::Io { address, source };
        let wrong = |why: String| UpstreamError::Answer { address, why };
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(query.clone());
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_SIZE);
        message.set_edns(edns);
        let bytes = message.to_vec().map_err(|error| wrong(error.to_string()))?;
        let answer = over_udp(&self.from, address, &bytes, &message)
            .await
            .map_err(failed)?;
        let Some(answer) = answer else {
            return Err(wrong("packets that answer something else".into()));
        };
        let answer = if answer.metadata.truncation {
            let bytes = over_tcp(&self.from, address, &bytes)
                .await
                .map_err(failed)?;
            let answer = Message::from_vec(&bytes).map_err(|error| wrong(error.to_string()))?;
            if !answers(&answer, &message) {
                return Err(wrong("over TCP it answers something else".into()));
            }
            answer
        } else {
            answer
        };
        match answer.metadata.response_code {
            ResponseCode::NoError | ResponseCode::NXDomain => Ok(answer),
            other => Err(wrong(other.to_string())),
        }
    }
}

/// A socket of its own for each question has a port that cannot be guessed,
/// and takes packets from the upstream only.
async fn over_udp(
    from: &Outgoing,
    address: SocketAddr,
    bytes: &[u8],
    question: &Message,
) -> io::Result<Option<Message>> {
    let socket = from.packets(address).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; 4096];
    for _ in 0..STRAY {
        let length = socket.recv(&mut buffer).await?;
        // What does not decode may be a forgery as well; the answer may follow.
        if let Ok(answer) = Message::from_vec(&buffer[..length])
            && answers(&answer, question)
        {
            return Ok(Some(answer));
        }
    }
    Ok(None)
}

async fn over_tcp(from: &Outgoing, address: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = from.connect(address).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes(), bytes].concat())
        .await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

/// Whether `answer` is one to `question`.
fn answers(answer: &Message, question: &Message) -> bool {
    let (theirs, ours) = (&answer.metadata, &question.metadata);
    theirs.message_type == MessageType::Response
        && theirs.id == ours.id
        && theirs.op_code == OpCode::Query
        && answer.queries == question.queries
}
