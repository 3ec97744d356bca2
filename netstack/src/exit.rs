//! A lane's way out, as its flow engine sees it.

use std::{
    cell::RefCell,
    num::NonZeroU16,
    task::{Context, Poll},
};

use crate::{flow::Outlet, overlay::Overlay, path::Via, peers::PeerId};

/// The overlay behind the engine's interface.
pub(crate) struct Exit {
    pub(crate) overlay: RefCell<Overlay>,
    /// Whether the peer is only a station: it passes packets on, and drops what it can't.
    relayed: bool,
}

impl Exit {
    /// The way to peers where packets end.
    pub(crate) fn direct(overlay: Overlay) -> Self {
        Self { overlay: RefCell::new(overlay), relayed: false }
    }

    /// The way to a manager that passes packets on.
    pub(crate) fn relayed(overlay: Overlay) -> Self {
        Self { overlay: RefCell::new(overlay), relayed: true }
    }
}

impl Outlet for Exit {
    fn poll_ready(&self, peer: PeerId, context: &mut Context<'_>) -> Poll<()> {
        self.overlay.borrow_mut().poll_ready(peer, context)
    }

    fn is_lossy(&self, peer: PeerId) -> bool {
        let mut overlay = self.overlay.borrow_mut();
        let path = overlay.peers.get_mut(peer).and_then(|peer| peer.path);
        self.relayed || !matches!(path, Some(Via::Stream(_)))
    }

    fn send(&self, peer: PeerId, packet: &mut [u8], gso: Option<NonZeroU16>) {
        self.overlay.borrow_mut().transmit(peer, packet, gso);
    }
}
