//! How much a machine may ask, so that questions are not a way to send data.
//!
//! Rates are buckets that fill up again with time. What a name can carry is
//! what stands left of its last two labels: those cost somebody money. A name
//! that a rule has in full tells nobody anything, and one that was asked for
//! lately tells nothing new.

use std::collections::{HashMap, HashSet, VecDeque};

use tokio::time::Instant;

use super::ResolverLimits;
use crate::net::bucket::Bucket;
use crate::net::refusal::{Code, Refusal};
use crate::spec::Domain;

/// Names remembered as asked for lately.
const REMEMBERED: usize = 4096;
/// A shorter label is no place for data.
const DENSE_LENGTH: usize = 16;
/// Bits per character from which on a label looks like data: words have less,
/// hexadecimal digits of some length 3.4 to 4, base32 4 to 5.
const DENSE_ENTROPY: f64 = 3.3;
/// A name with more characters of such labels is data.
const DENSE_MOST: usize = 90;
/// What a character of such a label costs.
const DENSE_COST: u32 = 4;

/// What is left to one machine.
#[derive(Debug)]
pub(super) struct Budget {
    questions: Bucket,
    out: Bucket,
    back: Bucket,
    recent: HashSet<Domain>,
    order: VecDeque<Domain>,
    under_way: HashMap<String, usize>,
    per_parent: usize,
}

impl Budget {
    pub(super) fn new(limits: &ResolverLimits) -> Self {
        let now = Instant::now();
        Self {
            questions: Bucket::new(limits.burst, limits.per_second, now),
            out: Bucket::new(limits.name_burst, limits.name_per_second, now),
            back: Bucket::new(limits.data_burst, limits.data_per_second, now),
            recent: HashSet::new(),
            order: VecDeque::new(),
            under_way: HashMap::new(),
            per_parent: limits.at_a_time_below_one,
        }
    }

    /// Takes one question from the rate.
    pub(super) fn question(&mut self) -> Result<(), Refusal> {
        match self.questions.take(1, Instant::now()) {
            true => Ok(()),
            false => Err(Refusal::built_in(
                Code::QueryRate,
                "the machine asks the resolver more often than it may",
                "Ask less often; a program that repeats its question at once is often the reason.",
            )),
        }
    }

    /// Takes what a name can carry, for one that no rule has in full.
    pub(super) fn name(&mut self, name: &Domain) -> Result<(), Refusal> {
        if self.recent.contains(name) {
            return Ok(());
        }
        let (cost, dense) = weigh(name);
        let remedy = format!("Allow it with `--allow-host {name}`, if it is a host's name.");
        if dense > DENSE_MOST {
            let cause = format!("{name} looks like data in the form of a name");
            return Err(Refusal::built_in(Code::QueryTunnel, cause, &remedy));
        }
        if !self.out.take(cost, Instant::now()) {
            let cause = format!("{name} is one of more different names than programs ask for");
            return Err(Refusal::built_in(Code::QueryTunnel, cause, &remedy));
        }
        if self.order.len() >= REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.recent.remove(&oldest);
        }
        self.recent.insert(name.clone());
        self.order.push_back(name.clone());
        Ok(())
    }

    /// Takes what an answer brings besides addresses.
    pub(super) fn data(&mut self, bytes: usize) -> Result<(), Refusal> {
        let amount = u32::try_from(bytes).unwrap_or(u32::MAX);
        match self.back.take(amount, Instant::now()) {
            true => Ok(()),
            false => Err(Refusal::built_in(
                Code::QueryTunnel,
                "the resolver's answers bring more data than answers do",
                "Fetch data over HTTPS from an allowed host.",
            )),
        }
    }

    /// Counts a question that goes to the host's resolvers; whether it may. One
    /// domain that is slow to answer does not take all places.
    pub(super) fn begin(&mut self, name: &Domain) -> bool {
        let count = self.under_way.entry(parent(name)).or_insert(0);
        let free = *count < self.per_parent;
        *count += usize::from(free);
        free
    }

    pub(super) fn end(&mut self, name: &Domain) {
        let parent = parent(name);
        if let Some(count) = self.under_way.get_mut(&parent) {
            *count -= 1;
            if *count == 0 {
                self.under_way.remove(&parent);
            }
        }
    }
}

