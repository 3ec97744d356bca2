//! The developers' laptops, which one test at a time has to itself.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tpd_api::local::{Path, PathKind, Status};

use crate::cluster::Cluster;
use crate::run::{Run, Running, Script};
use crate::snapshot::Snapshot;
use crate::wait::until;

/// A laptop, until the test ends.
#[derive(Debug)]
pub struct Laptop {
    /// The cluster on the other side.
    pub cluster: &'static Cluster,
    /// `laptop`, or `laptop2`: its network namespace, and what processes on it call themselves.
    pub name: &'static str,
    // The second laptop is there for as long as the first, which has the turn.
    _turn: Option<MutexGuard<'static, ()>>,
}

impl Laptop {
    /// Waits for its turn; then cluster and laptop are as new, and tpd is not connected.
    ///
    /// # Panics
    /// If the cluster cannot be had, or the laptop not be disconnected.
    #[must_use]
    pub fn take() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let cluster = Cluster::get();
        cluster.heal();
        let laptop = Self { cluster, name: "laptop", _turn: Some(turn) };
        let _ = laptop.run("tpd down");
        laptop
    }

    /// The laptop of another developer, `dev2`, not connected either.
    #[must_use]
    pub fn second(&self) -> Self {
        let laptop = Self { cluster: self.cluster, name: "laptop2", _turn: None };
        let _ = laptop.run("tpd down");
        laptop
    }

    /// Runs a script as root on the laptop, with a developer's kubeconfig.
    #[must_use]
    #[track_caller]
    pub fn run(&self, script: &str) -> Run {
        self.script(script).run()
    }

    /// The same, to be adjusted first.
    #[must_use]
    pub fn script(&self, script: &str) -> Script {
        self.cluster.laptop(self.name, script)
    }

    /// The same, in the background.
    #[must_use]
    pub fn start(&self, script: &str) -> Running {
        self.script(script).start()
    }

    /// Does something with sockets of the laptop. Names are not resolved there: use addresses.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        crate::inside(&self.netns(), work)
    }

    /// Name of its network namespace.
    #[must_use]
    pub fn netns(&self) -> String {
        self.cluster.netns(self.name)
    }

    /// Runs `tpd up` and expects it to succeed. The laptop is disconnected at the end, and must be as it was before.
    #[must_use]
    #[track_caller]
    pub fn up(&self, arguments: &str) -> Connection<'_> {
        let before = Snapshot::of(self);
        self.run(&format!("tpd up {arguments}")).ok();
        Connection { laptop: self, before, down: false }
    }

    /// `tpd up` with the namespace of the samples, over one kind of path.
    #[must_use]
    #[track_caller]
    pub fn up_over(&self, path: PathKind) -> Connection<'_> {
        self.up(&format!("--namespace shop --path {}", name(path)))
    }

    /// What `tpd status` says.
    ///
    /// # Panics
    /// If it prints something else than a [`Status`].
    #[must_use]
    #[track_caller]
    pub fn status(&self) -> Status {
        let run = self.run("tpd status --output json");
        // A daemon that is reconnecting answers too, with another exit code.
        serde_json::from_str(run.out())
            .unwrap_or_else(|error| panic!("`tpd status --output json` is not a Status: {error}\n{run}"))
    }

    /// The name of the laptop's ClientSession, in the manager's namespace.
    ///
    /// # Panics
    /// If it has none.
    #[must_use]
    #[track_caller]
    pub fn session(&self) -> String {
        let session = self.status().session.expect("a connected laptop has a session");
        session.rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// The manager pod that carries the session. It introduces itself a moment after the first packet.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    #[track_caller]
    pub fn manager(&self) -> String {
        let what = "a connected laptop knows its manager";
        until(Duration::from_secs(2), what, || self.status().manager.ok_or("it does not")).0.pod
    }

    /// Waits until the session is carried by this kind of path.
    #[track_caller]
    pub fn until_over(&self, limit: Duration, path: PathKind) -> Path {
        let what = format!("the session goes over {}", name(path));
        until(limit, &what, || {
            let paths = self.status().paths;
            let active = paths.iter().find(|path| path.active).cloned();
            active.filter(|active| active.kind == path).ok_or_else(|| format!("{paths:?}"))
        })
        .0
    }

    /// Checks that the laptop is as it was.
    ///
    /// # Panics
    /// If it still is not when the limit is over.
    #[track_caller]
    pub fn until_as(&self, before: &Snapshot, limit: Duration) {
        until(limit, "the laptop's network is as it was before `tpd up`", || {
            before.same_as(&Snapshot::of(self))
        });
    }

    /// Process ids of tpd on the laptop: `up` for daemons, anything else by a word of its command line.
    #[must_use]
    pub fn processes(&self, word: &str) -> Vec<u32> {
        let netns = self.netns();
        let script = format!(
            "for p in $(ip netns pids {netns}); do tr '\\0' ' ' </proc/$p/cmdline | grep -q -e '{word}' && echo $p; done; true"
        );
        self.cluster.machine(&script).run().out().lines().filter_map(|pid| pid.parse().ok()).collect()
    }
}

/// A path's name on the command line.
fn name(path: PathKind) -> &'static str {
    match path {
        PathKind::Udp => "udp",
        PathKind::Proxy => "proxy",
        PathKind::Forward => "forward",
    }
}

/// A laptop that is connected, until this is dropped.
#[derive(Debug)]
pub struct Connection<'a> {
    laptop: &'a Laptop,
    before: Snapshot,
    down: bool,
}

impl Connection<'_> {
    /// The laptop's network before `tpd up`.
    #[must_use]
    pub fn before(&self) -> &Snapshot {
        &self.before
    }

    /// Disconnects, and checks that all is as it was before.
    ///
    /// # Panics
    /// If `tpd down` fails or leaves something behind.
    #[track_caller]
    pub fn down(mut self) {
        self.down = true;
        self.laptop.run("tpd down").ok();
        self.laptop.until_as(&self.before, Duration::ZERO);
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        if self.down {
            return;
        }
        let run = self.laptop.run("tpd down");
        if !thread::panicking() {
            run.ok();
            self.laptop.until_as(&self.before, Duration::ZERO);
        }
    }
}
