//! Which addresses the resolver gave out for which names, and until when.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::policy::{Policy, Ports};
use crate::spec::Domain;

/// Most pairs of name and address that are kept.
const MOST: usize = 8192;

/// An address that is to be let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The name it was asked for.
    pub name: Domain,
    /// The address.
    pub address: IpAddr,
    /// At which TCP ports.
    pub ports: Ports,
    /// From now on.
    pub lifetime: Duration,
    /// The rule that allows the name.
    pub rule: String,
}

/// Addresses that have to be let through before the guest is told of them.
#[derive(Debug)]
pub struct Feed {
    /// All of one answer.
    pub grants: Vec<Grant>,
    /// To be told when they are let through, or why they cannot be.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// Names and addresses of one machine. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Names(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    /// Kept past its end, for the record of connections that outlive it.
    until: BTreeMap<(Domain, IpAddr), Instant>,
    names: HashMap<IpAddr, BTreeSet<Domain>>,
}

impl Names {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that an address was given out. A shorter time does not cut a
    /// longer one off. Gives until when it was known before.
    pub(crate) fn give_out(
        &self,
        name: &Domain,
        address: IpAddr,
        lifetime: Duration,
    ) -> Option<Instant> {
        let now = Instant::now();
        let mut table = self.lock();
        if table.until.len() >= MOST {
            table.make_room();
        }
        let key = (name.clone(), address);
        let before = table.until.get(&key).copied();
        let until = before.unwrap_or(now).max(now + lifetime);
        table.until.insert(key, until);
        table.names.entry(address).or_default().insert(name.clone());
        before
    }

    /// Remembers what was known before an address was given out in vain.
    pub(crate) fn take_back(&self, name: &Domain, address: IpAddr, before: Option<Instant>) {
        let mut table = self.lock();
        let key = (name.clone(), address);
        match before {
            None => table.forget(&key),
            Some(before) => {
                // A new policy may have had it forgotten meanwhile.
                if let Some(until) = table.until.get_mut(&key) {
                    *until = before;
                }
            }
        }
    }

    /// Whether the address is one that the name has now.
    pub fn is_current(&self, name: &Domain, address: IpAddr) -> bool {
        let now = Instant::now();
        let until = self.lock().until.get(&(name.clone(), address)).copied();
        until.is_some_and(|until| until > now)
    }

    /// The name that an address was given out for last, perhaps some time ago.
    pub fn name_of(&self, address: IpAddr) -> Option<Domain> {
        self.names_of(address).into_iter().next()
    }

    /// The names that an address was given out for, the last first.
    pub(crate) fn names_of(&self, address: IpAddr) -> Vec<Domain> {
        let table = self.lock();
        let names = table.names.get(&address).into_iter().flatten();
        let mut names: Vec<_> = names.cloned().collect();
        let until = |name: &Domain| table.until.get(&(name.clone(), address)).copied();
        names.sort_by_cached_key(|name| std::cmp::Reverse(until(name)));
        names
    }

    /// Forgets what a new policy does not allow, and gives what is to be let
    /// through from now on: all of it, in the place of what was before.
    pub fn follow(&self, policy: &Policy) -> Vec<Grant> {
        let now = Instant::now();
        let mut table = self.lock();
        let (mut gone, mut grants) = (Vec::new(), Vec::new());
        for ((name, address), until) in &table.until {
            match policy.name(name) {
                Err(_) => gone.push((name.clone(), *address)),
                Ok(allowed) if *until > now => grants.push(Grant {
                    name: name.clone(),
                    address: *address,
                    ports: allowed.ports,
                    lifetime: *until - now,
                    rule: allowed.rule,
                }),
                Ok(_) => {}
            }
        }
        for key in &gone {
            table.forget(key);
        }
        grants
    }

    /// How many pairs are kept.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lock().until.len()
    }
}

impl Table {
    fn forget(&mut self, key: &(Domain, IpAddr)) {
        self.until.remove(key);
        if let Some(names) = self.names.get_mut(&key.1) {
            names.remove(&key.0);
            if names.is_empty() {
                self.names.remove(&key.1);
            }
        }
    }

    /// Forgets an eighth: those that end, or ended, first.
    fn make_room(&mut self) {
        let mut all: Vec<_> = self
            .until
            .iter()
            .map(|(key, until)| (*until, key.clone()))
            .collect();
        all.sort_by_key(|(until, _)| *until);
        for (_, key) in all.into_iter().take(MOST / 8) {
            self.forget(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::NetworkPolicy;

    fn name(text: &str) -> Domain {
        Domain::parse(text).unwrap()
    }

    fn address(last: u32) -> IpAddr {
        IpAddr::V4((0x0808_0000 + last).into())
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_current_for_its_time() {
        let names = Names::default();
        let (one, two) = (name("one.org"), name("two.org"));
        names.give_out(&one, address(1), Duration::from_secs(60));
        names.give_out(&two, address(1), Duration::from_secs(10));
        names.give_out(&one, address(1), Duration::from_secs(1));
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(names.is_current(&one, address(1)));
        assert!(!names.is_current(&two, address(1)) && !names.is_current(&one, address(2)));
        assert_eq!(names.name_of(address(1)), Some(one.clone()));
        tokio::time::advance(Duration::from_secs(31)).await;
        assert!(!names.is_current(&one, address(1)));
        assert_eq!(names.name_of(address(1)), Some(one));
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded() {
        let names = Names::default();
        for number in 0..30_000 {
            names.give_out(&name("one.org"), address(number), Duration::from_secs(60));
        }
        assert!(names.len() <= MOST);
        assert!(names.is_current(&name("one.org"), address(29_999)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stricter_policy_takes_addresses_back() {
        let names = Names::default();
        let minute = Duration::from_secs(60);
        names.give_out(&name("one.org"), address(1), minute);
        names.give_out(&name("two.org"), address(1), minute);
        names.give_out(&name("two.org"), address(2), minute);
        let request = NetworkPolicy {
            deny_hosts: ["two.org".parse().unwrap()].into(),
            ..NetworkPolicy::default()
        };
        let policy = Policy::new(&request);
        let left = names.follow(&policy);
        assert_eq!(left.len(), 1);
        assert_eq!(
            (left[0].name.as_str(), left[0].address),
            ("one.org", address(1))
        );
        assert_eq!(left[0].lifetime, minute);
        assert!(names.is_current(&name("one.org"), address(1)));
        assert!(!names.is_current(&name("two.org"), address(1)));
    }
}
