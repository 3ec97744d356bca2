//! The pod's readiness, as far as it is the agent's: a new pod serves nothing for itself before it has the intercept.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tpd_api::inject::READY_PORT;
use tracing::warn;

use super::listeners::bind;

/// How long a pod waits for a manager. Production never waits for tpd longer than a slow start of an app takes anyway.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it waits, once it is told of intercepts, for a way to the laptops.
const SETTLING: Duration = Duration::from_secs(2);

/// Pause after a failed call on the listening socket.
const PAUSE: Duration = Duration::from_millis(50);

/// Decides when the pod is ready; after that it is for good.
#[derive(Debug)]
pub struct Readiness {
    started: Instant,
    configured: Option<Instant>,
}

impl Readiness {
    /// Not yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { started: now, configured: None }
    }

    /// Whether it is ready, given whether a configuration is in force and whether each of its intercepts was acknowledged or
    /// tried.
    pub fn is_ready(&mut self, configured: bool, settled: bool, now: Instant) -> bool {
        if !configured {
            return now >= self.started + PATIENCE;
        }
        let since = *self.configured.get_or_insert(now);
        settled || now >= since + SETTLING
    }
}

/// Answers the kubelet, for ever.
pub async fn answer() {
    loop {
        match bind(READY_PORT) {
            Ok(listener) => loop {
                // To have connected is all that it wants.
                if listener.accept().await.is_err() {
                    sleep(PAUSE).await;
                }
            },
            Err(error) => warn!(port = READY_PORT, %error, "listen for the kubelet"),
        }
        sleep(PATIENCE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::Readiness;

    #[test]
    fn a_pod_waits_for_its_intercepts_but_not_for_ever() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut alone = Readiness::new(start);
        assert!(!alone.is_ready(false, true, at(4)));
        assert!(alone.is_ready(false, true, at(5)), "no manager answers");

        let mut told = Readiness::new(start);
        assert!(!told.is_ready(true, false, at(4)));
        assert!(!told.is_ready(true, false, at(5)));
        assert!(told.is_ready(true, true, at(5)));
        assert!(told.is_ready(true, false, at(6)), "a laptop that never answers");
    }
}
