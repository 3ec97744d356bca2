//! What is to become of the traffic of one port. Rules are replaced while connections live, and every request is judged by those
//! that are current when it comes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};

use tokio::sync::watch;
use tpd_api::agent::{Intercept, InterceptReport, Mode, Port as PortOfIntercept};
use tpd_api::filter::{FilterError, Matcher};

use super::h2::Offer;
use super::live::{Activity, Entry, Live, UnderWay};

/// What has gone where for one intercept, all its ports together, as an
/// [`InterceptReport`] counts it.
#[derive(Debug, Default)]
pub struct Counters {
    to_laptop: Cell<u64>,
    to_app: Cell<u64>,
    failed_open: Cell<u64>,
    copies_lost: Cell<u64>,
}

impl Counters {
    /// Writes the counts into a report.
    pub fn write_to(&self, report: &mut InterceptReport) {
        report.to_laptop = self.to_laptop.get();
        report.to_app = self.to_app.get();
        report.failed_open = self.failed_open.get();
        report.copies_lost = self.copies_lost.get();
    }

    pub(super) fn went_to_laptop(&self) {
        self.to_laptop.update(|count| count + 1);
    }

    pub(super) fn went_to_app(&self) {
        self.to_app.update(|count| count + 1);
    }

    pub(super) fn failed_open(&self) {
        self.failed_open.update(|count| count + 1);
    }

    pub(super) fn lost_copy(&self) {
        self.copies_lost.update(|count| count + 1);
    }
}

/// One intercept, as it concerns one port.
#[derive(Debug)]
pub struct Rule {
    /// UID of the intercept.
    pub uid: String,
    /// Generation of its spec.
    pub generation: i64,
    /// The laptop's overlay address and port.
    pub laptop: SocketAddr,
    /// Whether connections to the laptop begin with a PROXY protocol header.
    pub proxy_protocol: bool,
    mode: Mode,
    /// `None` matches everything, whatever it is.
    matcher: Option<Matcher>,
    counters: Rc<Counters>,
    /// Generation of the port's rules that first had it as it is now.
    since: u64,
    /// Requests, and connections without any, that are under way with the laptop.
    engaged: Cell<usize>,
}

impl Rule {
    /// The rule that an intercept makes for one of its ports.
    ///
    /// # Errors
    /// Fails where its filter makes no sense.
    pub fn new(
        intercept: &Intercept,
        port: &PortOfIntercept,
        counters: Rc<Counters>,
    ) -> Result<Self, FilterError> {
        let filter = &intercept.filter;
        Ok(Self {
            uid: intercept.uid.clone(),
            generation: intercept.generation,
            laptop: SocketAddr::from((intercept.laptop, port.overlay_port)),
            proxy_protocol: intercept.proxy_protocol,
            mode: intercept.mode,
            matcher: if filter.is_empty() { None } else { Some(filter.compile()?) },
            counters,
            since: 0,
            engaged: Cell::default(),
        })
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Notes that something is under way with the laptop, for as long as what is returned lives.
    pub(super) fn engage(self: &Rc<Self>) -> Engaged {
        self.engaged.update(|count| count + 1);
        Engaged(self.clone())
    }

    /// Whether connections of one serve for the other.
    pub(super) fn leads_where(&self, other: &Self) -> bool {
        self.laptop == other.laptop && self.proxy_protocol == other.proxy_protocol
    }

    fn is_as_before(&self, before: &Self) -> bool {
        self.uid == before.uid && self.generation == before.generation && self.leads_where(before)
    }
}

/// Something that is under way with a rule's laptop.
#[derive(Debug)]
pub(super) struct Engaged(Rc<Rule>);

impl Drop for Engaged {
    fn drop(&mut self) {
        self.0.engaged.update(|count| count - 1);
    }
}

/// All rules of a port, the oldest first.
#[derive(Debug, Default)]
pub struct Rules {
    generation: u64,
    rules: Vec<Rc<Rule>>,
}

/// Where a request, or a connection that is none of HTTP, goes.
#[derive(Clone, Debug, Default)]
pub(super) struct Choice {
    /// To this laptop; to the app if there is none.
    pub(super) laptop: Option<Rc<Rule>>,
    /// To these, a copy.
    pub(super) taps: Vec<Rc<Rule>>,
}

impl Rules {
    /// Raised whenever the rules are replaced.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether requests are told apart.
    pub(super) fn have_filters(&self) -> bool {
        self.rules.iter().any(|rule| rule.matcher.is_some())
    }

    /// Chooses for a request, and counts it where it matches nothing.
    pub(super) fn choose<'a, H>(&self, method: &[u8], target: &[u8], headers: H) -> Choice
    where
        H: IntoIterator<Item = (&'a str, &'a [u8])> + Clone,
    {
        self.decide(|rule| {
            (rule.matcher.as_ref()).is_none_or(|matcher| matcher.matches(method, target, headers.clone()))
        })
    }

