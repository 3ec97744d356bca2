//! Why a command did not do what was asked: what happened, its causes, what to do next, and the exit code.

use std::error::Error;
use std::fmt::{self, Display, Write as _};

use serde::{Deserialize, Serialize};
use tpd_api::exit::ExitCode;
use tpd_api::local::Problem;

/// The one error type of the command line and the daemon; it also travels from one to the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Failure {
    /// What the process exits with.
    pub(crate) code: ExitCode,
    /// What happened, naming the object.
    pub(crate) error: String,
    /// Why, the nearest cause first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) causes: Vec<String>,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) help: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: ExitCode, error: impl Into<String>) -> Self {
        Self { code, error: error.into(), causes: Vec::new(), help: None }
    }

    /// Adds a cause.
    pub(crate) fn because(mut self, cause: impl Display) -> Self {
        self.causes.push(cause.to_string());
        self
    }

    /// Adds an error and what caused it, leaving out what merely repeats the one before.
    pub(crate) fn caused_by(mut self, error: &(dyn Error + 'static)) -> Self {
        self.causes.extend(causes(error));
        self
    }

    /// Says what to do.
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// As people read it; every line ends with a newline.
    pub(crate) fn render(&self) -> String {
        let mut text = format!("error: {}\n", self.error);
        for cause in &self.causes {
            push_indented(&mut text, "cause: ", cause);
        }
        if let Some(help) = &self.help {
            push_indented(&mut text, "help: ", help);
        }
        text
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        Self {
            code: failure.code,
            message: failure.error,
            causes: failure.causes,
            help: failure.help.into_iter().collect(),
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self {
            code: problem.code,
            error: problem.message,
            causes: problem.causes,
            help: (!problem.help.is_empty()).then(|| problem.help.join("\n")),
        }
    }
}

/// An error and all that caused it, in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    causes(error).join(": ")
}

fn causes(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut causes: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        let text = cause.to_string();
        // Many errors print their source themselves.
        if !text.is_empty() && !causes.last().is_some_and(|last| last.contains(&text)) {
            causes.push(text);
        }
        next = cause.source();
    }
    causes
}

/// Lines after the first are indented as far as the first is, so that blocks such as YAML keep their shape.
fn push_indented(text: &mut String, label: &str, body: &str) {
    let mut lines = body.trim_end().lines();
    let _ = writeln!(text, "  {label}{}", lines.next().unwrap_or_default());
    for line in lines {
        let _ = writeln!(text, "    {line}");
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)?;
        for cause in &self.causes {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_travels_from_daemon_to_command_line_unchanged() {
        let failure = Failure::new(ExitCode::Conflict, "taken").because("by bob").help("add\na filter");
        assert_eq!(Failure::from(Problem::from(failure.clone())), failure);
        let plain = Failure::new(ExitCode::NotFound, "none");
        assert_eq!(Failure::from(Problem::from(plain.clone())), plain);
    }

    #[test]
    fn causes_are_listed_once_and_help_keeps_its_shape() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        let failure = Failure::new(ExitCode::Kubeconfig, "cannot read /x").caused_by(&io).help("rules:\n- a");
        assert_eq!(
            failure.render(),
            "error: cannot read /x\n  cause: no such file\n  help: rules:\n    - a\n"
        );
        assert_eq!(failure.to_string(), "cannot read /x: no such file");
    }
}
