//! What `tpd status` shows, gathered from whoever knows.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;
use tpd_api::local::{Manager, Phase, Request, Status, Traffic};
use tpd_netstack::client::Status as LaneStatus;

use crate::dns::Watch as DnsWatch;
use crate::intercept::Keeper;
use crate::overlay;

/// The daemon's state, for everyone in it to write to and for the API to read.
#[derive(Debug)]
pub(crate) struct Board {
    began: Instant,
    keeper: Arc<Keeper>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    status: Status,
    lane: Option<watch::Receiver<LaneStatus>>,
    dns: Option<DnsWatch>,
}

impl Board {
    pub(crate) fn new(request: Request, keeper: Arc<Keeper>) -> Self {
        let status = Status {
            phase: Phase::Connecting,
            problem: None,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: 0,
            request,
            user: None,
            session: None,
            ready_ms: None,
            manager: None,
            address: None,
            networks: Vec::new(),
            excluded: Vec::new(),
            tun: None,
            dns: None,
            paths: Vec::new(),
            handshake_seconds: None,
            traffic: Traffic::default(),
            intercepts: Vec::new(),
        };
        Self { began: Instant::now(), keeper, inner: Mutex::new(Inner { status, lane: None, dns: None }) }
    }

    /// Changes what is known.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock().status);
    }

    pub(crate) fn attach_lane(&self, lane: Option<watch::Receiver<LaneStatus>>) {
        self.lock().lane = lane;
    }

    pub(crate) fn attach_dns(&self, dns: Option<DnsWatch>) {
        self.lock().dns = dns;
    }

    /// Everything, as of now.
    pub(crate) fn status(&self) -> Status {
        let inner = self.lock();
        let mut status = inner.status.clone();
        status.uptime_seconds = self.began.elapsed().as_secs();
        status.intercepts = self.keeper.list();
        status.dns = inner.dns.as_ref().map(DnsWatch::describe);
        if let Some(lane) = &inner.lane {
            let lane = lane.borrow();
            (status.paths, status.traffic) = overlay::describe(&lane);
            status.handshake_seconds = lane.handshake_age.map(|age| age.as_secs());
            if let (Some(tun), false) = (&mut status.tun, lane.offload.is_empty()) {
                tun.offload.clone_from(&lane.offload);
            }
            if let Some(peer) = &lane.peer {
                status.manager = Some(Manager {
                    namespace: status.request.manager_namespace.clone(),
                    pod: peer.name.clone(),
                    version: peer.version.clone(),
                });
            }
        }
        status
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
