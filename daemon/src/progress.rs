//! What is being done right now: a spinner on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// Shows one step at a time on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    spinner: Option<ProgressBar>,
    last: String,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let spinner = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(ProgressStyle::default_spinner());
            // Ten frames a second look alive and cost nothing.
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { spinner, last: String::new() }
    }

    /// Replaces the step that is shown.
    pub(crate) fn step(&mut self, step: &str) {
        if self.last == step {
            return;
        }
        step.clone_into(&mut self.last);
        match &self.spinner {
            Some(bar) => bar.set_message(step.to_owned()),
            None => output::note(step),
        }
    }

    /// Shows nothing any more.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.spinner.take() {
            bar.finish_and_clear();
        }
    }

    /// Leaves a line behind that stays.
    pub(crate) fn note(&self, line: &str) {
        match &self.spinner {
            Some(bar) => bar.suspend(|| output::note(line)),
            None => output::note(line),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
