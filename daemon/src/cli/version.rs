//! `tpd version`: of the command, and of the daemon and the manager where they run.

use serde::Serialize;
use tpd_api::exit::ExitCode;
use tpd_api::session::{PROTOCOL, ProtocolRange};

use super::OutputArgs;
use crate::failure::Failure;
use crate::local;
use crate::output::{self, Format};

/// Shows the versions of command, daemon and manager
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Version {
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    protocol: ProtocolRange,
    #[serde(skip_serializing_if = "Option::is_none")]
    daemon: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    manager: Option<String>,
}

impl Version {
    pub(super) fn format(&self) -> Format {
        self.output.output
    }

    pub(super) async fn run(&self) -> Result<ExitCode, Failure> {
        // A daemon of another user is none of our business here.
        let status = local::status().await.ok().flatten();
        let versions = Versions {
            client: env!("CARGO_PKG_VERSION"),
            protocol: PROTOCOL,
            daemon: status.as_ref().map(|status| status.version.clone()),
            manager: status.and_then(|status| status.manager).map(|manager| manager.version),
        };
        match self.format() {
            Format::Json => output::json(&versions),
            Format::Human => output::text(&versions.render()),
        }
        Ok(ExitCode::Ok)
    }
}

impl Versions {
    fn render(&self) -> String {
        let none = || "not connected".to_owned();
        format!(
            "client   {} (protocol {} to {})\ndaemon   {}\nmanager  {}\n",
            self.client,
            self.protocol.min,
            self.protocol.max,
            self.daemon.clone().unwrap_or_else(none),
            self.manager.clone().unwrap_or_else(none),
        )
    }
}
