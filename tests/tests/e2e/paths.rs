//! Which path carries the session, and that changing it breaks nothing.

use std::time::Duration;

use tpd_api::local::PathKind;
use tpd_tests::{Block, Held, Laptop, until};

use crate::samples::echo;

/// UDP is tried in the background and taken when it answers.
const TAKEN: Duration = Duration::from_secs(10);

/// The session is back on another path this soon after its own has died.
const BACK: Duration = Duration::from_secs(3);

#[test]
fn auto_takes_udp_where_it_answers() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let udp = laptop.until_over(TAKEN, PathKind::Udp);
    assert!(!udp.reason.is_empty() && udp.rtt_ms.is_some(), "{udp:?}");
    laptop.run("curl -sS --max-time 2 http://web").ok();
}

#[test]
fn auto_connects_where_udp_is_blocked_and_says_so() {
    let laptop = Laptop::take();
    let _block = Block::udp(laptop.cluster);
    let _connection = laptop.up("--namespace shop");
    laptop.run("curl -sS --max-time 2 http://web").ok();
    let paths = laptop.status().paths;
    let active = paths.iter().find(|path| path.active).expect("it is connected");
    assert_eq!(active.kind, PathKind::Proxy, "{paths:?}");
    assert!(paths.iter().any(|path| path.kind == PathKind::Udp && !path.active), "{paths:?}");
}

#[test]
fn a_path_that_dies_and_comes_back_resets_nothing() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    laptop.until_over(TAKEN, PathKind::Udp);
    let held = Held::start(&laptop, echo(&laptop, 7));
    let size: u64 = 3 << 30;
    let transfer =
        laptop.script(&format!("tpd-echo receive echo:19 {size}")).limit(Duration::from_secs(180)).start();
    let upload =
        laptop.script(&format!("tpd-echo send echo:9 {size}")).limit(Duration::from_secs(180)).start();

    let block = Block::udp(laptop.cluster);
    let (other, took) = until(Duration::from_secs(15), "another path carries the session", || {
        let paths = laptop.status().paths;
        paths
            .iter()
            .find(|path| path.active && path.kind != PathKind::Udp)
            .cloned()
            .ok_or_else(|| format!("{paths:?}"))
    });
    println!("UDP died; {:?} carries the session after {took:?}", other.kind);
    assert!(
        took <= BACK + Duration::from_millis(500),
        "another path carries the session only after {took:?}"
    );
    laptop.run("curl -sS --max-time 3 http://web").ok();

    drop(block);
    laptop.until_over(Duration::from_secs(60), PathKind::Udp);
    let gap = held.longest_gap();
    transfer.finish().ok();
    upload.finish().ok();
    println!("longest silence of a connection that lived through both: {gap:?}");
    assert!(gap <= BACK + Duration::from_secs(1), "a connection was silent for {gap:?}");
}

#[test]
fn a_path_that_was_asked_for_is_the_only_one() {
    let laptop = Laptop::take();
    let _connection = laptop.up_over(PathKind::Udp);
    let held = Held::start(&laptop, echo(&laptop, 7));
    {
        let _block = Block::udp(laptop.cluster);
        until(Duration::from_secs(30), "status says that no path carries the session", || {
            let status = laptop.status();
            if status.paths.iter().all(|path| !path.active) {
                Ok(())
            } else {
                Err(format!("{:?}", status.paths))
            }
        });
        assert!(laptop.status().problem.is_some(), "status does not say what is wrong");
        laptop.run("tpd status").says(&["udp"]);
    }
    laptop.until_over(Duration::from_secs(20), PathKind::Udp);
    let gap = held.longest_gap();
    println!("longest silence: {gap:?}");
}

#[test]
fn a_network_that_is_gone_for_a_while_resets_nothing() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let held = Held::start(&laptop, echo(&laptop, 7));
    {
        let _gone = Block::everything(laptop.cluster);
        tpd_tests::pause(Duration::from_secs(12));
    }
    until(Duration::from_secs(10), "it works again", || {
        let run = laptop.run("curl -sS --max-time 1 http://web");
        if run.code == Some(0) { Ok(()) } else { Err(run) }
    });
    println!("longest silence: {:?}", held.longest_gap());
}
