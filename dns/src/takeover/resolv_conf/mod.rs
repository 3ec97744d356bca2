//! Systems whose programs read resolv.conf: the proxy becomes its only name server.
//!
//! NetworkManager, dhclient and others may rewrite the file at any time. What they wrote is taken as the new state of the system: its
//! servers are the ones to ask, and it is what comes back in the end. Then the proxy is put in front again, a few times.

mod boot;
mod state;
pub(super) mod text;

use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

pub(crate) use state::recover_from;
use state::{Before, Saved, read};
pub use state::{Recovery, recover};
use text::Text;

use super::{Files, Guard, Hold, Link, TakeoverError, WayBack};
use crate::rules::Scope;

/// How often the file is looked at: reading a page that is in memory costs microseconds.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often the file is taken again within [`WINDOW`]. Changing networks rewrites it once or twice; somebody who does it more often fights
/// for it, and then it is theirs.
const MAX_RETAKES: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// A system whose programs read resolv.conf.
#[derive(Debug)]
pub struct ResolvConf {
    files: Files,
    upstreams: watch::Sender<Arc<[SocketAddr]>>,
}

impl ResolvConf {
    pub(super) fn new(files: Files) -> Result<Self, TakeoverError> {
        let before = before(&files.resolv_conf)?;
        let (upstreams, _) = watch::channel(servers(before.content.as_deref()));
        Ok(Self { files, upstreams })
    }

    pub(super) fn upstreams(&self) -> watch::Receiver<Arc<[SocketAddr]>> {
        self.upstreams.subscribe()
    }

    pub(super) fn take(self, link: Link, scope: &Scope) -> Result<Guard, TakeoverError> {
        let state_dir = self.files.state_dir.clone();
        let (hold, held) = watch::channel(Hold::Held);
        let keeper =
            Keeper { link, scope: scope.clone(), retakes: VecDeque::new(), seen: None, system: self };
        let before = before(&keeper.system.files.resolv_conf)?;
        keeper.publish(servers(before.content.as_deref()));
        let saved = keeper.take(before)?;
        let task = tokio::spawn(keeper.keep(saved, hold));
        Ok(Guard::new(WayBack::ResolvConf(state_dir), held, task))
    }
}

fn before(path: &Path) -> Result<Before, TakeoverError> {
    Before::read(path).map_err(|source| TakeoverError::File { action: "read", path: path.to_owned(), source })
}

fn servers(content: Option<&[u8]>) -> Arc<[SocketAddr]> {
    Text::parse(content.unwrap_or_default()).effective_servers().into()
}

/// Keeps the file ours.
struct Keeper {
    system: ResolvConf,
    link: Link,
    scope: Scope,
    retakes: VecDeque<Instant>,
    /// What somebody else had written when we last looked.
    seen: Option<Before>,
}

impl Keeper {
    fn take(&self, before: Before) -> Result<Saved, TakeoverError> {
        let content = before.content.as_deref().unwrap_or_default();
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let ours = Text::parse(content).taken_over(self.link.server, &self.scope, &host);
        let mut saved = Saved::new(&self.system.files.resolv_conf, before, ours);
        saved.take(&self.system.files.state_dir)?;
        Ok(saved)
    }

    async fn keep(mut self, mut saved: Saved, hold: watch::Sender<Hold>) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = if saved.is_in_force() {
                self.seen = None;
                self.follow_target(&saved);
                Hold::Held
            } else {
                self.retake(&mut saved)
            };
            if *hold.borrow() != now {
                tracing::info!(hold = ?now, "resolv.conf");
                hold.send_replace(now);
            }
        }
    }

    /// The file behind a symbolic link goes on saying which servers the network has.
    fn follow_target(&self, saved: &Saved) {
        let target = saved.before.target(&self.system.files.resolv_conf);
        if let Some(Ok(Some(content))) = target.map(|target| read(&target)) {
            self.publish(servers(Some(&content)));
        }
    }

    /// Takes the file again once whoever changed it has finished.
    fn retake(&mut self, saved: &mut Saved) -> Hold {
        let Ok(found) = Before::read(&self.system.files.resolv_conf) else { return Hold::Disturbed };
        if self.seen.as_ref() != Some(&found) {
            self.seen = Some(found);
            return Hold::Disturbed;
        }
        self.publish(servers(found.content.as_deref()));
        if !may_retake(&mut self.retakes, Instant::now()) {
            saved.yielded();
            return Hold::Yielded;
        }
        match self.take(found) {
            Ok(taken) => {
                *saved = taken;
                Hold::Held
            }
            Err(error) => {
                tracing::warn!(%error, "resolv.conf not taken again");
                Hold::Disturbed
            }
        }
    }

    fn publish(&self, servers: Arc<[SocketAddr]>) {
        let own = servers.iter().any(|server| server.ip() == self.link.server);
        self.system.upstreams.send_if_modified(|known| {
            let news = !own && *known != servers;
            if news {
                *known = servers;
            }
            news
        });
    }
}

/// Counts a retake at `now` if it isn't one too many.
fn may_retake(retakes: &mut VecDeque<Instant>, now: Instant) -> bool {
    while retakes.front().is_some_and(|first| now.saturating_duration_since(*first) >= WINDOW) {
        retakes.pop_front();
    }
    let may = retakes.len() < MAX_RETAKES;
    if may {
        retakes.push_back(now);
    }
    may
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yields_to_who_insists() {
        let (mut retakes, start) = (VecDeque::new(), Instant::now());
        for second in 0..5 {
            assert!(may_retake(&mut retakes, start + Duration::from_secs(second)));
        }
        assert!(!may_retake(&mut retakes, start + Duration::from_secs(6)));
        assert!(may_retake(&mut retakes, start + Duration::from_secs(60)));
        assert!(!may_retake(&mut retakes, start + Duration::from_millis(60_500)));
    }
}
