//! What a pool is to be like.

use std::path::PathBuf;
use std::time::Duration;

use super::error::PoolError;
use super::ledger::Rules;
use crate::spec::{Bytes, Spec, VmId};

/// What a pool is to be like.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its clones' names begin so.
    pub name: VmId,
    /// So many are kept ready also while the host is short of processors.
    pub min: usize,
    /// So many are kept ready: at least `min`.
    pub idle: usize,
    /// So many there are at most, those lent out included: at least `idle`, and
    /// not 0.
    pub max: usize,
    /// So many are started at a time.
    pub parallel: usize,
    /// So many callers may wait; more are refused at once.
    pub queue: usize,
    /// A clone that was not lent by then is replaced, the next one first.
    pub ttl: Duration,
    /// How often those that are ready are asked whether they are.
    pub check: Duration,
    /// When the host is asked for no more.
    pub admission: Admission,
    /// What a clone that is ready takes of the host's memory.
    pub idle_cost: Bytes,
    /// What one that is lent can come to; its guest's memory when absent.
    pub lent_cost: Option<Bytes>,
    /// Where the host's /proc is.
    pub proc: PathBuf,
}

/// When the host is asked for no more.
#[derive(Debug, Clone, Copy)]
pub struct Admission {
    /// So much of what is available stays so.
    pub reserve: Bytes,
    /// Nothing is started while programs waited for memory in more than so many
    /// percent of the last ten seconds.
    pub memory_wait: u8,
    /// One clone is started at a time, and only `min` are kept ready, while
    /// programs waited for processors in more than so many percent of them.
    pub cpu_wait: u8,
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            reserve: Bytes::gib(1),
            memory_wait: 20,
            cpu_wait: 80,
        }
    }
}

impl Settings {
    /// A pool that keeps `idle` clones ready, of `max` in all.
    pub fn new(idle: usize, max: usize) -> Self {
        Self {
            name: "pool".parse().unwrap_or_else(|_| VmId::random()),
            min: idle.min(1),
            idle,
            max,
            parallel: std::thread::available_parallelism().map_or(1, usize::from),
            queue: 1000,
            ttl: Duration::from_secs(60 * 60),
            check: Duration::from_secs(10),
            admission: Admission::default(),
            idle_cost: Bytes::mib(64),
            lent_cost: None,
            proc: "/proc".into(),
        }
    }

    /// The rules for clones of `spec`.
    ///
    /// # Errors
    /// The numbers contradict each other.
    pub(super) fn rules(&self, spec: &Spec) -> Result<Rules, PoolError> {
        let refuse = |why: &'static str| Err(PoolError::Settings { why });
        match () {
            () if self.max == 0 || self.parallel == 0 || self.queue == 0 => {
                refuse("max, parallel and queue are at least 1")
            }
            () if self.min > self.idle || self.idle > self.max => {
                refuse("min is at most idle, and idle at most max")
            }
            () if self.ttl < SHORTEST || self.check < SHORTEST => {
                refuse("ttl and check are at least 100 ms")
            }
            () if self.name.as_str().len() > LONGEST => {
                refuse("the name has at most 40 characters")
            }
            () => Ok(Rules {
                min: self.min,
                idle: self.idle,
                max: self.max,
                parallel: self.parallel,
                queue: self.queue,
                ttl: self.ttl,
                idle_cost: self.idle_cost.0,
                lent_cost: self.lent_cost.unwrap_or(spec.limits.memory).0,
            }),
        }
    }
}

/// Shortest time that a pool keeps to.
const SHORTEST: Duration = Duration::from_millis(100);
/// Longest name, which leaves room for its clones'.
const LONGEST: usize = 40;
