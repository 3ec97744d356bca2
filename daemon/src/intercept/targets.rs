//! Overlay ports, and what is behind each on this machine.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use tpd_api::local::LocalPort;

/// Overlay ports of intercepts: above what anything well known uses, below the ports that this machine's own connections come from
/// (32768 and up), and many more than there are intercepts, so that one that was just given up is not drawn again soon.
pub(crate) const OVERLAY_PORTS: RangeInclusive<u16> = 20_000..=29_999;

/// An overlay port for each of `ports`. Those that were there before keep theirs, so that agents see no change; the others are
/// drawn, since a port that can be guessed is one that somebody may wait at. `before` are ports with theirs, `taken` those of
/// other intercepts.
pub(crate) fn assign(
    ports: &[LocalPort],
    before: &[(LocalPort, u16)],
    taken: &BTreeSet<u16>,
    mut random: impl FnMut() -> u16,
) -> Vec<u16> {
    let mut taken: BTreeSet<u16> =
        taken.iter().chain(before.iter().map(|(_, overlay)| overlay)).copied().collect();
    let kept = |port: &LocalPort| {
        let same =
            before.iter().find(|(other, _)| other.port == port.port && other.protocol == port.protocol);
        same.map(|(_, overlay)| *overlay)
    };
    ports.iter().map(|port| kept(port).unwrap_or_else(|| draw(&mut taken, random()))).collect()
}

/// The first free port from a random one on.
fn draw(taken: &mut BTreeSet<u16>, random: u16) -> u16 {
    let count = OVERLAY_PORTS.end() - OVERLAY_PORTS.start() + 1;
    let from_there = (0..count).map(|step| OVERLAY_PORTS.start() + (random % count + step) % count);
    let free = from_there.into_iter().find(|port| !taken.contains(port));
    let free = free.expect("there are ten thousand ports, and at most a thousand are in use");
    taken.insert(free);
    free
}

/// A number that nobody can guess.
pub(crate) fn random() -> u16 {
    let mut bytes = [0; 2];
    // The kernel's generator fails only before it is seeded, early at boot; then a port is merely easier to guess.
    let _ = getrandom::fill(&mut bytes);
    u16::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::example;

    #[test]
    fn ports_that_were_there_keep_theirs() {
        let before = example("web", &["8080", "metrics"]).ports;
        let assigned = assign(&before, &[], &BTreeSet::new(), || 42);
        assert_eq!(assigned, [20_042, 20_043]);

        let known: Vec<_> = before.into_iter().zip(assigned).collect();
        let mut changed = example("web", &["metrics", "grpc", "8080"]).ports;
        changed[2].local = "127.0.0.1:1".parse().unwrap();
        assert_eq!(assign(&changed, &known, &BTreeSet::new(), || 42), [20_043, 20_044, 20_042]);
    }

    #[test]
    fn nothing_is_drawn_twice_or_from_elsewhere() {
        let taken = BTreeSet::from([29_999, 20_000]);
        let ports = example("web", &["a", "b"]).ports;
        assert_eq!(assign(&ports, &[], &taken, || 9_999), [20_001, 20_002]);
        for number in [0, 9_999, 10_000, u16::MAX] {
            let drawn = assign(&ports, &[], &taken, || number);
            assert!(drawn.iter().all(|port| OVERLAY_PORTS.contains(port) && !taken.contains(port)));
        }
    }
}