/// The last two labels.
fn parent(name: &Domain) -> String {
    let mut labels: Vec<_> = name.labels().rev().take(2).collect();
    labels.reverse();
    labels.join(".")
}

/// What the name costs, and how many characters of it look like data.
fn weigh(name: &Domain) -> (u32, usize) {
    let (mut cost, mut dense) = (0, 0);
    for label in name.labels().rev().skip(2) {
        let length = u32::try_from(label.len()).unwrap_or(u32::MAX);
        if label.len() >= DENSE_LENGTH && entropy(label) >= DENSE_ENTROPY {
            dense += label.len();
            cost += length * DENSE_COST;
        } else {
            // The place of the dot carries something too.
            cost += length + 1;
        }
    }
    (cost, dense)
}

/// Shannon's entropy of the characters, in bits for each.
fn entropy(label: &str) -> f64 {
    let mut counts = [0_u32; 256];
    label
        .bytes()
        .for_each(|byte| counts[usize::from(byte)] += 1);
    let length = f64::from(u32::try_from(label.len()).unwrap_or(u32::MAX));
    let bits = |&count: &u32| {
        let share = f64::from(count) / length;
        -share * share.log2()
    };
    counts.iter().filter(|count| **count > 0).map(bits).sum()
}

/// Longest time after which a full budget is there again.
#[cfg(test)]
fn full_again(limits: &ResolverLimits) -> std::time::Duration {
    let seconds = |size: u32, rate: u32| size / rate.max(1) + 1;
    let longest = seconds(limits.burst, limits.per_second)
        .max(seconds(limits.name_burst, limits.name_per_second))
        .max(seconds(limits.data_burst, limits.data_per_second));
    std::time::Duration::from_secs(longest.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Domain {
        Domain::parse(text).unwrap()
    }

    fn budget() -> Budget {
        Budget::new(&ResolverLimits::default())
    }

    #[test]
    fn words_are_told_from_data() {
        for plain in [
            "www.example.org",
            "registry-1.docker.io",
            "files.pythonhosted.org",
            "objects.githubusercontent.com",
            "generativelanguage.googleapis.com",
            "ec2-203-0-113-25.compute-1.amazonaws.com",
        ] {
            assert_eq!(weigh(&name(plain)).1, 0, "{plain}");
        }
        let hex = "3a7bd3e2360a3d29eea436fcfb7e44c7.acm-validations.aws";
        assert_eq!(weigh(&name(hex)), (128, 32));
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_full_of_data_is_refused_at_once() {
        let label = "nbswy3dpeb3w64tmmqqho33snrscaylom4qhi2djomqgs4zamfwg63th";
        let refusal = budget()
            .name(&name(&format!("{label}.{label}.evil.com")))
            .unwrap_err();
        assert_eq!(refusal.code, Code::QueryTunnel);
    }

    #[tokio::test(start_paused = true)]
    async fn many_small_names_run_out_and_come_back() {
        let limits = ResolverLimits::default();
        let mut budget = Budget::new(&limits);
        let mut sent = 0;
        let mut number = 0_u64;
        loop {
            number += 1;
            let text = format!("x{number:09}.evil.com");
            if budget.name(&name(&text)).is_err() {
                break;
            }
            sent += 10;
        }
        assert!(sent <= limits.name_burst, "{sent} bytes went out");
        assert!(
            budget.name(&name("x000000001.evil.com")).is_ok(),
            "it was asked for before"
        );
        tokio::time::advance(full_again(&limits)).await;
        assert!(budget.name(&name("another.evil.com")).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_day_of_work_fits() {
        let mut budget = budget();
        for number in 0..300 {
            let text = format!("www.site-number-{number}.org");
            budget.question().unwrap();
            budget.name(&name(&text)).unwrap();
            budget
                .name(&name(&format!("cdn{number}.assets.example.net")))
                .unwrap();
            tokio::time::advance(std::time::Duration::from_millis(200)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_domain_does_not_take_all_places() {
        let limits = ResolverLimits::default();
        let mut budget = Budget::new(&limits);
        for number in 0..limits.at_a_time_below_one {
            assert!(budget.begin(&name(&format!("a{number}.slow.org"))));
        }
        assert!(!budget.begin(&name("b.slow.org")) && budget.begin(&name("b.fast.org")));
        budget.end(&name("a0.slow.org"));
        assert!(budget.begin(&name("b.slow.org")));
    }
}
