//! What fits into the agent's memory. Beyond that the kernel would end it, and every connection with it.

use super::proxy;

/// What a connection costs, bytes: its two sockets in the kernel, and what is kept of it here. 10 KiB were measured, with 5,500
/// of them that wait.
const CONNECTION: usize = 12 << 10;

/// What is needed whatever is relayed, bytes: 12 MiB for the program, and what the overlay's connections may hold.
const RESERVED: usize = (12 << 20) + super::uplinks::TCP_MEMORY;

/// What is assumed where no limit is known, bytes: the pod is of those that have none, or one for all its containers.
const UNKNOWN: usize = 64 << 20;

/// Where the kernel has the limit of a container, as the container sees it (cgroup v2).
const LIMIT: &str = "/sys/fs/cgroup/memory.max";

/// Room for connections, and for what waits on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    bytes: usize,
}

impl Room {
    /// That of this container, which may have so much memory by its pod, bytes; or less, if the kernel says so.
    #[must_use]
    pub fn of_container(limit: Option<usize>) -> Self {
        let kernels = std::fs::read_to_string(LIMIT).ok().and_then(|text| text.trim().parse().ok());
        Self::new([limit, kernels].into_iter().flatten().min())
    }

    /// That of one that may have so much memory, bytes.
    #[must_use]
    pub fn new(limit: Option<usize>) -> Self {
        Self { bytes: limit.unwrap_or(UNKNOWN).saturating_sub(RESERVED) }
    }

    /// Whether nothing more fits: connections have to wait until one of the others ends.
    #[must_use]
    pub fn is_full(self) -> bool {
        taken(proxy::connections(), proxy::held()) >= self.bytes
    }

    /// Whether half of it is taken: the rest is for what comes within the 2 s that the redirect outlives its last heartbeat.
    #[must_use]
    pub fn is_crowded(self) -> bool {
        taken(proxy::connections(), proxy::held()) >= self.bytes / 2
    }
}

fn taken(connections: usize, waiting: usize) -> usize {
    connections * CONNECTION + waiting
}

#[cfg(test)]
mod tests {
    use super::{Room, taken};

    #[test]
    fn a_large_agent_has_room_for_many_connections_and_the_smallest_for_some() {
        let fit =
            |mebibytes: Option<usize>| Room::new(mebibytes.map(|limit| limit << 20)).bytes / taken(1, 0);
        assert_eq!([Some(32), Some(64), Some(256), None].map(fit), [341, 3072, 19_456, 3072]);
    }
}
