//! Events of a monitor, kept raw so that an unknown one does no harm.

use std::{sync::Arc, time::Duration};

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::broadcast::{self, error::RecvError};

use super::{
    error::{Peer, QmpError},
    transport::Shared,
};

/// Something happened in the peer.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Name, such as `SHUTDOWN`; see QEMU's QMP reference.
    pub name: String,
    /// Its data; `Null` when it has none.
    pub data: Value,
    /// Host time since the Unix epoch, where QEMU could tell.
    pub timestamp: Option<Duration>,
}

impl Event {
    /// The data as a type of the caller's.
    ///
    /// # Errors
    /// The data has another shape.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, QmpError> {
        T::deserialize(&self.data).map_err(|source| QmpError::Decode {
            peer: Peer::Monitor,
            command: self.name.clone(),
            source,
        })
    }
}

/// The events of one connection, from the moment of subscription on.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    shared: Arc<Shared>,
}

impl Events {
    pub(super) fn new(receiver: broadcast::Receiver<Event>, shared: Arc<Shared>) -> Self {
        Self { receiver, shared }
    }

    /// Waits for the next event. Safe to cancel.
    ///
    /// # Errors
    /// [`QmpError::EventsLost`] when this reader was too slow: the next call
    /// goes on behind the gap. [`QmpError::NoMoreEvents`] at the end.
    pub async fn next(&mut self) -> Result<Event, QmpError> {
        let peer = self.shared.peer();
        self.receiver.recv().await.map_err(|error| match error {
            RecvError::Lagged(count) => QmpError::EventsLost { peer, count },
            RecvError::Closed => QmpError::NoMoreEvents {
                peer,
                source: self.shared.end(),
            },
        })
    }

    /// Waits for an event of this name whose data satisfies `wanted`, and
    /// discards the others.
    ///
    /// # Errors
    /// Nothing matching within `timeout`, the connection's end, or a gap that
    /// may have held the event.
    pub async fn wait_for(
        &mut self,
        name: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Event, QmpError> {
        let matching = async {
            loop {
                let event = self.next().await?;
                if event.name == name && wanted(&event.data) {
                    return Ok(event);
                }
            }
        };
        match tokio::time::timeout(timeout, matching).await {
            Ok(result) => result,
            Err(_) => Err(QmpError::NoEvent {
                peer: Peer::Monitor,
                event: name.to_owned(),
                after: timeout,
            }),
        }
    }
}
