//! The only place that writes to standard output and standard error.
//!
//! Much of what is written is other people's: names, header values, what programs answered. None of it commands the terminal.

use std::borrow::Cow;
use std::io::{self, Write as _};

use clap::ValueEnum;
use serde::Serialize;

use crate::failure::Failure;

/// How a reading command answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// Prints text. A reader that went away is no error: that is how `| head` works.
pub(crate) fn text(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(printable(text).as_bytes()).and_then(|()| out.flush());
}

/// Prints a value as indented JSON.
pub(crate) fn json(value: &impl Serialize) {
    let mut body = serde_json::to_string_pretty(value).expect("our own types have string keys");
    body.push('\n');
    text(&body);
}

/// Prints a line to standard error.
pub(crate) fn note(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", printable(line));
}

/// Prints a failure to standard error, as JSON where the command answers in JSON.
pub(crate) fn failure(failure: &Failure, format: Format) {
    let body = match format {
        Format::Human => failure.render(),
        Format::Json => serde_json::to_string(failure).expect("our own types have string keys") + "\n",
    };
    let _ = io::stderr().lock().write_all(printable(&body).as_bytes());
}

/// What is left of a text without control characters, of which only line ends and tabs mean anything here.
fn printable(text: &str) -> Cow<'_, str> {
    let is_command = |character: char| character.is_control() && !matches!(character, '\n' | '\t');
    if text.contains(is_command) { text.replace(is_command, "").into() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn no_text_commands_the_terminal() {
        let title = "web   x-dev=\u{1b}]0;owned\u{7}\u{1b}[2Jann\r\u{9b}1m\n\tnext: f\u{fc}r";
        assert_eq!(printable(title), "web   x-dev=]0;owned[2Jann1m\n\tnext: f\u{fc}r");
    }
}
