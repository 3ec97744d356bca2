//! `tpd daemon`: what `tpd up` leaves in the background. Its orders come as JSON on standard input.

use std::io::Read as _;
use std::path::Path;

use tokio_util::sync::CancellationToken;
use tpd_api::exit::ExitCode;
use tpd_api::local::LOG;

use crate::daemon::report::{Event, Reporter, send};
use crate::daemon::{self, Start, log};
use crate::failure::Failure;

/// Connections, DNS and the local API wait more than they work, so two threads are plenty; packets have their own.
const THREADS: usize = 2;

pub(super) fn run() -> Result<ExitCode, Failure> {
    // Out of the terminal's session: closing it ends nothing here.
    let _ = rustix::process::setsid();
    let result = orders().and_then(connect);
    match result {
        Ok(leftovers) => {
            for leftover in leftovers {
                tracing::warn!(leftover);
            }
            Ok(ExitCode::Ok)
        }
        Err(failure) => {
            tracing::error!(%failure, "ended");
            let code = failure.code;
            let _ = send(&Event::Failed { failure });
            Ok(code)
        }
    }
}

fn orders() -> Result<Start, Failure> {
    let mut text = Vec::new();
    let read = std::io::stdin().read_to_end(&mut text).map_err(serde_json::Error::io);
    read.and_then(|_| serde_json::from_slice(&text)).map_err(|error| {
        Failure::new(ExitCode::Usage, "tpd daemon is started by tpd up, which hands it its orders")
            .caused_by(&error)
    })
}

fn connect(start: Start) -> Result<Vec<String>, Failure> {
    log::start(Path::new(LOG), &start.invoker).map_err(|error| {
        Failure::new(ExitCode::Failure, format!("{LOG} cannot be written")).caused_by(&error)
    })?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build().map_err(
            |error| Failure::new(ExitCode::Failure, "the daemon cannot be set up").caused_by(&error),
        )?;
    let stop = CancellationToken::new();
    let reporter = Reporter::pipe(stop.clone());
    let result = runtime.block_on(daemon::run(start, reporter, stop));
    runtime.shutdown_background();
    result
}
