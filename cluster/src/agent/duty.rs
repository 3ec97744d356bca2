//! The intercepts in force, and what it takes to carry them out in this pod: listeners, rules, heartbeats, probes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tpd_api::agent::{Config, Intercept, InterceptReport, Proof, Protocol};
use tracing::{info, warn};

use super::heartbeat::{Beat, Heartbeats, PERIOD};
use super::laptop::Laptops;
use super::listeners::{AppPort, Listeners};
use super::probe::Probes;
use super::proxy::{self, Activity, Rule};
use super::report::{Books, Finding};
use super::room::Room;
use super::stragglers::{self, Stragglers};

/// How often the kernel's tables are looked through for stragglers, while there are any.
const STRAGGLERS_PERIOD: Duration = Duration::from_secs(1);

/// How often heartbeats are tried that nothing heeds: they leave the kernel then, and an app may see them.
const UNHEEDED_PERIOD: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Duty {
    config: Option<Rc<Config>>,
    laptops: Rc<Laptops>,
    listeners: Listeners,
    room: Room,
    heartbeats: Heartbeats,
    books: Books,
    probes: Probes,
    stragglers: Stragglers,
    /// Where each intercepted port comes in.
    claims: BTreeMap<AppPort, u16>,
    /// Whether the kernel heeds heartbeats; unknown before the first one.
    heeded: Option<bool>,
    /// Whether there are too many connections, or too much waits on them, so that new ones go to the app.
    crowded: bool,
    /// What cannot be done, by the UID of the intercept.
    problems: BTreeMap<String, String>,
    next_beat: Instant,
    next_look: Instant,
}

impl Duty {
    /// None yet.
    #[must_use]
    pub fn new(listeners: Listeners, laptops: Rc<Laptops>, room: Room, now: Instant) -> Self {
        Self {
            config: None,
            laptops,
            listeners,
            room,
            heartbeats: Heartbeats::default(),
            books: Books::default(),
            probes: Probes::default(),
            stragglers: Stragglers::default(),
            claims: BTreeMap::new(),
            heeded: None,
            crowded: false,
            problems: BTreeMap::new(),
            next_beat: now,
            next_look: now,
        }
    }

    /// Carries out a configuration from now on; `None` hands everything to the app.
    pub fn take_over(&mut self, config: Option<&Rc<Config>>, now: Instant) {
        let before = self.config.take();
        self.config = config.cloned();
        let same = |one: &Config, other: &Config| one.intercepts == other.intercepts;
        match (&before, config) {
            (Some(before), Some(config)) if same(before, config) => return,
            (None, None) => return,
            _ => {}
        }
        info!(
            intercepts = self.intercepts().len(),
            connected = config.is_some(),
            "what is intercepted has changed"
        );
        self.apply();
        (self.next_beat, self.next_look) = (now, now);
    }

    fn intercepts(&self) -> &[Intercept] {
        self.config.as_ref().map_or(&[], |config| &config.intercepts)
    }

    fn apply(&mut self) {
        let config = self.config.clone();
        let intercepts = config.as_ref().map_or(&[][..], |config| &config.intercepts);
        // Counts go on when all managers were away for a while.
        if config.is_some() {
            self.books.retain(intercepts);
        }
        let mut rules: BTreeMap<AppPort, Vec<Rule>> = BTreeMap::new();
        self.problems.clear();
        self.claims.clear();
        for intercept in intercepts {
            for port in &intercept.ports {
                let app = (port.protocol, port.port);
                let rule = Rule::new(intercept, port, self.books.of(&intercept.uid))
                    .map_err(|error| error.to_string());
                match self.listeners.entry(app).and_then(|entry| Ok((entry, rule?))) {
                    Ok((entry, rule)) => {
                        self.claims.insert(app, entry);
                        rules.entry(app).or_default().push(rule);
                    }
                    Err(problem) => {
                        warn!(intercept = intercept.name, problem, "a port cannot be intercepted");
                        self.problems.insert(intercept.uid.clone(), problem);
                    }
                }
            }
        }
        self.listeners.replace(rules);
    }

