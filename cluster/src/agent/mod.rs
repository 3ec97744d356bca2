//! The agent: stands beside an app in its pod and hands intercepted traffic to laptops.
//!
//! One thread, within the memory that it is told of (`room`). `worker` holds it together: what `control` hears from managers is merged (`merge`), and `duty` has it
//! carried out, by `listeners`, `heartbeat`s, the `proxy` and `laptop`. `supervisor` keeps a worker running, `shelf` its sockets, and `redirect` is what
//! the init container does. Where the kernel has none of that, `stand_ins` lead the kubelet's probes to the app.

pub mod config;
pub mod control;
pub mod dns;
pub mod drain;
pub mod duty;
pub mod environment;
pub mod heartbeat;
pub mod laptop;
pub mod listeners;
pub mod merge;
pub mod parting;
pub mod policy;
pub mod probe;
pub mod proxy;
pub mod ready;
pub mod redirect;
pub mod report;
pub mod room;
pub mod shelf;
pub mod sockets;
pub mod stand_ins;
pub mod stragglers;
pub mod supervisor;
pub mod suspension;
pub mod uplinks;
pub mod worker;
