//! The resolver of one machine.
//!
//! It answers on sockets that were opened in the machine's network namespace
//! and asks the host's resolvers. hickory reads and writes the messages; what
//! is asked, answered and passed on is decided here. It keeps no answers: the
//! host's resolver does.

mod answer;
mod budget;
mod config;
#[cfg(fuzzing)]
pub(super) mod fuzz;
mod hosts;
mod listen;
mod question;
mod upstream;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::event::{Journal, Query, QueryResult, What};
use super::names::{Feed, Grant, Names};
use super::policy::{Allowed, Policy};
use super::refusal::{Code, Refusal};
use crate::spec::Domain;
use answer::{Sifted, sift};
use budget::Budget;
pub use config::{ResolverConfig, ResolverLimits};
pub use hosts::host_upstreams;
pub use listen::{Serving, Sockets};
use question::{Heard, Question, Reply, hear, private_reverse};
use upstream::Upstreams;

/// How long addresses are let through at least, whatever their time to live:
/// a client needs a moment to connect, and a name that changes its address each
/// time is asked for again anyway.
const LIFE_LEAST: Duration = Duration::from_secs(60);
/// And at most.
const LIFE_MOST: Duration = Duration::from_secs(3600);
/// So much longer than the guest is told: it may connect in the last moment.
const GRACE: Duration = Duration::from_secs(10);
/// How long it may take to let an address through.
const FEED_PATIENCE: Duration = Duration::from_secs(2);

/// Answers for one machine. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Resolver(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    upstreams: Upstreams,
    strict: bool,
    limits: ResolverLimits,
    policy: watch::Receiver<Arc<Policy>>,
    names: Names,
    feed: mpsc::Sender<Feed>,
    journal: Journal,
    budget: Mutex<Budget>,
    places: Arc<Semaphore>,
}

/// What is to be done with a message.
enum Step {
    Nothing,
    Bytes(Vec<u8>),
    Reply(Reply),
    Forward(Box<Forward>),
}

/// A question that goes to an upstream.
struct Forward {
    question: Question,
    allowed: Allowed,
    since: Instant,
    place: Place,
}

/// A place among those under way, given back when dropped.
struct Place {
    inner: Arc<Inner>,
    name: Domain,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.budget().end(&self.name);
    }
}

impl Inner {
    fn budget(&self) -> std::sync::MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// It may not have one.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be found out.
    #[error("cannot look up {name}: {why}")]
    Failed {
        /// The name.
        name: Domain,
        /// Why.
        why: String,
    },
}

impl Resolver {
    /// A resolver that follows `policy` as it changes, tells `feed` what has to
    /// be let through, and keeps what it gave out in `names`.
    pub fn new(
        config: ResolverConfig,
        policy: watch::Receiver<Arc<Policy>>,
        names: Names,
        feed: mpsc::Sender<Feed>,
        journal: Journal,
    ) -> Self {
        let ResolverConfig {
            upstreams,
            from,
            strict,
            limits,
        } = config;
        Self(Arc::new(Inner {
            upstreams: Upstreams::new(upstreams, from, limits.deadline),
            strict,
            policy,
            names,
            feed,
            journal,
            budget: Mutex::new(Budget::new(&limits)),
            places: Arc::new(Semaphore::new(limits.at_a_time)),
            limits,
        }))
    }

    /// The names and addresses that it gave out.
    pub fn names(&self) -> &Names {
        &self.0.names
    }

