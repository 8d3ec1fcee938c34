//! Ports of the host that lead to services in a machine.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::Request;

use super::MachineError;
use crate::guest::{Channel, GuestError};
use crate::net::{Connections, Serving, forward};
use crate::spec::Publish;

/// How long the guest may take to answer a connection.
const ANSWER: Duration = Duration::from_secs(30);

/// Listens at all of them, before there is a machine to lead to.
///
/// # Errors
/// One cannot be listened at.
pub(crate) fn bind(publish: &[Publish]) -> Result<Vec<(Publish, TcpListener)>, MachineError> {
    let bind = |&publish: &Publish| {
        let listener = TcpListener::bind(publish.listen);
        match listener {
            Ok(listener) => Ok((publish, listener)),
            Err(source) => Err(MachineError::Publish { publish, source }),
        }
    };
    publish.iter().map(bind).collect()
}

/// Ports of the host that lead to a machine, for as long as this lives.
#[derive(Debug, Default)]
pub(crate) struct Published {
    _serving: Vec<Serving>,
    connections: Arc<Connections>,
}

impl Published {
    /// Connections to all of them.
    pub(crate) fn connections(&self) -> &Connections {
        &self.connections
    }
}

/// Leads what was listened at to the guest, for as long as what it gives lives.
///
/// # Errors
/// A listener cannot be watched.
pub(crate) fn serve(
    bound: Vec<(Publish, TcpListener)>,
    channel: &Channel,
) -> Result<Published, MachineError> {
    let connections = Arc::new(Connections::default());
    let serve = |(publish, listener): (Publish, TcpListener)| {
        let (channel, port) = (channel.clone(), publish.port);
        let connect = move || connect(channel.clone(), port);
        let told = move |error: GuestError| {
            tracing::debug!("a connection to {publish} did not come about: {error}");
        };
        forward(listener, connect, told, Arc::clone(&connections))
            .map_err(|source| MachineError::Publish { publish, source })
    };
    let serving: Result<_, _> = bound.into_iter().map(serve).collect();
    Ok(Published {
        _serving: serving?,
        connections,
    })
}

async fn connect(channel: Channel, port: u16) -> Result<crate::guest::Stream, GuestError> {
    let what = format!("connect to port {port}");
    let asked = async {
        let mut stream = channel.open(&Request::Connect { port }).await?;
        stream.started(&what).await?;
        Ok(stream)
    };
    let after = ANSWER;
    let late = |_| GuestError::Timeout {
        what: what.clone(),
        after,
    };
    tokio::time::timeout(ANSWER, asked).await.map_err(late)?
}
