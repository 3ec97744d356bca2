//! tpd from end to end: a laptop, a real Kubernetes, and what goes wrong between them.
//!
//! Root, the tests' packages (`tests/kubernetes/prerequisites.sh`), and what `make build images` makes are needed;
//! `make e2e` sees to all of it. The tests take turns on the laptops.

#![allow(clippy::print_stdout, reason = "figures that a person reads")]

mod agents;
mod capacity;
mod commands;
mod connect;
mod corners;
mod events;
mod fidelity;
mod injection;
mod install;
mod intercept;
mod mistakes;
mod names;
mod outages;
mod paths;
mod peer;
mod production;
mod records;
mod recovery;
mod refusals;
mod replacing;
mod resolved;
mod samples;
mod scaling;
mod security;
mod services;
mod sharing;
mod store;
mod sudo;
mod traffic;
