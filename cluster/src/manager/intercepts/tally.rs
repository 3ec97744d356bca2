//! What has gone where since an intercept began, though pods, agents and managers come and go.

use std::collections::BTreeMap;

use tpd_api::agent::InterceptReport;
use tpd_api::intercept::{InterceptStatus, Traffic};

/// The counts of one intercept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    departed: Traffic,
    pods: BTreeMap<String, Counts>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Of agents' processes that have ended.
    earlier: Traffic,
    /// Of the present one.
    present: Traffic,
}

impl Tally {
    /// Goes on from what a status says: another manager wrote it, or this one before it was restarted. Where the status does
    /// not list every pod, what has departed cannot be told, and is counted too low rather than twice.
    #[must_use]
    pub fn resume(status: &InterceptStatus) -> Self {
        let mut departed = status.traffic;
        for pod in &status.pods {
            departed = minus(departed, pod.traffic);
        }
        if (status.pods.len() as u64) < u64::from(status.counts.pods) {
            departed = Traffic::default();
        }
        let pods = status.pods.iter().filter(|pod| pod.traffic != Traffic::default());
        let pods =
            pods.map(|pod| (pod.name.clone(), Counts { earlier: Traffic::default(), present: pod.traffic }));
        Self { departed, pods: pods.collect() }
    }

    /// Takes in what a pod's agent has counted since its process began. Less than before is a new process.
    pub fn count(&mut self, pod: &str, report: &InterceptReport) {
        let now = Traffic {
            to_laptop: report.to_laptop,
            to_app: report.to_app,
            failed_open: report.failed_open,
            copies_lost: report.copies_lost,
        };
        let counts = self.pods.entry(pod.to_owned()).or_default();
        if minus(counts.present, now) != Traffic::default() {
            counts.earlier += counts.present;
        }
        counts.present = now;
    }

    /// Keeps the sums of pods that are no more.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        let departed = &mut self.departed;
        self.pods.retain(|pod, counts| {
            let keep = exists(pod);
            if !keep {
                *departed += counts.sum();
            }
            keep
        });
    }

    /// What has gone where at one pod.
    #[must_use]
    pub fn of(&self, pod: &str) -> Traffic {
        self.pods.get(pod).map(Counts::sum).unwrap_or_default()
    }

    /// What has gone where altogether.
    #[must_use]
    pub fn total(&self) -> Traffic {
        let mut total = self.departed;
        for counts in self.pods.values() {
            total += counts.sum();
        }
        total
    }
}

impl Counts {
    fn sum(&self) -> Traffic {
        let mut sum = self.earlier;
        sum += self.present;
        sum
    }
}

/// How much of each is more than in the other.
fn minus(one: Traffic, other: Traffic) -> Traffic {
    Traffic {
        to_laptop: one.to_laptop.saturating_sub(other.to_laptop),
        to_app: one.to_app.saturating_sub(other.to_app),
        failed_open: one.failed_open.saturating_sub(other.failed_open),
        copies_lost: one.copies_lost.saturating_sub(other.copies_lost),
    }
}

#[cfg(test)]
mod tests {
    use tpd_api::agent::InterceptReport;
    use tpd_api::intercept::{Counts, InterceptStatus, PodStatus, Traffic};

    use super::Tally;

    fn report(to_laptop: u64) -> InterceptReport {
        InterceptReport { to_laptop, ..InterceptReport::default() }
    }

    fn traffic(to_laptop: u64) -> Traffic {
        Traffic { to_laptop, ..Traffic::default() }
    }

    #[test]
    fn nothing_is_lost_when_agents_restart_and_pods_leave() {
        let mut tally = Tally::default();
        tally.count("a", &report(10));
        tally.count("a", &report(15));
        tally.count("b", &report(4));
        tally.count("a", &report(2));
        assert_eq!((tally.of("a"), tally.total()), (traffic(17), traffic(21)));
        tally.retain(|pod| pod == "b");
        assert_eq!((tally.of("a"), tally.total()), (traffic(0), traffic(21)));
    }

    #[test]
    fn a_new_manager_goes_on_from_the_status() {
        let pod = |name: &str, count| PodStatus {
            name: name.into(),
            traffic: traffic(count),
            ..PodStatus::default()
        };
        let mut status = InterceptStatus {
            counts: Counts { pods: 2, ..Counts::default() },
            traffic: traffic(100),
            pods: vec![pod("a", 10), pod("b", 20)],
            ..InterceptStatus::default()
        };
        let mut tally = Tally::resume(&status);
        assert_eq!(tally.total(), traffic(100));
        tally.count("a", &report(12));
        tally.count("b", &report(1));
        assert_eq!(tally.total(), traffic(70 + 12 + 21));
        status.counts.pods = 300;
        assert_eq!(Tally::resume(&status).total(), traffic(30));
    }
}
