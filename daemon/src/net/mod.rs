//! The laptop's own network: addresses and routes of the TUN, and what must stay out of it.

pub(crate) mod listener;
pub(crate) mod netlink;
pub(crate) mod network;
pub(crate) mod overlap;
mod way;

pub(crate) use netlink::Netlink;
