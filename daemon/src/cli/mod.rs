//! The command line: one file per subcommand.

mod completions;
mod daemon;
mod describe;
mod down;
mod install;
mod intercept;
mod intercepts;
mod leave;
mod list;
mod logs;
mod status;
mod uninstall;
mod up;
mod version;

use std::future::Future;
use std::io::BufRead;
use std::path::PathBuf;
use std::process::ExitCode as ProcessCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use tpd_api::exit::ExitCode;

use crate::failure::Failure;
use crate::output::{self, Format};

pub(crate) use up::summary;

/// Puts this machine on the network of a Kubernetes cluster.
#[derive(Debug, Parser)]
#[command(name = "tpd", version, max_term_width = 100, after_help = exit_codes())]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Up),
    Down(down::Down),
    Status(status::Status),
    Intercept(Box<intercept::Intercept>),
    Leave(leave::Leave),
    List(list::List),
    Logs(logs::Logs),
    Version(version::Version),
    Install(install::Install),
    Uninstall(uninstall::Uninstall),
    Completions(completions::Completions),
    /// The background process of `tpd up`.
    #[command(hide = true)]
    Daemon,
    /// Puts things back when the daemon was killed.
    #[command(hide = true)]
    Guard,
}

/// Which cluster, for every command that talks to one.
#[derive(Clone, Debug, clap::Args)]
struct ClusterArgs {
    /// Context of the kubeconfig [default: its current one]
    #[arg(long)]
    context: Option<String>,
    /// Kubeconfig file [default: $KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Namespace of the manager
    #[arg(long, value_name = "NAMESPACE", default_value = tpd_api::MANAGER_NAMESPACE)]
    manager_namespace: String,
}

/// How a reading command answers.
#[derive(Clone, Copy, Debug, clap::Args)]
struct OutputArgs {
    /// How to answer
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Runs the command that the process was started with.
pub(crate) fn run() -> ProcessCode {
    let (result, format) = match Cli::parse().command {
        Command::Intercept(intercept) => return end(block_on(intercept.run()), intercept.format()),
        Command::Up(up) => (block_on(up.run()), Format::Human),
        Command::Down(down) => (block_on(down.run()), down.format()),
        Command::Status(status) => (block_on(status.run()), status.format()),
        Command::Leave(leave) => (block_on(leave.run()), leave.format()),
        Command::List(list) => (block_on(list.run()), list.format()),
        Command::Logs(logs) => (block_on(logs.run()), Format::Human),
        Command::Version(version) => (block_on(version.run()), version.format()),
        Command::Install(install) => (block_on(install.run()), Format::Human),
        Command::Uninstall(uninstall) => (block_on(uninstall.run()), Format::Human),
        Command::Completions(completions) => (Ok(completions.run(Cli::command())), Format::Human),
        Command::Daemon => (daemon::run(), Format::Human),
        Command::Guard => {
            crate::daemon::guard::run();
            (Ok(ExitCode::Ok), Format::Human)
        }
    };
    end(result, format)
}

/// Says what failed. Answers what the process ends with: a code of ours, or of the command that it ran.
fn end(result: Result<impl Into<ProcessCode>, Failure>, format: Format) -> ProcessCode {
    match result {
        Ok(code) => code.into(),
        Err(failure) => {
            output::failure(&failure, format);
            failure.code.into()
        }
    }
}

/// The name of a namespace, or of an Intercept.
fn label(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    // Longest label (RFC 1123).
    let good = (1..=63).contains(&text.len()) && text.bytes().all(plain);
    if good {
        Ok(text.to_owned())
    } else {
        Err("it has other characters than a-z, 0-9 and -, or too many".into())
    }
}

/// Whether the next line is a yes. An end without any is a no.
fn agrees(mut answers: impl BufRead) -> bool {
    let mut answer = String::new();
    // What cannot be read agrees to nothing.
    let _ = answers.read_line(&mut answer);
    matches!(&*answer.trim().to_ascii_lowercase(), "y" | "yes")
}

/// A command's runtime: what it does is wait, so one thread is plenty.
fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(ExitCode::Failure, "the process cannot be set up").caused_by(&error))?;
    let result = runtime.block_on(command);
    // A name lookup that hangs must not keep a command that has its answer.
    runtime.shutdown_background();
    result
}

fn exit_codes() -> String {
    let rows = ExitCode::TABLE.iter().map(|(code, meaning)| format!("  {:>2}  {meaning}\n", *code as u8));
    format!("Exit codes:\n{}", rows.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn nothing_but_a_yes_is_one() {
        for yes in ["y\n", "Y\n", "yes\n", " YES \r\n", "y"] {
            assert!(agrees(yes.as_bytes()), "{yes:?}");
        }
        for no in ["", "\n", "n\n", "no\ny\n", "yep\n"] {
            assert!(!agrees(no.as_bytes()), "{no:?}");
        }
    }

    #[test]
    fn help_lists_every_exit_code() {
        let help = Cli::command().render_help().to_string();
        assert!(help.contains("16  no path to the manager carried a handshake"), "{help}");
    }
}
