//! `tpd intercept`, until it is left.

use std::thread;
use std::time::Duration;

use tpd_api::intercept::{InterceptStatus, State};
use tpd_api::local::Intercept;

use crate::wait::until;
use crate::{Laptop, Run};

/// A workload's pods may have to be replaced first, one surge at a time.
const STARTS: Duration = Duration::from_secs(90);

/// An intercept of a laptop. It is left when this is dropped.
#[derive(Debug)]
pub struct Intercepted<'a> {
    laptop: &'a Laptop,
    namespace: String,
    workload: String,
    left: bool,
}

impl Laptop {
    /// Runs `tpd intercept` without asking, and expects it to succeed: then traffic goes to the laptop.
    #[must_use]
    #[track_caller]
    pub fn intercept(&self, namespace: &str, workload: &str, arguments: &str) -> Intercepted<'_> {
        let intercepted = Intercepted {
            laptop: self,
            namespace: namespace.to_owned(),
            workload: workload.to_owned(),
            left: false,
        };
        let selector = format!("app={}", intercepted.name());
        let before = self.cluster.pods(namespace, &selector).concat();
        self.try_intercept(namespace, workload, arguments).ok();
        self.cluster.forgets(namespace, &selector, &before);
        intercepted
    }

    /// The same, without expecting anything.
    #[must_use]
    #[track_caller]
    pub fn try_intercept(&self, namespace: &str, workload: &str, arguments: &str) -> Run {
        let script =
            format!("tpd intercept {workload} --namespace {namespace} --yes --output json {arguments}");
        self.script(&script).limit(STARTS).run()
    }
}

impl Intercepted<'_> {
    /// How it is now, as `tpd status` has it.
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    #[track_caller]
    pub fn now(&self) -> Intercept {
        let status = self.laptop.status();
        let own = status.intercepts.iter().find(|intercept| {
            intercept.request.namespace == self.namespace && intercept.request.workload.name == self.name()
        });
        own.cloned()
            .unwrap_or_else(|| panic!("`tpd status` has no intercept of {}: {status:?}", self.workload))
    }

    /// What the manager says of it.
    ///
    /// # Panics
    /// If it says nothing.
    #[must_use]
    #[track_caller]
    pub fn status(&self) -> InterceptStatus {
        self.now().status.expect("an intercept that was proved has a status")
    }

    /// Waits until it is so.
    #[track_caller]
    pub fn until(
        &self,
        limit: Duration,
        what: &str,
        is_so: impl Fn(&InterceptStatus) -> bool,
    ) -> (InterceptStatus, Duration) {
        until(limit, what, || {
            let now = self.now();
            now.status.clone().filter(&is_so).ok_or_else(|| format!("{now:#?}"))
        })
    }

    /// Waits until just so many pods are ready, all of them have acknowledged, and Services lead to no other.
    #[track_caller]
    pub fn until_covered(&self, pods: u32) -> InterceptStatus {
        let what = format!("all of {pods} pods have acknowledged");
        let covered = |status: &InterceptStatus| {
            let counts = status.counts;
            status.state == State::Active
                && counts.ready == pods
                && counts.acknowledged == pods
                && counts.leaving == 0
        };
        self.until(Duration::from_secs(30), &what, covered).0
    }

    /// Changes it: `tpd intercept` with other arguments.
    #[track_caller]
    pub fn change(&self, arguments: &str) {
        self.laptop.try_intercept(&self.namespace, &self.workload, arguments).ok();
    }

    /// Ends it.
    #[track_caller]
    pub fn leave(mut self) {
        self.left = true;
        self.run_leave().ok();
    }

    fn run_leave(&self) -> Run {
        self.laptop.run(&format!("tpd leave {} --namespace {}", self.name(), self.namespace))
    }

    /// The workload's name, without its kind.
    fn name(&self) -> &str {
        self.workload.rsplit('/').next().unwrap_or_default()
    }
}

impl Drop for Intercepted<'_> {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let run = self.run_leave();
        if run.code != Some(0) && !thread::panicking() {
            panic!("an intercept cannot be left:\n{run}");
        }
    }
}
