//! `tpd completions`: a script for the user's shell.

use clap_complete::Shell;
use tpd_api::exit::ExitCode;

use crate::output;

/// Prints a completion script for a shell
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(super) fn run(&self, mut command: clap::Command) -> ExitCode {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "tpd", &mut script);
        output::text(&String::from_utf8_lossy(&script));
        ExitCode::Ok
    }
}
