//! What the end-to-end tests stand on: the local [`Cluster`], the [`Laptop`] that tpd runs on, and ways to watch a
//! network from outside.
//!
//! Everything here fails by panicking with a sentence that names what was found broken: it is test code, and a test has
//! nothing better to do with an error.

mod agent;
mod cluster;
mod intercepted;
mod laptop;
mod load;
mod local;
mod netns;
mod probe;
mod run;
mod snapshot;
mod terminal;
mod wait;
mod wan;
mod workload;

pub use agent::{Agent, Squeeze};
pub use cluster::Cluster;
pub use intercepted::Intercepted;
pub use laptop::{Connection, Laptop};
pub use load::{Failure, Load, Loading, Record, Source, Stamp, is_laptop, is_pod};
pub use local::{Counts, Local};
pub use netns::inside;
pub use probe::{Held, Outcome, Probe, attempt};
pub use run::{Run, Running, Script};
pub use snapshot::Snapshot;
pub use terminal::Terminal;
pub use wait::{pause, until};
pub use wan::{Block, DeafManagers};
pub use workload::Workload;
