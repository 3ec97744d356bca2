//! Acknowledgements that only odd peers send.

use super::*;

const MSS: usize = 1000;
const MS: Duration = Duration::from_millis(1);

/// A sender that has sent `length` bytes at time zero.
fn sent(selective: bool, length: usize) -> Sender {
    let mut sender = Sender::new(u32::MAX, MSS, 10 * MSS, Duration::from_secs(20), &Budget::new(1 << 20));
    sender.meet(MSS, selective, 64 << 10);
    sender.measure(10 * MS, Duration::ZERO);
    let mut left = length;
    while left > 0 {
        let room = sender.vacant().len().min(left);
        sender.append(room);
        left -= room;
    }
    while flush(&mut sender, Duration::ZERO).is_some() {}
    assert_eq!(sender.next, length as u64);
    sender
}

fn flush(sender: &mut Sender, now: Duration) -> Option<Range<u64>> {
    let plan = sender.plan(now)?;
    sender.sent(&plan, now);
    Some(plan.range)
}

fn acknowledge(sender: &mut Sender, sequence: u32, blocks: &[(u32, u32)], is_pure: bool, now: Duration) {
    assert!(sender.acknowledge(sequence, blocks, 64 << 10, is_pure, now));
}

#[test]
fn what_was_acknowledged_selectively_and_thrown_away_is_sent_again() {
    let mut sender = sent(true, 3000);
    acknowledge(&mut sender, 0, &[(1000, 3000)], true, 10 * MS);
    sender.tick(30 * MS);
    assert_eq!(flush(&mut sender, 30 * MS), Some(0..1000));
    // Everything before it has arrived now, and yet it isn't acknowledged.
    acknowledge(&mut sender, 1000, &[], true, 40 * MS);
    assert_eq!(flush(&mut sender, 40 * MS), Some(1000..3000));
    acknowledge(&mut sender, 3000, &[], true, 50 * MS);
    assert!(!sender.is_busy() && sender.in_flight == 0);
}

#[test]
fn a_peer_that_acknowledges_every_other_byte_costs_no_more_than_one_that_does_not() {
    let mut sender = sent(true, 60_000);
    for start in (1..60_000).step_by(2) {
        acknowledge(&mut sender, 0, &[(start, start + 1)], true, 10 * MS);
    }
    assert!(sender.sacked.len() <= 1024 && sender.flying.len() <= 1024 + 60, "{}", sender.flying.len());
    acknowledge(&mut sender, 60_000, &[], true, 20 * MS);
    assert!(!sender.is_busy() && sender.in_flight == 0);
}

#[test]
fn a_probe_with_nothing_to_probe_does_not_stand_in_the_way_of_what_is_lost() {
    let mut sender = sent(true, 1000);
    sender.probe = true;
    sender.lose(0..1000);
    assert_eq!(flush(&mut sender, 20 * MS), Some(0..1000));
}

#[test]
fn the_third_duplicate_counts_once() {
    let mut sender = sent(false, 5000);
    (0..3).for_each(|_| acknowledge(&mut sender, 0, &[], true, 10 * MS));
    assert_eq!(flush(&mut sender, 10 * MS), Some(0..1000));
    // Data of the peer's own, which was on its way already, says the same.
    (0..3).for_each(|_| acknowledge(&mut sender, 0, &[], false, 11 * MS));
    assert_eq!(flush(&mut sender, 11 * MS), None);
}
