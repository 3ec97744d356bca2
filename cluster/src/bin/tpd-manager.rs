//! The manager: puts laptops on the cluster's network.

use std::process::ExitCode;

use clap::Parser;
use tpd_cluster::log;
use tpd_cluster::manager::{self, config::Config};
use tracing::error;

fn main() -> ExitCode {
    // Before anything asks for TLS; it fails only where a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = Config::parse();
    log::start(&config.log, config.log_format);
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error = format!("{error:#}"), "the manager ends");
            ExitCode::FAILURE
        }
    }
}

/// One thread for the control plane: the data plane has its own.
fn run(config: Config) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(manager::run(config))
}
