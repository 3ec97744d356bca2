//! How each intercept fares, as managers are told.

use std::collections::BTreeMap;
use std::rc::Rc;

use tpd_api::agent::{Intercept, InterceptReport, Proof};

use super::proxy::Counters;

/// What the agent has found out about an intercept in force.
#[derive(Debug)]
pub struct Finding<'a> {
    /// The intercept.
    pub intercept: &'a Intercept,
    /// What could not be done.
    pub problem: Option<String>,
    /// Whether there is a way to the laptop.
    pub reachable: bool,
    /// Older connections.
    pub stragglers: u64,
    /// The last probe.
    pub proof: Option<&'a Proof>,
}

/// Counters of every intercept, for as long as it is there.
#[derive(Debug, Default)]
pub struct Books(BTreeMap<String, Rc<Counters>>);

impl Books {
    /// Those of one intercept; they begin at nothing.
    pub fn of(&mut self, uid: &str) -> Rc<Counters> {
        Rc::clone(self.0.entry(uid.to_owned()).or_default())
    }

    /// Forgets all but these intercepts.
    pub fn retain(&mut self, intercepts: &[Intercept]) {
        self.0.retain(|uid, _| intercepts.iter().any(|intercept| intercept.uid == *uid));
    }

    /// What there is to say of an intercept.
    #[must_use]
    pub fn report(&self, finding: Finding<'_>) -> InterceptReport {
        let mut report = InterceptReport {
            uid: finding.intercept.uid.clone(),
            generation: finding.intercept.generation,
            acknowledged: finding.reachable && finding.problem.is_none(),
            stragglers: finding.stragglers,
            proof: finding.proof.cloned(),
            problem: finding.problem,
            ..InterceptReport::default()
        };
        if let Some(counters) = self.0.get(&finding.intercept.uid) {
            counters.write_to(&mut report);
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use super::{Books, Finding};
    use crate::agent::merge::tests::intercept;

    #[test]
    fn an_intercept_is_acknowledged_once_it_works() {
        let intercept = intercept("i", "fd74::2");
        let books = Books::default();
        let acknowledged = |reachable, problem: Option<&str>| {
            let problem = problem.map(Into::into);
            books.report(Finding { intercept: &intercept, problem, reachable, stragglers: 3, proof: None })
        };
        assert!(!acknowledged(false, None).acknowledged);
        assert!(acknowledged(true, None).acknowledged);
        let report = acknowledged(true, Some("no"));
        assert!(!report.acknowledged);
        assert_eq!((report.stragglers, report.problem.as_deref()), (3, Some("no")));
    }
}
