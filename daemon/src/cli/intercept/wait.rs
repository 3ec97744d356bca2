//! Waits until an intercept is proved, or says why it is not.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tpd_api::exit::ExitCode;
use tpd_api::intercept::{Counts, OUR_CONTAINERS, unpulled};
use tpd_api::local::Intercept;

use super::standing::{Standing, is_covered, reasons, standing};
use crate::failure::Failure;
use crate::local;
use crate::progress::Progress;

/// How often the daemon, which answers from memory, is asked.
const POLL: Duration = Duration::from_millis(100);

/// Time without any progress after which nobody waits longer. Pulling an image and starting an app takes less.
const LIMIT: Duration = Duration::from_secs(60);

/// Time after which pods that have a reason, and that nothing is being done about, are taken to stay as they are.
const STUCK: Duration = Duration::from_secs(10);

/// Time without any pod after which a workload that had none from the beginning is taken to have none: its first may just be made.
/// One that had pods is waited for as long as for anything else: a pod that is restarted is gone until it has ended, which takes as
/// long as its grace period, and its successor is there.
const EMPTY: Duration = Duration::from_secs(3);

/// What the wait is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Every ready pod hands traffic over.
    Covered,
    /// And each has reached the local port, or nothing answers there.
    Proved,
}

/// How the wait ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ended {
    pub(super) intercept: Intercept,
    /// How far it came: never [`Standing::Failed`].
    pub(super) standing: Standing,
}

/// Waits. What is waited for is shown as it changes, and why pods have no agent as soon as it is known. A workload whose pods
/// are being restarted (`restarts`) had some, though none may be seen.
pub(super) async fn wait(
    namespace: &str,
    name: &str,
    until: Until,
    restarts: bool,
    mut progress: Option<&mut Progress>,
) -> Result<Ended, Failure> {
    let mut patience = Patience::new(restarts, Instant::now());
    loop {
        let intercept = local::look(namespace, name).await?;
        let counts = intercept.status.as_ref().map(|status| status.counts).unwrap_or_default();
        let now = Instant::now();
        let is_empty = patience.is_empty(intercept.current && counts.pods > 0, now);
        let covered = intercept.current && intercept.status.as_ref().is_some_and(is_covered);
        match standing(&intercept) {
            Standing::Failed(failure) => return Err(failure),
            standing @ Standing::Waiting { .. } if covered && until == Until::Covered => {
                return Ok(Ended { intercept, standing });
            }
            Standing::Waiting { what, stuck } => {
                let news = patience.learn(counts, &stuck, now);
                if let Some(progress) = progress.as_deref_mut() {
                    progress.step(&what);
                    news.iter().for_each(|reason| progress.note(reason));
                }
                if patience.is_over(!stuck.is_empty(), now) {
                    return Err(given_up(&intercept, &what, stuck));
                }
            }
            Standing::Empty if !is_empty => {
                if let Some(progress) = progress.as_deref_mut() {
                    progress.step("waiting for pods: the workload has none");
                }
            }
            standing => return Ok(Ended { intercept, standing }),
        }
        sleep(POLL).await;
    }
}

/// How long is waited: longer for as long as something happens.
struct Patience {
    counts: Counts,
    progress: Instant,
    /// Reasons that have been heard, as few as pods and what can be the matter with them.
    heard: BTreeSet<String>,
    /// When something was heard for the first time, or nothing was the matter.
    since: Instant,
    /// When there were pods for the last time.
    peopled: Option<Instant>,
    began: Instant,
}

impl Patience {
    fn new(restarts: bool, now: Instant) -> Self {
        Self {
            counts: Counts::default(),
            progress: now,
            heard: BTreeSet::new(),
            since: now,
            peopled: restarts.then_some(now),
            began: now,
        }
    }

    /// Whether there have been no pods for so long that there will be none.
    fn is_empty(&mut self, has_pods: bool, now: Instant) -> bool {
        if has_pods {
            self.peopled = Some(now);
        }
        match self.peopled {
            Some(last) => now - last > LIMIT,
            None => now - self.began > EMPTY,
        }
    }

    /// Takes in how it is, and returns the reasons that are new. One that was heard before is no news when it comes back: a kubelet
    /// says by turns that it could not pull an image, and that it waits before it tries again.
    fn learn(&mut self, counts: Counts, stuck: &[String], now: Instant) -> Vec<String> {
        if counts != self.counts {
            (self.counts, self.progress, self.since) = (counts, now, now);
        }
        let news: Vec<_> =
            stuck.iter().filter(|reason| self.heard.insert((*reason).clone())).cloned().collect();
        if stuck.is_empty() || !news.is_empty() {
            self.since = now;
        }
        news
    }

