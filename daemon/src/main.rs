//! `tpd`: a laptop on the network of a Kubernetes cluster. The command line, and the root daemon behind it.

mod cli;
mod daemon;
mod dns;
mod failure;
mod install;
mod intercept;
mod invoker;
mod kube;
mod local;
mod net;
mod output;
mod overlay;
mod path;
mod progress;

use std::process::ExitCode;

fn main() -> ExitCode {
    // kube takes the process's default provider, and panics where there is none.
    let _ = rustls::crypto::ring::default_provider().install_default();
    cli::run()
}
