//! Keeping one stream to the manager open: the first maker that answers, again and again.

use std::{
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval_at, sleep, timeout},
};

use super::{Client, idle};
use crate::{
    lane,
    path::{BoxStream, DialError, PathKind, StreamDialer, Via},
};

/// Head start of each maker over the next. The proxy answers within a round trip or two where it works; where the
/// API server cannot reach the pod it is silent for half a minute.
const HEAD_START: Duration = Duration::from_millis(1_000);

/// A dial that takes longer is given up. The API server's own limit is 30 s, which is no time to keep a person waiting.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// A dial without an answer for so long is made once more beside itself: where a manager restarts, the API server may be waiting for
/// the pod that has just gone while the next one is up. Someone far away has answered by then.
const AGAIN: Duration = Duration::from_secs(2);

/// Most dials of one maker at a time: the one that hangs, and the one that may answer in its place. More would only add to what the
/// API server has to do while it is slow.
const MOST_TRIES: usize = 2;

/// Pauses between handshakes on a new stream: a manager may learn of our key a moment after we learn of its pod.
const HANDSHAKE_PAUSES: [Duration; 6] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1_600),
];

/// Pauses between attempts, doubling. The least is one that a restarting manager's API server does not feel; the
/// most is what someone waits for without wondering.
const LEAST_PAUSE: Duration = Duration::from_millis(100);
const MOST_PAUSE: Duration = Duration::from_secs(2);

/// A stream that lasted this long was a good one: the next attempt is made at once.
const GOOD: Duration = Duration::from_secs(5);

impl Client {
    /// Opens a stream, carries it to its end, and opens the next.
    pub(super) async fn keep_stream(self: Rc<Self>) {
        let mut pause = LEAST_PAUSE;
        loop {
            let dialers: Vec<_> = self
                .dialers
                .borrow()
                .iter()
                .filter(|dialer| self.policy.allows(dialer.kind()))
                .map(Arc::clone)
                .collect();
            if dialers.is_empty() {
                tokio::select! {
                    () = idle() => {}
                    () = self.dialers_changed.notified() => {}
                }
                continue;
            }
            let opened = Instant::now();
            let problem = match first_to_answer(&dialers).await {
                Ok((dialer, stream)) => {
                    let problem = self.carry(&*dialer, stream).await;
                    if opened.elapsed() >= GOOD {
                        pause = LEAST_PAUSE;
                    }
                    format!("{}: {problem}", dialer.kind())
                }
                Err(problem) => problem,
            };
            tracing::info!(problem, "stream");
            self.selector.borrow_mut().stream_failed(problem);
            self.choose();
            self.publish();
            tokio::select! {
                () = sleep(pause) => {}
                () = self.dialers_changed.notified() => pause = LEAST_PAUSE,
            }
            pause = (pause * 2).min(MOST_PAUSE);
        }
    }

    /// Runs one stream until it ends; answers why it did.
    async fn carry(self: &Rc<Self>, dialer: &dyn StreamDialer, stream: BoxStream) -> String {
        // Cookies are bound to an address; a stream has none of its own that the manager would see.
        let id = self.exit.overlay.borrow_mut().open_stream(SocketAddr::from(([0, 0, 0, 0], 0)));
        self.stream.set(Some((id, dialer.kind())));
        let (reader, writer) = tokio::io::split(stream);
        let problem = tokio::select! {
            problem = lane::read_stream(Rc::clone(self), id, reader, &[]) => problem,
            problem = lane::write_stream(Rc::clone(self), id, writer) => problem,
            problem = self.shake_hands(dialer.kind(), id) => problem,
        };
        self.stream.set(None);
        self.exit.overlay.borrow_mut().close_stream(id);
        problem
    }

    /// Starts handshakes until the manager answers one; returns only if it never does.
    async fn shake_hands(&self, kind: PathKind, id: u64) -> String {
        for pause in HANDSHAKE_PAUSES {
            self.exit.overlay.borrow_mut().initiate(Via::Stream(id), self.manager);
            sleep(pause).await;
            if self.exit.overlay.borrow().is_authentic(id) {
                // Who answers here may be another manager than the one that UDP leads to: ask now, not at the next beat.
                self.ping(kind, Via::Stream(id));
                idle().await;
            }
        }
        "the manager does not answer the handshake: it may not know this session (yet)".into()
    }
}

/// The first stream that can be had. Each maker starts when its head start is over, or as soon as all before it
/// have failed.
async fn first_to_answer(
    dialers: &[Arc<dyn StreamDialer>],
) -> Result<(Arc<dyn StreamDialer>, BoxStream), String> {
    let (failures, _) = watch::channel(0);
    let mut attempts: FuturesUnordered<_> = dialers
        .iter()
        .enumerate()
        .map(|(place, dialer)| {
            let failures = &failures;
            async move {
                let mut failed = failures.subscribe();
                tokio::select! {
                    () = sleep(HEAD_START * place as u32) => {}
                    _ = failed.wait_for(|failed| *failed >= place) => {}
                }
                let result = dial(&**dialer).await;
                if result.is_err() {
                    failures.send_modify(|failed| *failed += 1);
                }
                result.map(|stream| (Arc::clone(dialer), stream)).map_err(|error| (dialer.kind(), error))
            }
        })
        .collect();
    let mut problems = Vec::new();
    while let Some(result) = attempts.next().await {
        match result {
            Ok(answered) => return Ok(answered),
            Err((kind, error)) => problems.push(format!("{kind}: {error}")),
        }
    }
    Err(problems.join("; "))
}

