//! Requests without end, and who answered them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;

use crate::wait::until;
use crate::{Cluster, Running};

/// No load of a test is this long; one that nobody ends does.
const LONGEST: Duration = Duration::from_secs(240);

/// Milliseconds of Unix time, as a [`Record`] has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(transparent)]
pub struct Stamp(u64);

impl Stamp {
    /// Now.
    ///
    /// # Panics
    /// If the clock is before 1970.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is set");
        Self(u64::try_from(since.as_millis()).expect("milliseconds fit for ages"))
    }

    /// Time since another; none if that is later.
    #[must_use]
    pub fn since(self, other: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(other.0))
    }
}

impl std::ops::Add<Duration> for Stamp {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0 + u64::try_from(time.as_millis()).expect("tests are short"))
    }
}

/// Where requests come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The node itself: it reaches Services and pods.
    Node,
    /// Outside the cluster: it reaches the Ingress.
    Outside,
}

/// A load that is to be: `tpd-echo load`.
#[derive(Clone, Debug)]
pub struct Load {
    url: String,
    from: Source,
    arguments: String,
}

impl Load {
    /// On a URL, with eight kept-alive connections and as many requests as there can be.
    #[must_use]
    pub fn on(from: Source, url: &str) -> Self {
        Self { url: url.to_owned(), from, arguments: String::new() }
    }

    /// With that many connections, each with one request at a time.
    #[must_use]
    pub fn connections(self, count: u32) -> Self {
        self.with(&format!("-connections {count}"))
    }

    /// With that many requests a second, all together.
    #[must_use]
    pub fn rate(self, per_second: u32) -> Self {
        self.with(&format!("-rate {per_second}"))
    }

    /// With that many requests, and then it ends.
    #[must_use]
    pub fn requests(self, count: u32) -> Self {
        self.with(&format!("-requests {count}"))
    }

    /// With further arguments of `tpd-echo load`.
    #[must_use]
    pub fn with(mut self, arguments: &str) -> Self {
        self.arguments += &format!(" {arguments}");
        self
    }

    /// Begins; it goes on until it is finished.
    ///
    /// # Panics
    /// If no file can be made.
    #[must_use]
    pub fn start(self, cluster: &Cluster) -> Loading {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("load-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let file = cluster.state(&name);
        fs::write(&file, "").expect("the cluster's state can be written");
        let script = format!(
            "exec {} load -seconds {} -while {} {} {}",
            cluster.program("tpd-echo"),
            LONGEST.as_secs(),
            file.display(),
            self.arguments,
            self.url
        );
        let script = match self.from {
            Source::Node => cluster.node_script(&script),
            Source::Outside => cluster.wan_script(&script),
        };
        Loading { file, process: Some(script.limit(LONGEST + Duration::from_secs(20)).start()) }
    }

    /// Makes the requests that it was told to, and says what became of them.
    #[must_use]
    #[track_caller]
    pub fn run(self, cluster: &Cluster) -> Record {
        let mut loading = self.start(cluster);
        let process = loading.process.as_mut().expect("it is finished once");
        until(LONGEST, "the load comes to its end", || {
            if process.ended() { Ok(()) } else { Err("it still runs") }
        });
        loading.finish()
    }
}

/// A load that is on. It ends when it is dropped.
#[derive(Debug)]
pub struct Loading {
    file: PathBuf,
    process: Option<Running>,
}

impl Loading {
    /// Ends it once what is under way has been answered, and says what became of all requests.
    ///
    /// # Panics
    /// If it does not say.
    #[must_use]
    #[track_caller]
    pub fn finish(mut self) -> Record {
        let _ = fs::remove_file(&self.file);
        let run = self.process.take().expect("it is finished once").finish();
        serde_json::from_str(run.ok().out()).unwrap_or_else(|error| panic!("no record: {error}\n{run}"))
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// What became of the requests of a load.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// How many there were.
    pub requests: u64,
    /// How many were not answered, or not well.
    pub failed: u64,
    /// Failures, the first two hundred.
    pub failures: Vec<Failure>,
    /// Who answered how many of those without the mark.
    pub unmarked: BTreeMap<String, u64>,
    /// And of those with it.
    pub marked: BTreeMap<String, u64>,
    /// Half were answered within this, microseconds.
    pub p50_micros: u64,
    /// The slowest, microseconds.
    pub max_micros: u64,
    /// What was answered when.
    pub timeline: Vec<Moment>,
}

/// A request that failed.
#[derive(Clone, Debug, Deserialize)]
pub struct Failure {
    /// When it was made.
    pub began: Stamp,
    /// When it failed.
    pub ended: Stamp,
    /// In a word.
    pub kind: String,
    /// In full.
    pub error: String,
}

/// How finely a record tells when something was answered.
const MOMENT: Duration = Duration::from_millis(50);

/// One of them.
#[derive(Clone, Debug, Deserialize)]
pub struct Moment {
    /// When they began.
    pub at: Stamp,
    /// Who answered how many requests in them.
    pub served: BTreeMap<String, u64>,
    /// How many failed in them.
    pub failed: u64,
}

impl Record {
    /// How many requests were answered by those.
    #[must_use]
    pub fn by(&self, who: impl Fn(&str) -> bool) -> u64 {
        let all = self.unmarked.iter().chain(&self.marked);
        all.filter(|(name, _)| who(name)).map(|(_, count)| count).sum()
    }