    /// Chooses for what is not HTTP, and counts it where it goes to the app: filters match none of it.
    pub(super) fn choose_raw(&self) -> Choice {
        self.decide(|rule| rule.matcher.is_none())
    }

    /// Where anything that is not HTTP would go.
    pub(super) fn raw_laptop(&self) -> Option<&Rc<Rule>> {
        self.rules.iter().find(|rule| rule.mode == Mode::Intercept && rule.matcher.is_none())
    }

    /// Whether some rule leads where `other` does.
    pub(super) fn lead_to(&self, other: &Rule) -> bool {
        self.rules.iter().any(|rule| rule.leads_where(other))
    }

    fn decide(&self, matches: impl Fn(&Rule) -> bool) -> Choice {
        let mut choice = Choice::default();
        for rule in &self.rules {
            match rule.mode {
                Mode::Intercept if choice.laptop.is_none() && matches(rule) => {
                    choice.laptop = Some(rule.clone());
                }
                Mode::Wiretap if matches(rule) => choice.taps.push(rule.clone()),
                _ => {}
            }
        }
        if choice.laptop.is_none() {
            let tapped = |rule: &Rc<Rule>| choice.taps.iter().any(|tap| Rc::ptr_eq(tap, rule));
            self.rules.iter().filter(|rule| !tapped(rule)).for_each(|rule| rule.counters.went_to_app());
        }
        choice
    }
}

/// A port of the app: its rules, and the connections that the agent holds on it.
#[derive(Debug)]
pub struct Port {
    rules: watch::Sender<Rc<Rules>>,
    /// Rules that were in force before; of those that nobody uses any more nothing is left.
    former: RefCell<Vec<Weak<Rule>>>,
    live: Rc<Live>,
    offer: Offer,
}

impl Default for Port {
    fn default() -> Self {
        Self {
            rules: watch::Sender::new(Rc::default()),
            former: RefCell::default(),
            live: Rc::default(),
            offer: Offer::default(),
        }
    }
}

impl Port {
    /// Puts other rules in force, the oldest first. Live connections obey them from their next request on.
    pub fn replace(&self, rules: Vec<Rule>) {
        let before = self.current();
        let generation = before.generation + 1;
        let rules = rules.into_iter().map(|mut rule| {
            let same = before.rules.iter().find(|old| rule.is_as_before(old));
            rule.since = same.map_or(generation, |old| old.since);
            Rc::new(rule)
        });
        let rules = rules.collect();
        let mut former = self.former.borrow_mut();
        former.retain(|rule| rule.strong_count() > 0);
        former.extend(before.rules.iter().map(Rc::downgrade));
        self.rules.send_replace(Rc::new(Rules { generation, rules }));
    }

    /// Connections that the agent holds on this port.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.live.count()
    }

    /// Connections of this port whose last request was judged by rules that did not have the intercept, or not as it is now.
    #[must_use]
    pub fn stragglers(&self, uid: &str) -> u64 {
        let rules = self.current();
        let since = rules.rules.iter().find(|rule| rule.uid == uid).map(|rule| rule.since);
        since.map_or(0, |since| self.live.older_than(since))
    }

    pub(super) fn current(&self) -> Rc<Rules> {
        self.rules.borrow().clone()
    }

    /// Completes when the last rule is gone. That there has been none so far is no news.
    pub(super) async fn released(&self) {
        let mut rules = self.rules.subscribe();
        // Both fail only without a sender, which is `self`.
        let _ = rules.wait_for(|rules| !rules.is_empty()).await;
        let _ = rules.wait_for(|rules| rules.is_empty()).await;
    }

    /// Ports of laptops that something is still under way with, although no rule leads there any more.
    #[must_use]
    pub fn held(&self) -> BTreeSet<SocketAddr> {
        let rules = self.current();
        let former = self.former.borrow();
        let engaged = former.iter().filter_map(Weak::upgrade).filter(|rule| rule.engaged.get() > 0);
        let held = engaged.map(|rule| rule.laptop);
        held.filter(|laptop| rules.rules.iter().all(|rule| rule.laptop != *laptop)).collect()
    }

