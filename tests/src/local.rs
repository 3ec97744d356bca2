//! The process on a laptop that an intercept leads to.

use std::time::Duration;

use serde::Deserialize;

use crate::wait::until;
use crate::{Laptop, Running};

/// An application (`tpd-echo http`) on a laptop, which names itself after it. It ends when this is dropped.
#[derive(Debug)]
pub struct Local<'a> {
    laptop: &'a Laptop,
    address: String,
    process: Running,
}

/// What it has answered since it began.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Counts {
    /// Requests.
    pub requests: u64,
    /// Connections.
    pub connections: u64,
    /// Datagrams.
    pub datagrams: u64,
}

impl<'a> Local<'a> {
    /// Starts it, and waits until it answers.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    #[track_caller]
    pub fn start(laptop: &'a Laptop, address: &str) -> Self {
        let script = format!("exec tpd-echo http -name {} {address}", laptop.name);
        // It lives as long as the test.
        let process = laptop.script(&script).limit(Duration::from_secs(3600)).start();
        let local = Self { laptop, address: address.to_owned(), process };
        until(Duration::from_secs(5), "the local process answers", || local.get("/healthz"));
        local
    }

    /// What it has answered so far.
    ///
    /// # Panics
    /// If it does not say.
    #[must_use]
    #[track_caller]
    pub fn counts(&self) -> Counts {
        let answer =
            self.get("/counts").unwrap_or_else(|why| panic!("the local process does not answer: {why}"));
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{answer:?} are no counts: {error}"))
    }

    /// Sends it a signal, such as `STOP`.
    pub fn signal(&self, name: &str) {
        self.laptop.cluster.machine(&format!("kill -{name} {}", self.process.pid())).run().ok();
    }

    fn get(&self, path: &str) -> Result<String, String> {
        let run = self.laptop.run(&format!("curl -sS --fail --max-time 2 http://{}{path}", self.address));
        if run.code == Some(0) { Ok(run.stdout) } else { Err(run.to_string()) }
    }
}
