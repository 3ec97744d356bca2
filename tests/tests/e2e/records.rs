//! The tests' own measure: what a record says of who answered, and when.

use std::time::Duration;

use tpd_tests::{Record, Stamp, is_laptop, is_pod};

/// Pods until 1.1 s, a failure and the laptop in the next moments, and the laptop alone from 1.2 s.
const RECORD: &str = r#"{ "requests": 8, "failed": 1,
    "failures": [{ "began": 1090, "ended": 1110, "kind": "reset", "error": "connection reset by peer" }],
    "unmarked": { "web-1": 2, "web-2": 1, "laptop": 3 }, "marked": { "laptop": 1 },
    "p50Micros": 400, "maxMicros": 1000,
    "timeline": [
        { "at": 1000, "served": { "web-1": 2 }, "failed": 0 },
        { "at": 1100, "served": { "web-2": 1, "laptop": 1 }, "failed": 0 },
        { "at": 1150, "served": {}, "failed": 1 },
        { "at": 1200, "served": { "laptop": 2 }, "failed": 0 },
        { "at": 1500, "served": { "laptop": 1 }, "failed": 0 }
    ] }"#;

fn record() -> Record {
    serde_json::from_str(RECORD).expect("a record")
}

fn stamp(millis: u64) -> Stamp {
    serde_json::from_str(&millis.to_string()).expect("a stamp")
}

#[test]
fn a_record_tells_when_the_last_other_answer_was() {
    let record = record();
    assert_eq!(record.settled_after(stamp(1000), is_laptop), Duration::from_millis(200));
    assert_eq!(record.settled_after(stamp(1200), is_laptop), Duration::ZERO);
    assert_eq!(record.settled_between(stamp(1000), stamp(1149), is_pod), Duration::ZERO);
    assert_eq!((record.by(is_laptop), record.by(is_pod)), (4, 3));
}

#[test]
#[should_panic(expected = "never settled")]
fn what_only_others_answered_has_not_settled() {
    let _ = record().settled_after(stamp(1150), is_pod);
}

#[test]
#[should_panic(expected = "1 requests failed")]
fn one_failure_is_one_too_many() {
    record().none_failed();
}

#[test]
#[should_panic(expected = "others answered too")]
fn one_answer_of_another_is_found() {
    record().all_by(is_laptop);
}
