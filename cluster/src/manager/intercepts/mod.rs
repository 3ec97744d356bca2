//! Intercepts: who has which traffic, what agents and the hub are told for it, and what is said of it.

pub mod accept;
pub mod births;
pub mod configure;
pub mod controller;
pub mod departed;
pub mod events;
pub mod evict;
pub mod expire;
pub mod leavers;
pub mod linger;
pub mod objects;
pub mod ports;
pub mod question;
pub mod replace;
#[cfg(test)]
mod samples;
pub mod services;
pub mod sessions;
pub mod spread;
pub mod status;
pub mod strangers;
pub mod tally;
pub mod track;
pub mod watch;
pub mod world;
