//! Exit codes: one table, which the documentation and the tests read too.

use serde::{Deserialize, Serialize};

/// How a `tpd` command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[repr(u8)]
pub enum ExitCode {
    /// It did what was asked.
    Ok = 0,
    /// Something that this table does not name; the message tells.
    Failure = 1,
    /// The command line could not be understood.
    Usage = 2,
    /// Root is needed, or the daemon belongs to another user.
    Privilege = 3,
    /// The machine has no usable TUN device.
    NoTun = 4,
    /// No kubeconfig, an unreadable one, or an unknown context.
    Kubeconfig = 5,
    /// The API server does not answer.
    Unreachable = 6,
    /// The API server does not know these credentials (401), or a credential plugin failed.
    Unauthenticated = 7,
    /// The API server refuses the user a verb (403).
    Forbidden = 8,
    /// No manager is installed in the cluster.
    NotInstalled = 9,
    /// Manager and laptop speak no common protocol.
    Incompatible = 10,
    /// The cluster's networks overlap with the laptop's own.
    Overlap = 11,
    /// The system's resolver could not be taken over.
    Dns = 12,
    /// No daemon is running, or it is not connected.
    NotConnected = 13,
    /// It is connected to something else already.
    Busy = 14,
    /// Something did not happen in time.
    Timeout = 15,
    /// No path to the manager carried a handshake.
    NoPath = 16,
    /// Somebody else intercepts that traffic already.
    Conflict = 17,
    /// There is no such workload, port, or intercept.
    NotFound = 18,
    /// No pod of the workload has an agent, or none could be given one.
    NoAgent = 19,
    /// The intercept is there, but nothing answers at the local port; the app serves meanwhile.
    NotServed = 20,
}

impl ExitCode {
    /// Every code with its meaning, in order.
    pub const TABLE: [(Self, &'static str); 21] = [
        (Self::Ok, "it did what was asked"),
        (Self::Failure, "something this table does not name; the message tells"),
        (Self::Usage, "the command line could not be understood"),
        (Self::Privilege, "root is needed, or the daemon belongs to another user"),
        (Self::NoTun, "the machine has no usable TUN device"),
        (Self::Kubeconfig, "no kubeconfig, an unreadable one, or an unknown context"),
        (Self::Unreachable, "the API server does not answer"),
        (
            Self::Unauthenticated,
            "the API server does not know the credentials, or a credential plugin failed",
        ),
        (Self::Forbidden, "the API server refuses a verb; the RBAC to add is printed"),
        (Self::NotInstalled, "no manager is installed in the cluster"),
        (Self::Incompatible, "manager and laptop speak no common protocol"),
        (Self::Overlap, "the cluster's networks overlap with the laptop's own"),
        (Self::Dns, "the system's resolver could not be taken over"),
        (Self::NotConnected, "no daemon is running, or it is not connected"),
        (Self::Busy, "it is connected to something else already"),
        (Self::Timeout, "something did not happen in time"),
        (Self::NoPath, "no path to the manager carried a handshake"),
        (Self::Conflict, "somebody else intercepts that traffic already"),
        (Self::NotFound, "there is no such workload, port or intercept"),
        (Self::NoAgent, "no pod of the workload has an agent, or none could be given one"),
        (
            Self::NotServed,
            "the intercept is there, but nothing answers at the local port; the app serves meanwhile",
        ),
    ];
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::ExitCode;

    #[test]
    fn the_table_is_in_order_and_whole() {
        for (position, (code, meaning)) in ExitCode::TABLE.iter().enumerate() {
            assert_eq!(*code as usize, position);
            assert!(!meaning.is_empty());
        }
    }
}
