//! Waiting for something to become true, always with a deadline.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Between two looks. Short beside every deadline in the tests, and one look at a time.
const INTERVAL: Duration = Duration::from_millis(20);

/// Lets time pass.
#[allow(clippy::disallowed_methods, reason = "the tests have no event loop to block")]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Looks until `look` returns something, and says how long that took.
///
/// # Panics
/// With `what` and the newest reason if it has not happened within `limit`.
#[track_caller]
pub fn until<T, E: Display>(
    limit: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<T, E>,
) -> (T, Duration) {
    let began = Instant::now();
    loop {
        match look() {
            Ok(value) => return (value, began.elapsed()),
            Err(reason) if began.elapsed() >= limit => {
                panic!("{what}: not within {limit:?}; {reason}")
            }
            Err(_) => pause(INTERVAL),
        }
    }
}
