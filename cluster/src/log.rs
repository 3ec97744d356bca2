//! How both programs log: events with fields, on standard error.

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// Form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line, for collectors.
    Json,
    /// For people.
    Text,
}

/// Begins to log what `directives` let through.
pub fn start(directives: &str, format: LogFormat) {
    // boringtun reports expected idle events as errors, and kube what its callers report better.
    let filter = EnvFilter::new(format!("{directives},boringtun=off,kube_client::client::builder=off"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => log.json().flatten_event(true).init(),
        LogFormat::Text => log.with_ansi(false).init(),
    }
}
