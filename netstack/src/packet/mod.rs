//! IP packets as byte slices: reading, checksumming, cutting and joining them. Pure.

pub mod checksum;
pub mod coalesce;
pub mod fragment;
pub mod header;
pub mod icmp;
mod ip;
pub mod reset;
pub mod segment;
pub mod virtio;

pub use ip::{Fragment, IpHeader, protocol};

/// Longest IP packet without jumbo extensions, bytes (RFC 791; for IPv6 a payload of 65,535 less what a super-packet leaves room for).
pub const MAX: usize = 65_535;
