//! The cluster's side of tpd: the manager, and the agents in pods. Each is a feature, so that the agent is built without what
//! the manager needs.

#[cfg(feature = "agent")]
pub mod agent;
pub mod log;
#[cfg(feature = "manager")]
pub mod manager;
pub mod process;
