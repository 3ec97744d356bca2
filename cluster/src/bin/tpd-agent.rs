//! The agent: hands a pod's intercepted traffic to laptops.

use std::process::ExitCode;

use clap::Parser;
use tpd_cluster::agent::config::{Action, Command};
use tpd_cluster::agent::{redirect, supervisor, worker};
use tpd_cluster::log;
use tracing::error;

fn main() -> ExitCode {
    let command = Command::parse();
    log::start(&command.log, command.log_format);
    match run(command.action) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error = format!("{error:#}"), "the agent ends");
            ExitCode::FAILURE
        }
    }
}

/// One thread does everything.
fn run(action: Action) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match action {
        Action::Run(probes) => runtime.block_on(supervisor::run(probes.probes.0)),
        Action::Redirect(probes) => {
            runtime.block_on(redirect::run(&probes.probes.0));
            Ok(())
        }
        Action::Worker(config) => tokio::task::LocalSet::new().block_on(&runtime, worker::run(*config)),
    }
}
