//! The overlay data plane.
//!
//! IP packets between a laptop, a manager and agents travel in WireGuard over *paths*: UDP, or a stream
//! through the API server. One lane owns everything that a packet touches, so nothing is locked.

pub mod client;
pub mod control;
mod exit;
pub mod flow;
mod hub;
pub mod key;
mod lane;
mod overlay;
pub mod packet;
pub mod path;
pub mod peers;
pub mod selector;
pub mod server;
pub mod tcp;
pub mod tun;
pub mod tunnel;
pub mod uplink;
