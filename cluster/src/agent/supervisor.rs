//! The first process of the agent's container: starts the worker, and starts it again whatever becomes of it, so that the pod
//! stays ready. A worker that is stopped counts as one that has ended.

use std::future::pending;
use std::io;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::redirect::table::StandIn;
use super::shelf::{Counter, Shelf};
use super::stand_ins;

/// Pause before a worker is started again, the first time: clients wait meanwhile.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// Longest pause: one start in so many seconds costs nobody anything.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A worker that lived for so long did not fail at its start.
const HEALTHY: Duration = Duration::from_secs(10);

/// A worker that is stopped for so long is killed: clients of the connections in it would wait, and come back when they are reset.
/// What is new goes past a worker 2 s after its last heartbeat. Half of that leaves the other half to the next one's start, so that
/// neither waits for longer.
const STANDSTILL: Duration = Duration::from_secs(1);

/// Runs workers until told to end, and leads probes to the app where the kernel does not.
///
/// # Errors
/// Fails where a signal cannot be waited for.
pub async fn run(probes: Vec<StandIn>) -> anyhow::Result<()> {
    let mut signals = Waiting::new().context("wait for signals")?;
    tokio::spawn(stand_ins::serve(probes));
    let (mut shelf, mut pause) = (Shelf::default(), FIRST_PAUSE);
    loop {
        let started = Instant::now();
        match start_worker(&shelf) {
            Ok((worker, counter)) => {
                let Some(status) = signals.watch_over(worker, &mut shelf, &counter).await else {
                    return Ok(());
                };
                warn!(?status, "the worker ended; it is started again");
            }
            // The node is out of something. To end for that would cost the pod its readiness, and clients the sockets on the shelf.
            Err(error) => {
                warn!(error = format!("{error:#}"), "the worker was not started; it is tried again")
            }
        }
        if started.elapsed() >= HEALTHY {
            pause = FIRST_PAUSE;
        }
        if signals.told_to_end_within(pause).await {
            return Ok(());
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The same program with another task; its log is ours. It is waited for along with every other child.
fn start_worker(shelf: &Shelf) -> anyhow::Result<(Pid, Counter)> {
    let (theirs, counter) = shelf.hand_over().context("join the worker")?;
    let program = std::env::current_exe().context("find this program")?;
    let child = Command::new(program).arg("worker").stdin(theirs).spawn().context("start the worker")?;
    let worker = Pid::from_raw(child.id().try_into()?).context("the worker has no number")?;
    Ok((worker, counter))
}

/// Signals that concern the agent.
struct Waiting {
    terminate: Signals,
    interrupt: Signals,
    child: Signals,
}

impl Waiting {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            child: signal(SignalKind::child())?,
        })
    }

    /// Waits for the worker's end, and brings it about where the worker stands still. Told to end, it tells the worker, and waits
    /// for as long as that takes (the kubelet has the last word); then there is no status.
    async fn watch_over(&mut self, worker: Pid, shelf: &mut Shelf, counter: &Counter) -> Option<WaitStatus> {
        let (mut asked, mut joined) = (false, true);
        let mut standstill = None;
        loop {
            match news_of(worker) {
                Some(status) if status.stopped() => standstill = Some(Instant::now() + STANDSTILL),
                Some(status) if status.continued() => standstill = None,
                Some(status) => {
                    if joined {
                        // Its last messages; they end, as it has. What cannot be read is lost with it.
                        let _ = shelf.serve(counter).await;
                    }
                    return (!asked).then_some(status);
                }
                None => {}
            }
            if standstill.is_some_and(|end| end <= Instant::now()) {
                standstill = None;
                warn!("the worker is stopped; it is killed");
                let _ = kill_process(worker, Signal::KILL);
            }
            tokio::select! {
                _ = self.child.recv() => continue,
                () = reached(standstill) => continue,
                _ = shelf.serve(counter), if joined => {
                    joined = false;
                    continue;
                }
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
            }
            info!("told to end");
            asked = true;
            // It fails only where the worker has just ended, which the next round finds.
            let _ = kill_process(worker, Signal::TERM);
        }
    }

    async fn told_to_end_within(&mut self, pause: Duration) -> bool {
        tokio::select! {
            () = sleep(pause) => false,
            _ = self.terminate.recv() => true,
            _ = self.interrupt.recv() => true,
        }
    }
}

/// Waits for a moment, if there is one.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}

/// Buries every child that has ended (the first process of a container inherits its orphans); the latest that became of the worker,
/// if anything did: it was stopped, continued, or has ended.
fn news_of(worker: Pid) -> Option<WaitStatus> {
    let mut news = None;
    while let Ok(Some((child, status))) =
        wait(WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED)
    {
        if child == worker {
            news = Some(status);
        }
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker of the supervisor's own making, whose connection to it is closed.
    #[expect(clippy::zombie_processes, reason = "the supervisor waits for it")]
    fn started(script: &str) -> (Pid, Counter) {
        let (_theirs, counter) = Shelf::default().hand_over().unwrap();
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        (Pid::from_raw(child.id() as i32).unwrap(), counter)
    }

    // All in one, since each supervisor buries whatever child the process has.
    #[tokio::test]
    async fn a_worker_that_stands_still_is_killed_unless_it_goes_on_within_a_second() {
        let mut signals = Waiting::new().unwrap();
        let mut shelf = Shelf::default();

        let (worker, counter) = started("exec sleep 60");
        let began = Instant::now();
        kill_process(worker, Signal::STOP).unwrap();
        let status = signals.watch_over(worker, &mut shelf, &counter).await.unwrap();
        assert_eq!(status.terminating_signal(), Some(Signal::KILL.as_raw()));
        assert!((STANDSTILL..2 * STANDSTILL).contains(&began.elapsed()), "{:?}", began.elapsed());

        let (worker, counter) = started("sleep 2.5; exit 7");
        let (status, ()) = tokio::join!(signals.watch_over(worker, &mut shelf, &counter), async {
            for signal in [Signal::STOP, Signal::CONT, Signal::STOP, Signal::CONT] {
                kill_process(worker, signal).unwrap();
                sleep(STANDSTILL * 2 / 5).await;
            }
        });
        assert_eq!(status.unwrap().exit_status(), Some(7), "it was never stopped for a second");

        let (worker, counter) = started("exec sleep 60");
        kill_process(worker, Signal::STOP).unwrap();
        signals.child.recv().await;
        kill_process(Pid::from_raw(std::process::id() as i32).unwrap(), Signal::TERM).unwrap();
        let ended = signals.watch_over(worker, &mut shelf, &counter).await;
        assert!(ended.is_none(), "one that is stopped holds up no end that was asked for");
    }
}
