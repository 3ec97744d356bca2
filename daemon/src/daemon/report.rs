//! What the daemon tells the `tpd up` that started it: a JSON object a line.

use std::io::{self, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tpd_api::local::Status;

use crate::failure::Failure;
use crate::output;
use crate::progress::Progress;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase")]
pub(crate) enum Event {
    /// What is being done now.
    Step {
        /// In words.
        text: String,
    },
    /// It is up and has proved itself.
    Connected {
        /// How it stands.
        status: Box<Status>,
    },
    /// It is not, and everything is as before.
    Failed {
        /// Why.
        failure: Failure,
    },
}

/// Where the events go until the first connection stands. Later ones are for the log alone.
#[derive(Debug)]
pub(crate) struct Reporter {
    sink: Sink,
    finished: AtomicBool,
}

#[derive(Debug)]
enum Sink {
    Pipe(CancellationToken),
    Person(Mutex<Progress>),
}

impl Reporter {
    /// To a `tpd up` that waits at the other end of standard output. When it goes away, so should the daemon: `stop`
    /// is cancelled.
    pub(crate) fn pipe(stop: CancellationToken) -> Self {
        Self { sink: Sink::Pipe(stop), finished: AtomicBool::new(false) }
    }

    /// To the person in front of a `tpd up --foreground`.
    pub(crate) fn person() -> Self {
        Self { sink: Sink::Person(Mutex::new(Progress::new())), finished: AtomicBool::new(false) }
    }

    /// Says what is being done now.
    pub(crate) fn step(&self, text: &str) {
        tracing::info!(step = text);
        if self.finished.load(Ordering::Relaxed) {
            return;
        }
        match &self.sink {
            Sink::Pipe(stop) => {
                if send(&Event::Step { text: text.to_owned() }).is_err() {
                    stop.cancel();
                }
            }
            Sink::Person(progress) => {
                if let Ok(mut progress) = progress.lock() {
                    progress.step(text);
                }
            }
        }
    }

    /// Says that it stands, and nothing ever after.
    pub(crate) fn connected(&self, status: Status) {
        if self.finished.swap(true, Ordering::Relaxed) {
            return;
        }
        match &self.sink {
            // A person who gave up waiting does not want the connection either.
            Sink::Pipe(stop) => {
                if send(&Event::Connected { status: Box::new(status) }).is_err() {
                    stop.cancel();
                }
            }
            Sink::Person(progress) => {
                if let Ok(mut progress) = progress.lock() {
                    progress.clear();
                }
                output::text(&crate::cli::summary(&status));
                output::note("press Ctrl-C to disconnect");
            }
        }
    }
}

/// Writes an event to standard output. An error says that nobody waits any more.
pub(crate) fn send(event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}
