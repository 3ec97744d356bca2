//! The way to the API server: whose kubeconfig, which credentials, and what its answers mean.

pub(crate) mod cluster;
pub(crate) mod config;
pub(crate) mod credentials;
pub(crate) mod errors;
pub(crate) mod follow;
pub(crate) mod identity;
pub(crate) mod session;
pub(crate) mod warnings;
