//! Numbers that nobody can guess.

use rustix::rand::{GetRandomFlags, getrandom};

/// Identifier of a question (RFC 5452, 4.3).
pub(crate) fn random_id() -> u16 {
    u16::from_ne_bytes(random())
}

/// A number that no other machine picks.
pub(crate) fn nonce() -> u64 {
    u64::from_ne_bytes(random())
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // Up to 256 octets come whole and can't be interrupted once the kernel has its seed, which it has when a user is logged in.
    getrandom(&mut bytes, GetRandomFlags::empty()).expect("getrandom has existed since Linux 3.17");
    bytes
}
