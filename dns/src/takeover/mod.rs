//! Becoming the system's resolver, and no longer being it: whatever happens, the system gets back what it had.
//!
//! | the system resolves with | then | which ends with |
//! |---|---|---|
//! | systemd-resolved ([`resolved`]) | the cluster's domains are routed to the proxy, over D-Bus | the tunnel's interface |
//! | resolv.conf ([`resolv_conf`]) | the proxy is the only name server | [`Guard::revert`], [`watchdog`], or [`recover`] |
//!
//! A backend for another system is another file here and another variant of [`System`].

mod detect;
pub mod resolv_conf;
pub mod resolved;
pub mod watchdog;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use tokio::{sync::watch, task::JoinHandle};

use crate::{name::NameError, rules::Scope};
use resolv_conf::ResolvConf;
pub use resolv_conf::{Recovery, recover};
use resolved::Resolved;

/// Files that the takeover reads and writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// `/etc/resolv.conf`.
    pub resolv_conf: PathBuf,
    /// `/etc/nsswitch.conf`.
    pub nsswitch: PathBuf,
    /// Where the way back is kept. Has to survive a reboot: `/var/lib/tpd`.
    pub state_dir: PathBuf,
}

impl Files {
    /// Those of this system, with the way back in `state_dir`.
    pub fn system(state_dir: impl AsRef<Path>) -> Self {
        Self {
            resolv_conf: "/etc/resolv.conf".into(),
            nsswitch: "/etc/nsswitch.conf".into(),
            state_dir: state_dir.as_ref().to_owned(),
        }
    }
}

/// The tunnel, as the system sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index of the tunnel's interface. It has to be up and to have its addresses.
    pub index: u32,
    /// The proxy's address, port 53.
    pub server: IpAddr,
}

/// Who resolves names on this system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// systemd-resolved.
    SystemdResolved,
    /// The C library or whoever reads resolv.conf.
    ResolvConf,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SystemdResolved => "systemd-resolved",
            Self::ResolvConf => "resolv.conf",
        })
    }
}

/// Why the system's resolver can't be taken over, or not be given back.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// A file can't be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is protected against changes.
    #[error("cannot change {}: it is immutable; `sudo chattr -i {}` allows it", path.display(), path.display())]
    Immutable {
        /// The file.
        path: PathBuf,
    },
    /// systemd-resolved refused.
    #[error("systemd-resolved does not accept {call}")]
    Resolved {
        /// The D-Bus method.
        call: &'static str,
        /// What it said.
        source: zbus::Error,
    },
    /// A name of the cluster is no domain name.
    #[error("the cluster's DNS names cannot be used")]
    Name(#[from] NameError),
}

/// How a takeover holds up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// In force.
    #[default]
    Held,
    /// Somebody else has changed the settings; they will be taken again.
    Disturbed,
    /// Somebody else keeps changing the settings; they are left alone until that has stopped for a minute.
    Yielded,
}

/// The system's resolver before it is taken over.
#[derive(Debug)]
pub enum System {
    /// systemd-resolved is in use.
    Resolved(Resolved),
    /// Programs read resolv.conf.
    ResolvConf(ResolvConf),
}

impl System {
    /// Finds out who resolves names, after giving back what a crash may have left taken. Changes nothing else.
    pub async fn detect(files: Files) -> Result<Self, TakeoverError> {
        recover(&files.state_dir)?;
        match detect::resolved_in_use(&files).await {
            Some(connection) => Ok(Self::Resolved(Resolved::new(connection).await?)),
            None => Ok(Self::ResolvConf(ResolvConf::new(files)?)),
        }
    }

    /// Who resolves names.
    pub fn backend(&self) -> Backend {
        match self {
            Self::Resolved(_) => Backend::SystemdResolved,
            Self::ResolvConf(_) => Backend::ResolvConf,
        }
    }

    /// The name servers that the system uses without us, kept up to date while taken over. With systemd-resolved they serve only names
    /// under a namespace's domain that the cluster hasn't.
    pub fn upstreams(&self) -> watch::Receiver<Arc<[SocketAddr]>> {
        match self {
            Self::Resolved(resolved) => resolved.upstreams(),
            Self::ResolvConf(resolv_conf) => resolv_conf.upstreams(),
        }
    }

    /// Has the system ask the proxy, and sees to it that it stays so until [`Guard::revert`].
    pub async fn take(self, link: Link, scope: watch::Receiver<Arc<Scope>>) -> Result<Guard, TakeoverError> {
        match self {
            Self::Resolved(resolved) => resolved.take(link, scope).await,
            Self::ResolvConf(resolv_conf) => resolv_conf.take(link, &scope.borrow().clone()),
        }
    }
}

/// A system that asks the proxy. Dropping it leaves the settings as they are: [`Self::revert`] gives them back.
#[derive(Debug)]
pub struct Guard {
    way_back: WayBack,
    hold: watch::Receiver<Hold>,
    keeper: JoinHandle<()>,
}

#[derive(Debug)]
enum WayBack {
    Resolved(resolved::Session),
    ResolvConf(PathBuf),
}

impl Guard {
    fn new(way_back: WayBack, hold: watch::Receiver<Hold>, keeper: JoinHandle<()>) -> Self {
        Self { way_back, hold, keeper }
    }

    /// Who was taken over.
    pub fn backend(&self) -> Backend {
        match self.way_back {
            WayBack::Resolved(_) => Backend::SystemdResolved,
            WayBack::ResolvConf(_) => Backend::ResolvConf,
        }
    }

    /// Does somebody else interfere?
    pub fn hold(&self) -> watch::Receiver<Hold> {
        self.hold.clone()
    }

    /// Gives the system back what it had. What somebody else has changed meanwhile is theirs and stays.
    pub async fn revert(self) -> Result<Recovery, TakeoverError> {
        self.keeper.abort();
        // Ended, not just told to: nothing may take the settings again after this.
        let _ = self.keeper.await;
        match self.way_back {
            WayBack::Resolved(session) => session.revert().await.map(|()| Recovery::Restored),
            WayBack::ResolvConf(state_dir) => recover(&state_dir),
        }
    }
}
