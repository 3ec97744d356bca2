//! What the agent is told: flags, or the environment that the webhook sets.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use tpd_api::agent::Entry;
use tpd_api::inject::{TOKEN_DIRECTORY, TOKEN_FILE};

use super::redirect::table::StandIn;
use crate::log::LogFormat;

/// Hands a pod's intercepted traffic to laptops.
#[derive(Clone, Debug, Parser)]
#[command(name = "tpd-agent", version)]
pub struct Command {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,

    /// What is logged: a level, or directives such as `info,tpd_netstack=debug`.
    #[arg(long, env = "TPD_LOG", default_value = "info", global = true)]
    pub log: String,

    /// How it is logged.
    #[arg(long, env = "TPD_LOG_FORMAT", default_value = "json", global = true)]
    pub log_format: LogFormat,
}

/// What the program is there for.
#[derive(Clone, Debug, Subcommand)]
pub enum Action {
    /// Runs the worker, and runs it again when it ends.
    Run(Probes),
    /// Sets up the redirect of this pod. Needs the capability NET_ADMIN, once.
    Redirect(Probes),
    /// Does the agent's work; `run` starts it.
    #[command(hide = true)]
    Worker(Box<Config>),
}

/// What the redirect needs to know, and whoever stands in for it.
#[derive(Clone, Debug, Args)]
pub struct Probes {
    /// Ports that stand in for probed ones, as STANDIN:PORT, separated by commas; none if it is empty.
    #[arg(long, env = "TPD_PROBES", default_value = "", value_parser = stand_ins)]
    pub probes: StandIns,
}

/// Every port that stands in for a probed one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StandIns(pub Vec<StandIn>);

/// What the worker needs to know.
#[derive(Clone, Debug, Args)]
pub struct Config {
    /// Where a first manager is found: address and port of the managers' Service.
    #[arg(long, env = "TPD_MANAGER")]
    pub manager: SocketAddr,

    /// Certificate of the managers' authority, PEM.
    #[arg(long, env = "TPD_CA")]
    pub ca: String,

    /// How traffic comes to this pod's agent, JSON.
    #[arg(long, env = "TPD_ENTRY", value_parser = entry)]
    pub entry: Entry,

    /// Names of the app's containers, in the order of the numbers in `TPD_APP_<number>_<name>`.
    #[arg(long, env = "TPD_CONTAINERS", value_delimiter = ',')]
    pub containers: Vec<String>,

    /// How much memory the container may have, bytes.
    #[arg(long, env = "TPD_MEMORY")]
    pub memory: Option<usize>,

    /// File with the token that tells the managers which pod this is.
    #[arg(long, env = "TPD_TOKEN", default_value_os_t = token())]
    pub token: PathBuf,
}

fn token() -> PathBuf {
    Path::new(TOKEN_DIRECTORY).join(TOKEN_FILE)
}

fn entry(text: &str) -> anyhow::Result<Entry> {
    serde_json::from_str(text).context("not an entry such as {\"type\":\"redirect\"}")
}

fn stand_ins(text: &str) -> anyhow::Result<StandIns> {
    text.split(',').filter(|pair| !pair.is_empty()).map(stand_in).collect::<Result<_, _>>().map(StandIns)
}

fn stand_in(pair: &str) -> anyhow::Result<StandIn> {
    let ports = pair.split_once(':').and_then(|(port, app)| Some((port.parse().ok()?, app.parse().ok()?)));
    let (port, app) = ports.context("not a pair of ports such as 19950:8080")?;
    Ok(StandIn { port, app })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use tpd_api::agent::Entry;

    use super::{Action, Command};
    use crate::agent::redirect::table::StandIn;

    fn parse(arguments: &[&str]) -> Result<Action, clap::Error> {
        Command::try_parse_from([&["tpd-agent"], arguments].concat()).map(|command| command.action)
    }

    #[test]
    fn the_agent_and_the_redirect_need_to_know_probes_alone() {
        let probes = |arguments: &[&str]| match parse(arguments) {
            Ok(Action::Run(probes) | Action::Redirect(probes)) => Some(probes.probes.0),
            _ => None,
        };
        for action in ["run", "redirect"] {
            let expected = vec![StandIn { port: 19_950, app: 80 }, StandIn { port: 19_951, app: 81 }];
            assert_eq!(probes(&[action, "--probes", "19950:80,19951:81"]), Some(expected));
            assert_eq!(probes(&[action]), Some(vec![]));
            assert_eq!(probes(&[action, "--probes", ""]), Some(vec![]));
            assert_eq!(probes(&[action, "--probes", "19950"]), None);
        }
    }

    #[test]
    fn the_worker_reads_what_the_webhook_writes() {
        let arguments = |entry| {
            parse(&[
                "worker",
                "--manager",
                "10.96.0.9:443",
                "--ca",
                "PEM",
                "--entry",
                entry,
                "--containers",
                "a,b",
            ])
        };
        let Ok(Action::Worker(config)) = arguments(r#"{"type":"redirect"}"#) else { panic!() };
        assert_eq!(config.entry, Entry::Redirect);
        assert_eq!(config.containers, ["a", "b"]);
        assert_eq!(config.token.to_str(), Some("/var/run/secrets/tpd.dev/token"));
        assert!(arguments("redirect").is_err());
    }
}
