//! Requests that the manager's webhook judges. While no manager can be asked the API server refuses them, and nothing is decided.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kube::core::Status;
use tokio::time::{Instant, sleep};

use super::refusals;
use crate::failure::Failure;
use crate::kube::errors::{self, Call};
use crate::kube::session::CALL_TIMEOUT;

/// How long no manager may be there to be asked: a single one that is made anew is back within 5 s, and nodes have learned of it
/// a moment later. With what the last request takes it is half of the time that a command waits for its daemon.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pause between requests, which are refused at once.
const PAUSE: Duration = Duration::from_millis(250);

/// Makes a request, and makes it again for as long as the manager could not be asked about it.
pub(super) async fn judged<T, F>(call: Call<'_>, request: impl Fn() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, kube::Error>>,
{
    let end = Instant::now() + PATIENCE;
    loop {
        let undecided = AtomicBool::new(false);
        let watched = async {
            let answer = request().await;
            let is_undecided = matches!(&answer, Err(kube::Error::Api(status)) if is_undecided(status));
            undecided.store(is_undecided, Ordering::Relaxed);
            answer
        };
        match errors::judged(call, refusals::failure, CALL_TIMEOUT, watched).await {
            Err(_) if undecided.load(Ordering::Relaxed) && Instant::now() < end => sleep(PAUSE).await,
            answer => return answer,
        }
    }
}

/// Whether the API server refuses because it could not ask a webhook.
pub(super) fn is_undecided(status: &Status) -> bool {
    status.code >= 500 && status.message.contains("failed calling webhook")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const CALL: Call<'static> =
        Call { doing: "create Intercept shop/web-ann", server: "https://api:6443", namespace: "shop" };

    fn refusal(code: u16, message: &str) -> kube::Error {
        kube::Error::Api(Status::failure(message, "InternalError").with_code(code).boxed())
    }

    /// What comes of a request that is refused so often in that way, after how long, and how often it was made.
    async fn play(refusals: usize, code: u16, message: &str) -> (Result<(), Failure>, Duration, usize) {
        let (made, begun) = (Cell::new(0), Instant::now());
        let answer = judged(CALL, || {
            made.set(made.get() + 1);
            let is_refused = made.get() <= refusals;
            async move { if is_refused { Err(refusal(code, message)) } else { Ok(()) } }
        });
        (answer.await, begun.elapsed(), made.get())
    }

    const GONE: &str =
        r#"Internal error occurred: failed calling webhook "intercepts.tpd.dev": connection refused"#;

    #[tokio::test(start_paused = true)]
    async fn a_manager_that_comes_back_is_waited_for() {
        let (answer, took, made) = play(8, 500, GONE).await;
        assert!(answer.is_ok());
        assert_eq!((took, made), (8 * PAUSE, 9));
        let (answer, took, _) = play(usize::MAX, 500, GONE).await;
        assert!(answer.unwrap_err().help.unwrap().contains("the manager may be starting or down"));
        assert!((PATIENCE..PATIENCE + 2 * PAUSE).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_decided_is_not_asked_again() {
        for (code, message) in [(409, "taken"), (500, "etcdserver: request timed out"), (403, GONE)] {
            let (answer, took, made) = play(usize::MAX, code, message).await;
            assert!(answer.is_err());
            assert_eq!((took, made), (Duration::ZERO, 1), "{code} {message}");
        }
    }
}
