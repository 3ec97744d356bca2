//! Counters, and how long answers took.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use serde::Serialize;

/// Upper bounds of the latency buckets in microseconds: a cache hit, a LAN, a tunnel, a far one, a slow one, the deadline.
const BOUNDS: [u64; 10] = [100, 500, 1_000, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000, 5_000_000];

/// What the proxy has done since it was bound.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) queries: AtomicU64,
    pub(crate) cluster: AtomicU64,
    pub(crate) upstream: AtomicU64,
    pub(crate) cache_hits: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) overloaded: AtomicU64,
    pub(crate) garbage: AtomicU64,
    latency: [AtomicU64; BOUNDS.len()],
}

/// A reading of the proxy's counters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Questions received, garbage excluded.
    pub queries: u64,
    /// Questions sent to the cluster: those that neither the cache nor another one on its way could answer.
    pub cluster: u64,
    /// Questions sent to the resolver that the system used before.
    pub upstream: u64,
    /// Questions about cluster names that the cache answered.
    pub cache_hits: u64,
    /// Questions answered SERVFAIL because nobody gave an answer in time.
    pub failures: u64,
    /// Questions answered SERVFAIL at once because too many were on their way.
    pub overloaded: u64,
    /// Packets that were no questions, and were dropped.
    pub garbage: u64,
    /// Half of the questions were answered within so many microseconds (rounded up to a bucket).
    pub p50_us: u64,
    /// All but one in a hundred were answered within so many microseconds (rounded up to a bucket).
    pub p99_us: u64,
}

impl Counters {
    pub(crate) fn took(&self, time: Duration) {
        let time = time.as_micros() as u64;
        let bucket = BOUNDS.iter().position(|bound| time <= *bound).unwrap_or(BOUNDS.len() - 1);
        self.latency[bucket].fetch_add(1, Relaxed);
    }

    pub(crate) fn read(&self) -> Stats {
        Stats {
            queries: self.queries.load(Relaxed),
            cluster: self.cluster.load(Relaxed),
            upstream: self.upstream.load(Relaxed),
            cache_hits: self.cache_hits.load(Relaxed),
            failures: self.failures.load(Relaxed),
            overloaded: self.overloaded.load(Relaxed),
            garbage: self.garbage.load(Relaxed),
            p50_us: self.percentile(50),
            p99_us: self.percentile(99),
        }
    }

    fn percentile(&self, percent: u64) -> u64 {
        let counts = self.latency.each_ref().map(|count| count.load(Relaxed));
        let wanted = (counts.iter().sum::<u64>() * percent).div_ceil(100);
        let reached = counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        });
        let bucket = reached.zip(BOUNDS).find(|(sum, _)| *sum >= wanted.max(1));
        bucket.map_or(0, |(_, bound)| bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_bucket_bounds() {
        let counters = Counters::default();
        assert_eq!(counters.read(), Stats::default());
        for _ in 0..98 {
            counters.took(Duration::from_micros(300));
        }
        counters.took(Duration::from_millis(40));
        counters.took(Duration::from_secs(9));
        let stats = counters.read();
        assert_eq!((stats.p50_us, stats.p99_us), (500, 50_000));
    }
}
