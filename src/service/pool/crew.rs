//! Threads that start and end machines: both block now and then, and whoever
//! acquires a clone must not wait for that. They live as long as the keeper, so
//! that machines can end with them (`Host::die_with_thread`).

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Handle;

/// A piece of work; it may wait for futures by the handle.
type Job = Box<dyn FnOnce(&Handle) + Send>;

/// The threads; they end when this is dropped and nothing is left to do.
#[derive(Debug)]
pub(super) struct Crew {
    jobs: Sender<Job>,
}

impl Crew {
    /// Starts `count` threads that use this runtime.
    ///
    /// # Errors
    /// The host has no more threads.
    pub(super) fn new(count: usize, runtime: &Handle) -> io::Result<Self> {
        let (jobs, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..count {
            let (queue, runtime) = (Arc::clone(&queue), runtime.clone());
            std::thread::Builder::new()
                .name("pool".into())
                .spawn(move || work(&queue, &runtime))?;
        }
        Ok(Self { jobs })
    }

    /// Has it done by the next free thread.
    pub(super) fn give(&self, job: impl FnOnce(&Handle) + Send + 'static) {
        // They end after this.
        let _ = self.jobs.send(Box::new(job));
    }
}

fn work(queue: &Mutex<Receiver<Job>>, runtime: &Handle) {
    loop {
        let job = {
            let queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.recv()
        };
        let Ok(job) = job else { return };
        // A runtime that shuts down meanwhile panics (tokio, `Handle::block_on`).
        if catch_unwind(AssertUnwindSafe(|| job(runtime))).is_err() {
            tracing::warn!("the start or the end of a clone was cut short");
        }
    }
}
