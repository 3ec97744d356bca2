//! The root daemon: one connection, kept for as long as nobody says otherwise.

pub(crate) mod api;
mod board;
mod follow;
pub(crate) mod guard;
mod intercepts;
pub(crate) mod live;
pub(crate) mod lock;
pub(crate) mod log;
mod prove;
pub(crate) mod report;
mod setup;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{fs, io};

use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tpd_api::exit::ExitCode;
use tpd_api::local::{Phase, Request, SOCKET};

use self::api::Api;
use self::board::Board;
use self::follow::End;
use self::guard::Guard;
use self::live::Live;
use self::lock::{LOCK, Lock};
use self::report::Reporter;
use self::setup::Setup;
use crate::failure::Failure;
use crate::intercept::{Keeper, STATE};
use crate::invoker::Invoker;
use crate::kube::cluster::Cluster;
use crate::kube::config;

/// First and longest pause before a lost connection is set up anew.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// A connection that lasted this long was sound: when it ends, the next one is made at once.
const STABLE: Duration = Duration::from_secs(2);

/// Time for the local API to send its last answer.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// What `tpd up` hands to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) request: Request,
    /// Kubeconfig files, absolute.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) invoker: Invoker,
    /// When `tpd up` was called, milliseconds since 1970.
    pub(crate) began_ms: u64,
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// Connects, and stays until it is told to stop. Answers what could not be undone.
pub(crate) async fn run(
    start: Start,
    reporter: Reporter,
    stop: CancellationToken,
) -> Result<Vec<String>, Failure> {
    let _lock = take_place()?;
    stop_on_signals(&stop).map_err(|error| broken("signals cannot be handled", &error))?;
    for leftover in guard::recover().await {
        tracing::warn!(leftover);
    }
    let guard = Guard::start().map_err(|error| broken("the guard process cannot be started", &error))?;
    let keeper = Keeper::new(STATE.into());
    let board = Arc::new(Board::new(start.request.clone(), Arc::clone(&keeper)));
    let owner = (start.invoker.uid, start.invoker.gid);
    let listener = api::listen(Path::new(SOCKET), owner).map_err(|error| broken(SOCKET, &error))?;
    let (report, undone) = watch::channel(None);
    let end = CancellationToken::new();
    let api = Api { board: Arc::clone(&board), keeper: Arc::clone(&keeper), stop: stop.clone(), undone };
    let served = tokio::spawn(api::serve(listener, api, end.clone()));

    let result = keep(&start, reporter, board, keeper, &stop).await;

    guard.dismiss().await;
    let leftovers = result.as_ref().map_or_else(|_| Vec::new(), Clone::clone);
    let _ = report.send(Some(leftovers));
    end.cancel();
    let _ = timeout(LAST_ANSWER, served).await;
    let _ = fs::remove_file(SOCKET);
    result
}

fn take_place() -> Result<Lock, Failure> {
    let directory = Path::new(LOCK).parent().expect("a constant path with a directory");
    let lock = log::public_directory(directory).and_then(|()| Lock::take(Path::new(LOCK)));
    lock.map_err(|error| broken("the daemon's directory cannot be used", &error))?.ok_or_else(|| {
        Failure::new(ExitCode::Busy, "another tpd daemon runs on this machine")
            .help("tpd status shows it; tpd down ends it")
    })
}

fn broken(what: &str, error: &io::Error) -> Failure {
    Failure::new(ExitCode::Failure, what).caused_by(error)
}

fn stop_on_signals(stop: &CancellationToken) -> io::Result<()> {
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let (mut signals, stop) = (signal(kind)?, stop.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                stop.cancel();
            }
        });
    }
    Ok(())
}

/// Connects and reconnects. The first failure is the caller's; later ones are tried again.
async fn keep(
    start: &Start,
    reporter: Reporter,
    board: Arc<Board>,
    keeper: Arc<Keeper>,
    stop: &CancellationToken,
) -> Result<Vec<String>, Failure> {
    let target = config::load_for(&start.invoker, &start.files, Some(&start.request.context)).await?;
    let setup = Setup {
        request: start.request.clone(),
        uid: start.invoker.uid,
        cluster: Arc::new(Cluster::new(target, &start.invoker)),
        board,
        keeper,
        reporter,
    };
    let (mut stood_once, mut pause) = (false, BACKOFF.0);
    loop {
        let mut live = Live::default();
        let attempt = tokio::select! {
            attempt = setup.connect(&mut live) => attempt,
            () = stop.cancelled() => Err(Failure::new(ExitCode::Failure, "it was told to stop")),
        };
        let end = match attempt {
            Ok(mut connection) => {
                stood_once = true;
                announce(&setup, start);
                let since = Instant::now();
                let end = follow::run(&setup, &mut live, &mut connection, stop).await;
                if since.elapsed() > STABLE {
                    pause = Duration::ZERO;
                }
                end
            }
            Err(failure) if !stood_once => {
                for leftover in live.undo(&setup.board).await {
                    tracing::warn!(leftover);
                }
                return Err(failure);
            }
            Err(failure) => End::Restart(failure.to_string()),
        };
        tracing::info!(?end, "undoing");
        // Traffic goes back to the apps while the laptop still answers. A connection that is set up anew keeps its intercepts.
        let mut leftovers = match end {
            End::Stop => setup.keeper.leave().await,
            End::Restart(_) => Vec::new(),
        };
        leftovers.extend(live.undo(&setup.board).await);
        let End::Restart(why) = end else { return Ok(leftovers) };
        setup.board.update(|board| {
            board.phase = Phase::Reconnecting;
            board.problem = Some(why);
        });
        tokio::select! {
            biased;
            () = stop.cancelled() => {
                leftovers.extend(setup.keeper.leave().await);
                return Ok(leftovers);
            }
            () = sleep(pause) => {}
        }
        pause = (pause * 2).clamp(BACKOFF.0, BACKOFF.1);
    }
}

fn announce(setup: &Setup, start: &Start) {
    setup.board.update(|board| {
        board.phase = Phase::Connected;
        board.problem = None;
        board.ready_ms.get_or_insert_with(|| now_ms().saturating_sub(start.began_ms));
    });
    let status = setup.board.status();
    tracing::info!(ready_ms = status.ready_ms, "connected");
    setup.reporter.connected(status);
}