    /// What it is held to now.
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.0.policy.borrow())
    }

    /// What it is held to, as it changes.
    pub(super) fn watch_policy(&self) -> watch::Receiver<Arc<Policy>> {
        self.0.policy.clone()
    }

    /// The addresses of a name, looked up now, for a connection that is made on
    /// the machine's behalf. They are remembered, and let through, as if the
    /// guest had asked.
    ///
    /// # Errors
    /// The name may not be looked up, has no address that may be reached, or
    /// nobody answers.
    pub async fn lookup(&self, name: &Domain, ipv6: bool) -> Result<Vec<IpAddr>, LookupError> {
        let since = Instant::now();
        let kind = if ipv6 {
            RecordType::AAAA
        } else {
            RecordType::A
        };
        let found = self.look_up(name, kind).await;
        let result = match &found {
            Ok(_) => QueryResult::Answered,
            Err(LookupError::Refused(_)) => QueryResult::Refused,
            Err(LookupError::Failed { .. }) => QueryResult::Failed,
        };
        self.note(
            name.to_string(),
            kind.to_string(),
            result,
            since,
            |query| match &found {
                Ok(addresses) => query.addresses.clone_from(addresses),
                Err(LookupError::Refused(refusal)) => query.refusal = Some(refusal.clone()),
                Err(LookupError::Failed { why, .. }) => query.failure = Some(why.clone()),
            },
        );
        found
    }

    async fn look_up(&self, name: &Domain, kind: RecordType) -> Result<Vec<IpAddr>, LookupError> {
        let policy = self.policy();
        let allowed = policy.name(name)?;
        // A name in a handshake is as good a way out as one in a question.
        {
            let mut budget = self.0.budget();
            budget.question()?;
            if !allowed.exact {
                budget.name(name)?;
            }
        }
        let failed = |why: String| {
            let name = name.clone();
            LookupError::Failed { name, why }
        };
        let question = Question::of(name, kind).ok_or_else(|| failed("it does not fit".into()))?;
        let Some(place) = self.place(name) else {
            return Err(failed("too many questions are under way".into()));
        };
        let sifted = self.find(&question, &policy).await?;
        drop(place);
        self.let_through(name, &allowed, &sifted)
            .await
            .map_err(failed)?;
        if sifted.addresses.is_empty() {
            let cause = format!("{name} has no address that may be reached");
            return Err(Refusal::built_in(Code::NoAddress, cause, "Check the name.").into());
        }
        let addresses = sifted.addresses.into_iter();
        Ok(addresses.map(|(address, _)| address).collect())
    }

    /// All that can be said without asking anybody.
    fn step(&self, bytes: &[u8]) -> Step {
        let since = Instant::now();
        let within = self.0.budget().question();
        let question = match hear(bytes) {
            Heard::Noise => return Step::Nothing,
            // What makes no sense is not worth an answer beyond the rate.
            Heard::Wrong(_) | Heard::Refused { .. } if within.is_err() => return Step::Nothing,
            Heard::Wrong(bytes) => return Step::Bytes(bytes),
            Heard::Refused {
                reply,
                name,
                kind,
                refusal,
            } => {
                self.note(name, kind, QueryResult::Refused, since, |query| {
                    query.refusal = Some(refusal);
                });
                return Step::Reply(reply);
            }
            Heard::Question(question) => question,
        };
        let refuse = |refusal: Refusal| {
            let reply = question.refused(&refusal);
            self.note_of(&question, QueryResult::Refused, since, |query| {
                query.refusal = Some(refusal);
            });
            Step::Reply(reply)
        };
        if let Err(refusal) = within {
            return refuse(refusal);
        }
        let policy = self.policy();
        let allowed = match policy.name(&question.name) {
            Ok(allowed) => allowed,
            Err(refusal) => return refuse(refusal),
        };
        if let Some(refusal) = private_reverse(&question.name) {
            return refuse(refusal);
        }
        let hides = matches!(question.kind, RecordType::HTTPS | RecordType::SVCB);
        let pointless = question.kind == RecordType::AAAA && !policy.ipv6();
        if hides && self.0.strict || pointless {
            self.note_of(&question, QueryResult::Empty, since, |query| {
                query.rule = Some(allowed.rule);
            });
            return Step::Reply(question.empty());
        }
        if !allowed.exact
            && let Err(refusal) = self.0.budget().name(&question.name)
        {
            return refuse(refusal);
        }
        let Some(place) = self.place(&question.name) else {
            let why = "too many questions are under way";
            self.note_of(&question, QueryResult::Failed, since, |query| {
                query.failure = Some(why.into());
            });
            return Step::Reply(question.failed(why));
        };
        Step::Forward(Box::new(Forward {
            question,
            allowed,
            since,
            place,
        }))
    }

    fn place(&self, name: &Domain) -> Option<Place> {
        let permit = Arc::clone(&self.0.places).try_acquire_owned().ok()?;
        self.0.budget().begin(name).then(|| Place {
            inner: Arc::clone(&self.0),
            name: name.clone(),
            _permit: permit,
        })
    }

    /// Asks an upstream and makes an answer of what it says.
    async fn forward(&self, forward: Forward) -> Reply {
        let Forward {
            question,
            allowed,
            since,
            place,
        } = forward;
        let policy = self.policy();
        let found = self.find(&question, &policy).await;
        drop(place);
        let found = match found {
            // The policy may have changed meanwhile.
            Ok(sifted) => match self.policy().name(&question.name) {
                Ok(_) => Ok(sifted),
                Err(refusal) => Err(refusal.into()),
            },
            Err(error) => Err(error),
        };
        let sifted = match found {
            Ok(sifted) => sifted,
            Err(LookupError::Refused(refusal)) => {
                let reply = question.refused(&refusal);
                self.note_of(&question, QueryResult::Refused, since, |query| {
                    query.refusal = Some(refusal);
                });
                return reply;
            }
            Err(LookupError::Failed { why, .. }) => {
                let reply = question.failed(&why);
                self.note_of(&question, QueryResult::Failed, since, |query| {
                    query.failure = Some(why);
                });
                return reply;
            }
        };
        if let Err(why) = self.let_through(&question.name, &allowed, &sifted).await {
            let reply = question.failed(&why);
            self.note_of(&question, QueryResult::Failed, since, |query| {
                query.failure = Some(why);
            });
            return reply;
        }
        let result = match (sifted.records.is_empty(), sifted.no_name) {
            (_, true) => QueryResult::NoName,
            (true, false) => QueryResult::Empty,
            (false, false) => QueryResult::Answered,
        };
        self.note_of(&question, result, since, |query| {
            query.addresses = sifted
                .addresses
                .iter()
                .map(|(address, _)| *address)
                .collect();
            query.rule = Some(allowed.rule);
            query.refusal.clone_from(&sifted.left_out);
        });
        let mut reply = question.empty();
        let message = &mut reply.message;
        if sifted.no_name {
            message.metadata.response_code = ResponseCode::NXDomain;
        }
        message.authorities.extend(sifted.nothing);
        message.answers = sifted.records;
        for record in &mut message.answers {
            // Nobody may remember an address for longer than it is let through.
            record.ttl = record
                .ttl
                .min(u32::try_from(LIFE_MOST.as_secs()).unwrap_or(0));
        }
        reply
    }

    async fn find(&self, question: &Question, policy: &Policy) -> Result<Sifted, LookupError> {
        let failed = |why: String| {
            let name = question.name.clone();
            LookupError::Failed { name, why }
        };
        let query = question
            .query()
            .ok_or_else(|| failed("it does not fit".into()))?;
        let answer = self.0.upstreams.ask(&query).await;
        let answer = answer.map_err(|error| failed(error.to_string()))?;
        let sifted = sift(question, &answer, policy, &self.0.limits)?;
        self.0.budget().data(sifted.data)?;
        Ok(sifted)
    }

    /// Remembers the addresses, and has them let through. In this order: a new
    /// policy goes by what is remembered.
    async fn let_through(
        &self,
        name: &Domain,
        allowed: &Allowed,
        sifted: &Sifted,
    ) -> Result<(), String> {
        if sifted.addresses.is_empty() {
            return Ok(());
        }
        let life = |ttl| Duration::from_secs(u64::from(ttl)).clamp(LIFE_LEAST, LIFE_MOST) + GRACE;
        let grant = |&(address, ttl): &(IpAddr, u32)| Grant {
            name: name.clone(),
            address,
            ports: allowed.ports.clone(),
            lifetime: life(ttl),
            rule: allowed.rule.clone(),
        };
        let grants: Vec<Grant> = sifted.addresses.iter().map(grant).collect();
        let names = &self.0.names;
        let remember = |grant: &Grant| {
            let before = names.give_out(name, grant.address, grant.lifetime);
            (grant.address, before)
        };
        let remembered: Vec<_> = grants.iter().map(remember).collect();
        let (done, told) = oneshot::channel();
        let feed = Feed { grants, done };
        let work = async {
            self.0
                .feed
                .send(feed)
                .await
                .map_err(|_| "nobody lets addresses through".to_owned())?;
            told.await
                .unwrap_or_else(|_| Err("the address was not let through".into()))
        };
        let result = tokio::time::timeout(FEED_PATIENCE, work).await;
        let result =
            result.unwrap_or_else(|_| Err("it takes too long to let the address through".into()));
        if result.is_err() {
            for (address, before) in remembered {
                names.take_back(name, address, before);
            }
        }
        result
    }

    fn note_of(
        &self,
        question: &Question,
        result: QueryResult,
        since: Instant,
        more: impl FnOnce(&mut Query),
    ) {
        let (name, kind) = (question.name.to_string(), question.kind.to_string());
        self.note(name, kind, result, since, more);
    }

    fn note(
        &self,
        name: String,
        kind: String,
        result: QueryResult,
        since: Instant,
        more: impl FnOnce(&mut Query),
    ) {
        let mut query = Query {
            name,
            kind,
            result,
            addresses: Vec::new(),
            rule: None,
            refusal: None,
            failure: None,
            us: u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX),
        };
        more(&mut query);
        self.0.journal.note(What::Query(query));
    }
}