async fn dial(dialer: &dyn StreamDialer) -> Result<BoxStream, DialError> {
    let mut refusal = None;
    let dialled = timeout(DIAL_TIMEOUT, dial_again_and_again(dialer, &mut refusal)).await;
    dialled.unwrap_or_else(|_| {
        Err(refusal.unwrap_or_else(|| DialError {
            message: format!("no answer within {} s", DIAL_TIMEOUT.as_secs()),
            refused: false,
        }))
    })
}

/// The first stream of several tries; an error only if no other try may still have a better answer. Until then a definite one is
/// left in `refusal`.
async fn dial_again_and_again(
    dialer: &dyn StreamDialer,
    refusal: &mut Option<DialError>,
) -> Result<BoxStream, DialError> {
    let mut tries = FuturesUnordered::from_iter([dialer.dial()]);
    let mut again = interval_at(tokio::time::Instant::now() + AGAIN, AGAIN);
    // One that was not made, because others were under way, is made up for once at most.
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            Some(result) = tries.next() => match result {
                Err(error) if !tries.is_empty() => {
                    if error.refused {
                        *refusal = Some(error);
                    }
                }
                result => return result,
            },
            _ = again.tick(), if tries.len() < MOST_TRIES => tries.push(dialer.dial()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Mutex, time::Duration};

    use futures::future::{BoxFuture, FutureExt as _};
    use tokio::time::{Instant, sleep};

    use super::{AGAIN, DIAL_TIMEOUT, dial};
    use crate::path::{BoxStream, DialError, PathKind, StreamDialer};

    /// What becomes of one dial after another: how long it takes, and whether there is a stream.
    struct Dialer(Mutex<Vec<(Duration, bool)>>);

    impl StreamDialer for Dialer {
        fn kind(&self) -> PathKind {
            PathKind::Proxy
        }

        fn target(&self) -> String {
            "tpd-manager-0".into()
        }

        fn dial(&self) -> BoxFuture<'_, Result<BoxStream, DialError>> {
            let mut rest = self.0.lock().unwrap();
            let (time, answers) = if rest.is_empty() { (Duration::MAX, false) } else { rest.remove(0) };
            async move {
                sleep(time).await;
                let error = DialError { message: "refused".into(), refused: true };
                answers.then(|| Box::new(tokio::io::duplex(1).0) as BoxStream).ok_or(error)
            }
            .boxed()
        }
    }

    impl Dialer {
        fn new(dials: &[(u64, bool)]) -> Self {
            let dials = dials.iter().map(|(millis, answers)| (Duration::from_millis(*millis), *answers));
            Self(Mutex::new(dials.collect()))
        }
    }

    async fn dialled(dials: &[(u64, bool)]) -> (bool, Duration) {
        let began = Instant::now();
        let result = dial(&Dialer::new(dials)).await;
        (result.is_ok(), began.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_dial_that_hangs_holds_up_no_other() {
        assert_eq!(dialled(&[(300, true)]).await, (true, Duration::from_millis(300)));
        assert_eq!(dialled(&[(300, false)]).await, (false, Duration::from_millis(300)));
        let second = AGAIN + Duration::from_millis(5);
        assert_eq!(dialled(&[(60_000, true), (5, true)]).await, (true, second));
        let third = 2 * AGAIN + Duration::from_millis(5);
        assert_eq!(
            dialled(&[(60_000, true), (5, false), (5, true)]).await,
            (true, third),
            "a refusal may be early"
        );
        assert_eq!(dialled(&[(2_500, true), (60_000, true)]).await, (true, Duration::from_millis(2_500)));
        assert_eq!(dialled(&[]).await, (false, DIAL_TIMEOUT));
    }

    #[tokio::test(start_paused = true)]
    async fn two_dials_are_under_way_at_most_and_none_is_caught_up_on() {
        let dialer = Dialer::new(&[(60_000, true); 5]);
        assert!(!dial(&dialer).await.err().unwrap().refused);
        assert_eq!(dialer.0.lock().unwrap().len(), 3, "the first and one more");

        // The second fails after nine seconds: one is overdue, and the next is not due in the second that is left.
        let dialer = Dialer::new(&[(60_000, true), (7_000, false), (5, false), (5, true), (5, true)]);
        assert!(dial(&dialer).await.err().unwrap().refused);
        assert_eq!(dialer.0.lock().unwrap().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_says_more_than_that_another_dial_hung() {
        let began = Instant::now();
        let error = dial(&Dialer::new(&[(60_000, true), (5, false)])).await.err().unwrap();
        assert_eq!((error.refused, error.message.as_str()), (true, "refused"));
        assert_eq!(began.elapsed(), DIAL_TIMEOUT, "it may have been early");
    }
}
