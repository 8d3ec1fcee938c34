//! A stream of the guest carried to a client of the supervisor, or to none.

use std::time::Duration;

use bulkhead_agent::{Control, Exit, Kind};

use super::server::{FromClient, Inputs, ToClient};
use crate::guest::{GuestError, Input, Output, Stream};

/// How long a killed command may take to end before it is given up.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// How a command ended, before it is put into words.
pub(super) enum Ending {
    Exit(Exit),
    TimedOut,
    /// Its client is gone.
    Abandoned,
    Lost(GuestError),
}

/// Carries a stream to its end, the client's, or that of its time.
pub(super) async fn drive(
    mut stream: Stream,
    timeout: Option<Duration>,
    to: Option<&ToClient>,
    inputs: Option<Inputs>,
    mut each: impl FnMut(Kind, &[u8]),
) -> Ending {
    let control = stream.input();
    let limit = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let follow = async {
        loop {
            let (kind, bytes) = match stream.next().await {
                Ok(Output::Exit(exit)) => return Ending::Exit(exit),
                Ok(Output::Out(bytes)) => (Kind::Out, bytes),
                Ok(Output::Err(bytes)) => (Kind::Err, bytes),
                Err(error) => return Ending::Lost(error),
            };
            each(kind, &bytes);
            if let Some(to) = to
                && to.output(kind, &bytes).await.is_none()
            {
                return Ending::Abandoned;
            }
        }
    };
    let mut follow = std::pin::pin!(follow);
    // A client that reads slowly stops neither the clock nor its own input.
    tokio::select! {
        ending = &mut follow => return ending,
        () = forward(inputs, &control, to) => return Ending::Abandoned,
        () = limit => {}
    }
    let killed = async {
        let _ = control.control(&Control::Kill).await;
        follow.await
    };
    match tokio::time::timeout(KILL_GRACE, killed).await {
        Ok(Ending::Lost(error)) => Ending::Lost(error),
        _ => Ending::TimedOut,
    }
}

/// Passes on what a client sends, for as long as it is there.
async fn forward(inputs: Option<Inputs>, control: &Input, to: Option<&ToClient>) {
    let (Some(mut inputs), Some(to)) = (inputs, to) else {
        return std::future::pending().await;
    };
    while let Some(message) = inputs.recv().await {
        // What goes wrong shows where output is read.
        match message {
            FromClient::In(bytes) => {
                let _ = control.send(&bytes).await;
                to.passed(bytes.len()).await;
            }
            FromClient::End => {
                let _ = control.end().await;
            }
            FromClient::Control(message) => {
                let _ = control.control(&message).await;
            }
        }
    }
}
