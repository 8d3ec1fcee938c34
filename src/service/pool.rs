//! Clones that are restored and ready before anybody asks.
//!
//! A clone of a pool was made unlike its siblings and stands still until it is
//! acquired; then its clock is set, its agent answers, and nobody else ever
//! gets it: it is ended when it comes back, and another takes its place
//! (decision 0045).

mod crew;
mod error;
mod gauge;
mod keeper;
mod ledger;
mod loan;
mod settings;
mod status;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

pub use self::error::{PoolError, Why};
pub use self::loan::Loan;
pub use self::settings::{Admission, Settings};
pub use self::status::Status;

use self::crew::Crew;
use self::gauge::Gauge;
use self::keeper::{Keeper, Parts, Waiter, Word};
use self::ledger::Ticket;
use crate::run::{Host, RunError};
use crate::spec::{Spec, Workspace, WorkspaceMode};

/// How long a clone may take from being woken to its agent's answer, before
/// another is taken.
const WAKE: Duration = Duration::from_secs(30);

/// A pool. Cheap to clone; when the last is dropped, its clones end in the
/// background, those lent out when they come back.
#[derive(Debug, Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    words: UnboundedSender<Word>,
    status: watch::Receiver<Status>,
    idle: usize,
    tickets: AtomicU64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = self.words.send(Word::Drain);
    }
}

impl Pool {
    /// Opens a pool of clones of the template that matches `spec`, and starts to
    /// fill it. Needs a runtime with I/O and time; blocking work is done in
    /// threads of the pool's own.
    ///
    /// # Errors
    /// Settings that contradict each other, a spec that cannot be kept ready, no
    /// template that matches, or a host that cannot be asked what it has.
    pub async fn open(host: Host, spec: Spec, settings: Settings) -> Result<Self, PoolError> {
        let rules = settings.rules(&spec)?;
        let spec = kept_ready(spec)?;
        let (host, spec) = found(host, spec).await?;
        let gauge = Gauge::new(&settings.proc);
        gauge.read().map_err(|source| PoolError::Host {
            path: settings.proc.join("meminfo"),
            source,
        })?;
        // One more, so that ends do not wait for starts.
        let crew = Crew::new(rules.parallel + 1, &Handle::current()).map_err(PoolError::Threads)?;
        let (words, inbox) = unbounded_channel();
        let (sender, status) = watch::channel(Status::default());
        let parts = Parts {
            host,
            spec,
            settings,
            rules,
            gauge,
            crew,
            inbox,
            words: words.clone(),
            status: sender,
        };
        tokio::spawn(Keeper::new(parts).run());
        let inner = Inner {
            words,
            status,
            idle: rules.idle,
            tickets: AtomicU64::new(0),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// A clone of one's own: unlike its siblings, its clock right, its agent
    /// answering. Callers are served in turn. Dropping the future gives the
    /// place up, and what was taken for it.
    ///
    /// # Errors
    /// None within `within`, with what stood in the way; too many callers wait;
    /// the pool is closed.
    pub async fn acquire(&self, within: Duration) -> Result<Loan, PoolError> {
        let deadline = Instant::now() + within;
        let place = Place {
            ticket: self.inner.tickets.fetch_add(1, Ordering::Relaxed),
            words: &self.inner.words,
        };
        let mut again = false;
        loop {
            let (answer, reply) = oneshot::channel();
            let waiter = Waiter {
                deadline,
                within,
                again,
                answer,
            };
            let asked = self.inner.words.send(Word::Ask(place.ticket, waiter));
            asked.map_err(|_| PoolError::Closed)?;
            let mut loan = reply.await.unwrap_or(Err(PoolError::Closed))?;
            loan.touch();
            let patience = deadline.min(Instant::now() + WAKE);
            match tokio::time::timeout_at(patience, loan.wake(WAKE)).await {
                Ok(Ok(())) => return Ok(loan),
                Ok(Err(error)) => tracing::warn!("a clone of the pool is not fit: {error}"),
                Err(_) if patience == deadline => return Err(self.slow(within)),
                Err(_) => tracing::warn!("a clone of the pool is silent"),
            }
            again = true;
        }
    }

    fn slow(&self, within: Duration) -> PoolError {
        let waiting = self.status().waiting;
        let why = Why::Slow { waiting };
        PoolError::Late { within, why }
    }

    /// How it is at the moment.
    pub fn status(&self) -> Status {
        self.inner.status.borrow().clone()
    }

    /// Waits until as many clones are ready as are to be kept so; gives how it
    /// is then, or when `within` is over.
    pub async fn filled(&self, within: Duration) -> Status {
        let mut status = self.inner.status.clone();
        let full = status.wait_for(|status| status.idle >= self.inner.idle);
        let _ = tokio::time::timeout(within, full).await;
        self.status()
    }

    /// Serves nobody any more, ends all clones, and waits for those lent out to
    /// come back and end.
    ///
    /// # Errors
    /// Some are still lent out after `within`. They go on, and are ended when
    /// they come back.
    pub async fn drain(&self, within: Duration) -> Result<Status, PoolError> {
        // Drained already where nobody hears it.
        let _ = self.inner.words.send(Word::Drain);
        let mut status = self.inner.status.clone();
        let empty = status.wait_for(|status| status.closed && status.alive() == 0);
        match tokio::time::timeout(within, empty).await {
            Ok(_) => Ok(self.status()),
            Err(_) => Err(PoolError::Lent {
                lent: self.status().lent,
                within,
            }),
        }
    }
}

/// A caller's place in the queue, given up with it.
struct Place<'a> {
    ticket: Ticket,
    words: &'a UnboundedSender<Word>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let _ = self.words.send(Word::GiveUp(self.ticket));
    }
}

/// The spec of a machine that waits for whoever comes: as that of a template
/// (`run::build`).
fn kept_ready(spec: Spec) -> Result<Spec, PoolError> {
    let refuse = |what| Err(PoolError::Spec { what });
    match () {
        () if spec.workspace.dir.is_some() => refuse("a workspace"),
        () if !spec.publish.is_empty() => refuse("published ports"),
        () if spec.templates.cold => refuse("a cold boot"),
        () => Ok(Spec {
            workspace: Workspace {
                mode: WorkspaceMode::None,
                ..Workspace::default()
            },
            detached: false,
            balloon: false,
            ..spec
        }),
    }
}

/// Sees to it that there is a template; its files may have to be read.
async fn found(host: Host, spec: Spec) -> Result<(Host, Spec), PoolError> {
    let look = tokio::task::spawn_blocking(move || {
        let found: Result<String, RunError> = host.template_of(&spec);
        found.map(|_| (host, spec))
    });
    match look.await {
        Ok(found) => Ok(found.map_err(Box::new)?),
        // Only a runtime that shuts down cuts it short.
        Err(_) => Err(PoolError::Closed),
    }
}
