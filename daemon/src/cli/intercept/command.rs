//! A command that runs for as long as the intercept does.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tpd_api::exit::ExitCode;

use crate::failure::Failure;
use crate::invoker::Invoker;

/// Interruptions that would end this process. They are the command's while it runs, and then it is left in good order.
#[derive(Debug)]
pub(super) struct Interruptions {
    interrupt: Signals,
    terminate: Signals,
    hangup: Signals,
}

impl Interruptions {
    /// From here on they are caught.
    pub(super) fn catch() -> Result<Self, Failure> {
        let catch = |kind| {
            signal(kind).map_err(|error| {
                Failure::new(ExitCode::Failure, "signals cannot be handled").caused_by(&error)
            })
        };
        Ok(Self {
            interrupt: catch(SignalKind::interrupt())?,
            terminate: catch(SignalKind::terminate())?,
            hangup: catch(SignalKind::hangup())?,
        })
    }

    /// Waits for one. `None` where the terminal has sent it to the command too.
    pub(super) async fn next(&mut self) -> Option<Signal> {
        tokio::select! {
            _ = self.interrupt.recv() => (!std::io::stdin().is_terminal()).then_some(Signal::INT),
            _ = self.terminate.recv() => Some(Signal::TERM),
            _ = self.hangup.recv() => Some(Signal::HUP),
        }
    }
}

/// Starts the command as the invoker, with the app's variables over its own.
pub(super) fn start(
    words: &[String],
    variables: &BTreeMap<String, String>,
    invoker: &Invoker,
) -> Result<Child, Failure> {
    let (program, arguments) =
        words.split_first().ok_or_else(|| Failure::new(ExitCode::Usage, "there is no command behind --"))?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(&invoker.environment).envs(variables);
    if invoker.is_under_root() {
        // As root, setting the uid also drops root's supplementary groups.
        command.uid(invoker.uid).gid(invoker.gid);
    }
    command.spawn().map_err(|error| {
        Failure::new(ExitCode::Failure, format!("{program} cannot be started")).caused_by(&error)
    })
}

/// Waits for the command to end, and passes on what it would not hear of otherwise.
pub(super) async fn finish(child: &mut Child, interruptions: &mut Interruptions) -> Result<u8, Failure> {
    loop {
        tokio::select! {
            ended = child.wait() => {
                return ended.map(code).map_err(|error| {
                    Failure::new(ExitCode::Failure, "the command cannot be waited for").caused_by(&error)
                });
            }
            signal = interruptions.next() => {
                let pid = child.id().and_then(|pid| Pid::from_raw(pid as i32));
                if let (Some(signal), Some(pid)) = (signal, pid) {
                    let _ = kill_process(pid, signal);
                }
            }
        }
    }
}

/// The code that a shell would give for it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn run(script: &str) -> u8 {
        let invoker = Invoker {
            uid: 65534,
            gid: 65534,
            environment: [
                ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
                ("WHO".to_owned(), "ann".to_owned()),
            ]
            .into(),
            directory: "/".into(),
        };
        let variables = [("WHO".to_owned(), "app".to_owned())].into();
        let words = ["sh", "-c", script].map(str::to_owned);
        let mut child = start(&words, &variables, &invoker).unwrap();
        finish(&mut child, &mut Interruptions::catch().unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn its_code_is_ours_and_it_has_the_apps_variables() {
        assert_eq!(run("exit 7").await, 7);
        assert_eq!(run("kill -9 $$").await, 137);
        assert_eq!(run("test \"$WHO\" = app").await, 0);
        if rustix::process::geteuid().is_root() {
            assert_eq!(run("test $(id -u) = 65534").await, 0);
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let invoker = Invoker { uid: 0, gid: 0, environment: BTreeMap::new(), directory: "/".into() };
        let _entered = runtime.enter();
        let failure = start(&["/nowhere/x".to_owned()], &BTreeMap::new(), &invoker).unwrap_err();
        assert_eq!(failure.error, "/nowhere/x cannot be started");
    }
}
