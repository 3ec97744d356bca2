//! `tpd down`: give the laptop back.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use tpd_api::exit::ExitCode;

use super::OutputArgs;
use crate::daemon::guard;
use crate::daemon::lock::{self, LOCK};
use crate::failure::Failure;
use crate::local;
use crate::output::{self, Format};

/// The daemon removes its socket as its last act; it has answered by then.
const GONE_TIMEOUT: Duration = Duration::from_secs(3);

/// Disconnects, and puts routes and DNS back
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Down {
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    was_connected: bool,
    leftovers: Vec<String>,
}

impl Down {
    pub(super) fn format(&self) -> Format {
        self.output.output
    }

    pub(super) async fn run(&self) -> Result<ExitCode, Failure> {
        let answer = match local::down().await {
            Ok(Some(down)) => {
                gone().await;
                Answer { was_connected: true, leftovers: down.leftovers }
            }
            Ok(None) => Answer { was_connected: false, leftovers: recover().await },
            Err(failure) if failure.code == ExitCode::Failure && is_root() => kill(failure).await?,
            Err(failure) => return Err(failure),
        };
        match self.format() {
            Format::Json => output::json(&answer),
            Format::Human if answer.was_connected => say(&answer.leftovers),
            Format::Human => {
                output::text("not connected\n");
                answer.leftovers.iter().for_each(|leftover| output::note(leftover));
            }
        }
        Ok(ExitCode::Ok)
    }
}

/// What a person hears at the end of a connection.
pub(super) fn say(leftovers: &[String]) {
    output::text("disconnected\n");
    for leftover in leftovers {
        output::note(&format!("left behind: {leftover}"));
    }
}

/// Waits until the daemon is gone, so that the next `tpd up` finds its place free.
async fn gone() {
    let waited = async {
        while Path::new(tpd_api::local::SOCKET).exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = tokio::time::timeout(GONE_TIMEOUT, waited).await;
}

/// A daemon that does not answer is ended the hard way; its guard, or else we, put things back.
async fn kill(failure: Failure) -> Result<Answer, Failure> {
    lock::kill_holder(Path::new(LOCK))
        .map_err(|error| failure.because(format!("and it cannot be killed: {error}")))?;
    let mut leftovers = vec!["the daemon did not answer and was killed; its ClientSession goes when it has not been heard of for a while".to_owned()];
    leftovers.extend(recover().await);
    Ok(Answer { was_connected: true, leftovers })
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// No daemon runs; should one have been killed together with its guard, its traces are removed now.
async fn recover() -> Vec<String> {
    if is_root() { guard::recover().await } else { Vec::new() }
}