    /// In a line.
    #[must_use]
    pub fn summary(&self) -> String {
        let laptops = self.by(is_laptop);
        format!(
            "{} requests, {} failed, {laptops} answered by a laptop, {} by {} pods; p50 {} us, longest {} ms",
            self.requests,
            self.failed,
            self.by(|name| !is_laptop(name)),
            self.unmarked.keys().filter(|name| !is_laptop(name)).count(),
            self.p50_micros,
            self.max_micros / 1000
        )
    }

    /// There were requests, and none failed.
    ///
    /// # Panics
    /// If one did.
    #[track_caller]
    pub fn none_failed(&self) -> &Self {
        self.failed_at_most(0)
    }

    /// There were requests, and no more failed than this.
    ///
    /// # Panics
    /// If more did.
    #[track_caller]
    pub fn failed_at_most(&self, bound: u64) -> &Self {
        assert!(self.requests > 0, "there was no request at all");
        assert!(
            self.failed <= bound,
            "{} requests failed, over {bound}: {}\n{:#?}",
            self.failed,
            self.summary(),
            &self.failures[..self.failures.len().min(10)]
        );
        self
    }

    /// All that were answered were answered by those.
    ///
    /// # Panics
    /// If somebody else answered one.
    #[track_caller]
    pub fn all_by(&self, who: impl Fn(&str) -> bool) -> &Self {
        let others: BTreeMap<_, _> =
            self.unmarked.iter().chain(&self.marked).filter(|(name, _)| !who(name)).collect();
        assert!(others.is_empty(), "others answered too, {others:?}: {}", self.summary());
        self
    }

    /// How long after `since` the last request was answered by somebody else, or failed: none if none was.
    #[must_use]
    pub fn settled_after(&self, since: Stamp, who: impl Fn(&str) -> bool) -> Duration {
        self.settled_between(since, Stamp(u64::MAX), who)
    }

    /// The same, of what happened before `end`: a moment in which that falls is not looked at.
    ///
    /// # Panics
    /// If those answered nothing before `end`.
    #[must_use]
    #[track_caller]
    pub fn settled_between(&self, since: Stamp, end: Stamp, who: impl Fn(&str) -> bool) -> Duration {
        let moments =
            || self.timeline.iter().filter(|moment| moment.at >= since && moment.at + MOMENT <= end);
        let other = |moment: &&Moment| moment.failed > 0 || moment.served.keys().any(|name| !who(name));
        let last = moments().rfind(other);
        let settled = last.map_or(Duration::ZERO, |moment| moment.at.since(since) + MOMENT);
        let after = moments()
            .any(|moment| moment.at >= since + settled && moment.served.keys().any(|name| who(name)));
        assert!(after, "it never settled: {}\n{:?}", self.summary(), moments().next_back());
        settled
    }

    /// Failures that began only after this.
    #[must_use]
    pub fn failures_begun_after(&self, stamp: Stamp) -> Vec<&Failure> {
        self.failures.iter().filter(|failure| failure.began > stamp).collect()
    }
}

/// Whether an application's name is that of one on a laptop.
#[must_use]
pub fn is_laptop(name: &str) -> bool {
    name.starts_with("laptop")
}

/// Whether it is that of one in a pod.
#[must_use]
pub fn is_pod(name: &str) -> bool {
    !is_laptop(name)
}
