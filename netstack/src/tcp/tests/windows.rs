//! Peers that don't read.

use super::*;

/// A run in which neither end reads, until both windows are closed.
fn closed(up: usize, down: usize) -> Run {
    let mut run = Run::new(path(MS), path(MS), up, down, true);
    // An agent is less patient than a laptop, which asks for no sign of life all the while.
    run.patience = Some(Duration::from_secs(900));
    (run.a.appetite, run.b.appetite) = (0, 0);
    pass(&mut run, Duration::from_secs(10));
    run
}

fn pass(run: &mut Run, time: Duration) {
    let end = run.now + time;
    while run.now < end {
        run.deliver();
        run.a.pump(run.now);
        run.b.pump(run.now);
        run.now += MS;
    }
}

#[test]
fn two_closed_windows_are_asked_now_and_then() {
    let mut run = closed(3 << 20, 3 << 20);
    let before = run.a.out.sent + run.b.out.sent;
    pass(&mut run, Duration::from_secs(60));
    let sent = run.a.out.sent + run.b.out.sent - before;
    assert!((8..100).contains(&sent), "{sent} packets in a minute");
    (run.a.appetite, run.b.appetite) = (usize::MAX, usize::MAX);
    run.run();
}

#[test]
fn who_does_not_read_for_long_is_not_given_up() {
    // Little enough that all of it is sent or waiting, and so is the end of it: the peer's own has been received.
    for up in [100_000, 3 << 20] {
        let mut run = closed(up, 0);
        assert_eq!(run.a.closed, up == 100_000);
        pass(&mut run, Duration::from_secs(300));
        assert!(!run.a.connection.as_ref().unwrap().is_dead(), "{up} bytes");
        run.b.appetite = usize::MAX;
        run.run();
    }
}
