//! What an engine has seen.

/// Counts since the engine was made; the first three are the present numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// TCP connections, being made or open.
    pub tcp_flows: u64,
    /// UDP associations.
    pub udp_flows: u64,
    /// Ping associations.
    pub echo_flows: u64,

    /// TCP connections from peers that were carried on.
    pub accepted: u64,
    /// TCP connections made to peers.
    pub dialed: u64,
    /// TCP connections that the destination refused.
    pub refused: u64,
    /// Flows whose destination couldn't be reached.
    pub unreachable: u64,
    /// Flows that the policy prohibited.
    pub prohibited: u64,
    /// TCP connections that the destination never answered.
    pub timed_out: u64,
    /// TCP connections that ended by a reset from either side.
    pub reset: u64,
    /// Flows refused because a limit was reached.
    pub over_limit: u64,
    /// Flows that couldn't get a socket from the kernel.
    pub no_socket: u64,

    /// Packets that weren't whole or belonged to no protocol or flow.
    pub malformed: u64,
    /// Datagrams dropped because their destination's socket was full.
    pub datagrams_dropped: u64,
    /// Fragments dropped: overlapping, too many, or never completed.
    pub fragments_dropped: u64,
    /// Answers (resets, ICMP errors) not sent because too many were due.
    pub answers_dropped: u64,
    /// Pings not carried because the kernel grants no ping sockets.
    pub pings_denied: u64,
}