    /// What goes on on them.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.live.activity()
    }

    /// What clients of HTTP/2 are offered.
    pub(super) fn offer(&self) -> &Offer {
        &self.offer
    }

    pub(super) fn enter(&self) -> Entry {
        Entry::new(&self.live)
    }

    /// Notes that a request is being answered, for as long as what is returned lives.
    pub(super) fn begin(&self) -> UnderWay {
        UnderWay::new(&self.live)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::rc::Rc;

    use tpd_api::agent::{Intercept, InterceptReport, Mode, Port as PortOfIntercept, Protocol};
    use tpd_api::filter::{Filter, HeaderCondition, Match};

    use super::{Counters, Port, Rule};

    /// A rule and its counters; `header` is the value that `x-dev` must have.
    pub(in crate::agent::proxy) fn rule(uid: &str, header: Option<&str>, mode: Mode) -> (Rule, Rc<Counters>) {
        let condition = |value: &str| HeaderCondition {
            name: "x-dev".into(),
            value: value.into(),
            r#match: Match::Exact,
        };
        let port = PortOfIntercept { port: 80, protocol: Protocol::Tcp, overlay_port: 4000 };
        let intercept = Intercept {
            uid: uid.into(),
            name: uid.into(),
            generation: 1,
            laptop: "fd74::2".parse().unwrap(),
            ports: vec![port],
            filter: Filter { headers: header.map(condition).into_iter().collect(), ..Filter::default() },
            mode,
            proxy_protocol: false,
            environment: None,
        };
        let counters = Rc::new(Counters::default());
        (Rule::new(&intercept, &port, counters.clone()).unwrap(), counters)
    }

    /// To the laptop, to the app, failed open, copies lost.
    pub(in crate::agent::proxy) fn counts(counters: &Counters) -> [u64; 4] {
        let mut report = InterceptReport::default();
        counters.write_to(&mut report);
        [report.to_laptop, report.to_app, report.failed_open, report.copies_lost]
    }

    #[test]
    fn the_oldest_that_matches_takes_a_request_and_taps_get_copies() {
        let port = Port::default();
        port.replace(vec![
            rule("a", Some("a"), Mode::Intercept).0,
            rule("tap", Some("b"), Mode::Wiretap).0,
            rule("b", Some("b"), Mode::Intercept).0,
            rule("late", Some("b"), Mode::Intercept).0,
        ]);
        let rules = port.current();
        let choose = |value: &'static [u8]| {
            let choice = rules.choose(b"GET", b"/", [("X-Dev", value)]);
            let taps: Vec<_> = choice.taps.iter().map(|rule| rule.uid.clone()).collect();
            (choice.laptop.map(|rule| rule.uid.clone()), taps)
        };
        assert_eq!(choose(b"a"), (Some("a".into()), vec![]));
        assert_eq!(choose(b"b"), (Some("b".into()), vec!["tap".into()]));
        assert_eq!(choose(b"c"), (None, vec![]));
        assert!(rules.choose_raw().laptop.is_none());
        let to_app: Vec<_> = rules.rules.iter().map(|rule| counts(&rule.counters)[1]).collect();
        assert_eq!(to_app, [2, 2, 2, 2], "the request that matched nothing, and the raw connection");
    }

    #[test]
    fn a_laptop_is_held_by_what_its_former_rule_has_under_way() {
        let port = Port::default();
        port.replace(vec![rule("a", None, Mode::Intercept).0]);
        let former = port.current().raw_laptop().unwrap().clone();
        let engaged = former.engage();
        assert!(port.held().is_empty(), "the rule is in force");
        port.replace(vec![rule("b", None, Mode::Intercept).0]);
        assert!(port.held().is_empty(), "another leads there");
        port.replace(vec![]);
        assert_eq!(port.held(), [former.laptop].into());
        port.replace(vec![]);
        assert_eq!(port.held(), [former.laptop].into());
        drop(engaged);
        assert!(port.held().is_empty(), "an idle connection needs nothing");
        drop(former);
        port.replace(vec![]);
        assert!(port.former.borrow().is_empty());
    }

    #[test]
    fn connections_are_stragglers_until_they_obey_the_rules() {
        let port = Port::default();
        port.replace(vec![rule("a", None, Mode::Intercept).0]);
        let mut entry = port.enter();
        assert_eq!((port.connections(), port.stragglers("a")), (1, 0), "nothing was asked yet");
        entry.judged_by(&port.current());
        assert_eq!(port.stragglers("a"), 0);

        port.replace(vec![rule("a", None, Mode::Intercept).0, rule("b", None, Mode::Intercept).0]);
        assert_eq!((port.stragglers("a"), port.stragglers("b"), port.stragglers("c")), (0, 1, 0));
        let mut changed = rule("a", Some("x"), Mode::Intercept).0;
        changed.generation = 2;
        port.replace(vec![changed, rule("b", None, Mode::Intercept).0]);
        assert_eq!((port.stragglers("a"), port.stragglers("b")), (1, 1));
        entry.judged_by(&port.current());
        assert_eq!((port.stragglers("a"), port.stragglers("b")), (0, 0));
        drop(entry);
        assert_eq!(port.connections(), 0);
    }
}
