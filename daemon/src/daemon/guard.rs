//! A tiny process that outlives a killed daemon just long enough to put things back.
//!
//! It waits on a pipe whose other end only the daemon holds, and which the kernel closes however the daemon ends. Where
//! the daemon has undone everything itself, nothing is left to do.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::dns;
use crate::net::Netlink;

/// Time for a guard to see that there is nothing to undo.
const DISMISSAL: Duration = Duration::from_secs(2);

/// What runs here, even if its file has been replaced since: an upgrade must not stop a daemon from starting anew.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The daemon's side of the guard.
#[derive(Debug)]
pub(crate) struct Guard(Child);

impl Guard {
    /// Starts the guard: this same program.
    pub(crate) fn start() -> io::Result<Self> {
        Command::new(THIS_PROGRAM)
            .arg0("tpd")
            .arg("guard")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map(Self)
    }

    /// Sends the guard home, and waits until it has gone; not for ever, as it only has nothing to do.
    pub(crate) async fn dismiss(mut self) {
        drop(self.0.stdin.take());
        let gone = tokio::task::spawn_blocking(move || self.0.wait());
        let _ = timeout(DISMISSAL, gone).await;
    }
}

/// The guard itself: waits for the daemon to end, and undoes what it left behind.
pub(crate) fn run() {
    let Ok(runtime) = runtime::Builder::new_current_thread().enable_all().build() else { return };
    // A session of its own: a terminal that closes takes the daemon perhaps, but not the guard.
    let _ = rustix::process::setsid();
    runtime.block_on(async {
        // Handled, and so no longer fatal. The guard's life is bounded by the daemon's, so it needs no other end.
        let _deaf = [SignalKind::interrupt(), SignalKind::hangup(), SignalKind::terminate()].map(signal);
        let restored = tokio::task::spawn_blocking(dns::restore_when_gone).await;
        let removed = remove_routes().await;
        // Standard error is the daemon's log.
        for error in [restored.map_or_else(|error| Some(error.to_string()), failed), failed(removed)] {
            error.iter().for_each(|error| crate::output::note(&format!("guard: {error}")));
        }
    });
}

fn failed<E: std::error::Error + 'static>(result: Result<(), E>) -> Option<String> {
    result.err().map(|error| crate::failure::chain(&error))
}

/// Undoes what a daemon left behind that was killed, also before a reboot. Answers what could not be undone.
pub(crate) async fn recover() -> Vec<String> {
    let resolver =
        failed(dns::recover()).map(|error| format!("the system's resolver was not restored: {error}"));
    let routes = failed(remove_routes().await)
        .map(|error| format!("routes (ip route show proto 116) were not removed: {error}"));
    resolver.into_iter().chain(routes).collect()
}

async fn remove_routes() -> io::Result<()> {
    Netlink::open()?.remove_ours().await.map(drop)
}
