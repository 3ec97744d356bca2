//! Hands the redirect to the kernel.

use std::io;

use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with, sockopt,
};

use super::netlink::{Answer, answers};
use super::table::{self, StandIn, TABLE};

/// For the kernel's answers. Each is 36 octets, or repeats a refused message of at most a kilobyte.
const ANSWERS: usize = 64 << 10;

/// Most answers to wait for: it says something to each message once, and to the transaction.
const MAX_DATAGRAMS: usize = 256;

/// Why there is no redirect.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The process may not.
    #[error(
        "the kernel does not let this container change nftables: it needs the capability NET_ADMIN, which its security context \
         or a policy of the namespace takes away"
    )]
    Permission,
    /// The kernel is built without a part of it.
    #[error(
        "the node's kernel has no nftables with NAT for IPv4 and IPv6 ({object}: {cause}): load the modules nf_tables, \
         nft_chain_nat and nft_redir there"
    )]
    Unsupported {
        /// What the kernel refused.
        object: String,
        /// What it says.
        cause: io::Error,
    },
    /// It refuses for another reason.
    #[error("the kernel refuses {object}: {cause}")]
    Refused {
        /// What.
        object: String,
        /// What it says.
        cause: io::Error,
    },
    /// It cannot be spoken to.
    #[error("netlink: {0}")]
    Netlink(#[from] Errno),
    /// It said nothing to a message.
    #[error("the kernel did not acknowledge {0}")]
    Silent(String),
}

impl ApplyError {
    /// Whether it may go better the next time.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Permission | Self::Unsupported { .. } => false,
            Self::Netlink(error) => *error != Errno::PROTONOSUPPORT && *error != Errno::AFNOSUPPORT,
            Self::Refused { .. } | Self::Silent(_) => true,
        }
    }
}

/// Replaces the redirect of this network namespace by one with these stand-ins.
///
/// # Errors
/// Fails where the kernel refuses; then what was there before is there still.
pub fn apply(probes: &[StandIn]) -> Result<(), ApplyError> {
    let (transaction, names) = table::replacement(probes);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(NETFILTER))?;
    sockopt::set_socket_recv_buffer_size(&socket, ANSWERS * 2)?;
    // The kernel works a transaction off within the call, so what it has to say is there afterwards.
    sendto(&socket, &transaction, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;

    let mut awaited = names;
    let mut buffer = vec![0; ANSWERS];
    for _ in 0..MAX_DATAGRAMS {
        let Some((_, name)) = awaited.first() else { return Ok(()) };
        let length = match recv(&socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((length, _)) => length,
            Err(Errno::AGAIN) => return Err(ApplyError::Silent(name.clone())),
            Err(error) => return Err(error.into()),
        };
        for answer in answers(&buffer[..length]) {
            check(answer, &awaited)?;
            awaited.retain(|(sequence, _)| *sequence != answer.sequence);
        }
    }
    Err(ApplyError::Silent(format!("table {TABLE}")))
}

fn check(answer: Answer, names: &[(u32, String)]) -> Result<(), ApplyError> {
    if answer.error == 0 {
        return Ok(());
    }
    let name = names.iter().find(|(sequence, _)| *sequence == answer.sequence);
    let object = name.map_or_else(|| format!("the transaction of table {TABLE}"), |(_, name)| name.clone());
    let cause = io::Error::from_raw_os_error(answer.error);
    Err(match Errno::from_raw_os_error(answer.error) {
        Errno::PERM | Errno::ACCESS => ApplyError::Permission,
        Errno::NOENT | Errno::OPNOTSUPP | Errno::AFNOSUPPORT | Errno::PROTONOSUPPORT => {
            ApplyError::Unsupported { object, cause }
        }
        _ => ApplyError::Refused { object, cause },
    })
}

#[cfg(test)]
mod tests {
    use super::{Answer, ApplyError, check};

    #[test]
    fn refusals_name_their_object_and_what_to_do() {
        let names = [(4, "map tcp_live".to_owned())];
        let refused = |error| check(Answer { sequence: 4, error }, &names);
        assert!(refused(0).is_ok());
        assert!(matches!(refused(1), Err(ApplyError::Permission)));
        let text = refused(95).unwrap_err().to_string();
        assert!(text.contains("map tcp_live") && text.contains("nft_redir"), "{text}");
        let text = check(Answer { sequence: 9, error: 22 }, &names).unwrap_err().to_string();
        assert!(text.starts_with("the kernel refuses the transaction of table tpd: "), "{text}");
    }
}