    fn is_over(&self, is_stuck: bool, now: Instant) -> bool {
        now - self.progress > LIMIT || is_stuck && now - self.since > STUCK
    }
}

fn given_up(intercept: &Intercept, what: &str, stuck: Vec<String>) -> Failure {
    let request = &intercept.request;
    let name = request.name.as_deref().unwrap_or_default();
    let missing = intercept.status.as_ref().is_some_and(|status| status.counts.agents < status.counts.pods);
    let code = if missing { ExitCode::NoAgent } else { ExitCode::Timeout };
    let failure =
        Failure::new(code, format!("{} is not intercepted in full", request.workload)).because(what);
    let why =
        if stuck.is_empty() { intercept.status.as_ref().map(reasons).unwrap_or_default() } else { stuck };
    let mut help = format!(
        "the intercept stays, and goes on by itself as pods come to it; see: tpd status\nleave it with: tpd leave {name}"
    );
    let is_agents = |reason: &String| OUR_CONTAINERS.iter().any(|ours| reason.contains(&unpulled(ours)));
    if why.iter().any(is_agents) {
        help += "\nan administrator says which image that is: tpd install --agent-image REF; after that, leave it and intercept anew";
    }
    why.into_iter().fold(failure, |failure, reason| failure.because(reason)).help(help)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::example;

    /// Whether nobody waits any longer after this was seen.
    fn is_over(patience: &mut Patience, counts: Counts, stuck: &[String], now: Instant) -> bool {
        patience.learn(counts, stuck, now);
        patience.is_over(!stuck.is_empty(), now)
    }

    #[test]
    fn patience_lasts_while_something_happens() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let counts = |acknowledged| Counts { pods: 3, ready: 3, agents: 3, acknowledged, leaving: 0 };
        let mut patience = Patience::new(false, start);
        let over = [(1, 59), (2, 118), (2, 178), (2, 179)]
            .map(|(acknowledged, second)| is_over(&mut patience, counts(acknowledged), &[], after(second)));
        assert_eq!(over, [false, false, false, true]);
    }

    #[test]
    fn a_workload_that_has_lost_its_last_pod_gets_another() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut patience = Patience::new(false, start);
        let looks = [(false, 3), (false, 4), (true, 5), (false, 35), (true, 40), (false, 100), (false, 101)];
        let over = looks.map(|(has_pods, second)| patience.is_empty(has_pods, after(second)));
        assert_eq!(over, [false, true, false, false, false, false, true]);
        let mut patience = Patience::new(true, start);
        assert_eq!([59, 61].map(|second| patience.is_empty(false, after(second))), [false, true]);
    }

    #[test]
    fn pods_that_stay_as_they_are_are_not_waited_for() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let (one, other) = (["web-1: pending".to_owned()], ["web-1: image cannot be pulled".to_owned()]);
        let mut patience = Patience::new(false, start);
        // What is said by turns is heard twice at the most.
        let over = [(&one, 0), (&other, 9), (&one, 15), (&other, 19), (&one, 20)]
            .map(|(stuck, second)| is_over(&mut patience, Counts::default(), stuck, after(second)));
        assert_eq!(over, [false, false, false, false, true]);
        assert_eq!(patience.learn(Counts::default(), &one, after(21)), Vec::<String>::new());

        // Something was done about it meanwhile.
        assert!(!is_over(&mut patience, Counts::default(), &[], after(30)));
        assert!(!is_over(&mut patience, Counts::default(), &one, after(40)));
        assert!(is_over(&mut patience, Counts::default(), &one, after(41)));
    }

    #[test]
    fn giving_up_names_the_pods() {
        let intercept = Intercept {
            request: example("web", &["http"]),
            status: Some(tpd_api::intercept::InterceptStatus {
                counts: Counts { pods: 1, ready: 1, ..Counts::default() },
                ..Default::default()
            }),
            current: true,
            silent: Vec::new(),
            over: false,
            problem: None,
        };
        let failure =
            given_up(&intercept, "waiting for agents", vec!["web-1: image cannot be pulled".into()]);
        assert_eq!(failure.code, ExitCode::NoAgent);
        assert_eq!(failure.causes, ["waiting for agents", "web-1: image cannot be pulled"]);
        assert!(!failure.help.unwrap().contains("tpd install"));
        for trouble in OUR_CONTAINERS.map(unpulled) {
            let failure = given_up(&intercept, "waiting", vec![format!("web-1: {trouble}: no such host")]);
            assert!(failure.help.unwrap().contains("tpd install --agent-image"));
        }
    }
}
