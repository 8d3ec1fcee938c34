//! Those who wait for a machine's end.

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::wire::Answer;
use crate::run::Asked;

/// Those who wait for the machine's end.
pub(super) struct Waiting {
    tasks: JoinSet<()>,
    over: watch::Sender<bool>,
}

impl Waiting {
    pub(super) fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            over: watch::channel(false).0,
        }
    }

    /// Answers when the machine has ended, unless whoever asked is gone by then.
    pub(super) fn push(&mut self, mut asked: Asked) {
        while self.tasks.try_join_next().is_some() {}
        let mut over = self.over.subscribe();
        self.tasks.spawn(async move {
            let ended = tokio::select! {
                over = over.wait_for(|over| *over) => over.is_ok(),
                () = asked.gone() => false,
            };
            if ended {
                asked.answer(&Answer::Done).await;
            }
        });
    }

    /// The machine has ended.
    pub(super) async fn tell(mut self) {
        self.over.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}