    /// Whether an intercept concerns the agent.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.intercepts().is_empty()
    }

    /// Whether traffic may come to the agent.
    #[must_use]
    pub fn is_led(&self) -> bool {
        self.is_busy() || !self.listeners.are_redirected()
    }

    /// Connections that the agent holds.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.listeners.connections()
    }

    /// What goes on on them.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.listeners.activity()
    }

    /// Ports of laptops that something is still under way with, although no intercept in force leads there any more.
    #[must_use]
    pub fn held(&self) -> BTreeSet<SocketAddr> {
        self.listeners.held()
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        if self.listeners.are_redirected() {
            if now >= self.next_beat {
                self.beat();
                self.next_beat = now + if self.heeded == Some(false) { UNHEEDED_PERIOD } else { PERIOD };
            }
            // After the beat: what comes from then on comes to the agent.
            if now >= self.next_look {
                self.look_for_stragglers();
                self.next_look = now + STRAGGLERS_PERIOD;
            }
        }
        let claims = &self.claims;
        self.listeners.sweep(|port| claims.contains_key(port), now);
    }

    /// Has the kernel lead intercepted ports to the agent for a while longer.
    fn beat(&mut self) {
        let claims = &self.claims;
        self.heartbeats.retain(|entry| claims.values().any(|claimed| *claimed == entry));
        let crowded = self.room.is_crowded();
        if std::mem::replace(&mut self.crowded, crowded) != crowded {
            warn!(
                crowded,
                connections = proxy::connections(),
                bytes = proxy::held(),
                "while there are too many, or too much waits on them, new ones go to the app"
            );
        }
        // Datagrams have bounds of their own, and conversations would change side in the middle.
        let beating = claims.iter().filter(|((protocol, _), _)| !crowded || *protocol == Protocol::Udp);
        for ((protocol, port), entry) in beating {
            match self.heartbeats.beat(*protocol, *port, *entry) {
                Ok(beat) => self.heeded = Some(beat == Beat::Taken),
                Err(error) => warn!(port, %protocol, %error, "heartbeat"),
            }
        }
    }

    fn look_for_stragglers(&mut self) {
        let tcp = self.claims.keys().filter(|(protocol, _)| *protocol == Protocol::Tcp);
        let ports: BTreeSet<_> = tcp.map(|(_, port)| *port).collect();
        if ports.is_empty() {
            self.stragglers.observe(&ports, &[]);
        } else if self.stragglers.is_concerned(&ports)
            && let Ok(open) = stragglers::connections()
        {
            self.stragglers.observe(&ports, &open);
        }
    }

    /// Which intercepts are to be probed now, and where.
    pub fn probes(&mut self, now: Instant) -> Vec<(String, Vec<SocketAddr>)> {
        let intercepts = self.config.as_ref().map_or(&[][..], |config| &config.intercepts);
        let (reachable, suspensions) =
            (|laptop| self.laptops.is_reachable(laptop), self.laptops.suspensions());
        self.probes.due(intercepts, reachable, |target| suspensions.is_suspended(target), now)
    }

    /// Takes the result of one.
    pub fn settle(&mut self, uid: &str, targets: &[SocketAddr], proof: Proof, now: Instant) {
        self.probes.settle(uid, targets, proof, now);
    }

    /// How each intercept fares.
    #[must_use]
    pub fn report(&self) -> Arc<[InterceptReport]> {
        self.intercepts().iter().map(|intercept| self.books.report(self.finding(intercept))).collect()
    }

    fn finding<'a>(&'a self, intercept: &'a Intercept) -> Finding<'a> {
        let unheeded = self.listeners.are_redirected() && self.heeded == Some(false);
        let problem = self.problems.get(&intercept.uid).cloned();
        Finding {
            intercept,
            problem: problem.or_else(|| unheeded.then(|| NOT_REDIRECTED.to_owned())),
            reachable: self.laptops.is_reachable(intercept.laptop),
            stragglers: intercept
                .ports
                .iter()
                .map(|port| self.older(intercept, (port.protocol, port.port)))
                .sum(),
            proof: self.probes.proof(&intercept.uid),
        }
    }

    /// Connections of a port that an intercept has not reached: those past the agent, and those that it holds.
    fn older(&self, intercept: &Intercept, port: AppPort) -> u64 {
        let past = if port.0 == Protocol::Tcp { self.stragglers.count(port.1) } else { 0 };
        past + self.listeners.stragglers(port, &intercept.uid)
    }
}

/// What the developer reads where the init container could not do its work.
const NOT_REDIRECTED: &str = "the kernel does not lead traffic to this pod's agent, as where the container runtime has no nftables: \
                              see the log of its init container tpd-redirect";

/// Whether nothing more can be waited for: each intercept works, or it is known why not.
#[must_use]
pub fn is_settled(reports: &[InterceptReport]) -> bool {
    reports.iter().all(|report| report.acknowledged || report.proof.is_some() || report.problem.is_some())
}
